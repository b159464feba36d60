"""Numbers of the trust region per unit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import tolerance
from torchgeom_optim.geometry.unit_trust import relative_change, spread_floor, unit_scale


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
