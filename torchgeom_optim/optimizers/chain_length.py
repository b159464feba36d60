"""How the moves of layers add up: how many lie in a row, how many are multiplied; read from autograd's graph."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["ChainLength"]

# Which inputs of an operation are multiplied; to the product of some another input is added.
_FACTORS = {
    **dict.fromkeys(("Mul", "Bmm", "Mm", "Mv", "Dot", "Convolution"), (0, 2)),
    **dict.fromkeys(("Addcmul", "Addmm", "Addmv", "Addr", "Addbmm", "Baddbmm"), (1, 3)),
    "ScaledDotProduct": (0, 3),
}
_PARTS = frozenset({"Split", "SplitWithSizes", "Unbind", "Slice", "Select", "Index", "IndexSelect"})
_NORMS = frozenset({"Rsqrt", "Reciprocal"})  # these divide by a size, which takes away from a move
_MOST_FACTORS = 4
_IN_A_ROW = 2  # multilayer perceptrons of 4, 7, 10, 14 and 20 layers train best at 2 (of 1, 2 and 4)
_BESIDE = 1.5  # resnet20 without norms (22 layers, shortest path 4): no batch rises at 8, single ones do at 6


class ChainLength:
    """How many layers a signal has to pass, and how many layers' outputs are multiplied with each other.

    The moves of layers in a row add up, those beside skip connections like random numbers: a plain network of 10 layers
    has length 20, a residual one of n layers 1.5 sqrt(n), or twice the shortest path from the last layer called back to
    the inputs (stem, projections, head) if that is longer. The moves of the factors of a product add up too: attention
    is a product of queries, keys and values, a gated unit one of two parts. A number times a function of itself (SiLU)
    is no such product. Products that no layer follows are not seen.

    Every operation is looked at once, however many layers' inputs it leads to: what was found is written into its node.

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
        (4, 2, False)
    """

    def __init__(self) -> None:
        self._shortest = 0
        self._weights = set[Tensor]()
        self.factors: dict[Tensor, int] = {}
        self._key = object()  # notes are written into the graph's nodes, so that nothing here keeps a graph alive
        self._known: weakref.ref[_Sources] | None = None

    @property
    def length(self) -> int:
        """Effective number of layers in a row; 0 until a call was seen."""
        return max(_IN_A_ROW * self._shortest, math.ceil(_BESIDE * math.sqrt(len(self._weights))))

    def see(self, weight: Tensor, layer_input: Tensor, output: Tensor) -> None:
        """Take notice of a call, in the order of the forward pass.

        Args:
            weight: of the layer.
            layer_input: of the layer.
            output: what it returned, before anything was done to it.
        """
        sources = None if self._known is None else self._known()
        if sources is None:  # no graph is left that has notes of others
            sources = _Sources()
            self._known = weakref.ref(sources)
        before = self._look_back(layer_input.grad_fn, sources)
        for number, mask in enumerate(before.multiplied, 2):
            for factor in sources.weights(mask, number):
                self.factors[factor] = max(number, self.factors.get(factor, 1))
        self._shortest = 1 + (before.shortest or 0)
        self._weights.add(weight)
        note = _Note(sources, _Reach(1, sources.add(weight), self._shortest))
        base = output._base  # an in-place change of a view cuts the view's own node out of the graph
        for node in (output.grad_fn, None if base is None else base.grad_fn):
            if node is not None:
                _notes(node)[self._key] = note

    def _look_back(self, start: Any, sources: _Sources) -> _Reach:
        """How a tensor depends on the layers right before it."""
        stack = [start]
        while stack:
            node = stack.pop()
            if node is None or not (edges := node.next_functions) or self._key in _notes(node):
                continue
            missing = [edge for edge, _ in edges if self._reach_of(edge) is None]
            if missing:
                stack += [node, *missing]
                continue
            reaches = [self._along(edge, place) for edge, place in edges]
            operation = _operation(node)
            reach = _joined(operation, reaches)
            _notes(node)[self._key] = _Note(sources, reach, {} if operation in _PARTS else None)
        found = self._reach_of(start)
        assert found is not None
        return found

    def _reach_of(self, node: Any) -> _Reach | None:
        """What is known of a node's outputs as a whole; of parameters and data, that no layer comes before them."""
        if node is None or not node.next_functions:
            return _NOTHING
        note: _Note | None = _notes(node).get(self._key)
        return None if note is None else note.reach

    def _along(self, node: Any, place: int) -> _Reach:
        """Along an edge from the output of that place; parts of one tensor are tensors of their own."""
        note: _Note | None = None if node is None else _notes(node).get(self._key)
        if note is None:
            return _NOTHING
        reach = note.reach
        if note.parts is None or not reach.factors:
            return reach
        if place not in note.parts:
            note.parts[place] = note.sources.add(reach.sources)
        return reach._replace(sources=note.parts[place])

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which finds no notes of its own."""
        return {**vars(self), "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of earlier versions have less; they look anew."""
        self.__init__()  # type: ignore[misc]
        vars(self).update({key: value for key, value in state.items() if key in vars(self)})


