"""The gradient graph: parameters of neighbouring layers, joined where their gradients go together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.private_evaluation import private_evaluation

__all__ = ["EdgeWeight", "GradientGraph", "draw_graphs", "gradient_graph", "gradient_graphs_by_class"]

EdgeWeight = Literal["outer_product", "hessian"]
_Loss = Callable[[Tensor, Tensor], Tensor]

_NUMBERS_AT_ONCE = 2**23  # of a block between two layers
_MOST_EDGES = 10**7


@dataclass(frozen=True, eq=False)
class GradientGraph:
    """An undirected graph whose nodes are parameters; edges run between neighbouring layers.

    Attributes:
        shapes: layer by layer, from the input to the output, a parameter's name and its shape.
        sources: int64 [E], the edges' ends in the layer nearer to the input: places in the vector of all parameters, in
            the order of ``shapes``.
        targets: int64 [E], their ends in the next layer.
        weights: [E], signed, in units of loss^2 / weight^2 (outer product) or loss / weight^2 (Hessian).
    """

    shapes: dict[str, torch.Size]
    sources: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def size(self) -> int:
        """P, the number of nodes, most of them without an edge."""
        return sum(shape.numel() for shape in self.shapes.values())

    def matrix(self) -> Tensor:
        """The weighted adjacency matrix: sparse (COO), symmetric, [P, P]."""
        places = torch.stack([torch.cat([self.sources, self.targets]), torch.cat([self.targets, self.sources])])
        return torch.sparse_coo_tensor(places, self.weights.repeat(2), (self.size, self.size)).coalesce()

    def nodes(self, name: str) -> Tensor:
        """The places within a layer of the parameters that have an edge, ascending; ``unravel_index`` gives indices."""
        start = self._starts()[name]
        ends: Tensor = torch.cat([self.sources, self.targets]).unique()  # type: ignore[no-untyped-call]
        return ends[(ends >= start) & (ends < start + self.shapes[name].numel())] - start

    def draw(self, axes: Any = None, *, color: Any = None, title: str | None = None) -> Any:
        """Draw it: a column per layer, parameters from top to bottom in their order, stronger edges darker.

        Args:
            axes: matplotlib's, or None for new ones.
            color: of all edges; by default blue for positive weights and red for negative ones.
            title: of the axes.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is missing.
        """
        if axes is None:
            axes = optional_import("matplotlib.pyplot", "the picture of a gradient graph").subplots()[1]
        lines = optional_import("matplotlib.collections", "the picture of a gradient graph")
        colors = optional_import("matplotlib.colors", "the picture of a gradient graph")
        heights, columns = self._positions()
        ends = torch.stack([columns[self.sources], heights[self.sources], columns[self.targets], heights[self.targets]])
        strength = self.weights.abs() / self.weights.abs().max().clamp(min=torch.finfo(self.weights.dtype).tiny)
        shades = [
            colors.to_rgba(color or ("tab:blue" if weight > 0 else "tab:red"), 0.08 + 0.92 * share)
            for weight, share in zip(self.weights.tolist(), strength.tolist(), strict=True)
        ]
        axes.add_collection(lines.LineCollection(ends.T.reshape(-1, 2, 2).cpu().numpy(), colors=shades, linewidths=0.6))
        places = torch.cat([self.sources, self.targets]).unique()  # type: ignore[no-untyped-call]
        axes.scatter(columns[places].cpu(), heights[places].cpu(), s=5, color="black", linewidths=0, zorder=3)
        for column, shape in enumerate(self.shapes.values()):
            axes.plot([column, column], [0, 1], color="0.85", linewidth=1, zorder=0)
            size = " x ".join(map(str, shape))
            axes.annotate(size, (column, 1.02), ha="center", va="top", fontsize=7, annotation_clip=False)
        axes.set(xlim=(-0.15, len(self.shapes) - 0.85), ylim=(1.0, 0.0))
        axes.axis("off")
        if title is not None:
            axes.set_title(title, fontsize=9)
        return axes

    def _starts(self) -> dict[str, int]:
        starts, start = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = start
            start += shape.numel()
        return starts

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Of every parameter its height in [0, 1] and the number of its layer."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        heights = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in sizes])
        columns = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).double()
        return heights.to(self.sources.device), columns.to(self.sources.device)


def gradient_graph(
    model: nn.Module,
    data: Tensor,
    targets: Tensor,
    *,
    loss_fn: _Loss = nn.functional.cross_entropy,
    edges: int | float = 200,
    weights: EdgeWeight = "outer_product",
    parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
) -> GradientGraph:
    r"""The strongest edges between the parameters of neighbouring layers, for given samples.

        outer_product      w_km = 1/N \sum_i g_k(x_i) g_m(x_i)         a block of the metric, Eqs. (1), (2)
        hessian            w_km = d^2 loss / d theta_k d theta_m       of the mean loss

    for k in one layer and m in the next; of every pair of layers those of largest |w| are kept. Source: "GradNet", §2.1
    and Fig. 1, for one sample or for those of one class. The paper speaks of the Hessian and, just before, of the outer
    product that stands for it; both are offered, the second as the default since it costs one backward pass. A Hessian
    block costs one backward pass of a backward pass per parameter of the smaller layer.

    Args:
        model: evaluated in evaluation mode, and left as it was.
        data: samples [N, ...].
        targets: their labels.
        loss_fn: loss of a batch, a mean over its samples.
        edges: how many for every pair of layers; or, as a float in (0, 1], which share of all pairs of parameters.
        weights: what stands at an edge.
        parameters: a layer each: names, or a predicate of name and parameter; by default weights of two axes or more.
            Neighbours are those that follow one another in ``model.named_parameters()``.

    Returns:
        The graph; edges of weight zero are left out, so there may be fewer of them.

    Raises:
        ValueError: fewer than two layers; a number of edges out of range; as :class:`Jacobian` has it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> graph = gradient_graph(model, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), edges=10)
        >>> graph.shapes, graph.matrix().shape, graph.matrix()._nnz()
        ({'0.weight': torch.Size([8, 4]), '2.weight': torch.Size([3, 8])}, torch.Size([56, 56]), 20)
    """
    if weights not in get_args(EdgeWeight):
        raise ValueError(f"weights={weights!r}: must be 'outer_product' or 'hessian'.")
    chosen = (lambda _, p: p.dim() >= 2) if parameters is None else parameters
    jacobian = Jacobian(model, data, targets, of="loss", loss_fn=loss_fn, parameters=chosen)
    shapes = jacobian.vectors.shapes
    if len(shapes) < 2:
        raise ValueError(
            f"{len(shapes)} layers ({', '.join(shapes)}): edges need two or more. Name them in parameters=."
        )
    counts = [_count(edges, a.numel() * b.numel()) for a, b in _neighbours(shapes.values())]
    rows = jacobian.dense() if weights == "outer_product" else None
    sources, ends, values = [], [], []
    start = 0
    for (left, right), count in zip(_neighbours(shapes), counts, strict=True):
        if rows is not None:
            sizes = shapes[left].numel(), shapes[right].numel()
            blocks = _outer_blocks(rows[:, start : start + sizes[0]], rows[:, start + sizes[0] : start + sum(sizes)])
        else:
            blocks = _hessian_blocks(model, data, targets, loss_fn, left, right)
        k, m, w = _strongest(blocks, count)
        sources.append(k + start)
        start += shapes[left].numel()
        ends.append(m + start)
        values.append(w)
    return GradientGraph(dict(shapes), torch.cat(sources), torch.cat(ends), torch.cat(values))


def gradient_graphs_by_class(
    model: nn.Module, data: Tensor, targets: Tensor, **options: Any
) -> dict[int, GradientGraph]:
    """A graph for the samples of each class.

    Args:
        model: see :func:`gradient_graph`.
        data: samples [N, ...].
        targets: classes [N].
        **options: of :func:`gradient_graph`.

    Returns:
        class -> graph, for the classes that occur, ascending.
    """
    classes = sorted(set(targets.tolist()))
    return {c: gradient_graph(model, data[targets == c], targets[targets == c], **options) for c in classes}


def draw_graphs(graphs: Mapping[Any, GradientGraph], *, columns: int = 5, title: str | None = None) -> Any:
    """A picture with one graph beside the other, such as the paper's Fig. 1 with a panel for each class.

    Args:
        graphs: title of a panel -> graph.
        columns: panels in a row.
        title: of the whole.

    Returns:
        Matplotlib's figure; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: matplotlib is missing.
    """
    figures = optional_import("matplotlib.figure", "the picture of a gradient graph")
    columns = min(columns, len(graphs))
    num_rows = -(-len(graphs) // columns)
    figure = figures.Figure(figsize=(2.4 * columns, 2.6 * num_rows + 0.3), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).flat
    for panel, (name, graph) in zip(panels, graphs.items(), strict=False):
        graph.draw(panel, title=str(name))
    for panel in list(panels)[len(graphs) :]:
        panel.axis("off")
    if title is not None:
        figure.suptitle(title)
    return figure


def _neighbours(items: Iterable[Any]) -> list[tuple[Any, Any]]:
    return list(itertools.pairwise(items))


def _count(edges: int | float, pairs: int) -> int:
    is_share = isinstance(edges, float)
    if not (0.0 < edges <= 1.0 if is_share else edges >= 1):
        raise ValueError(f"edges={edges}: must be a number of at least 1, or as a float a share in (0, 1]; try 200.")
    count = min(pairs, math.ceil(edges * pairs) if is_share else int(edges))
    if count > _MOST_EDGES:
        raise ValueError(
            f"edges={edges} are {count:,} of {pairs:,} pairs of parameters: at most {_MOST_EDGES:,} between two layers"
            ". Take a smaller number."
        )
    return count


def _outer_blocks(left: Tensor, right: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The mean outer product [P_left, P_right] in blocks of rows, each with its first row's place."""
    at_once = max(1, _NUMBERS_AT_ONCE // right.shape[1])
    for start in range(0, left.shape[1], at_once):
        yield start, left[:, start : start + at_once].T @ right / len(left)


def _hessian_blocks(
    model: nn.Module, data: Tensor, targets: Tensor, loss_fn: _Loss, left: str, right: str
) -> Iterator[tuple[int, Tensor]]:
    """The same of the Hessian of the mean loss; where the left layer is the larger one, a single block of all rows."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    values |= {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return loss_fn(cast(Tensor, functional_call(model, {**values, left: first, right: second}, (data,))), targets)

    by_left = values[left].numel() <= values[right].numel()
    few, many = (left, right) if by_left else (right, left)
    with private_evaluation(model):
        # Gradient by the smaller layer, as a function of the larger one; its rows are pulled back.
        gradient = grad(loss, 0 if by_left else 1)
        _, pull, *_ = vjp(
            (lambda w: gradient(values[left], w)) if by_left else (lambda w: gradient(w, values[right])), values[many]
        )
        unit = torch.eye(values[few].numel(), dtype=values[few].dtype, device=values[few].device)
        at_once = max(1, _NUMBERS_AT_ONCE // values[many].numel())
        rows = torch.cat(
            [
                vmap(lambda u: pull(u.view_as(values[few]))[0])(part).flatten(1).detach()
                for part in torch.split(unit, at_once)
            ]
        )
    yield 0, rows if by_left else rows.T


def _strongest(blocks: Iterable[tuple[int, Tensor]], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the entries of largest size, none of them zero, strongest first."""
    places, values, width = None, None, 0
    for start, block in blocks:
        flat, width = block.reshape(-1), block.shape[1]
        top = flat.abs().topk(min(count, len(flat))).indices
        found, where = flat[top], top + start * width
        if places is not None and values is not None:
            found, where = torch.cat([values, found]), torch.cat([places, where])
        keep = found.abs().topk(min(count, len(found))).indices
        places, values = where[keep], found[keep]
    assert places is not None
    assert values is not None
    places, values = places[values != 0], values[values != 0]
    return places // width, places % width, values
