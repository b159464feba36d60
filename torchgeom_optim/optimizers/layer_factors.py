r"""What a call of a layer says about its Fisher matrix: factors of a Kronecker product, or the matrix itself.

With the patches a_nt that a layer sees of sample n at position t (a 1 appended if it has a bias) and the gradients g_nt
at its outputs, of N samples at T positions,

    Kronecker    A = T mean_nt(a a^T),  B = mean_nt(g g^T)          F ~ A (x) B
    exact        F = mean_n(r r^T),  r = \sum_t vec(g_nt a_nt^T)

This is the empirical Fisher matrix, of the labels that the user's own loss has. Source: Martens and Grosse 2015, §3;
for convolutions Grosse and Martens 2016, §3.1 (derivatives at different positions taken for uncorrelated). As
everywhere among the optimizers the positions of a sequence count as samples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torchgeom_optim.geometry.convolution_factor import ConvolutionFactor
from torchgeom_optim.geometry.factors import Factor, OuterFactor, TokenFactor
from torchgeom_optim.geometry.layers import factors_of_call, plain_arithmetic, rule_for
from torchgeom_optim.optimizers.layers import AffineLayer, LayerCall, SeenCall

__all__ = ["FactorCall", "FactorKind", "PassCounter", "SeenFactors", "pooled_factors"]

FactorKind = Literal["kronecker", "kronecker_diagonal", "exact"]

# Of convolutions not many more positions than these are looked at, as those of one sample are correlated.
_ENOUGH_POSITIONS = 1024
_POSITIONS_PER_ENTRY = 8  # of a patch, or of the outputs at a position


class SeenFactors(SeenCall):
    """A call with its factors.

    Attributes:
        factors: A and B (or its diagonal), or F; of the gradients as autograd scaled them.
        number_of_pass: which backward pass reached it; calls of one pass share its mean over samples.
    """

    factors: tuple[Tensor, ...]
    number_of_pass: int


class PassCounter:
    """Numbers the backward passes; one that a reentrant checkpoint starts inside another is part of that one."""

    def __init__(self) -> None:
        self._number = -1
        self._is_open = False

    def current(self) -> int:
        """Number of the pass that is under way, unique in this process."""
        if not self._is_open:
            self._is_open, self._number = True, next(_numbers)
            torch.autograd.Variable._execution_engine.queue_callback(self.close)
        return self._number

    def close(self) -> None:
        """What comes next is another pass."""
        self._is_open = False


_numbers = itertools.count()


class FactorCall(LayerCall):
    """A call whose factors are taken when a backward pass reaches it."""

    def __init__(self, layer: AffineLayer, x: Tensor, y: Tensor, kind: FactorKind, passes: PassCounter) -> None:
        super().__init__(layer, x, y, [], with_moments=False, with_output_grads=False)
        self._inputs: Tensor | None = x.detach()
        self._kind = kind
        self._passes = passes
        self._input_factor: Tensor | None = None
        self._output_shape = y.shape

    def summarise(self) -> None:
        """Reduce the input to its factor, and let go of it; an exact matrix cannot be had from the input alone."""
        if self._inputs is None or self._kind == "exact":
            return
        x, self._inputs = self._inputs, None
        dtype = torch.promote_types(self._layer.weight.dtype, torch.float32)
        no_grads = torch.empty((), dtype=dtype, device=x.device).expand(self._output_shape)
        with plain_arithmetic(x.device.type):
            self._input_factor = _input_factor(_factor(self._layer, x, no_grads), self._layer.bias is not None)

    def on_output_grad(self, output_grad: Tensor) -> None:
        """Count the call, once."""
        is_first = not self._counted
        super().on_output_grad(output_grad)
        if not is_first:
            return
        self.summarise()
        with plain_arithmetic(output_grad.device.type):
            if self._kind == "exact":
                assert self._inputs is not None
                x, self._inputs = self._inputs, None
                factors: tuple[Tensor, ...] = (_fisher(self._layer, x, output_grad.detach()),)
            else:
                assert self._input_factor is not None
                factors = (self._input_factor, _output_factor(self._layer, output_grad.detach(), self._kind))
        seen = SeenFactors(*self._layer.calls[-1])
        seen.factors, seen.number_of_pass = factors, self._passes.current()
        self._layer.calls[-1] = seen


def pooled_factors(calls: Sequence[SeenCall], *, mean_reduction: bool) -> tuple[Tensor, ...]:
    """Factors of the union of a step's calls, or none.

    Args:
        calls: of one layer, since the last step.
        mean_reduction: whether hooks deliver g / N, N the samples of the whole step, which is undone.

    Returns:
        (A, B), (F,) or (), as :class:`SeenFactors`.
    """
    seen = [call for call in calls if isinstance(call, SeenFactors)]
    if not seen:
        return ()
    if len(seen) == 1 and not mean_reduction:
        return seen[0].factors
    samples, applications = sum(c.num_samples for c in seen), sum(c.num_applications for c in seen)
    passes: dict[int, int] = {}  # each brings the samples of its largest call; k of them share one mean
    for call in seen:
        passes[call.number_of_pass] = max(call.num_samples, passes.get(call.number_of_pass, 0))
    undone = float(sum(passes.values()) ** 2) if mean_reduction else 1.0
    of_samples = [call.num_samples / samples for call in seen]
    if len(seen[0].factors) == 1:
        return (_weighted([call.factors[0] for call in seen], [share * undone for share in of_samples]),)
    of_outputs = [call.num_applications / applications * undone for call in seen]
    a, b = ([call.factors[k] for call in seen] for k in (0, 1))
    return (_weighted(a, of_samples), _weighted(b, of_outputs))


def _weighted(parts: list[Tensor], weights: list[float]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


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


def _input_factor(factor: Factor, has_bias: bool) -> Tensor:
    if isinstance(factor, TokenFactor):  # one-hot inputs: A is diagonal
        tokens = factor.tokens.reshape(-1)
        ones = torch.ones(tokens.shape, dtype=factor.output_grads.dtype, device=tokens.device)
        counts = ones.new_zeros(factor.num_embeddings).index_add_(0, tokens, ones)
        return counts[None] / len(tokens)
    if isinstance(factor, ConvolutionFactor):
        num_positions, kernel = factor.num_positions, math.prod(factor.kernel_size)
        patches = _thinned(factor).patches().movedim(1, 0).flatten(1, 2)  # [groups, observations, kernel * channels]
        # The small matrix is put into the weight's order, channels before kernel, not the patches.
        order = torch.arange(patches.shape[-1], device=patches.device).view(kernel, -1).t().reshape(-1)
        second = torch.bmm(patches.transpose(1, 2), patches)[:, order][:, :, order]
        first = _sums(patches)[:, order]
    else:
        assert isinstance(factor, OuterFactor)
        num_positions = 1
        patches = factor.inputs.movedim(1, 0).flatten(1, 2)
        second, first = torch.bmm(patches.transpose(1, 2), patches), _sums(patches)
    share = num_positions / max(patches.shape[1], 1)
    if has_bias:
        corner = first.new_full((len(first), 1, 1), float(patches.shape[1]))
        second = torch.cat([torch.cat([second, first[:, :, None]], 2), torch.cat([first[:, None], corner], 2)], 1)
    return second.mul_(share)


def _sums(patches: Tensor) -> Tensor:
    """Over axis 1; a product with ones is several times faster than a sum over rows."""
    return torch.matmul(patches.new_ones(patches.shape[1]), patches)


def _stride(num_samples: int, positions: Sequence[int], num_entries: int) -> int:
    """Every how many-th position of each axis is enough."""
    enough = max(_ENOUGH_POSITIONS, _POSITIONS_PER_ENTRY * num_entries)
    return max(1, int((num_samples * math.prod(positions) / enough) ** (1 / max(len(positions), 1))))


def _thinned(factor: ConvolutionFactor) -> ConvolutionFactor:
    """At every k-th position of every axis, if there are more than enough."""
    axes = len(factor.kernel_size)
    k = _stride(factor.num_samples, factor.output_grads.shape[3:], factor.unit_numel)
    if k == 1:
        return factor
    every = (slice(None), slice(None), slice(None), *[slice(None, None, k)] * axes)
    stride = tuple(step * k for step in factor.stride)
    return dataclasses.replace(factor, output_grads=factor.output_grads[every], stride=stride)


def _output_factor(layer: AffineLayer, g: Tensor, kind: str) -> Tensor:
    if layer.spatial_axes:
        positions = g.shape[-layer.spatial_axes :]
        k = _stride(g.numel() // g.shape[layer.channel_axis] // math.prod(positions), positions, len(layer.weight))
        for axis in range(-layer.spatial_axes, 0):
            g = g.movedim(axis, 0)[::k].movedim(0, axis)
    g = g.to(torch.promote_types(g.dtype, torch.float32)).movedim(layer.channel_axis, -1)
    g = g.reshape(-1, layer.groups, g.shape[-1] // layer.groups).transpose(0, 1)
    count = max(g.shape[1], 1)
    if kind == "kronecker_diagonal":
        return g.square().sum(1).div_(count)
    return torch.bmm(g.transpose(1, 2), g).div_(count)


def _fisher(layer: AffineLayer, x: Tensor, g: Tensor) -> Tensor:
    factor = _factor(layer, x, g)
    rows = factor.rows()[:, 0]
    if layer.is_embedding:  # units are the columns
        rows = rows.view(len(rows), *layer.weight.shape).transpose(1, 2).flatten(1)
    if layer.bias is not None:
        g = g.to(rows.dtype).movedim(layer.channel_axis, -1)
        g = g.reshape(len(rows), -1, g.shape[-1]).sum(1)
        rows = torch.cat([rows.view(*g.shape, -1), g[:, :, None]], 2).flatten(1)
    return torch.mm(rows.t(), rows).div_(max(len(rows), 1))[None]
