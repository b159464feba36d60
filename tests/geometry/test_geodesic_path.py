"""Lengths of paths, against the geodesic equation integrated numerically on a network of two parameters."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from torchgeom_optim.geometry.compensation import compensated_step
from torchgeom_optim.geometry.geodesic_path import chord_length, segment_length
from torchgeom_optim.geometry.trust_region import eigenpairs, geodesic_step

integrate = pytest.importorskip("scipy.integrate", reason="the geodesic equation is integrated by scipy")
optimize = pytest.importorskip("scipy.optimize", reason="the geodesic's end is found by scipy")

X = torch.tensor([[0.5, 1.0, -1.5, 2.0]], dtype=torch.float64)
START = torch.tensor([1.0, 0.8], dtype=torch.float64)
END = torch.tensor([0.2, 1.4], dtype=torch.float64)


def outputs(w: Tensor) -> Tensor:
    """A network of two weights, w_2 tanh(w_1 x), and a second output that keeps the metric from being singular."""
    return torch.cat([w[1] * torch.tanh(w[0] * X[0]), 0.3 * w])


def jacobian(w: Tensor) -> Tensor:
    return torch.func.jacrev(outputs)(w)


def metric(w: Tensor) -> Tensor:
    return jacobian(w).T @ jacobian(w)


def acceleration(w: Tensor, velocity: Tensor) -> Tensor:
    """-Gamma^k_ij w'^i w'^j, Christoffel symbols by autograd; Eq. (4)."""
    g, dg = metric(w), torch.func.jacrev(metric)(w)  # dg[i, j, k] = d g_ij / d w_k
    first = torch.einsum("kij,i,j->k", dg, velocity, velocity)
    last = torch.einsum("ijk,i,j->k", dg, velocity, velocity)
    return -torch.linalg.solve(g, first - last / 2)


def shot(velocity: np.ndarray) -> tuple[np.ndarray, float]:
    """Where the geodesic with that velocity is after unit time, and its length, which is its constant speed."""

    def rhs(_: float, state: np.ndarray) -> np.ndarray:
        w, v = torch.from_numpy(state[:2].copy()), torch.from_numpy(state[2:].copy())
        return np.concatenate([v.numpy(), acceleration(w, v).numpy()])

    end = integrate.solve_ivp(rhs, (0, 1), np.concatenate([START.numpy(), velocity]), rtol=1e-5, atol=1e-7).y[:, -1]
    v = torch.from_numpy(velocity)
    return end, float(v @ metric(START) @ v) ** 0.5


@pytest.fixture(scope="module")
def shortest() -> float:
    """Length of the geodesic from START to END, by shooting."""
    nearly = np.array([-1.04, -0.037])  # from a search that began with END - START; it saves most of the shots
    found = optimize.root(lambda v: shot(v)[0][:2] - END.numpy(), nearly, tol=1e-4)
    assert found.success
    return shot(found.x)[1]


def push(w: Tensor, theta: Tensor) -> Tensor:
    return jacobian(w) @ theta


def length(points: list[Tensor]) -> float:
    return float(sum(segment_length(push, a, b, 1) for a, b in itertools.pairwise(points)))


def paths_by_equation_5(end: Tensor, steps: int, relative: float) -> list[Tensor]:
    w, points = START, [START]
    for k in range(steps - 1):
        J, v = jacobian(w), end - w
        radius = float(v.norm()) / (steps - k)
        step = geodesic_step(
            lambda x, J=J: J @ x, lambda u, J=J: J.T @ u, eigenpairs(J @ J.T), v, radius, relative_multiplier=relative
        )
        w = w + step.step
        points.append(w)
    return [*points, end]


@pytest.mark.parametrize("relative", [0.1, 1.0, 100.0])
def test_no_path_of_equation_5_is_shorter_than_the_geodesic(relative, shortest):
    found = length(paths_by_equation_5(END, 12, relative))
    assert shortest <= found * (1 + 1e-4)  # shooting ends within 1e-4 of END
    assert found < 2 * shortest
    # The metric is not flat here: otherwise the straight line would be the geodesic, and this would show nothing.
    assert length([START, END]) > shortest * 1.001


def test_the_geodesic_keeps_its_speed():
    """The oracle itself: a wrong Christoffel symbol would not."""
    velocity = np.array([-0.6, 0.5])

    def rhs(_: float, state: np.ndarray) -> np.ndarray:
        w, v = torch.from_numpy(state[:2].copy()), torch.from_numpy(state[2:].copy())
        return np.concatenate([v.numpy(), acceleration(w, v).numpy()])

    states = integrate.solve_ivp(rhs, (0, 1), np.concatenate([START.numpy(), velocity]), rtol=1e-7, atol=1e-9).y.T
    speeds = [float(torch.tensor(s[2:]) @ metric(torch.tensor(s[:2])) @ torch.tensor(s[2:])) ** 0.5 for s in states]
    torch.testing.assert_close(
        torch.tensor(speeds), torch.full((len(speeds),), speeds[0]), rtol=1e-5, atol=0.0
    )  # the solver's tolerance


def test_in_a_constant_metric_the_compensated_path_is_the_geodesic_to_the_plane():
    """The shortest way to the plane w_0 = 0 by brute force over where it arrives; the way there is straight."""
    J = torch.tensor([[1.0, 0.4], [0.2, -0.7], [0.5, 0.1]], dtype=torch.float64)
    w, points = START, [START]
    free = torch.tensor([False, True])
    steps = 5
    for k in range(steps):
        move = torch.tensor([-float(w[0]) / (steps - k), 0.0], dtype=torch.float64)
        w = w + compensated_step(lambda v: J @ v, lambda u: J.T @ u, move, free, 0.0).step
        points.append(w)
    found = float(sum(segment_length(lambda _, t: J @ t, a, b, 1) for a, b in itertools.pairwise(points)))
    best = optimize.minimize_scalar(
        lambda at: float((J @ (torch.tensor([0.0, at], dtype=torch.float64) - START)).norm()), tol=1e-12
    )
    torch.testing.assert_close(found, float(best.fun), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(float(points[-1][1]), float(best.x), rtol=1e-6, atol=0.0)  # flat at its minimum
    assert float(points[-1][0]) == 0.0


def test_chords_tend_to_the_length_from_below():
    whole = float(segment_length(push, START, (START + END) / 2, 4) + segment_length(push, (START + END) / 2, END, 4))
    chords = [float(chord_length(outputs, START, END, 4, pieces)) for pieces in (1, 2, 4, 32)]
    assert all(a < b for a, b in zip(chords, [*chords[1:], whole * (1 + 1e-6)], strict=True))
    errors = [whole - chord for chord in chords]
    assert errors[2] < errors[1] / 2.5
    torch.testing.assert_close(chords[3], whole, rtol=1e-3, atol=0.0)  # 1 / 32^2


def test_samples_are_averaged():
    torch.testing.assert_close(chord_length(outputs, START, END, 4), chord_length(outputs, START, END, 1) / 2)
    torch.testing.assert_close(segment_length(push, START, END, 4), segment_length(push, START, END, 1) / 2)


def test_bad_values():
    with pytest.raises(ValueError, match="must be at least 1"):
        chord_length(outputs, START, START, 1, 0)
    with pytest.raises(ValueError, match="must be at least 1"):
        segment_length(push, START, START, 0)
    assert math.isclose(float(segment_length(push, START, START, 1)), 0.0)
