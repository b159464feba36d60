r"""What a call of a layer is made of, as rows: the patches a_nt that it saw, and the gradients g_nt at its outputs.

With N samples at T positions each, a 1 appended to a_nt if there is a bias, and r_n = \sum_t vec(g_nt a_nt^T) the
gradient of sample n,

    Kronecker    A = T mean_nt(a a^T),  B = mean_nt(g g^T)          F ~ A (x) B
    exact        F = mean_n(r r^T)
    moments      mean_n of r * r, and of r times the unit's bias gradient

all of them parts of the empirical Fisher matrix, of the labels that the user's own loss has. Source: Martens and Grosse
2015, §3; for convolutions Grosse and Martens 2016, §3.1 (derivatives at different positions taken for uncorrelated). As
everywhere among the optimizers the positions of a sequence count as samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgeom_optim.geometry.convolution_factor import ConvolutionFactor
from torchgeom_optim.geometry.factors import Factor
from torchgeom_optim.geometry.layers import factors_of_call, rule_for
from torchgeom_optim.geometry.moments import at_least_float32
from torchgeom_optim.geometry.sample_moments import SampleMoments, sample_moments
from torchgeom_optim.optimizers.layers import AffineLayer

__all__ = ["Rows", "fisher", "input_rows", "moments", "output_rows", "token_frequencies"]

# Of convolutions not many more positions than these are looked at, as those of one sample are correlated. (K-FAC on
# lenet, five seeds, 100 steps: losses with half and with twice as many differ by less than those of two seeds.)
_ENOUGH_POSITIONS = 256  # of one batch: averages run over many
_POSITIONS_PER_ENTRY = 2  # of a patch, or of the outputs at a position


class Rows(NamedTuple):
    """Rows r whose second moment share * r^T r is meant, and formed only when it is needed.

    Attributes:
        values: r of every group, shape [groups, n, q].
        share: weight of each.
    """

    values: Tensor
    share: float

    def second_moment(self) -> Tensor:
        """The matrices, [groups, q, q]."""
        return torch.bmm(self.values.transpose(1, 2), self.values).mul_(self.share)

    def mean_squares(self) -> Tensor:
        """Their diagonals, [groups, q]."""
        return self.values.square().sum(1).mul_(self.share)


def input_rows(layer: AffineLayer, x: Tensor, output_shape: Sequence[int]) -> Rows:
    """The patches of a linear layer or a convolution, with a 1 if there is a bias; weighted for A.

    Args:
        layer: not an embedding.
        x: its input.
        output_shape: of what it returned.

    Returns:
        The rows; a view of the input where it can be.
    """
    has_bias = layer.bias is not None
    if not layer.spatial_axes:
        rows = at_least_float32(x.reshape(1, -1, x.shape[-1]))
        return Rows(F.pad(rows, (0, 1), value=1.0) if has_bias else rows, 1.0 / max(rows.shape[1], 1))
    x = at_least_float32(x if x.dim() == layer.spatial_axes + 2 else x[None])
    no_grads = x.new_empty(()).expand(len(x), 1, *output_shape[layer.channel_axis :])
    rule = rule_for(layer.modules[0])
    assert rule is not None  # every layer that has a rule here has one there
    factor = rule.factors(layer.modules[0], x, no_grads, ("weight",))["weight"]
    assert isinstance(factor, ConvolutionFactor)
    rows = _patches(factor, with_one=has_bias)
    return Rows(rows, factor.num_positions / max(rows.shape[1], 1))


def output_rows(layer: AffineLayer, g: Tensor) -> Rows:
    """The output gradients, weighted for B."""
    if layer.spatial_axes:
        positions = g.shape[-layer.spatial_axes :]
        k = _stride(g.numel() // g.shape[layer.channel_axis] // math.prod(positions), positions, len(layer.weight))
        some: tuple[Any, ...] = (..., *(_every(k, size) for size in positions))
        g = g[some]
    g = at_least_float32(g).movedim(layer.channel_axis, -1)
    rows = g.reshape(-1, layer.groups, g.shape[-1] // layer.groups).transpose(0, 1)
    return Rows(rows, 1.0 / max(rows.shape[1], 1))


def token_frequencies(layer: AffineLayer, tokens: Tensor) -> Tensor:
    """A of an embedding, whose inputs are one-hot: diagonal, [1, num_embeddings]."""
    tokens = tokens.reshape(-1)
    ones = torch.ones(tokens.shape, dtype=torch.promote_types(layer.weight.dtype, torch.float32), device=tokens.device)
    return ones.new_zeros(len(layer.weight)).index_add_(0, tokens, ones)[None] / max(len(tokens), 1)


def fisher(layer: AffineLayer, x: Tensor, g: Tensor) -> Tensor:
    """F, shape [1, P, P] in the order of the rows [weight, bias] of the units."""
    rows = _factor(layer, x, g).rows()[:, 0]
    if layer.is_embedding:  # units are the columns
        rows = rows.view(len(rows), *layer.weight.shape).transpose(1, 2).flatten(1)
    if layer.bias is not None:
        of_bias = _bias_grads(layer, g)
        rows = torch.cat([rows.view(*of_bias.shape, -1), of_bias[:, :, None]], 2).flatten(1)
    return torch.mm(rows.t(), rows).div_(max(len(rows), 1))[None]


def moments(layer: AffineLayer, x: Tensor, g: Tensor, *, with_row: bool) -> SampleMoments:
    """Moments of the samples' gradients in the shapes of the parameters; of an embedding transposed, units first."""
    of_bias = None if layer.bias is None else _bias_grads(layer, g)
    found = sample_moments(_factor(layer, x, g), of_bias, with_row=with_row)
    weight = found.weight.view(layer.weight.shape)
    row = None if found.bias_row is None else found.bias_row.view(layer.weight.shape)
    return SampleMoments(weight.t() if layer.is_embedding else weight, row, found.bias)


