"""J J' from the rows of J, or from what the layers' gradients are made of, without rows where that is cheaper.

For a parameter that only known layers use, the C gradients of every sample come from C backward passes over the batch,
as factors (:mod:`torchgeom_optim.geometry.factors`); what is kept of them is the factors or the rows, whichever is
smaller. With N samples, C outputs, T positions, n inputs and m outputs a product of two such sets costs

    positions first    (N T)^2 (n + C^2 m)
    gradients first    N C T m n  +  (N C)^2 m n / 2          (J J' is symmetric: what is above the diagonal is copied)

multiplications, and the cheaper is taken.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.factors import Factor, OuterFactor, RowFactor, TokenFactor, inner_products, pieces
from torchgeom_optim.geometry.jacobian_routes import Function, Switches, Weights, batched_gradients, rows_match
from torchgeom_optim.geometry.layer_calls import LayerCalls
from torchgeom_optim.geometry.layers import rule_for

__all__ = [
    "FactorStore",
    "Uses",
    "carried_to_outputs",
    "coordinates_of_outputs",
    "factor_bytes",
    "factors_agree",
    "gram_of_outputs",
    "gram_of_row_blocks",
    "layer_factors",
    "layers_with_rule",
    "sphere_basis",
    "sum_of_rows",
    "unit_basis",
]

_PIECE_BYTES = 2**26
_ROW_BLOCKS = 8
_FEWEST_ROWS = 100  # of a square on the diagonal, of which half is wasted
Uses = dict[str, list[Factor]]


def layers_with_rule(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The layers that have a rule and one of the named parameters."""
    named = dict(model.named_parameters())
    chosen = {id(named[name]) for name in names}
    return [m for m in model.modules() if any(id(p) in chosen for p in m._parameters.values()) and rule_for(m)]


