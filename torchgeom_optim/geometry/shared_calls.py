"""Layers that are called once for all samples of a batch: tables of positions, whose rows are added to every sample.

The gradient at such a call's output is a sum over samples. At the sum x + p of what the samples have (x, [N, T, d]) and
what they share (p, [T, d] or [1, T, d]) it is not yet summed: there row n is sample n's, as if it had called the layer
itself. Only sums are known, and only where x is made of calls whose axis 0 has been found to be the samples.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch.autograd.graph import Node

__all__ = ["is_added_to_samples"]

_SUM = "AddBackward0"


def is_added_to_samples(total: Node, shared: Node, shape: torch.Size, num_samples: int, calls: Container[Node]) -> bool:
    """Whether a node adds what all samples share to what each of them has, and so is as wide as all of them.

    Args:
        total: a node of autograd's graph.
        shared: the node below it that made what is shared.
        shape: of that.
        num_samples: N.
        calls: the nodes of calls that have the samples along axis 0.

    Returns:
        False in doubt.
    """
    if type(total).__name__ != _SUM:
        return False
    below = [node for node, _ in total.next_functions]
    if below.count(shared) != 1 or (below[1] is shared and total._saved_alpha != 1):  # type: ignore[attr-defined]
        return False
    wide, row = _shape(total), shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
    return wide == (num_samples, *row) and _has_samples_first(below[1 - below.index(shared)], wide, calls)


def _has_samples_first(node: Node | None, shape: tuple[int, ...], calls: Container[Node]) -> bool:
    if node is None or _shape(node) != shape:
        return False
    if node in calls:
        return True
    return type(node).__name__ == _SUM and any(_has_samples_first(n, shape, calls) for n, _ in node.next_functions)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)  # of what the operation returned  # type: ignore[attr-defined]
