"""Numbers of the trust region per unit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import tolerance
from torchgeom_optim.geometry.unit_trust import expected_change, relative_change, spread_floor, unit_scale


def positive(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + 1e-3


@given(seed=st.integers(0, 1000), exponent=st.integers(-6, 6))
def test_a_scaled_direction_moves_a_unit_by_its_spread_at_most(seed, exponent):
    change, expected, spread = positive(seed, 10.0**exponent), positive(seed + 1, 10.0**exponent), positive(seed + 2)
    relative = relative_change(change, expected, spread)
    scale = unit_scale(relative, torch.zeros((), dtype=torch.float64))
    moved = scale.square() * change / spread
    assert bool((moved <= 1 + 1e-12).all())
    larger = change >= expected
    torch.testing.assert_close(moved[larger], torch.ones_like(moved[larger]), **tolerance())
    floored = unit_scale(relative, relative.mean() * 0.01)
    assert bool((floored < scale).all())


def test_directions_of_zero_have_a_finite_scale():
    zeros = torch.zeros(3)
    assert bool(unit_scale(relative_change(zeros, zeros, torch.ones(3)), torch.zeros(())).isfinite().all())


def test_the_floor_is_a_share_of_the_layer_and_of_its_inputs():
    floors = spread_floor(torch.tensor([2.0, 0.0]).double(), torch.tensor([5.0, 3.0]).double())
    torch.testing.assert_close(floors, torch.tensor([0.02 + 5e-4, 3e-4], dtype=torch.float64), **tolerance())


def averages(changes: torch.Tensor, decay: float = 0.95) -> torch.Tensor:
    """The running average after each batch, as the optimizer takes it."""
    found, past = [], changes[0]
    for change_sq in changes:
        past = expected_change(past, change_sq, decay)
        found.append(past)
    return torch.stack(found)


def lognormal(number: int) -> torch.Tensor:
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(0)).exp()


def test_the_average_is_a_running_one_that_its_first_batch_initialises():
    changes = lognormal(50)
    expected = changes[0].clone()
    for change_sq, average in zip(changes, averages(changes, 0.9), strict=True):
        expected = 0.9 * expected + 0.1 * change_sq
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("huge", [math.inf, 1e38])
def test_overflows_at_the_start_leave_no_trace(huge, number):
    """Three hundred steps: an average without these batches, and one that an ordinary batch stands in the place of."""
    changes = lognormal(300)
    overflowed = changes.clone()
    overflowed[:number, 0] = huge
    found = averages(overflowed)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 1:], averages(changes)[:, 1:], rtol=0, atol=0)  # of others
    torch.testing.assert_close(found[number:, 0], averages(changes[number:])[:, 0], rtol=0, atol=0)
    bias = (found[-1, 0] / averages(changes)[-1, 0] - 1).abs()
    assert float(bias) < 1e-5  # 0.95^300 is 2e-7


def test_an_overflow_later_on_is_passed_over():
    changes = lognormal(300)
    overflowed = changes.clone()
    overflowed[20, 0] = math.inf
    kept = torch.cat([changes[:20], changes[21:]])
    torch.testing.assert_close(averages(overflowed)[-1, 0], averages(kept)[-1, 0], rtol=0, atol=0)
    assert torch.equal(averages(overflowed)[20, 0], averages(overflowed)[19, 0])