def _bias_grads(layer: AffineLayer, g: Tensor) -> Tensor:
    """Of every sample, [N, m]."""
    g = at_least_float32(g)
    if not layer.spatial_axes:
        return g.reshape(-1, g.shape[-1])
    g = g.flatten(-layer.spatial_axes).sum(-1)
    return g if g.dim() == 2 else g[None]


def _factor(layer: AffineLayer, x: Tensor, g: Tensor) -> Factor:
    """Of the weight, positions of sequences as samples."""
    module = layer.modules[0]
    if layer.spatial_axes:
        if x.dim() == layer.spatial_axes + 1:
            x, g = x[None], g[None]
    else:
        x = x.reshape(-1) if layer.is_embedding else x.reshape(-1, x.shape[-1])
        g = g.reshape(-1, g.shape[-1])
    rule = rule_for(module)
    assert rule is not None  # every layer that has a rule here has one there
    return factors_of_call(rule, module, x, g[:, None], ("weight",))["weight"]


def _stride(num_samples: int, positions: Sequence[int], num_entries: int) -> int:
    """Every how many-th position of each axis is enough."""
    enough = max(_ENOUGH_POSITIONS, _POSITIONS_PER_ENTRY * num_entries)
    return max(1, round(math.pow(num_samples * math.prod(positions) / enough, 1 / max(len(positions), 1))))


def _every(k: int, size: int) -> slice:
    """Each k-th position of an axis, from the middle of the first k, so that borders count for their share."""
    return slice(min((k - 1) // 2, size - 1), None, k)


def _patches(factor: ConvolutionFactor, *, with_one: bool) -> Tensor:
    """Patches at enough positions, in the weight's order, [groups, n, channels * kernel (+ 1)]."""
    x, sizes = factor.inputs, factor.output_grads.shape[3:]
    k = _stride(factor.num_samples, sizes, factor.unit_numel)
    if any(factor.padding):
        x = F.pad(x, [pad for p in reversed(factor.padding) for pad in (p, p)])
    shape = x.shape[1] // factor.groups, *x.shape[2:]
    seen = tuple(range(0, size * s, s)[_every(k, size)] for size, s in zip(sizes, factor.stride, strict=True))
    pixels = _pixels(tuple(shape), seen, factor.kernel_size, factor.dilation, with_one, x.device)
    rows = x.reshape(factor.num_samples * factor.groups, -1).index_select(1, pixels)
    rows = rows.view(factor.num_samples, factor.groups, -1, factor.unit_numel + with_one)
    if with_one:
        rows[..., -1] = 1.0
    return rows.transpose(0, 1).flatten(1, 2)


@lru_cache(maxsize=64)  # making them takes as long as using them
def _pixels(
    shape: tuple[int, ...],
    seen: tuple[range, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    with_one: bool,
    device: torch.device,
) -> Tensor:
    """Where the entries of the patches stand in an image [channels, *spatial]: position by position."""
    numbers = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    positions: tuple[Any, ...] = 0, *(slice(r.start, r.stop, r.step) for r in seen)
    entries: tuple[Any, ...] = (
        slice(None), *(slice(0, (n - 1) * d + 1, d) for n, d in zip(kernel_size, dilation, strict=True))
    )  # fmt: skip
    pixels = numbers[positions].reshape(-1, 1) + numbers[entries].reshape(1, -1)
    return (F.pad(pixels, (0, 1)) if with_one else pixels).reshape(-1).to(device)