def layer_factors(
    function: Function,
    values: Weights,
    layers: Iterable[nn.Module],
    private: Callable[[Capture], AbstractContextManager[None]],
    basis: Callable[[Tensor], Tensor],
    num_samples: int,
    switches: Switches,
) -> tuple[Uses, Tensor]:
    """The rows of J, in a basis of the outputs, for each parameter that only layers with a rule used.

    Args:
        function: evaluates the mini-batch.
        values: the weights.
        layers: those to watch.
        private: what the pass takes place in; only the capture that it is given sees it.
        basis: from f [b, C] to the basis [b, C, K] of each sample's outputs.
        num_samples: b.
        switches: told whether cotangents can be batched.

    Returns:
        Name to one factor with K gradients per sample for each use; and the basis.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    record = LayerCalls({id(leaf): name for name, leaf in leaves.items()})

    def factors_of(f: Tensor) -> tuple[Uses, Tensor]:
        directions = basis(f.detach())
        if not f.requires_grad:
            return {}, directions
        # A call that sees something else than the samples first counts as another use of its parameters.
        record.calls = [call for call in record.calls if call.input_shape[0] == num_samples]
        uses: Uses = {name: [] for name in record.resolve([f], values, [f]).calls}
        calls = [call for call in record.calls if any(name in uses for name in call.parameters.values())]
        edges = [call.output_edge for call in calls]
        grads = batched_gradients(f, edges, directions.permute(2, 0, 1), switches)
        for call, grad in zip(calls, grads, strict=True):
            own = [own for own, name in call.parameters.items() if name in uses]
            if grad is not None:  # the calls that f does not depend on add nothing
                for own_name, factor in call.factors(grad.transpose(0, 1), own).items():
                    uses[call.parameters[own_name]].append(factor)
            call.release()
        return {name: factors for name, factors in uses.items() if factors}, directions

    capture = Capture(layers, lambda *call: record.on_call(*call))
    with capture, private(capture):
        result: tuple[Uses, Tensor] = function(leaves, factors_of)
    return result


def factors_agree(uses: Uses, gradients: Weights, weights: Tensor) -> list[str]:
    """The parameters whose factors add up to what one plain backward pass computes.

    Args:
        uses: factors of a few samples with C gradients each.
        gradients: the gradient of sum(weights f) with respect to each parameter.
        weights: [b, C], drawn at random: factors with another axis in the samples' place do not agree.

    Returns:
        Their names.
    """
    return [name for name, factors in uses.items() if _add_up(factors, gradients[name].reshape(-1), weights)]


def _add_up(factors: list[Factor], gradient: Tensor, weights: Tensor) -> bool:
    """A few units at a time: the rows of a wide layer are many times as large as the layer."""
    if any(factor.num_samples != len(weights) for factor in factors):
        return False
    unit_numel, step = factors[0].unit_numel, math.lcm(*(factor.unit_step for factor in factors))
    for start, stop in pieces(factors[0].num_units, weights.numel() * unit_numel * 8, step):
        rows = sum_of_rows(factors, start, stop)
        combined = torch.tensordot(weights.to(rows.dtype), rows, 2)
        if not rows_match(combined, gradient[start * unit_numel : stop * unit_numel], rows):
            return False
    return True


def sum_of_rows(factors: Iterable[Factor], start: int = 0, stop: int | None = None) -> Tensor:
    """All uses' rows with respect to ``parameter[start:stop]``, added.

    Args:
        factors: the uses, one at least.
        start: first unit.
        stop: unit after the last; None for all.

    Returns:
        [N, C, entries].
    """
    total, *others = (factor.rows(start, stop) for factor in factors)
    for rows in others:
        total = total + rows
    return total


def unit_basis(f: Tensor) -> Tensor:
    """Every output by itself: [b, C, C]."""
    return torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(len(f), -1, -1)


def sphere_basis(f: Tensor) -> Tensor:
    """C - 1 orthonormal directions R at right angles to f.

    2 sqrt(p) keeps its length, so its derivatives lie in their span and J = R R'J: one backward pass in C is saved, and
    J J' is taken in the smaller space and carried back.

    Args:
        f: values >= 0, [b, C].

    Returns:
        [b, C, C - 1].
    """
    unit = f / f.norm(dim=1, keepdim=True)
    # The Householder reflection that takes the first axis to -f/|f|; f >= 0, so nothing cancels.
    reflector = unit.clone()
    reflector[:, 0] += 1
    scale = 2 / reflector.square().sum(1)
    outer = reflector[:, :, None] * reflector[:, None, :] * scale[:, None, None]
    basis: Tensor = unit_basis(f) - outer
    return basis[:, :, 1:]


class FactorStore:
    """The rows of J for all samples, parameter by parameter, in the smaller of two forms, and their inner products."""

    def __init__(self) -> None:
        self._parts: dict[str, list[list[Factor]]] = {}
        self._bases: list[Tensor] = []

    def add(self, uses: Mapping[str, list[Factor]], basis: Tensor) -> None:
        """Take in a mini-batch."""
        for name, factors in uses.items():
            self._parts.setdefault(name, []).append(_compact(factors))
        self._bases.append(basis)

    def gram(self) -> tuple[Tensor, Tensor]:
        """R'J J'R [N K, N K] over all parameters taken in, and R [N, C, K]."""
        basis = torch.cat(self._bases)
        num_rows = len(basis) * basis.shape[2]
        lower = basis.new_zeros(num_rows, num_rows, dtype=torch.promote_types(basis.dtype, torch.float32))
        while self._parts:
            name, parts = self._parts.popitem()  # each parameter's factors go as soon as they are used
            partner = self._weight_of(name, parts)
            if partner is not None:
                parts = self._parts.pop(partner)
            _add_inner_products(lower, _over_samples(parts), with_bias=partner is not None)
        return _mirrored(lower), basis

    def _weight_of(self, name: str, parts: list[list[Factor]]) -> str | None:
        """The weight whose products of output gradients are those of this bias too, one position each."""
        layer = name.rpartition(".")[0]
        for other, candidates in self._parts.items():
            same_layer = other.rpartition(".")[0] == layer
            if same_layer and all(_share_gradients(*both) for both in zip(candidates, parts, strict=True)):
                return other
        return None


def gram_of_outputs(gram: Tensor, basis: Tensor) -> Tensor:
    """J J' from R'J J'R.

    Args:
        gram: [N K, N K].
        basis: R [N, C, K].

    Returns:
        [N C, N C], exactly symmetric; ``gram`` itself where K = C, as R is then 1.
    """
    if basis.shape[1] == basis.shape[2]:
        return gram
    return _mirrored(carried_to_outputs(carried_to_outputs(gram, basis).T, basis))


def coordinates_of_outputs(columns: Tensor, basis: Tensor) -> Tensor:
    """R'U for columns U in the space of all outputs.

    Args:
        columns: U [N C, k].
        basis: R [N, C, K].

    Returns:
        [N K, k].
    """
    num_samples, num_outputs, num_directions = basis.shape
    coordinates = torch.bmm(basis.mT.to(columns.dtype), columns.reshape(num_samples, num_outputs, -1))
    return coordinates.reshape(num_samples * num_directions, -1)


def carried_to_outputs(columns: Tensor, basis: Tensor) -> Tensor:
    """R U: columns in the space of the directions in that of all outputs.

    Args:
        columns: U [N K, k].
        basis: R [N, C, K].

    Returns:
        [N C, k].
    """
    num_samples, num_outputs, num_directions = basis.shape
    carried = torch.bmm(basis.to(columns.dtype), columns.reshape(num_samples, num_directions, -1))
    return carried.reshape(num_samples * num_outputs, -1)


def factor_bytes(uses: Mapping[str, list[Factor]], num_samples: int) -> tuple[int, int]:
    """Bytes per sample that a :class:`FactorStore` will hold, and of the largest parameter's patches."""
    held, patches = 0, 0
    for factors in uses.values():
        compact = _compact(factors)
        held += sum(_size(factor) for factor in compact)
        outer = [f.as_outer() for f in compact if not isinstance(f, OuterFactor)]
        patches = max(patches, sum(_size(f) for f in outer if f is not None))
    return -(-held // num_samples), -(-patches // num_samples)


def gram_of_row_blocks(
    row_blocks: Callable[[int], Iterator[Tensor]], num_rows: int, capacity: int, empty: Callable[[int, int], Tensor]
) -> Tensor:
    """J J' from blocks of rows, of which ``capacity`` rows are held at once and the others computed again.

    Args:
        row_blocks: the blocks from a row on.
        num_rows: N C.
        capacity: rows to hold; one block is held in any case.
        empty: makes the result.

    Returns:
        [N C, N C].
    """
    gram = empty(num_rows, num_rows)
    start = 0
    while start < num_rows:
        held: list[tuple[int, Tensor]] = []
        row = room_until = start
        for block in row_blocks(start):
            if not held or (row == room_until and row + len(block) <= start + capacity):
                held.append((row, block))
                room_until = row + len(block)
            for column, other in held:
                with torch.autocast(block.device.type, enabled=False):
                    product = block @ other.T
                gram[row : row + len(block), column : column + len(other)] = product
            row += len(block)
        start = room_until
    return _mirrored(gram)


def _mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of this lower triangle, in its place."""
    for top, bottom in _row_ranges(len(lower)):
        lower[:top, top:bottom] = lower[top:bottom, :top].T
        corner = lower[top:bottom, top:bottom].tril()
        lower[top:bottom, top:bottom] = corner + corner.tril(-1).T
    return lower


def _row_ranges(num_rows: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows, some eight of them, cut between multiples of ``step``."""
    size = step * -(-num_rows // (step * _ROW_BLOCKS))
    return ((start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _share_gradients(weight: list[Factor], bias: list[Factor]) -> bool:
    """Whether one use of a weight at one position and one of a bias have the same output gradients."""
    if len(weight) != 1 or len(bias) != 1:
        return False
    outer, rows = weight[0], bias[0]
    if not (isinstance(outer, OuterFactor) and isinstance(rows, RowFactor) and outer.num_positions == 1):
        return False
    return torch.equal(outer.output_grads.flatten(2), rows.values)


def _compact(factors: list[Factor]) -> list[Factor]:
    first = factors[0]
    size = first.num_samples * first.num_grads * first.num_units * first.unit_numel * _item(first)
    if all(isinstance(f, RowFactor) for f in factors) and len(factors) == 1:
        return factors
    if size <= sum(_size(f) for f in factors):
        return [RowFactor(sum_of_rows(factors), first.unit_numel)]
    return factors


def _over_samples(parts: list[list[Factor]]) -> list[Factor]:
    """The factors of all mini-batches as one per use."""
    alike = {tuple((type(f), *_geometry(f)) for f in part) for part in parts}
    if len(alike) > 1:  # shapes or uses that differ between mini-batches have only the rows in common
        parts = [[RowFactor(sum_of_rows(part), part[0].unit_numel)] for part in parts]
    joined = []
    for same_use in zip(*parts, strict=True):
        tensors = {name: torch.cat([getattr(f, name) for f in same_use]) for name in _tensors(same_use[0])}
        joined.append(copy.copy(same_use[0]))
        vars(joined[-1]).update(tensors)
    return joined


def _add_inner_products(lower: Tensor, uses: list[Factor], with_bias: bool = False) -> None:
    """Add <J_i, J_j> to the lower triangle (whatever lies above the diagonal is not used)."""
    first = uses[0]
    num_samples, num_grads = first.num_samples, first.num_grads
    weight = first.num_units * first.unit_numel
    outer = [use.as_outer() for use in uses]
    products = [use for use in outer if use is not None]
    positions = sum(use.inputs.shape[2] for use in products)
    gradients_first = len(lower) * weight * (2 * positions + len(lower) / 2)
    m, n = first.num_units, first.unit_numel
    # One entry of a product over pairs of positions is worth some multiplications: it is bound by memory.
    positions_first = (num_samples * positions) ** 2 * (n + num_grads**2 * (m + (32 if positions > 1 else 4)))
    by_positions = len(products) == len(uses) and positions_first < gradients_first
    if len(products) == 1 and products[0].num_positions == 1 and (by_positions or with_bias):
        _add_products_of_products(lower, products[0], with_bias)
        return
    if by_positions or (len(uses) == 1 and isinstance(first, TokenFactor)):
        lower += inner_products(products if by_positions else uses).view_as(lower)
        return
    uses = [use if product is None else product for use, product in zip(uses, outer, strict=True)]
    step = math.lcm(*(use.unit_step for use in uses))
    size = max(1, _PIECE_BYTES // (len(lower) * n * step * lower.element_size())) * step
    for start in range(0, m, size):
        rows = sum_of_rows(uses, start, min(m, start + size)).reshape(len(lower), -1).to(lower.dtype)
        _add_own_products(lower, rows)


def _add_own_products(lower: Tensor, rows: Tensor) -> None:
    """Add R R' to the lower triangle: the square below the diagonal's middle, and so on with the two halves."""
    if len(rows) <= _FEWEST_ROWS:
        lower.addmm_(rows, rows.T)
        return
    half = len(rows) // 2
    lower[half:, :half].addmm_(rows[half:], rows[:half].T)
    _add_own_products(lower[:half, :half], rows[:half])
    _add_own_products(lower[half:, half:], rows[half:])


def _add_products_of_products(lower: Tensor, weight: OuterFactor, with_bias: bool) -> None:
    """(a . a')(g . g'), or (a . a' + 1)(g . g') for a weight and its bias together, a few samples' rows at a time."""
    a, g = weight.inputs.flatten(1).to(lower.dtype), weight.output_grads.flatten(2).flatten(0, 1).to(lower.dtype)
    num_grads = weight.num_grads
    of_inputs = torch.addmm(a.new_full((), float(with_bias)), a, a.T)
    for top, bottom in _row_ranges(len(lower), num_grads):
        of_grads = (g[top:bottom] @ g[:bottom].T).view(-1, num_grads, bottom)
        pairs = of_inputs[top // num_grads : bottom // num_grads, : bottom // num_grads]
        block = lower[top:bottom, :bottom].view(-1, num_grads, bottom)
        block.addcmul_(of_grads, pairs.repeat_interleave(num_grads, 1)[:, None])


def _tensors(factor: Factor) -> dict[str, Tensor]:
    return {name: value for name, value in vars(factor).items() if isinstance(value, Tensor)}


def _geometry(factor: Factor) -> tuple[Any, ...]:
    return tuple(value.shape[1:] if isinstance(value, Tensor) else value for value in vars(factor).values())


def _size(factor: Factor) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(factor).values())


def _item(factor: Factor) -> int:
    return max(x.element_size() for x in _tensors(factor).values() if x.is_floating_point())
