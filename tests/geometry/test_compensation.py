"""The compensated step against dense least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry.compensation import CompensatedStep, compensated_step
from torchgeom_optim.geometry.trust_region import eigenpairs, geodesic_step


def solve(J: Tensor, move: Tensor, free: Tensor, damping: float, **kwargs) -> CompensatedStep:
    return compensated_step(lambda v: J @ v, lambda u: J.T @ u, move, free, damping, tolerance=1e-13, **kwargs)


def dense_solution(J: Tensor, move: Tensor, free: Tensor, damping: float, change: Tensor) -> Tensor:
    """By the normal equations in the space of the weights."""
    F = J[:, free]
    left = F.T @ F + damping * torch.eye(F.shape[1], dtype=J.dtype)
    theta = torch.linalg.solve(left, F.T @ (change - J @ move))
    step = move.clone()
    step[free] += theta
    return step


def problem(seed: int, q: int, p: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(q, p, generator=g, dtype=torch.float64)
    move = torch.randn(p, generator=g, dtype=torch.float64)
    free = torch.rand(p, generator=g) < 0.6
    free[0] = True
    return J, move.masked_fill(free, 0), free, torch.randn(q, generator=g, dtype=torch.float64)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.floats(-3, 2), st.booleans())
def test_the_minimum(seed, q, p, log_damping, with_scale):
    J, move, free, change = problem(seed, q, p)
    damping = 10**log_damping
    scale = (J.square().sum(0) + damping).rsqrt() if with_scale else None
    found = solve(J, move, free, damping, change=change, scale=scale)
    expected = dense_solution(J, move, free, damping, change)
    condition = float(torch.linalg.matrix_norm(J, 2)) ** 2 / damping + 1
    # Conjugate gradients end when their own residual does: a thousand roundings of it stand for the iterations.
    torch.testing.assert_close(found.step, expected, **tolerance(condition=1e3 * condition))
    torch.testing.assert_close(found.left, (change - J @ expected).norm(), **tolerance(condition=1e3 * condition))
    torch.testing.assert_close(found.wanted, (change - J @ move).norm(), **tolerance(condition=100))
    assert found.converged


def test_a_wrong_solution_is_told_from_it():
    J, move, free, change = problem(0, 8, 6)
    expected = dense_solution(J, move, free, 0.1, change)
    for wrong in (dense_solution(J, -move, free, 0.1, change), dense_solution(J, move, free, 0.2, change)):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, expected, **tolerance(condition=1e5))


def test_more_weights_than_rows_give_the_shortest_compensation():
    J, move, free, _ = problem(3, 4, 20)
    found = solve(J, move, free, 0.0)
    theta = found.step - move
    torch.testing.assert_close(J @ found.step, torch.zeros(4, dtype=J.dtype), atol=1e-10, rtol=0.0)
    expected = torch.linalg.pinv(J[:, free]) @ -(J @ move)
    torch.testing.assert_close(theta[free], expected, **tolerance(condition=1e4))
    assert bool((theta[~free] == 0).all())


def test_with_all_weights_free_it_has_the_direction_of_equation_5():
    J, *_ = problem(1, 5, 9)
    v = torch.randn(9, dtype=torch.float64)
    free = torch.ones(9, dtype=torch.bool)
    K = J @ J.T
    lam = 0.3 * float(K.diagonal().mean())
    found = solve(J, v, free, lam).step
    expected = geodesic_step(lambda x: J @ x, lambda u: J.T @ u, eigenpairs(K), v, 1.0, relative_multiplier=0.3).step
    torch.testing.assert_close(found / found.norm(), expected, **tolerance(condition=1e4))


def test_more_damping_moves_less_and_leaves_more():
    J, move, free, change = problem(5, 8, 12)
    steps = [solve(J, move, free, damping, change=change) for damping in (0.01, 0.1, 1.0, 10.0)]
    lengths = torch.stack([(s.step - move).norm() for s in steps])
    left = torch.stack([s.left for s in steps])
    assert bool((lengths.diff() < 0).all())
    assert bool((left.diff() > 0).all())


def test_fewer_iterations_are_reported_and_the_objective_falls_in_each():
    J, move, free, change = problem(7, 12, 12)

    def objective(s: CompensatedStep) -> Tensor:
        return s.left**2 + 0.05 * (s.step - move).square().sum()

    steps = [solve(J, move, free, 0.05, change=change, most_iterations=k) for k in range(6)]
    assert [s.iterations for s in steps] == list(range(6))
    assert not steps[2].converged
    assert bool((torch.stack([objective(s) for s in steps]).diff() < 0).all())


def test_nothing_to_do():
    J, move, _, _ = problem(0, 3, 4)
    none = torch.zeros(4, dtype=torch.bool)
    found = solve(J, move, none, 0.1)
    torch.testing.assert_close(found.step, move)
    assert (found.iterations, found.converged) == (0, True)
    found = solve(torch.zeros_like(J), move, ~none, 0.0)
    torch.testing.assert_close(found.step, move)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": -1.0}, r"damping=-1.0: must be in \[0, inf\)"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"free": torch.ones(3, dtype=torch.bool)}, r"both must be \[P\]"),
        ({"free": torch.ones(4)}, "of type bool"),
        ({"most_iterations": -1}, "most_iterations=-1"),
        ({"tolerance": 1.0}, r"tolerance=1.0: must be in \[0, 1\)"),
    ],
)
def test_bad_values(change, message):
    J, move, _, _ = problem(0, 3, 4)
    arguments = {"move": move, "free": torch.ones(4, dtype=torch.bool), "damping": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        compensated_step(lambda v: J @ v, lambda u: J.T @ u, **arguments)
