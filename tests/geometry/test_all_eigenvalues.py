"""All eigenvalues of a symmetric matrix, against LAPACK in float64 as numpy has it, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry import all_eigenvalues as module
from torchgeom_optim.geometry.all_eigenvalues import all_eigenvalues

N = 600
CLOSE = tolerance(condition=1e2)


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """In float32, with about these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    K = (Q * values.double() @ Q.T).float()
    return (K + K.T) / 2


def expected(K: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.eigvalsh(K.double().numpy())[::-1].copy())


def standing_out(smallest: float = 1e-3) -> Tensor:
    """Nine eigenvalues of a size, and others far below, as a classifier's Fisher matrix has them."""
    bulk = 0.1 * torch.logspace(0, math.log10(10 * smallest), N - 9, dtype=torch.float64)
    return torch.cat([torch.linspace(1, 0.6, 9, dtype=torch.float64), bulk])


SPECTRA = {
    "standing out": standing_out(),
    "eight decades": torch.logspace(0, -8, N),
    "flat": torch.ones(N),
    "two sizes": torch.cat([torch.ones(N // 2), torch.full((N // 2,), 1e-3)]),
    "linear": torch.linspace(1, 0, N),
    "one over": 1 / torch.arange(1, N + 1),
    "thirty equal": torch.cat([torch.ones(30), torch.full((N - 30,), 1e-2)]),  # more than block Lanczos sees at once
    "rank 5": torch.cat([torch.ones(5), torch.zeros(N - 5)]),
    "one": torch.cat([torch.ones(1), torch.full((N - 1,), 1e-6)]),
}


def test_most_are_computed_in_float32_where_all_stay_far_above_its_errors() -> None:
    K = matrix(standing_out())
    found, exact = all_eigenvalues(K), expected(K)
    off = (found.values - exact).abs()
    assert (found.dtype, found.values.dtype) == (torch.float32, torch.float64)
    assert bool((off <= found.errors).all())
    assert not bool((1.001 * found.values - exact).abs().le(found.errors).all())
    assert float(found.errors.max()) < min(1e-5 * float(exact[0]), 0.1 * float(exact[-1]))
    # Those that were split off have float64's errors and those of the coupling.
    assert float(found.errors[:9].max()) < 0.01 * float(found.errors[9:].min())
    assert float((off / exact)[:9].max()) < 1e-9


@pytest.mark.parametrize("name", SPECTRA)
def test_errors_in_float32_stay_below_what_is_told_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_matters", lambda *_: False)  # whatever they are
    K = matrix(SPECTRA[name])
    found = all_eigenvalues(K)
    off = found.values - expected(K)
    assert found.dtype == torch.float32
    assert bool((off.abs() <= found.errors).all())
    assert 0 < float(off.norm()) <= float(found.errors.max())


@pytest.mark.parametrize(
    "K",
    [
        matrix(standing_out(1e-7)),  # the smallest would drown
        matrix(SPECTRA["flat"]),  # the largest would be off by more than 1e-5
        matrix(standing_out()).double(),
        matrix(standing_out())[:500, :500],  # float64 takes no time
        1e20 * matrix(standing_out()),  # squares overflow, or vanish
        1e-20 * matrix(standing_out()),
        torch.zeros(N, N),
    ],
    ids=["sloppy", "flat", "float64", "small", "huge", "tiny", "zero"],
)
def test_else_all_are_computed_in_float64(K: Tensor) -> None:
    found, exact = all_eigenvalues(K), expected(K)
    assert found.dtype == torch.float64
    assert bool(((found.values - exact).abs() <= found.errors).all())
    assert float(found.errors.max()) == len(K) * torch.finfo(torch.float64).eps * float(found.values[0])


@pytest.mark.parametrize("aligned", [False, True])
def test_splitting_off_is_a_similarity_transformation(aligned: bool) -> None:
    K = matrix(standing_out()[-60:])
    vectors = torch.eye(60, dtype=torch.float64)[:, 2:7] if aligned else torch.linalg.eigh(K.double())[1][:, -5:]
    A, R, B = module._split(K, vectors)
    assert (A.shape, R.shape, B.shape) == ((5, 5), (55, 5), (55, 55))
    whole = torch.cat([torch.cat([A, R.T], 1), torch.cat([R, B.double()], 1)])
    close = tolerance(torch.float32)  # B is kept in that
    torch.testing.assert_close(torch.linalg.eigvalsh(whole).flip(0), expected(K), **close)
    if not aligned:
        torch.testing.assert_close(torch.linalg.eigvalsh(A).flip(0), expected(K)[:5], **CLOSE)
        torch.testing.assert_close(R, torch.zeros_like(R), **CLOSE)


@pytest.mark.parametrize(("gap", "coupling"), [(1.0, 0.3), (1.0, 1e-4), (0.0, 0.5), (0.0, 0.0)])
def test_the_coupling_of_two_numbers_is_told_exactly(gap: float, coupling: float) -> None:
    # [[gap, r], [r, 0]] has the eigenvalues gap / 2 +- sqrt(gap^2 / 4 + r^2).
    exact = math.sqrt(gap**2 / 4 + coupling**2) - gap / 2
    bound = module._coupling(torch.tensor(coupling).double(), torch.tensor(gap).double())
    torch.testing.assert_close(float(bound), exact, rtol=1e-6, atol=0.0)


def test_nothing_is_drawn_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, other = all_eigenvalues(matrix(standing_out())), all_eigenvalues(matrix(standing_out()))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.values, other.values)
