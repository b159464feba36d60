r"""Nodes of autograd's graph behind which row i may be another sample than sample i.

A layer rule reads sample i's share off row i of the layer's input. Models that reverse their batch, sort it by length
and restore the order later, or pack sequences keep the shapes and break that. Which operations can do so is a list of
names; whether one did is read from what the node saved. In doubt the answer is yes: that costs time, but no exactness.

Not seen are rows mixed by arithmetic (a product with a permutation matrix), by a view of a transposed batch, or taken
out one by one, computed with and stacked in another order, as a recurrent layer does with steps.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch.autograd.graph import Node

__all__ = ["could_move_rows", "moves_rows"]

_BY_DIMENSION = (
    "Cat Flip Gather IndexAdd IndexCopy IndexReduce IndexSelect Kthvalue Roll Rot90 Scatter ScatterAdd ScatterReduce "
    "SelectScatter SliceScatter Slice Sort Stack Topk"
).split()
_BY_INDICES = ["Index", "IndexPut"]
_ALWAYS = "MaskedScatter MaskedSelect PackPaddedSequence PadPackedSequence Put Repeat Take".split()
_NAMES = frozenset(f"{name}Backward" for name in (*_BY_DIMENSION, *_BY_INDICES, *_ALWAYS))

_could_move: dict[type, bool] = {}  # one look per kind of node: the graph is walked in every pass


def could_move_rows(node: Node) -> bool:
    """Whether nodes of this kind can put rows elsewhere: a dictionary's look-up."""
    kind = type(node)
    known = _could_move.get(kind)
    if known is None:
        is_custom = issubclass(kind, torch.autograd.function.BackwardCFunction)
        if kind.__name__ == "CppFunction":  # all kinds that Python does not know share this type
            return "CppNode" in node.name()
        known = _could_move[kind] = is_custom or kind.__name__.rstrip("0123456789") in _NAMES
    return known


def moves_rows(node: Node, parameters: Container[int]) -> bool:
    """Whether the node, of a kind that :func:`could_move_rows`, may put rows elsewhere along axis 0.

    Args:
        node: a node of a graph that has not been freed.
        parameters: ids of the model's parameters: a look-up in a parameter moves no samples.

    Returns:
        False if it is known not to.
    """
    below = [n for n, _ in node.next_functions if n is not None]
    if below and all(id(getattr(n, "variable", None)) in parameters for n in below):
        return False
    name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
    shape = node._input_metadata[0].shape  # of what the operation returned  # type: ignore[attr-defined]
    if name in _BY_INDICES:
        before = getattr(node, "_saved_self_sym_sizes", shape)
        return _indices_move_rows(node._saved_indices, int(before[0]))  # type: ignore[attr-defined]
    if name == "Repeat":
        return bool(node._saved_repeats[0] != 1)  # type: ignore[attr-defined]
    if name not in _BY_DIMENSION or len(shape) == 0:
        return True
    dims = getattr(node, "_saved_dims", None)
    dims = (node._saved_dim,) if dims is None else dims  # type: ignore[attr-defined]
    # Negative ones are saved as unsigned numbers.
    on_rows = not dims or any(d % len(shape) == 0 if d < 2**63 else d - 2**64 == -len(shape) for d in dims)
    if on_rows and name == "Stack":
        # Rows taken out and put together again. A recurrent layer stacks its steps too, but computed ones.
        return any(type(n).__name__.startswith(("Select", "Unbind", "Squeeze", "Slice")) for n in below)
    if on_rows and name == "Slice":
        return bool(shape[0] != node._saved_self_sym_sizes[0])  # type: ignore[attr-defined]
    return on_rows


def _indices_move_rows(indices: tuple[torch.Tensor | None, ...], num_rows: int) -> bool:
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if used and used[-1] - used[0] >= len(used):
        return True  # indices apart from one another: their axes come first
    rows = indices[0] if indices else None
    if rows is None:
        return False
    # x[arange(N), labels] picks one entry of every row. To tell, a device must be waited for; forming gradients costs
    # more.
    rank = max(index.dim() for index in indices if index is not None)
    if rows.dtype in (torch.bool, torch.uint8) or rows.dim() != rank or rows.numel() != num_rows or rank == 0:
        return True
    if rows.shape[0] != num_rows:
        return True
    return not torch.equal(rows.flatten(), torch.arange(num_rows, device=rows.device, dtype=rows.dtype))
