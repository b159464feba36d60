"""Sloppiness of spectra whose numbers are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchgeom_optim.geometry.sloppiness import linear_range, num_for_trace_share, sloppiness, trace_share


def close(got: object, expected: object, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    got, expected = (torch.tensor(x, dtype=torch.float64) for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def geometric(num: int, decades_each: float) -> Tensor:
    return 10.0 ** (-decades_each * torch.arange(num, dtype=torch.float64))


def test_a_geometric_spectrum() -> None:
    numbers = sloppiness(geometric(41, 0.25))
    assert (numbers.rank, numbers.slope_range, numbers.num_stiff) == (41, (0, 40), 9)
    values = [numbers.decades, numbers.slope, numbers.slope_per_rank, numbers.stiff_fraction]
    close(values, [10.0, -0.25, -10.25, 9 / 41])
    ratio = 10**-0.25
    close(numbers.trace, (1 - ratio**41) / (1 - ratio))
    close(numbers.participation_ratio, (1 + ratio) / (1 - ratio))
    assert numbers.num_for_90_percent == 4
    assert numbers.slope_misfit < 1e-6


def test_it_prints_in_words() -> None:
    lines = str(sloppiness(10.0 ** -torch.arange(0, 5, 0.1, dtype=torch.float64))).splitlines()
    assert lines[0].startswith("50 of 50 eigenvalues above round-off (1.1e-14), over 4.9 decades; trace 4.86")
    assert lines[1] == "21 (42.0%) are stiff: at least 0.01 of the largest; 10 make up 90 % of the trace"
    assert lines[-1] == "numbers 1 to 50 fall evenly, by 4.9 decades in all"
    assert "nan" not in str(sloppiness(torch.ones(1)))


def test_a_stiff_head_and_a_drop_at_the_end_are_left_out_of_the_slope() -> None:
    head = torch.tensor([4.0, 3.0, 2.5, 2.0])
    middle = torch.linspace(0, -3, 91)
    tail = torch.linspace(-4.5, -8, 5)
    numbers = sloppiness(10 ** torch.cat([head, middle, tail]).double())
    close(numbers.slope, -3 / 90, rtol=0.05)
    first, last = numbers.slope_range
    assert first in (3, 4)
    assert 92 <= last <= 96
    assert numbers.slope_misfit <= 0.1
    close(numbers.decades, 12.0)


def test_round_off_is_not_counted() -> None:
    noise = 1e-20 * torch.randn(30, dtype=torch.float64)
    numbers = sloppiness(torch.cat([noise, geometric(10, 0.5)]))
    assert (numbers.num_eigenvalues, numbers.rank) == (40, 10)
    close(numbers.decades, 4.5)
    assert sloppiness(geometric(10, 0.5), roundoff=1e-3).rank == 6


@given(scale=st.floats(1e-9, 1e9), seed=st.integers(0, 99), num=st.integers(3, 60))
def test_the_scale_does_not_matter_and_order_neither(scale: float, seed: int, num: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(num, generator=generator, dtype=torch.float64) ** 6
    one, other = sloppiness(values), sloppiness(scale * values.flip(0))
    for name in ("decades", "effective_dimension", "participation_ratio", "num_stiff", "num_for_90_percent", "rank"):
        close(getattr(other, name), getattr(one, name), rtol=1e-9)
    assert other.slope_range == one.slope_range
    assert 1 <= one.participation_ratio <= num + 1e-9
    assert 0 < one.effective_dimension <= num


def test_equal_eigenvalues_are_not_sloppy() -> None:
    numbers = sloppiness(torch.ones(50))
    assert (numbers.decades, numbers.stiff_fraction, numbers.num_for_90_percent) == (0.0, 1.0, 45)
    close(numbers.slope, 0.0, atol=1e-12)
    close(numbers.participation_ratio, 50.0)
    close(numbers.effective_dimension, 50 / 1.001)


def test_one_eigenvalue_has_no_slope() -> None:
    numbers = sloppiness(torch.tensor([2.0, 0.0, 0.0]))
    assert (numbers.rank, numbers.decades) == (1, 0.0)
    assert math.isnan(numbers.slope)


def test_the_line_is_the_one_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    y = -0.3 * torch.arange(40) + 0.05 * torch.randn(40, generator=generator)
    first, last, slope, misfit = linear_range(y, 1.0)
    assert (first, last) == (0, 39)
    A = torch.stack([torch.arange(40.0), torch.ones(40)], 1).double()
    solution = torch.linalg.lstsq(A, y.double()[:, None]).solution
    close(slope, float(solution[0]))
    close(misfit, float((A @ solution - y[:, None]).square().mean().sqrt()))


def test_long_sequences_are_searched_on_a_grid() -> None:
    y = torch.cat([torch.linspace(0, -5, 300), torch.linspace(-5, -6, 1700)])
    first, last, slope, _ = linear_range(y, 0.02)
    assert 250 < first < 320
    assert last == 1999
    close(slope, -1 / 1699, rtol=0.05)


def test_shares_of_the_trace() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, 1.0])
    close([trace_share(values, k) for k in range(5)], [0.0, 0.5, 0.8, 0.9, 1.0])
    close(trace_share(values[:2], 2, trace=10.0), 0.8)
    assert [num_for_trace_share(values, share) for share in (0.1, 0.5, 0.51, 0.9, 1.0)] == [1, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"make up 0\.8 of the trace"):
        num_for_trace_share(values[:2], 0.9, trace=10.0)
    with pytest.raises(ValueError, match="num=5"):
        trace_share(values, 5)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(3), {}, "one above round-off"),
        (torch.tensor([1.0, math.nan]), {}, "finite number"),
        (torch.ones(2, 2), {}, r"shape \[2, 2\]"),
        (torch.ones(0), {}, r"shape \[0\]"),
        (torch.ones(3), {"stiff_threshold": math.nan}, "stiff_threshold=nan"),
        (torch.ones(3), {"damping": 0.0}, "damping=0.0"),
        (torch.ones(3), {"misfit": math.nan}, "misfit=nan"),
        (torch.ones(3), {"roundoff": math.nan}, "roundoff=nan"),
        (torch.ones(3), {"roundoff": 2.0}, "one above round-off"),
    ],
)
def test_what_is_refused(values: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sloppiness(values, **options)
