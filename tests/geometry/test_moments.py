"""Moments against their definitions, pooled and averaged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry.moments import (
    Moments,
    channel_moments,
    one_hot_moments,
    pooled_moments,
    running_moments,
)

SEEDS = st.integers(0, 10_000)


def by_definition(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and mean squared deviation, one channel after the other."""
    means, variances = [], []
    for channel in x.unbind(channel_dim):
        values = channel.reshape(-1)
        mean = sum(values.tolist()) / len(values)
        means.append(mean)
        variances.append(sum((value - mean) ** 2 for value in values.tolist()) / len(values))
    return torch.tensor(means, dtype=x.dtype), torch.tensor(variances, dtype=x.dtype)


def draw(seed: int, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [
        ((7, 3), -1),
        ((3,), -1),
        ((4, 5, 3), -1),
        ((4, 5, 2, 3), -1),
        ((4, 3, 5), -2),
        ((3, 5), -2),
        ((5, 5), -2),
        ((4, 3, 5, 2), -3),
        ((3, 5, 2), -3),
        ((4, 3, 2, 5, 2), -4),
        ((4, 3, 1, 1), -3),
        ((1, 3), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last"])
def test_moments_of_a_channel_run_over_all_else(shape, channel_dim, layout):
    x = draw(0, *shape, mean=2.0)
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "channels last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    moments = channel_moments(x, channel_dim)
    mean, variance = by_definition(x, channel_dim)
    assert moments.count == x.numel() // len(mean)
    torch.testing.assert_close((moments.mean, moments.variance), (mean, variance), **tolerance())
    if moments.count > 1:
        with pytest.raises(AssertionError):  # with 1 / (count - 1) it would be another number
            torch.testing.assert_close(moments.variance, x.movedim(channel_dim, -1).flatten(0, -2).var(0))


@pytest.mark.parametrize("shape", [(4, 9), (4, 9, 5, 5)], ids=str)
def test_a_mean_far_from_zero_costs_no_digits(shape):
    x = draw(0, *shape).float() + 3000.0
    moments = channel_moments(x, -1 if len(shape) == 2 else -3)
    _, variance = by_definition(x.double(), 1)
    torch.testing.assert_close(moments.variance.double(), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_coarse_inputs_are_averaged_in_float32(dtype):
    x = draw(0, 50, 4, mean=1.0).to(dtype)
    moments = channel_moments(x)
    assert moments.mean.dtype == moments.variance.dtype == torch.float32
    torch.testing.assert_close(moments.variance.double(), by_definition(x.double(), 1)[1], rtol=1e-5, atol=0)


def test_inputs_are_not_modified_and_nothing_is_differentiated():
    x = draw(0, 5, 3).requires_grad_()
    before = x.detach().clone()
    moments = channel_moments(x)
    assert not moments.mean.requires_grad
    assert torch.equal(x, before)


LARGE = {
    "a batch of small images": ((300, 2, 32, 32), -3),
    "all of a data set": ((3000, 1, 14, 14), -3),
    "two positions": ((20_000, 2, 3), -1),
    "sequences": ((64, 300, 3), -1),
    "one long signal": ((2, 40_000), -2),
    "no positions": ((30_000, 3), -1),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("bright", ["first", "last", "every other"])
def test_the_subsample_of_a_large_input_sees_what_differs_between_positions(name, bright):
    """Along every axis of positions, one part is far brighter than the rest."""
    shape, channel_dim = LARGE[name]
    x = draw(0, *shape)
    channel = channel_dim % x.dim()
    for axis in range(1 if channel > 0 else channel + 1, x.dim()):
        if axis == channel:
            continue
        size = x.shape[axis]
        part = {"first": slice(0, size // 2), "last": slice(size // 2, None), "every other": slice(0, None, 2)}[bright]
        x = x.movedim(axis, 0)
        x[part] += 4.0
        x = x.movedim(0, axis)
    moments = channel_moments(x, channel_dim)
    rows = x.movedim(channel_dim, -1).reshape(-1, shape[channel])
    assert moments.count >= min(2048, len(rows) // 2)
    spread = rows.std(0)
    torch.testing.assert_close(moments.mean / spread, rows.mean(0) / spread, rtol=0, atol=0.25)
    torch.testing.assert_close(moments.variance / spread**2, torch.ones_like(spread), rtol=0, atol=0.4)


@given(SEEDS, st.integers(1, 7))
def test_the_order_of_samples_does_not_matter(seed, num_samples):
    x = draw(seed, num_samples, 3, 4)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    one, two = channel_moments(x, 1), channel_moments(x[order], 1)
    torch.testing.assert_close(two, one, **tolerance(condition=10))


@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_pooled_moments_are_those_of_the_union(seed, sizes):
    x = draw(seed, sum(sizes), 4, scale=2.0, mean=1.0) + torch.arange(sum(sizes), dtype=torch.float64)[:, None]
    pooled = pooled_moments([channel_moments(part) for part in x.split(sizes)])
    torch.testing.assert_close(pooled, channel_moments(x), **tolerance(condition=1e2))


def test_means_of_moments_are_not_the_moments_of_the_union():
    x = draw(0, 6, 2)
    parts = [channel_moments(part) for part in x.split([1, 5])]
    naive = Moments(6, (parts[0].mean + parts[1].mean) / 2, (parts[0].variance + parts[1].variance) / 2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(naive, channel_moments(x))


@given(SEEDS, st.floats(0.0, 0.99), st.integers(1, 12))
def test_running_moments_are_the_running_averages_of_the_paper(seed, decay, steps):
    mx = mx2 = running = None
    for step in range(steps):
        x = draw(seed + step, 9, 3, scale=1.0 + step % 3, mean=step % 4)
        batch = channel_moments(x)
        now, now2 = x.sum(0) / 9, (x * x).sum(0) / 9
        mx = now if mx is None else decay * mx + (1 - decay) * now
        mx2 = now2 if mx2 is None else decay * mx2 + (1 - decay) * now2
        running = running_moments(running or batch, batch, decay)
    torch.testing.assert_close(running.mean, mx, **tolerance(condition=1e2))
    torch.testing.assert_close(running.variance, mx2 - mx * mx, **tolerance(condition=1e3))
    torch.testing.assert_close(running.about_zero().variance, mx2, **tolerance(condition=1e3))
    assert not running.about_zero().mean.any()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_one_hot_moments_are_those_of_the_one_hot_encoding(index_dtype):
    indices = torch.tensor([[0, 2, 2], [4, 2, 0]])
    x = torch.nn.functional.one_hot(indices.reshape(-1), 6).double()
    moments = one_hot_moments(indices.to(index_dtype), 6, torch.float64)
    torch.testing.assert_close(moments, channel_moments(x), **tolerance())
    assert one_hot_moments(indices, 6, torch.bfloat16).mean.dtype == torch.float32


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_batches_without_a_variance_leave_no_trace(value):
    def batch(mean: float, variance: float) -> Moments:
        return Moments(4, torch.tensor([mean, 1.0]), torch.tensor([variance, 2.0]))

    bad, good, other = batch(1e30, value), batch(3.0, 4.0), batch(5.0, 1.0)
    expected = running_moments(good, other, 0.9)
    for batches in ((bad, good, other), (good, bad, other), (bad, bad, good, other), (batch(1e30, 1.0), good, other)):
        running = batches[0]
        for now in batches:
            running = running_moments(running, now, 0.9)
        torch.testing.assert_close(running.variance[0], expected.variance[0])
        torch.testing.assert_close(running.mean[0], expected.mean[0])
