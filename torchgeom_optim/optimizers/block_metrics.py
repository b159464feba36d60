"""From what a step sees of some parameters to G^-1 on them: running averages, and the metrics made of these.

A state is not touched before every metric of a step is known to be one, so that a step can be refused as a whole: what
may be refused is done first, and what is to be remembered is put aside; after that averages are taken in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchgeom_optim.geometry.matrix_metric import (
    ExactMetric,
    KroneckerMetric,
    cholesky_product,
    kronecker_product,
    relative_split,
)
from torchgeom_optim.geometry.metric import (
    Block,
    BlockValues,
    DiagonalMetric,
    IdentityMetric,
    LayerMetric,
    LayerVector,
    QuasiDiagonalMetric,
    WhiteningMetric,
)
from torchgeom_optim.geometry.moments import Moments, running_moments
from torchgeom_optim.geometry.reparametrization import guarded_second_moment, precision
from torchgeom_optim.geometry.sample_moments import SampleMoments, mean_dual_norm_sq
from torchgeom_optim.geometry.unit_trust import spread_floor
from torchgeom_optim.optimizers.layer_factors import CapturedProduct, Pooled, averaged
from torchgeom_optim.optimizers.layers import AffineLayer
from torchgeom_optim.optimizers.metric_grid import OF_INPUTS, Metric, without_layer
from torchgeom_optim.optimizers.parts import Part

__all__ = ["Piece", "Solved", "shapes_of_statistics", "solver"]

# So many weights at a time that the handful of tensors made of them stays in the cache.
_CACHED_NUMBERS = 2**18


class Piece(NamedTuple):
    """Some of the units of a layer.

    Attributes:
        units: which.
        gradient: g of their parameters.
        direction: G^-1 g.
    """

    units: slice
    gradient: LayerVector
    direction: LayerVector


@dataclass(frozen=True)
class Solved:
    """G^-1 of some parameters at this step.

    Attributes:
        gradient: of these parameters.
        solve: g -> G^-1 g; linear.
        metric_of: G of some of the units alone; None where it couples them.
        direction: G^-1 of the gradient, where it is known already.
        sample_norms: the average over samples of g_n^T G^-1 g_n in every block; None where it is not known.
    """

    gradient: LayerVector
    solve: Callable[[LayerVector], LayerVector]
    metric_of: Callable[[slice], LayerMetric] | None = None
    direction: LayerVector | None = None
    sample_norms: Callable[[Block], BlockValues] | None = None

    def whole(self) -> Solved:
        """The same with its direction, to be looked at more than once."""
        (piece,) = self.pieces(may_split=False)
        return replace(self, metric_of=None, direction=piece.direction)

    def pieces(self, *, may_split: bool) -> Iterator[Piece]:
        """The direction, of all units or of a few at a time.

        Args:
            may_split: whether a few are enough. On the CPU of large layers there are then so many that what is computed
                for them stays in the cache, and takes next to no memory.

        Yields:
            Until all units have been there: which ones, their gradients g, and G^-1 g; g itself if G = 1.
        """
        g, numbers = self.gradient, self.gradient.weight.numel()
        if self.metric_of is None or not may_split or numbers <= _CACHED_NUMBERS or g.weight.device.type != "cpu":
            yield Piece(slice(None), g, self.solve(g) if self.direction is None else self.direction)
            return
        step = max(len(g.weight) * _CACHED_NUMBERS // numbers, 1)
        for start in range(0, len(g.weight), step):
            units = slice(start, start + step)
            some = g.units(units)
            yield Piece(units, some, self.metric_of(units).solve_once(some))


def solver(
    part: Part,
    metric: Metric,
    factors: Pooled,
    *,
    invert: bool = False,
    product: CapturedProduct | None = None,
    with_samples: bool = False,
) -> Callable[[], Solved]:
    """How G u = g is solved, with this step's batch in G.

    Args:
        part: its ``new`` state is added to.
        metric: of the optimizer; a part without a layer may get a simpler one.
        factors: of this step's calls, from :func:`~torchgeom_optim.optimizers.layer_factors.pooled_factors`; empty if
            nothing was looked at.
        invert: whether factors are to be inverted anew, even if an inverse is known.
        product: that the gradient is known to be.
        with_samples: whether the samples' norms are wanted.

    Returns:
        To be called once the step is certain to be taken: it refuses nothing, and takes averages in place.

    Raises:
        RuntimeError: the layer's inputs are not known.
        NotPositiveDefiniteError: from a matrix that could not be inverted.
    """
    if part.layer is None:
        metric, with_samples = without_layer(metric), False
    if metric in ("kronecker", "kronecker_diagonal"):
        return _kronecker(part, factors, invert, product, with_samples)
    if metric == "exact":
        return _exact(part, factors, invert, with_samples)
    moments = _sample_moments(part, factors) if with_samples or metric.startswith("fisher") else None
    whitening = _whitening(part, scale_free=metric == "scale_free_whitening") if metric in OF_INPUTS else None

    def complete() -> Solved:
        if metric == "identity":
            metric_of: Callable[[slice], LayerMetric] = _identity
        else:
            metric_of = _diagonal(part, metric, moments) if whitening is None else whitening.of_units
        norms = None
        if moments is not None and with_samples:
            norms = partial(mean_dual_norm_sq, metric_of(slice(None)), moments)
        splits = whitening is None or whitening.groups == 1
        return Solved(
            part.gradient,
            lambda g: metric_of(slice(None)).solve_once(g),
            metric_of if splits else None,
            sample_norms=norms,
        )

    return complete


def _identity(units: slice) -> IdentityMetric:
    return IdentityMetric()


def _sample_moments(part: Part, factors: Pooled) -> SampleMoments:
    """Running averages of the samples' squared gradients, and of their products with the bias gradient."""
    has_bias = part.layer is not None and part.layer.bias is not None
    names = ["weight", *(["row"] if len(factors) > 2 else []), *(["bias"] if has_bias else [])]
    past, decay = part.past[0], part.group["decay"]
    found = list[Tensor | None]()
    for name, key in (("weight", "sample_sq"), ("row", "sample_row"), ("bias", "sample_bias_sq")):
        if factors and name in names:
            part.new[0][key] = averaged(factors[names.index(name)], past.get(key), decay)
        found.append(part.new[0].get(key, past.get(key)))
    weight, row, bias = found
    if weight is None:
        raise _unknown_inputs()
    return SampleMoments(weight) if part.bias is None else SampleMoments(weight, row, bias)


