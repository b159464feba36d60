"""How the moves of layers add up: how many lie in a row, how many are multiplied; read from autograd's graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["ChainLength"]

_MATRIX_PRODUCTS = frozenset({"Bmm", "Mm", "Mv", "Dot", "Addmm", "Baddbmm", "Convolution"})
_PARTS = frozenset({"Split", "SplitWithSizes", "Unbind", "Slice", "Select", "Index", "IndexSelect"})
_NORMS = frozenset({"Rsqrt", "Reciprocal"})  # these divide by a size, which takes away from a move
_MOST_FACTORS = 4
_BESIDE = 1.5  # resnet20 without norms (22 layers, shortest path 4): no batch rises at 8, single ones do at 6


class ChainLength:
    """How many layers a signal has to pass, and how many layers' outputs are multiplied with each other.

    The moves of layers in a row add up, those beside skip connections like random numbers: a plain network of 10 layers
    has length 10, a residual one of n layers 1.5 sqrt(n), or the shortest path from the last layer called back to the
    inputs (stem, projections, head) if that is longer. The moves of the factors of a product add up too: attention is
    a product of queries, keys and values, a gated unit one of two parts. A number times a function of itself (SiLU) is
    no such product.

    Attributes:
        factors: by the weight of a layer, among how many factors its outputs are multiplied; of others there is none.

    Example:
        >>> from torch import nn, ones
        >>> chain, gate, value, last = ChainLength(), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        >>> x = ones(1, 2)
        >>> a, b = gate(x), value(x)
        >>> chain.see(gate.weight, x, a)
        >>> chain.see(value.weight, x, b)
        >>> y = a.sigmoid() * b
        >>> chain.see(last.weight, y, last(y))
        >>> chain.length, chain.factors[gate.weight], last.weight in chain.factors
        (3, 2, False)
    """

    def __init__(self) -> None:
        self._shortest = 0
        self._weights = set[Tensor]()
        self.factors: dict[Tensor, int] = {}
        self._key = object()  # notes are written into the graph's nodes, so that nothing here keeps a graph alive

    @property
    def length(self) -> int:
        """Effective number of layers in a row; 0 until a call was seen."""
        number = len(self._weights)
        return max(self._shortest, min(number, math.ceil(_BESIDE * math.sqrt(number))))

    def see(self, weight: Tensor, layer_input: Tensor, output: Tensor) -> None:
        """Take notice of a call, in the order of the forward pass.

        Args:
            weight: of the layer.
            layer_input: of the layer.
            output: what it returned, before anything was done to it.
        """
        self._shortest = 1 + self._look_back(layer_input.grad_fn)
        self._weights.add(weight)
        base = output._base  # an in-place change of a view cuts the view's own node out of the graph
        for node in (output.grad_fn, None if base is None else base.grad_fn):
            if node is not None:
                _notes(node)[self._key] = self._shortest, weight

    def _look_back(self, start: Any) -> int:
        """The shortest length among the layers right before a node; their factors are noted."""
        lengths: list[int] = []
        weights: list[Tensor] = []
        found: dict[Any, _Reach] = {None: _Reach(0, frozenset())}
        stack = [start]
        while stack:
            node = stack[-1]
            if node in found:
                stack.pop()
            elif (note := _notes(node).get(self._key)) is not None:
                found[node] = _Reach(1, frozenset([(node, 0)]))
                lengths.append(note[0])
                weights.append(note[1])
            elif missing := [edge for edge, _ in node.next_functions if edge not in found]:
                stack += missing
            else:
                edges = [_through(edge, place, found[edge]) for edge, place in node.next_functions]
                found[node] = _joined(node.name().partition("Backward")[0], edges)
        for weight in weights if found[start].factors > 1 else ():
            self.factors[weight] = max(found[start].factors, self.factors.get(weight, 1))
        return min(lengths, default=0)


class _Reach(NamedTuple):
    """How a tensor depends on the layers right before it.

    Attributes:
        factors: the largest number of their outputs that are multiplied in it.
        sources: which outputs, or parts of outputs, it is made of.
    """

    factors: int
    sources: frozenset[tuple[Any, int]]


def _through(node: Any, place: int, reach: _Reach) -> _Reach:
    """Along an edge from the output of that place; parts of one tensor are tensors of their own."""
    if node is not None and reach.factors and node.name().partition("Backward")[0] in _PARTS:
        return _Reach(reach.factors, frozenset([(node, place)]))
    return reach


def _joined(operation: str, edges: Sequence[_Reach]) -> _Reach:
    sources = frozenset().union(*(edge.sources for edge in edges))
    if operation in _NORMS:
        return _Reach(0, frozenset())
    if operation == "Div":
        return edges[0]
    several = [edge for edge in edges if edge.factors]
    is_product = operation in _MATRIX_PRODUCTS or operation.startswith("ScaledDotProduct")
    if operation in ("Mul", "Addcmul"):
        is_product = len(several) > 1 and several[0].sources.isdisjoint(several[1].sources)
    factors = [edge.factors for edge in several]
    return _Reach(min(sum(factors), _MOST_FACTORS) if is_product else max(factors, default=0), sources)


def _notes(node: Any) -> dict[Any, Any]:
    notes: dict[Any, Any] = node.metadata  # declared as a method, but it is a dict
    return notes
