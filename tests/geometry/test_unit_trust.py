"""Numbers of the trust region per unit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import tolerance
from torchgeom_optim.geometry import unit_trust
from torchgeom_optim.geometry.unit_trust import expected_slope, spread_floor, turned_back, unit_scale


def positive(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + 1e-3


@given(seed=st.integers(0, 1000), exponent=st.integers(-6, 6))
def test_a_scaled_direction_moves_a_unit_by_its_spread_at_most(seed, exponent):
    change, spread, expected = positive(seed, 10.0**exponent), positive(seed + 2), positive(seed + 1, 10.0**exponent)
    slope = change * spread
    bound = torch.maximum(slope, expected)
    scale = unit_scale(spread, bound, torch.zeros((), dtype=torch.float64))
    moved = scale.square() * change / spread
    assert bool((moved <= 1 + 1e-12).all())
    larger = slope >= expected
    torch.testing.assert_close(moved[larger], torch.ones_like(moved[larger]), **tolerance())
    assert bool((unit_scale(spread, bound, bound.mean() * 0.01) < scale).all())


@given(seed=st.integers(0, 1000), exponent=st.integers(-6, 6))
def test_a_rescaled_unit_moves_by_the_same_share(seed, exponent):
    """Its outputs times kappa, its gradient divided by it: kappa^2 c then goes with d / kappa as kappa does with y."""
    change, spread, kappa = positive(seed), positive(seed + 2), 10.0**exponent
    scale = unit_scale(spread, change * spread, (change * spread).mean() * 0.01)
    change, spread = change / kappa**2, spread * kappa**2
    other = unit_scale(spread, change * spread, (change * spread).mean() * 0.01)
    torch.testing.assert_close(other, scale * kappa**2, **tolerance())


def test_directions_of_zero_have_a_finite_scale_and_slopes_without_end_have_none():
    zeros = torch.zeros(3)
    assert bool(unit_scale(torch.ones(3), zeros, torch.zeros(())).isfinite().all())
    torch.testing.assert_close(unit_scale(torch.ones(3), zeros + math.inf, torch.zeros(())), zeros)


def test_the_floor_is_a_share_of_the_layer_and_of_its_inputs():
    floors = spread_floor(torch.tensor([2.0, 0.0]).double(), torch.tensor([5.0, 3.0]).double())
    torch.testing.assert_close(floors, torch.tensor([2e-3 + 5e-5, 3e-5], dtype=torch.float64), **tolerance())


def averages(slopes: torch.Tensor, decay: float = 0.95) -> torch.Tensor:
    """The running average after each batch, as the optimizer takes it."""
    found, past = [], slopes[0]
    for slope_sq in slopes:
        past = expected_slope(past, slope_sq, decay)
        found.append(past)
    return torch.stack(found)


def lognormal(number: int) -> torch.Tensor:
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(0)).exp()


def test_the_average_is_a_running_one_that_its_first_batch_initialises():
    slopes = lognormal(50)
    expected = slopes[0].clone()
    for slope_sq, average in zip(slopes, averages(slopes, 0.9), strict=True):
        expected = 0.9 * expected + 0.1 * slope_sq
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("huge", [math.inf, 1e38])
def test_overflows_at_the_start_leave_no_trace(huge, number):
    """Three hundred steps: an average without these batches, and one that an ordinary batch stands in the place of."""
    slopes = lognormal(300)
    overflowed = slopes.clone()
    overflowed[:number, 0] = huge
    found = averages(overflowed)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 1:], averages(slopes)[:, 1:], rtol=0, atol=0)  # of others
    torch.testing.assert_close(found[number:, 0], averages(slopes[number:])[:, 0], rtol=0, atol=0)
    bias = (found[-1, 0] / averages(slopes)[-1, 0] - 1).abs()
    assert float(bias) < 1e-5  # 0.95^300 is 2e-7


def test_an_overflow_later_on_is_passed_over():
    slopes = lognormal(300)
    overflowed = slopes.clone()
    overflowed[20, 0] = math.inf
    kept = torch.cat([slopes[:20], slopes[21:]])
    torch.testing.assert_close(averages(overflowed)[-1, 0], averages(kept)[-1, 0], rtol=0, atol=0)
    assert torch.equal(averages(overflowed)[20, 0], averages(overflowed)[19, 0])


@given(seed=st.integers(0, 1000), angle=st.floats(0.0, 0.3), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_of_the_spread_that_noise_adds_its_share_is_taken_back(seed, angle, share):
    """y - lr (s u + b y) for u at right angles to y, in numbers: y turns by the angle whose tangent is given."""
    g = torch.Generator().manual_seed(seed)
    y, u = torch.linalg.qr(torch.randn(50, 2, generator=g, dtype=torch.float64)).Q.T
    variance = torch.tensor([4.0, 9.0], dtype=torch.float64)  # of y, and of u
    lr, scale = 0.1, torch.tensor([10 * angle * 2.0 / 3.0], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_trust, "_TAKEN_BACK", share)
        b = turned_back(variance[:1], variance[1:], scale, lr)
    new = 2.0 * y - lr * (scale * 3.0 * u + b * 2.0 * y)
    growth = float(new.square().sum()) / 4.0 - 1
    assert growth == pytest.approx((1 - share) * angle**2, rel=1e-6, abs=angle**4 + 1e-12)


@given(seed=st.integers(0, 1000), exponent=st.integers(-6, 6))
def test_rescaling_changes_nothing_of_what_is_taken_back(seed, exponent):
    spread, change, scale, kappa = positive(seed), positive(seed + 1), positive(seed + 2), 10.0**exponent
    b = turned_back(spread, change, scale, 0.3)
    other = turned_back(spread * kappa**2, change / kappa**2, scale * kappa**2, 0.3)
    torch.testing.assert_close(other, b, **tolerance(condition=10))


def test_nothing_is_taken_back_of_what_does_not_move():
    zeros, ones, infinite = torch.zeros(2), torch.ones(2), torch.full((2,), math.inf)
    for case in ((zeros, ones, ones), (ones, zeros, ones), (ones, ones, zeros), (ones, infinite, zeros), (zeros,) * 3):
        torch.testing.assert_close(turned_back(*case, 0.3), zeros)
    torch.testing.assert_close(turned_back(ones, ones, ones, 0.0), zeros)