def _diagonal(part: Part, metric: str, moments: SampleMoments | None) -> Callable[[slice], LayerMetric]:
    weight, bias = part.gradient
    damping, decay = part.group["damping"], part.group["decay"]
    row: Tensor | None = None
    if metric.startswith("fisher"):
        assert moments is not None
        weight_sq, row, bias_sq = moments
    else:
        weight_sq = part.average_product(0, "grad_sq", weight, weight, decay)
        bias_sq = None if bias is None else part.average_product(1, "grad_sq", bias, bias, decay)
        if metric == "quasi_diagonal" and bias is not None:
            beside = bias.view(-1, *[1] * (weight.dim() - 1))
            row = part.average_product(0, "bias_row", weight, beside, decay)
    # A metric that is zero to rounding: the gradient is too, and there is no step in the place of 0 / 0.
    if not metric.endswith("quasi_diagonal") or bias_sq is None or row is None:
        squares = LayerVector(weight_sq, bias_sq)
        floor = DiagonalMetric.floor(squares, damping, math.inf)
        return lambda units: DiagonalMetric.raised(squares.units(units), floor, math.inf)
    known, of_biases = LayerVector(weight_sq, bias_sq), row
    floors = QuasiDiagonalMetric.floors(weight_sq, bias_sq, damping, math.inf)

    def metric_of(units: slice) -> LayerMetric:
        some = known.units(units)
        assert some.bias is not None
        return QuasiDiagonalMetric.raised(some.weight, of_biases[units], some.bias, floors, math.inf)

    return metric_of


def _or_one(damping: Tensor, factor: Tensor) -> Tensor:
    """Damping; where a factor, and so its diagonal, is zero or cannot be inverted in its precision, 1 in its place."""
    on_diagonal = torch.diagonal(factor, dim1=-2, dim2=-1) if factor.dim() > 2 else factor
    numbers = torch.finfo(factor.dtype)
    return torch.where((on_diagonal < numbers.tiny / numbers.eps).all(-1), 1.0, damping)


def _whitening(part: Part, *, scale_free: bool) -> WhiteningMetric:
    layer, state, past = part.layer, part.past[0], None
    assert layer is not None
    if "input_mean" in state:
        past = Moments(0, state["input_mean"], state["input_variance"])
    batch = layer.batch_moments() if layer.calls else past
    if batch is None:
        raise _unknown_inputs()
    if past is not None and past.mean.dtype != batch.mean.dtype:  # the model was put into another precision
        past = Moments(0, past.mean.to(batch.mean.dtype), past.variance.to(batch.mean.dtype))
    running = running_moments(past or batch, batch, part.group["decay"])
    is_centred = part.bias is not None
    q = guarded_second_moment(*(m if is_centred else m.about_zero() for m in (running, batch)))
    scale = precision(q, q.mean() * part.group["damping"])
    part.new[0].update(input_mean=running.mean, input_variance=running.variance)
    of_outputs: Tensor | float = 1.0
    if scale_free:
        spread_sq = layer.output_spread_sq() if layer.calls else state.get("spread_sq")
        if spread_sq is None:
            raise _unknown_inputs()
        part.new[0]["spread_sq"] = spread_sq
        spread_sq = spread_sq.nan_to_num(nan=0.0, posinf=0.0)  # of outputs that overflow it says nothing
        floor = spread_floor(spread_sq.mean(), q.mean(), part.group["damping"])
        of_outputs = spread_sq + floor.nan_to_num_(nan=0.0, posinf=0.0)
    return WhiteningMetric(running.mean if is_centred else None, scale, of_outputs, layer.groups)


