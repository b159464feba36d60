"""How many layers lie in a row, read from autograd's graph."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

__all__ = ["ChainLength"]


class ChainLength:
    """How many layers a signal has to pass: the shortest path from the last layer called back to the inputs.

    The moves of layers in a row add up, those beside a skip connection hardly do: a plain network of 10 layers has
    length 10, a residual one that of its stem, its projections and its head.

    Example:
        >>> from torch import nn, ones
        >>> chain, first, second = ChainLength(), nn.Linear(2, 2), nn.Linear(2, 2)
        >>> x = first(ones(1, 2))
        >>> chain.see(ones(1, 2), x)
        >>> y = x.relu()
        >>> chain.see(y, second(y))
        >>> chain.length
        2
    """

    def __init__(self) -> None:
        self.length = 0  # no call was seen yet
        self._key = object()  # lengths are written into the graph's nodes, so that nothing here keeps a graph alive

    def see(self, layer_input: Tensor, output: Tensor) -> None:
        """Take notice of a call, in the order of the forward pass.

        Args:
            layer_input: of the layer.
            output: what it returned, before anything was done to it.
        """
        self.length = 1 + self._shortest(layer_input.grad_fn)
        base = output._base  # an in-place change of a view cuts the view's own node out of the graph
        for node in (output.grad_fn, None if base is None else base.grad_fn):
            if node is not None:
                _notes(node)[self._key] = self.length

    def _shortest(self, node: Any) -> int:
        found, seen, stack = math.inf, set(), [node]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (length := _notes(node).get(self._key)) is not None:
                found = min(found, length)
            else:
                stack.extend(edge for edge, _ in node.next_functions)
        return 0 if math.isinf(found) else int(found)


def _notes(node: Any) -> dict[Any, int]:
    notes: dict[Any, int] = node.metadata  # declared as a method, but it is a dict
    return notes
