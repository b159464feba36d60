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
    """

    def __init__(self) -> None:
        self._length_at: dict[Any, int] = {}
        self.length = 1

    def see(self, layer_input: Tensor, output: Tensor) -> None:
        """Take notice of a call, in the order of the forward pass."""
        self.length = 1 + self._shortest(layer_input.grad_fn)
        base = output._base
        for node in (output.grad_fn, None if base is None else base.grad_fn):
            if node is not None:
                self._length_at[node] = self.length

    def _shortest(self, node: Any) -> int:
        found, seen, stack = math.inf, set(), [node]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (length := self._length_at.get(node)) is not None:
                found = min(found, length)
            else:
                stack.extend(edge for edge, _ in node.next_functions)
        return 0 if math.isinf(found) else int(found)