def _averages(part: Part, factors: Pooled, keys: tuple[str, ...]) -> list[Tensor]:
    past = part.past[0]
    if not factors:
        if keys[0] not in past:
            raise _unknown_inputs()
        return [past[key] for key in keys]
    for key, terms in zip(keys, factors, strict=True):
        part.new[0][key] = averaged(terms, past.get(key), part.group["decay"])
    return [part.new[0][key] for key in keys]


def _kronecker(
    part: Part, factors: Pooled, invert: bool, product: CapturedProduct | None, with_samples: bool
) -> Callable[[], Solved]:
    a, b = _averages(part, factors, ("input_factor", "output_factor"))
    if part.layer is not None and part.layer.bias is not None and part.bias is None:
        a = a[:, :-1, :-1]  # the bias is frozen for now: G's part for the weight alone
    left, right = part.past[0].get("output_inverse"), part.past[0].get("input_inverse")
    if invert or left is None or right is None or right.shape != a.shape:
        split = relative_split(a, b, part.group["damping"])
        metric = KroneckerMetric.factorise(a, b, _or_one(split[0], a), _or_one(split[1], b))
        metric.require_positive_definite()  # waits for the device, once per inversion
        left, right = metric.output_inverse, metric.input_inverse
        part.new[0].update(input_inverse=right, output_inverse=left)
        if with_samples:
            part.new[0]["dimension"] = metric.effective_dimension(a, b)
    dimension: Tensor | None = part.new[0].get("dimension", part.past[0].get("dimension"))
    norms = None if dimension is None or not with_samples else partial(_in_blocks, dimension)

    def complete() -> Solved:
        direction = None
        if product is not None and product.is_cheaper(left, right):
            direction = product.between(left[0], right[0], part.gradient)
        solve = lambda g: kronecker_product(left, g, right)  # noqa: E731
        return Solved(part.gradient, solve, direction=direction, sample_norms=norms)

    return complete


def _in_blocks(dimension: Tensor, block: Block) -> BlockValues:
    """Of units ([m]) or of a layer ([]), as those of units or layers."""
    return (dimension if block == "unit" else dimension.sum(),)


def _exact(part: Part, factors: Pooled, invert: bool, with_samples: bool) -> Callable[[], Solved]:
    (fisher,) = _averages(part, factors, ("fisher",))
    if part.layer is not None and part.layer.bias is not None and part.bias is None:
        num_weights = part.gradient.weight[0].numel()
        rows = torch.arange(fisher.shape[-1], device=fisher.device).view(-1, num_weights + 1)
        kept = rows[:, :-1].reshape(-1)
        fisher = fisher[:, kept][:, :, kept]
    cholesky: Tensor | None = part.past[0].get("fisher_cholesky")
    if invert or cholesky is None or cholesky.shape != fisher.shape:
        damping = torch.diagonal(fisher, dim1=-2, dim2=-1).mean(-1) * part.group["damping"]
        metric = ExactMetric.factorise(fisher, _or_one(damping, fisher))
        metric.require_positive_definite()
        part.new[0]["fisher_cholesky"] = cholesky = metric.cholesky
        if with_samples:
            part.new[0]["dimension"] = metric.effective_dimension(fisher)
    known = cholesky
    dimension: Tensor | None = part.new[0].get("dimension", part.past[0].get("dimension"))
    norms = None if dimension is None or not with_samples else partial(_in_blocks, dimension)
    return lambda: Solved(part.gradient, lambda g: cholesky_product(known, g), sample_norms=norms)


def shapes_of_statistics(p: Tensor, layer: AffineLayer | None, metric: str, block: str) -> dict[str, tuple[int, ...]]:
    """What a parameter's state may look like, to tell that of another model.

    Args:
        p: the parameter.
        layer: whose weight it is, if it is one.
        metric: of the optimizer.
        block: of the optimizer.

    Returns:
        Shapes by the names of statistics, whether the state has these or not.
    """
    shape = tuple(torch.view_as_real(p).shape) if p.is_complex() else tuple(p.shape) or (1,)
    shape = shape[::-1] if layer is not None and layer.is_embedding else shape
    needs: dict[str, tuple[int, ...]] = dict.fromkeys(("grad_sq", "bias_row", "sample_sq", "sample_row"), shape)
    needs["norm_sq"] = {"weight": shape, "unit": shape[:1]}.get(block, ())
    if layer is not None:
        groups, m, q = layer.groups, layer.num_units // layer.groups, math.prod(shape[1:]) + (layer.bias is not None)
        needs |= {"sample_bias_sq": (layer.num_units,), "fisher": (1, layer.num_units * q, layer.num_units * q)}
        needs["input_factor"] = (1, q) if layer.is_embedding else (groups, q, q)
        needs["output_factor"] = (groups, m) if metric == "kronecker_diagonal" else (groups, m, m)
    return needs


def _unknown_inputs() -> RuntimeError:
    return RuntimeError(
        "a layer has a gradient, but what its inputs are like is not known; need a forward and a backward pass through "
        "it before its first step. If its weight is used without calling the layer, put it into a group with "
        "rule='sgd'. Nothing was changed."
    )
