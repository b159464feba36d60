"""Lanczos, traces and densities against matrices whose spectra are chosen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry.lanczos import spectral_density, top_eigenpairs


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return (Q * values.double()) @ Q.T


DECAY = 10.0 ** -torch.linspace(0, 8, 80, dtype=torch.float64)


@pytest.mark.parametrize("block_size", [1, 3, 8, 200])
def test_the_largest_with_true_residuals(block_size: int) -> None:
    K = matrix(DECAY)
    top = top_eigenpairs(lambda z: K @ z, 80, 6, block_size=block_size, tolerance=1e-9)
    assert top.converged
    torch.testing.assert_close(top.values, DECAY[:6], rtol=0.0, atol=1e-9)
    torch.testing.assert_close(top.vectors.T @ top.vectors, torch.eye(6, dtype=torch.float64), **tolerance())
    residuals = (K @ top.vectors - top.vectors * top.values).norm(dim=0)
    torch.testing.assert_close(top.residuals, residuals, rtol=1e-3, atol=1e-14)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(top.values, DECAY[1:7], rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("block_size", [1, 4])
def test_an_exhausted_space_gives_all_of_them_exactly(block_size: int) -> None:
    values = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # multiple ones and zeros
    K = matrix(values)
    top = top_eigenpairs(lambda z: K @ z, 7, 7, block_size=block_size)
    torch.testing.assert_close(top.values, values, **tolerance())
    assert top.converged
    assert (top.num_products, top.trace.standard_error) == (7, 0.0)
    torch.testing.assert_close(top.trace.value, 11.0, **tolerance())


def test_a_block_finds_multiple_eigenvalues_at_once() -> None:
    values = torch.cat([torch.full((4,), 5.0), torch.linspace(1, 0, 96)])
    K = matrix(values)
    top = top_eigenpairs(lambda z: K @ z, 100, 4, block_size=4)
    assert top.num_products < 60
    torch.testing.assert_close(top.values, values[:4].double(), rtol=0.0, atol=1e-6)


def test_too_few_products_are_said_and_not_hidden() -> None:
    K = matrix(torch.linspace(1, 0, 60))
    top = top_eigenpairs(lambda z: K @ z, 60, 5, block_size=2, max_products=8)
    assert not top.converged
    assert float(top.residuals.max()) > 1e-3
    # An eigenvalue lies within the residual of each value.
    nearest = (top.values[:, None] - torch.linspace(1, 0, 60, dtype=torch.float64)).abs().min(1).values
    assert bool((nearest <= top.residuals + 1e-12).all())


def test_the_trace_lies_within_five_standard_errors() -> None:
    K = matrix(torch.linspace(1, 0.1, 200))
    top = top_eigenpairs(lambda z: K @ z, 200, 3, tolerance=1e-2, num_probes=20)
    assert 0 < top.trace.standard_error < 5
    assert abs(top.trace.value - float(K.trace())) < 5 * top.trace.standard_error
    assert math.isnan(top_eigenpairs(lambda z: K @ z, 200, 3, tolerance=1e-2, num_probes=0).trace.value)


@given(size=st.integers(2, 40), seed=st.integers(0, 99), decades=st.floats(0.1, 6))
def test_the_density_is_exact_where_the_space_is_exhausted(size: int, seed: int, decades: float) -> None:
    values = 10.0 ** -torch.linspace(0, decades, size, dtype=torch.float64)
    K = matrix(values, seed)
    density = spectral_density(lambda z: K @ z, size, num_probes=3, num_steps=size)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(3, dtype=torch.float64), **tolerance(condition=10))
    # Each probe's quadrature is then z'f(K)z / n, whatever f.
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randint(2, (size, 3), generator=generator).double() - 1
    quadratic = torch.einsum("ni,nm,mi->i", z, K @ K @ K, z).mean()
    estimate = density.trace_of(lambda x: x**3).value
    torch.testing.assert_close(torch.tensor(estimate, dtype=torch.float64), quadratic, **tolerance(condition=1e3))


def test_estimates_lie_within_five_standard_errors() -> None:
    values = 10.0 ** -torch.linspace(0, 4, 300, dtype=torch.float64)
    K = matrix(values)
    density = spectral_density(lambda z: K @ z, 300, num_probes=20, num_steps=80)
    logs = density.trace_of(lambda x: (1e-3 + x).log())
    for estimate, exact in [
        (density.trace, values.sum()),
        (logs, (1e-3 + values).log().sum()),
        (density.num_above(0.1), (values > 0.1).sum()),
    ]:
        assert estimate.standard_error > 0
        assert abs(estimate.value - float(exact)) < 5 * estimate.standard_error
        assert abs(2 * estimate.value - float(exact)) > 5 * estimate.standard_error  # a wrong one would be noticed
    grid = torch.linspace(-6, 2, 801, dtype=torch.float64)
    curve, error = density.density(grid, width=0.2)
    total = float(torch.trapezoid(curve, grid))
    assert abs(total - 300) < 1
    assert bool(((curve - 75)[(grid > -3.2) & (grid < -0.8)].abs() < 40).all())  # 300 eigenvalues over 4 decades
    assert bool((error >= 0).all())


def test_the_same_generator_gives_the_same_numbers_and_the_global_one_is_left_alone() -> None:
    K = matrix(DECAY)
    before = torch.get_rng_state()
    runs = [
        top_eigenpairs(lambda z: K @ z, 80, 2, generator=torch.Generator().manual_seed(seed)).vectors
        for seed in (1, 1, 2)
    ]
    spectral_density(lambda z: K @ z, 80)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_products_in_float32_keep_their_precision() -> None:
    K = matrix(DECAY).float()
    top = top_eigenpairs(lambda z: K @ z.float(), 80, 4, tolerance=1e-5)
    assert top.values.dtype == torch.float64
    assert top.converged
    torch.testing.assert_close(top.values, DECAY[:4], rtol=0.0, atol=1e-5)


def test_a_matrix_of_zeros() -> None:
    top = top_eigenpairs(torch.zeros_like, 5, 2)
    assert top.values.tolist() == [0.0, 0.0]
    assert spectral_density(torch.zeros_like, 5).trace == (0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num=0"),
        ({"num": 81}, r"num=81: must be in \[1, 80\]"),
        ({"tolerance": math.nan}, "tolerance=nan"),
        ({"tolerance": 0.0}, "tolerance=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"num_probes": -1}, "num_probes=-1"),
    ],
)
def test_what_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(lambda z: z, **{"size": 80, "num": 2, **options})  # type: ignore[arg-type]


def test_products_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        top_eigenpairs(lambda z: z * math.nan, 5, 1)
    with pytest.raises(ValueError, match="not finite"):
        spectral_density(lambda z: z * math.inf, 5)
    with pytest.raises(ValueError, match="num_steps=0"):
        spectral_density(lambda z: z, 5, num_steps=0)
    with pytest.raises(ValueError, match="width=nan"):
        spectral_density(lambda z: z, 5).density(torch.zeros(1), math.nan)
