"""Gradients of single samples' losses through the one graph of a batch, so that all samples saw the same random draws.

losses [N, ...]     the loss of sample i is losses[i]
a criterion's       the criterion of row i of what the model returned
a model's own       sum over i of row i of u, where l = f(u) is the model's loss and u what else it returned with the
                    samples along axis 0: sample i's share of the gradient is (df/du)_i du_i/dw
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_optim.geometry.per_sample import Batch

__all__ = ["sample_gradients"]

_Place = tuple[Node, int]  # in autograd's graph: a node, and which of its outputs


def sample_gradients(
    leaves: Sequence[Tensor],
    indices: Iterable[int],
    loss_fn: Callable[..., Tensor],
    batch: Batch,
    outputs: Any,
    losses: Tensor,
    scale: float,
) -> Iterator[tuple[Tensor, ...]]:
    """The gradients of some samples' losses, one backward pass for each; the graph is kept.

    Args:
        leaves: of the graph.
        indices: of the samples.
        loss_fn: of the outputs and the batch's targets; may return what the model has computed itself.
        batch: N samples.
        outputs: what the model returned for it.
        losses: what ``loss_fn`` returned for these.
        scale: what makes a scalar loss the sum of the samples' losses.

    Yields:
        One gradient for each leaf, zeros where the loss does not depend on it.

    Raises:
        RuntimeError: a model's own loss does not go through what it returns besides, row by row.
    """

    def gradients(of: Sequence[Tensor], seeds: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of, leaves, seeds, retain_graph=True, allow_unused=True, materialize_grads=True)

    if losses.dim() > 0:
        for i in indices:
            yield gradients([losses[i].sum()])
        return
    if not any(isinstance(x, Tensor) and x.dim() == 0 for x in tree_leaves(outputs)):
        for i in indices:
            one = batch.map(lambda x, i=i: x[i : i + 1])  # type: ignore[misc]
            yield gradients([one.loss(loss_fn, tree_map(lambda x, i=i: x[i : i + 1], outputs)).sum()])
        return
    passed = _passed_by(losses, outputs, leaves, batch.num_samples)
    seeds = torch.autograd.grad(losses, passed, torch.full_like(losses, scale), retain_graph=True)
    for i in indices:
        yield gradients([x[i] for x in passed], [seed[i] for seed in seeds])


def _passed_by(loss: Tensor, outputs: Any, leaves: Iterable[Tensor], num_samples: int) -> list[Tensor]:
    """What of the outputs the loss was computed from, having the samples along axis 0; raises if there is more."""
    by_sample = {
        _place(x): x
        for x in tree_leaves(outputs)
        if isinstance(x, Tensor) and x.requires_grad and x.dim() > 0 and len(x) == num_samples
    }
    own = {_place(leaf)[0] for leaf in leaves}
    found, others = _reached([_place(loss)], by_sample)
    deeper, _ = _reached([place for edge in found for place in _below(edge)], by_sample)
    if not found or own & {node for node, _ in others} or found & deeper:
        raise RuntimeError(
            "the model returns its loss as one number, and not (or not only) by way of other outputs that have the "
            f"{num_samples} samples along axis 0: single samples' losses cannot be told apart in a pass that draws "
            "random numbers; return the logits beside the loss, compute the loss by a criterion, or set the model to "
            "evaluation mode."
        )
    return [by_sample[place] for place in by_sample if place in found]


def _reached(start: Iterable[_Place], ends: Iterable[_Place]) -> tuple[set[_Place], set[_Place]]:
    """Which of the ends the graph leads to before any other end, and where else it goes."""
    ends = set(ends)
    found, seen, stack = set[_Place](), set[_Place](), list(start)
    while stack:
        place = stack.pop()
        if place in ends:
            found.add(place)
        elif place not in seen:
            seen.add(place)
            stack.extend(_below(place))
    return found, seen


def _below(place: _Place) -> list[_Place]:
    return [(node, number) for node, number in place[0].next_functions if node is not None]


def _place(x: Tensor) -> _Place:
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr
