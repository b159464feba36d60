from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.oracles import tolerance
from torchgeom_optim.diagnostics import scales


def symmetric(values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return Q @ torch.diag(values.double()) @ Q.T


def test_norms_and_trace():
    h = torch.randn(6, 9, dtype=torch.float64)
    K = torch.stack([h @ h.T, 4 * h @ h.T])
    assert_close(scales.gradient_norm(K), torch.stack([h.mean(0).norm(), 2 * h.mean(0).norm()]), **tolerance())
    assert_close(scales.empirical_fisher_trace(K)[0], (h.T @ h / 6).trace(), **tolerance())
    named = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor(2.0)}
    assert scales.squared_norms(named).tolist() == [25.0, 4.0]
    assert scales.squared_norms({"a": torch.full((4,), 300.0, dtype=torch.float16)}).tolist() == [360000.0]


@given(st.integers(1, 40), st.integers(0, 50), st.sampled_from([-1.0, 1.0]))
def test_both_ends_of_a_known_spectrum(n, seed, sign):
    values = torch.linspace(-3.0, 7.0, n) * sign
    A = symmetric(values, seed)
    start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends = scales.extreme_eigenvalues(lambda v: A @ v, start, tolerance=1e-9, max_products=200)
    assert ends.norm == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-9)
    # Within the residual of an eigenvalue, whatever it has converged to.
    end = ends.largest if abs(ends.largest) >= abs(ends.smallest) else ends.smallest
    assert float((torch.linalg.eigvalsh(A) - end).abs().min()) <= ends.residual + 1e-9


def test_it_says_when_it_has_not_converged():
    A = symmetric(torch.linspace(0.0, 1.0, 200), 0)
    start = torch.randn(200, dtype=torch.float64)
    ends = scales.extreme_eigenvalues(lambda v: A @ v, start, tolerance=1e-12, max_products=5)
    assert not ends.converged
    assert ends.num_products == 5
    assert 0 < ends.residual
    assert ends.largest < 1
    assert scales.extreme_eigenvalues(lambda v: A @ v, start, tolerance=1e-2).converged


def test_zero_and_what_is_not_finite():
    start = torch.ones(4)
    assert scales.extreme_eigenvalues(torch.zeros_like, start) == (0.0, 0.0, 0.0, True, 1)
    assert math.isnan(scales.extreme_eigenvalues(lambda v: v * math.nan, start).norm)
    for wrong in (torch.zeros(4), torch.full((4,), math.nan)):
        with pytest.raises(ValueError, match="start of length"):
            scales.extreme_eigenvalues(lambda v: v, wrong)
    with pytest.raises(ValueError, match="tolerance=nan"):
        scales.extreme_eigenvalues(lambda v: v, start, tolerance=math.nan)
    with pytest.raises(ValueError, match="max_products=0"):
        scales.extreme_eigenvalues(lambda v: v, start, max_products=0)
