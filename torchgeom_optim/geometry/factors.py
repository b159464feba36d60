r"""Per-sample gradients of one parameter, kept as the products that they are made of.

The gradient of sample i and output c with respect to a layer's weight is a sum of outer products over the
positions t at which the layer was applied, in G groups that have weights of their own:

    J[i, c] = \sum_t g[i, c, t] a[i, t]^T         (input a, output gradient g)

so inner products of such gradients need no gradients. There are two routes; with N samples on either side, T
positions, n inputs and m outputs they cost, in multiplications,

    positions first    \sum_{t, t'} (a_it . a_jt') (g_it . g_jt')      (N T)^2 (n + m)
    gradients first    <J_i, J_j>                                      N T m n + N^2 m n

and :func:`inner_products` takes the cheaper one. Nothing here divides by N.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factor", "OuterFactor", "RowFactor", "TokenFactor", "inner_products", "pieces", "through_rows", "with_bias"]

WORKSPACE_BYTES = 8 * 2**20  # larger pieces were not faster: they leave the cache


class Factor(ABC):
    """The gradients [N, C, P] of N samples, C each, with respect to one parameter; one use of it."""

    unit_step = 1  # rows() is cut between multiples of this

    @property
    @abstractmethod
    def device_type(self) -> str:
        """Type of the device that it is on."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """N."""

    @property
    @abstractmethod
    def num_grads(self) -> int:
        """C, gradients per sample; 1 for a loss."""

    @property
    @abstractmethod
    def num_units(self) -> int:
        """Length of the parameter's axis 0."""

    @abstractmethod
    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The gradients with respect to ``parameter[start:stop]``, flattened: [N, C, (stop - start) * P / units]."""

    @property
    @abstractmethod
    def unit_numel(self) -> int:
        """Entries of one slice of the parameter along its axis 0."""

    def as_outer(self) -> OuterFactor | None:
        """The same gradients as outer products, if they are that."""
        return None

    def products(self, other: Factor) -> Tensor:
        """Inner products with the gradients of N' samples, C' each, or with these themselves: [N, C, N', C']."""
        return through_rows([self], [self] if other is self else [other])


@dataclass(frozen=True)
class RowFactor(Factor):
    """Explicit gradients: biases and whatever is small or has no better form.

    Args:
        values: shape [N, C, P].
        entries_per_unit: entries of one slice of the parameter along its axis 0.
    """

    values: Tensor
    entries_per_unit: int = 1

    @property
    def device_type(self) -> str:  # noqa: D102
        return self.values.device.type

    @property
    def num_samples(self) -> int:  # noqa: D102
        return self.values.shape[0]

    @property
    def num_grads(self) -> int:  # noqa: D102
        return self.values.shape[1]

    @property
    def num_units(self) -> int:  # noqa: D102
        return self.values.shape[2] // self.entries_per_unit

    @property
    def unit_numel(self) -> int:  # noqa: D102
        return self.entries_per_unit

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:  # noqa: D102
        stop = self.num_units if stop is None else stop
        return self.values[..., start * self.entries_per_unit : stop * self.entries_per_unit]


@dataclass(frozen=True)
class OuterFactor(Factor):
    """Sums of outer products over positions.

    Args:
        inputs: a, shape [N, G, T, n].
        output_grads: g, shape [N, C, G, T, m].
        transposed: the parameter is laid out [n, m] instead of [G * m, n]; needs G = 1.
    """

    inputs: Tensor
    output_grads: Tensor
    transposed: bool = False

    @property
    def device_type(self) -> str:  # noqa: D102
        return self.output_grads.device.type

    @property
    def num_samples(self) -> int:  # noqa: D102
        return self.output_grads.shape[0]

    @property
    def num_grads(self) -> int:  # noqa: D102
        return self.output_grads.shape[1]

    @property
    def num_units(self) -> int:  # noqa: D102
        return self.inputs.shape[3] if self.transposed else self.inputs.shape[1] * self.output_grads.shape[4]

    @property
    def unit_numel(self) -> int:  # noqa: D102
        return self.output_grads.shape[4] if self.transposed else self.inputs.shape[3]

    @property
    def unit_step(self) -> int:  # type: ignore[override]  # noqa: D102
        return self.output_grads.shape[4] if self.inputs.shape[1] > 1 else 1

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:  # noqa: D102
        a, g = self.inputs, self.output_grads
        num_samples, num_grads = g.shape[:2]
        stop = self.num_units if stop is None else stop
        if self.transposed:
            left = a[:, 0, :, start:stop].transpose(1, 2)
            right = g[:, :, 0].transpose(1, 2).flatten(2)
            product = torch.bmm(left, right).view(num_samples, stop - start, num_grads, -1)
            return product.transpose(1, 2).reshape(num_samples, num_grads, -1)
        if a.shape[1] > 1:
            groups = slice(start // g.shape[4], stop // g.shape[4])
            a, g = a[:, groups], g[:, :, groups]
        else:
            g = g[..., start:stop]
        num_groups, num_outputs = g.shape[2], g.shape[4]
        left = g.permute(0, 2, 1, 4, 3).reshape(num_samples * num_groups, num_grads * num_outputs, -1)
        product = torch.bmm(left, a.flatten(0, 1)).view(num_samples, num_groups, num_grads, -1)
        return product.transpose(1, 2).reshape(num_samples, num_grads, -1)

    @property
    def num_positions(self) -> int:
        """G T, all positions of all groups."""
        return self.inputs.shape[1] * self.inputs.shape[2]

    def as_outer(self) -> OuterFactor:  # noqa: D102
        return self

    def products(self, other: Factor) -> Tensor:  # noqa: D102
        outer = other.as_outer()
        if outer is None or outer.transposed != self.transposed:
            return super().products(other)
        return _of_outer_products(self, self if other is self else outer)


@dataclass(frozen=True)
class TokenFactor(Factor):
    """An embedding: a linear layer whose inputs are one-hot.

    Args:
        tokens: row of the weight that each position reads, shape [N, T].
        output_grads: shape [N, C, T, d], zero where the row is not trained (padding).
        num_embeddings: rows of the weight.
    """

    tokens: Tensor
    output_grads: Tensor
    num_embeddings: int

    @property
    def device_type(self) -> str:  # noqa: D102
        return self.tokens.device.type

    @property
    def num_samples(self) -> int:  # noqa: D102
        return self.tokens.shape[0]

    @property
    def num_grads(self) -> int:  # noqa: D102
        return self.output_grads.shape[1]

    @property
    def num_units(self) -> int:  # noqa: D102
        return self.num_embeddings

    @property
    def unit_numel(self) -> int:  # noqa: D102
        return self.output_grads.shape[3]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:  # noqa: D102
        stop = self.num_units if stop is None else stop
        num_samples, num_grads, _, dim = self.output_grads.shape
        inside = (self.tokens >= start) & (self.tokens < stop)
        places = (self.tokens - start).clamp(0, stop - start - 1)[:, None, :, None]
        source = self.output_grads * inside[:, None, :, None]
        rows = source.new_zeros(num_samples, num_grads, stop - start, dim)
        return rows.scatter_add_(2, places.expand_as(source), source).flatten(2)

    def products(self, other: Factor) -> Tensor:  # noqa: D102
        if not isinstance(other, TokenFactor):
            return super().products(other)
        return _of_tokens(self, self if other is self else other)


def inner_products(left: Sequence[Factor], right: Sequence[Factor] | None = None) -> Tensor:
    r"""Inner products of per-sample gradients with respect to one parameter.

    Every element of ``left`` is one use of the parameter by the same samples; the uses' gradients add up before
    the product is taken, and so for ``right``.

    Args:
        left: the uses by N samples with C gradients each.
        right: the uses by N' samples with C' gradients each; ``left`` itself by default.

    Returns:
        <J[i, c], J'[j, d]>, shape [N, C, N', C'], neither divided by N nor by N'.

    Example:
        >>> a, g = torch.randn(4, 1, 1, 3), torch.randn(4, 1, 1, 1, 2)
        >>> J = torch.einsum("no,ni->noi", g[:, 0, 0, 0], a[:, 0, 0]).flatten(1)
        >>> torch.testing.assert_close(inner_products([OuterFactor(a, g)])[:, 0, :, 0], J @ J.T)
    """
    one = _joined(left)
    other = one if right is None or right is left else _joined(right)
    if one is None or other is None:
        return through_rows(left, left if right is None else right)
    return one.products(other)


def with_bias(weight: OuterFactor) -> Tensor:
    """Inner products of a weight's and its bias's gradients together, one position: (a . a' + 1)(g . g')."""
    a, g = weight.inputs.flatten(1), weight.output_grads.flatten(2).flatten(0, 1)
    of_inputs = torch.addmm(a.new_ones(()), a, a.T)[:, None, :, None]
    shape = (weight.num_samples, weight.num_grads) * 2
    return (g @ g.T).view(shape).mul_(of_inputs)


def _joined(uses: Sequence[Factor]) -> Factor | None:
    """One factor in place of several, if their positions can be put in a row."""
    if len(uses) == 1:
        return uses[0]
    products = [outer for use in uses if (outer := use.as_outer()) is not None]
    if len(products) < len(uses) or len({(use.inputs.shape[1], use.transposed) for use in products}) > 1:
        return None
    inputs = torch.cat([use.inputs for use in products], 2)
    return OuterFactor(inputs, torch.cat([use.output_grads for use in products], 3), products[0].transposed)


def pieces(length: int, bytes_each: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``length``, multiples of ``step`` long, within the workspace where possible."""
    size = max(WORKSPACE_BYTES // max(bytes_each * step, 1), 1) * step
    size = step * math.ceil(length / step / math.ceil(length / size))  # equal pieces
    return ((start, min(start + size, length)) for start in range(0, length, size))


def through_rows(left: Sequence[Factor], right: Sequence[Factor]) -> Tensor:
    """Gradients first, a few units of the parameter at a time."""
    first, other = left[0], right[0]
    step = math.lcm(*(use.unit_step for use in (*left, *right)))
    num_rows = first.num_samples * first.num_grads
    num_columns = other.num_samples * other.num_grads
    result: Tensor | None = None
    bytes_each = max(num_rows, num_columns) * first.unit_numel * 8
    for start, stop in pieces(first.num_units, bytes_each, step):
        rows = _sum([use.rows(start, stop) for use in left]).reshape(num_rows, -1)
        columns = rows
        if right is not left:
            columns = _sum([use.rows(start, stop) for use in right]).reshape(num_columns, -1)
        result = rows @ columns.T if result is None else result.addmm_(rows, columns.T)
    assert result is not None
    return result.view(first.num_samples, first.num_grads, other.num_samples, other.num_grads)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _of_outer_products(left: OuterFactor, right: OuterFactor) -> Tensor:
    num_groups, positions, n = left.inputs.shape[1:]
    m = left.output_grads.shape[4]
    num_rows, num_columns = left.num_samples * left.num_grads, right.num_samples * right.num_grads
    pairs = left.num_samples * right.num_samples * positions * right.inputs.shape[2]
    first_positions = pairs * (n + left.num_grads * right.num_grads * m)
    formed = num_rows * positions + (0 if left is right else num_columns * right.inputs.shape[2])
    if first_positions > m * n * (formed + num_rows * num_columns):
        return through_rows([left], [left] if left is right else [right])
    result = left.inputs.new_empty(left.num_samples, left.num_grads, right.num_samples, right.num_grads)
    bytes_each = pairs // left.num_samples * num_groups * (1 + left.num_grads * right.num_grads) * 8
    for start, stop in pieces(left.num_samples, bytes_each):
        result[start:stop] = _positions_first(left, right, start, stop)
    return result


def _positions_first(left: OuterFactor, right: OuterFactor, start: int, stop: int) -> Tensor:
    """Rows ``start:stop`` of the inner products, the sum over pairs of positions taken last."""
    a, b = left.inputs[start:stop], right.inputs
    g, h = left.output_grads[start:stop], right.output_grads
    if a.shape[1] == a.shape[2] == b.shape[2] == 1:
        of_inputs = (a.flatten(1) @ b.flatten(1).T)[:, None, :, None]
        of_grads = g.flatten(0, 1).flatten(1) @ h.flatten(0, 1).flatten(1).T
        return of_grads.view(*g.shape[:2], *h.shape[:2]).mul_(of_inputs)
    a, b = (x.transpose(0, 1).flatten(1, 2) for x in (a, b))
    of_inputs = torch.bmm(a, b.transpose(1, 2))
    i, c, groups, t, _ = g.shape
    j, d, _, s, _ = h.shape
    g, h = (x.permute(2, 0, 1, 3, 4).flatten(1, 3) for x in (g, h))
    of_grads = torch.bmm(g, h.transpose(1, 2)).view(groups, i, c, t, j, d, s)
    return of_grads.mul_(of_inputs.view(groups, i, 1, t, j, 1, s)).sum((0, 3, 6))


def _of_tokens(left: TokenFactor, right: TokenFactor) -> Tensor:
    """Rows of the tokens that occur on both sides, numbered anew so that only they are formed."""
    present = torch.unique(left.tokens)
    if right is not left:
        other = torch.unique(right.tokens)
        present = present[torch.isin(present, other)]
        if present.numel() == 0:
            shape = (left.num_samples, left.num_grads, right.num_samples, right.num_grads)
            return left.output_grads.new_zeros(shape)
    compact = [_renumbered(side, present) for side in ([left] if left is right else [left, right])]
    return through_rows(compact[:1], compact[:1] if left is right else compact[1:])


def _renumbered(factor: TokenFactor, present: Tensor) -> TokenFactor:
    places = torch.searchsorted(present, factor.tokens).clamp_(max=present.numel() - 1)
    known = present[places] == factor.tokens
    return TokenFactor(places, factor.output_grads * known[:, None, :, None], present.numel())