class _Reach(NamedTuple):
    """How a tensor depends on the layers right before it.

    Attributes:
        factors: the largest number of their outputs that are multiplied in it.
        sources: which outputs, or parts of outputs, it is made of, a bit for each.
        shortest: the shortest length up to one of the layers; None without any.
        multiplied: which outputs are multiplied in it, among 2, 3 and more factors.
    """

    factors: int
    sources: int
    shortest: int | None
    multiplied: tuple[int, ...] = (0,) * (_MOST_FACTORS - 1)


_NOTHING = _Reach(0, 0, None)


class _Sources:
    """The outputs of the calls in a graph, and parts of them, numbered; lives as long as the nodes with its notes."""

    def __init__(self) -> None:
        self._all: list[Tensor | int] = []  # the layer's weight; of a part, what is divided
        self._told = [0] * (_MOST_FACTORS + 1)

    def add(self, source: Tensor | int) -> int:
        """A bit of its own for an output of the layer with this weight, or for a part of what has these bits."""
        self._all.append(source)
        return 1 << (len(self._all) - 1)

    def weights(self, mask: int, number: int) -> list[Tensor]:
        """The weights behind these bits, each bit once for each number of factors."""
        found = list[Tensor]()
        while mask := mask & ~self._told[number]:
            bit = mask & -mask
            self._told[number] |= bit
            source = self._all[bit.bit_length() - 1]
            if isinstance(source, Tensor):
                found.append(source)
            else:
                mask |= source
        return found


class _Note(NamedTuple):
    """What is written into a node.

    Attributes:
        sources: that the bits are of.
        reach: of its outputs.
        parts: by the place of an output, its own bit, where outputs are parts of a tensor; else None.
    """

    sources: _Sources
    reach: _Reach
    parts: dict[int, int] | None = None


def _notes(node: Any) -> dict[Any, Any]:
    notes: dict[Any, Any] = node.metadata  # declared as a method, but it is a dict
    return notes


def _operation(node: Any) -> str:
    return type(node).__name__.partition("Backward")[0]  # a custom function may have put anything into its ``name``


def _joined(operation: str, edges: Sequence[_Reach]) -> _Reach:
    shortest = min((edge.shortest for edge in edges if edge.shortest is not None), default=None)
    if operation in _NORMS:
        return _Reach(0, 0, shortest)
    if operation == "Div":
        return edges[0]._replace(shortest=shortest)
    first, last = _FACTORS.get("ScaledDotProduct" if operation.startswith("ScaledDotProduct") else operation, (0, 0))
    product = [edge for edge in edges[first:last] if edge.factors]
    if operation == "Glu":  # its input's halves
        product = [edge for edge in edges if edge.factors] * 2
    if operation in ("Mul", "Addcmul") and (len(product) < 2 or product[0].sources & product[1].sources):
        product = []
    number = min(sum(edge.factors for edge in product), _MOST_FACTORS)
    multiplied = [reduce(or_, masks) for masks in zip(*(edge.multiplied for edge in edges), strict=True)]
    if len(product) > 1:
        multiplied[number - 2] |= _union(product)
    factors = max(number, *(edge.factors for edge in edges))
    return _Reach(factors, _union(edges), shortest, tuple(multiplied))


def _union(reaches: Sequence[_Reach]) -> int:
    return reduce(or_, (reach.sources for reach in reaches), 0)
