"""First and second moments of a layer's inputs, pooled over calls and averaged over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Moments",
    "at_least_float32",
    "channel_moments",
    "moments_of",
    "one_hot_moments",
    "pooled_moments",
    "running_moments",
    "sampled",
]

# More observations per channel do not sharpen an average over steps: positions of one sample are correlated.
_ENOUGH_OBSERVATIONS = 4096


class Moments(NamedTuple):
    """Mean and (biased) variance of each channel over a number of observations.

    Attributes:
        count: observations per channel.
        mean: mu, shape [n], units of the input.
        variance: E[(x - mu)^2] with 1/count, shape [n], units of the input squared.
    """

    count: int  # type: ignore[assignment]  # not tuple.count
    mean: Tensor
    variance: Tensor

    def about_zero(self) -> Moments:
        """The same mean squares, as moments of inputs from which no mean is subtracted."""
        return Moments(self.count, torch.zeros_like(self.mean), torch.addcmul(self.variance, self.mean, self.mean))


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself if it is in single precision or better, else a float32 copy."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def channel_moments(x: Tensor, channel_dim: int = -1) -> Moments:
    """Moments of every channel over all other axes, in float32 or better.

    Two passes (mean, then squared deviations), so that a mean far from zero costs no digits. Where there are more than
    4096 observations per channel, every k-th position is taken, the same ones of every sample and about 64 at least,
    with k prime to the last axis of positions so that they spread over all rows and columns.
    Source: Lafond, Vasilache and Bottou 2017, §2.3 and App. B ("•": also over positions); the subsample is ours.

    Args:
        x: samples in axis 0, ``x.shape[channel_dim]`` channels, any other axes are positions.
        channel_dim: the axis that is kept.

    Returns:
        The moments over the observations used.

    Example:
        >>> channel_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).variance
        tensor([1., 0.])
    """
    return moments_of(sampled(x, channel_dim))


def sampled(x: Tensor, channel_dim: int = -1) -> Tensor:
    """The observations that :func:`channel_moments` goes by, as a view where that is possible.

    Args:
        x: as there.
        channel_dim: as there.

    Returns:
        Shape [observations, n], or [samples, n, positions].
    """
    x = x.detach()
    channel_dim %= x.dim()
    if channel_dim == x.dim() - 1 < 2:
        return x.reshape(-1, x.shape[-1])
    n, num_samples = x.shape[channel_dim], len(x) if channel_dim > 0 else 1
    num_positions = x.numel() // max(n * num_samples, 1)
    stride = _position_stride(num_samples, num_positions, x.shape[-2 if channel_dim == x.dim() - 1 else -1])
    if x.stride(channel_dim) == 1 or channel_dim > 1:
        x = x.movedim(channel_dim, -1).reshape(num_samples, -1, n)  # a view also of a channels-last image
        return x[:, ::stride].flatten(0, 1)
    return x.reshape(num_samples, n, -1)[:, :, ::stride]


def moments_of(observations: Tensor) -> Moments:
    """Moments of each channel over observations as :func:`sampled` returns them, in float32 or better."""
    return _moments(at_least_float32(observations), (0,) if observations.dim() == 2 else (0, 2))


def _moments(x: Tensor, axes: tuple[int, ...]) -> Moments:
    """Of channels in axis 1; ``axes`` are the others."""
    count = x.numel() // max(x.shape[1], 1)
    # One operation in place of the five below, equal in effect; where there are positions CPUs take four times as long.
    if count > 0 and (x.device.type == "cuda" or (x.device.type == "cpu" and x.dim() == 2)):
        return Moments(count, *torch.batch_norm_update_stats(x.contiguous(), None, None, 0.0))
    mean = x.mean(axes)
    return Moments(count, mean, (x - (mean if x.dim() == 2 else mean[:, None])).square_().mean(axes))


def _position_stride(num_samples: int, num_positions: int, width: int) -> int:
    # However many samples there are, a layer is judged by 64 of its positions or so: they differ systematically.
    stride = min(num_samples * num_positions // _ENOUGH_OBSERVATIONS, num_positions // 64)
    while stride > 1 and math.gcd(stride, width) > 1:
        stride += 1
    return max(stride, 1)


def one_hot_moments(indices: Tensor, num_categories: int, dtype: torch.dtype) -> Moments:
    """Moments of the one-hot encoding of indices: frequencies f and f (1 - f).

    Args:
        indices: integers in [0, num_categories), any shape.
        num_categories: n.
        dtype: of the result; float32 at least is used.

    Returns:
        The moments over ``indices.numel()`` observations, each of shape [n].
    """
    flat = indices.reshape(-1)
    dtype = torch.promote_types(dtype, torch.float32)
    ones = torch.ones(flat.shape, dtype=dtype, device=flat.device)
    frequency = torch.zeros(num_categories, dtype=dtype, device=flat.device).index_add_(0, flat, ones)
    frequency /= max(len(flat), 1)
    return Moments(len(flat), frequency, frequency * (1 - frequency))


def pooled_moments(parts: Sequence[Moments]) -> Moments:
    """Moments of the union of several sets of observations.

        mu = sum_k c_k mu_k / c,    v = sum_k c_k (v_k + (mu_k - mu)^2) / c

    so that several calls of a layer (gradient accumulation, reuse) count like one call with all samples.

    Args:
        parts: at least one; counts c_k, means mu_k, variances v_k.

    Returns:
        Moments over c = sum_k c_k observations.
    """
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    mean: Tensor = sum(part.mean * (part.count / count) for part in parts)  # type: ignore[assignment]
    variance = sum((part.variance + (part.mean - mean).square()) * (part.count / count) for part in parts)
    return Moments(count, mean, variance)  # type: ignore[arg-type]


def running_moments(past: Moments, batch: Moments, decay: float) -> Moments:
    r"""Running averages of mean and mean square, kept as mean and variance.

    With lam = decay, mx <- lam mx + (1 - lam) <x> and mx2 <- lam mx2 + (1 - lam) <x^2> give

        mu' = lam mu + (1 - lam) m,    v' = lam v + (1 - lam) s + lam (1 - lam) (m - mu)^2

    with m, s mean and variance of the batch. Source: Lafond, Vasilache and Bottou 2017, §2.3; there mx2 is stored,
    which loses the digits of the variance where the mean is large. The first batch initialises both (no bias to 0).
    A channel whose squares overflow in a batch keeps its past, and one whose past is beyond all averages begins anew.

    Args:
        past: the averages so far; before the first batch, the batch itself. Not modified.
        batch: the moments of the batch.
        decay: lam, the weight of the past, in [0, 1).

    Returns:
        The new averages, with the batch's count. Elementwise: vectors of several layers may be joined.
    """
    shift = batch.mean - past.mean
    mean = torch.lerp(past.mean, batch.mean, 1 - decay)
    variance = torch.lerp(past.variance, batch.variance, 1 - decay).addcmul_(shift, shift, value=decay * (1 - decay))
    if variance.device.type != "cpu" or not math.isfinite(variance.sum().item()):  # there nobody has to wait for it
        largest = torch.finfo(variance.dtype).max / 16
        goes_on, is_new = variance < largest, batch.variance < largest
        mean = torch.where(is_new, torch.where(goes_on, mean, batch.mean), past.mean)
        variance = torch.where(is_new, torch.where(goes_on, variance, batch.variance), past.variance)
    return Moments(batch.count, mean, variance)
