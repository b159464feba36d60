"""Steps of given metric length, and Eq. (5) of geodesic sparsification, against dense solutions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry.matrix_metric import KroneckerMetric
from torchgeom_optim.geometry.metric import BLOCKS, DiagonalMetric, LayerMetric, LayerVector, WhiteningMetric
from torchgeom_optim.geometry.trust_region import block_step, eigenpairs, geodesic_step, network_sum

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(n: int, g: torch.Generator) -> Tensor:
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64)).Q
    return basis @ torch.diag(torch.logspace(0, 1.5, n, dtype=F64)) @ basis.T


def network(seed: int, finest: str) -> list[tuple[LayerMetric, LayerVector]]:
    """Metrics and gradients of two layers."""
    g = generator(seed)
    layers: list[tuple[LayerMetric, LayerVector]] = []
    for m, n in ((3, 4), (2, 3)):
        gradient = LayerVector(*(torch.randn(*s, generator=g, dtype=F64) for s in ((m, n), (m,))))
        positive = [torch.rand(*s, generator=g, dtype=F64) + 0.3 for s in ((m, n), (m,), (n,))]
        metrics = {
            "weight": DiagonalMetric(LayerVector(positive[0], positive[1])),
            "unit": WhiteningMetric(torch.randn(n, generator=g, dtype=F64), positive[2], positive[1]),
            "layer": KroneckerMetric.factorise(spd(n + 1, g)[None], spd(m, g)[None]),
        }
        layers.append((metrics[finest], gradient))
    return layers


GRID = [
    ("weight", "weight"), ("weight", "unit"), ("weight", "layer"), ("weight", "network"),
    ("unit", "unit"), ("unit", "layer"), ("unit", "network"), ("layer", "layer"), ("layer", "network"),
]  # fmt: skip


# -- Eqs. (9) to (11) ---------------------------------------------------------------------------------------------


@given(st.sampled_from(GRID), st.integers(0, 10_000), st.floats(-4, 4), st.floats(-3, 3))
def test_the_step_of_every_block_has_the_length_that_was_asked_for(kind, seed, log_length, log_gradient):
    finest, block = kind
    layers = [(G, LayerVector(*(10**log_gradient * p for p in g))) for G, g in network(seed, finest)]
    directions = [G.solve(g).vector for G, g in layers]
    norms = [G.dual_norm_sq(g, "layer" if block == "network" else block) for G, g in layers]
    step = block_step(directions, norms, 10**log_length, block).step
    lengths_sq = [
        G.norm_sq(d, "layer" if block == "network" else block) for (G, _), d in zip(layers, step, strict=True)
    ]
    if block == "network":
        lengths_sq = [network_sum(lengths_sq)]
    for values in lengths_sq:
        for part in values:
            torch.testing.assert_close(part.sqrt(), torch.full_like(part, 10**log_length), **tolerance(condition=1e3))
    for d, (_, g) in zip(step, layers, strict=True):
        assert float((d.weight * g.weight).sum() + (d.bias * g.bias).sum()) < 0  # downhill
    if block != "network" and block != "layer":  # one norm for all is another step
        other = block_step(directions, [G.dual_norm_sq(g) for G, g in layers], 10**log_length, "network").step
        assert not torch.allclose(other[0].weight, step[0].weight, rtol=1e-6, atol=0)


def test_the_average_stands_under_the_root_with_eps():
    (G, g), (_, _) = network(3, "unit")
    u, average = G.solve(g).vector, torch.tensor([0.5, 4.0, 9.0], dtype=F64)
    step = block_step([u], [(average,)], 0.1, "unit", eps=0.25)
    for j in range(3):  # Eq. (11), line by line
        factor = 0.1 / math.sqrt(0.25 + float(average[j]))
        torch.testing.assert_close(step.step[0].weight[j], -factor * u.weight[j], **tolerance())
        torch.testing.assert_close(step.step[0].bias[j], -factor * u.bias[j], **tolerance())
        assert float(step.scale[0][0][j]) == pytest.approx(factor)


@pytest.mark.parametrize("block", [*BLOCKS, "network"])
def test_where_there_is_no_gradient_there_is_no_step(block):
    zero = LayerVector(torch.zeros(2, 3), torch.zeros(2))
    norms = DiagonalMetric(LayerVector(torch.ones(2, 3), torch.ones(2))).dual_norm_sq(
        zero, "layer" if block == "network" else block
    )
    step = block_step([zero], [norms], 0.1, block).step[0]
    torch.testing.assert_close(list(step), [torch.zeros(2, 3), torch.zeros(2)])
    nan = LayerVector(zero.weight * math.nan, zero.bias)
    norms = tuple(part * math.nan for part in norms)
    assert torch.isnan(block_step([nan], [norms], 0.1, block).step[0].weight).all()  # and what is wrong stays wrong


@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_the_step_in_another_unit_of_the_loss_is_the_same(seed, log_scale):
    """Gradients and the metric's root scale alike; Eq. (8)'s step would change."""
    steps = []
    for scale in (1.0, 10**log_scale):
        layers = network(seed, "unit")
        layers = [
            (
                WhiteningMetric(G.input_mean, G.input_scale, G.output_scale / scale**2),
                LayerVector(*(scale * p for p in g)),
            )
            for G, g in layers
        ]
        directions = [G.solve(g).vector for G, g in layers]
        steps.append(block_step(directions, [G.dual_norm_sq(g, "unit") for G, g in layers], 0.1 * scale, "unit").step)
    torch.testing.assert_close([list(d) for d in steps[1]], [list(d) for d in steps[0]], **tolerance(condition=1e6))


def test_the_function_of_section_3_1():
    """F = w1^2 / 2 + log(e^w2 + e^-w2) from (3, 3): steps until F - F* < 0.15."""

    def run(update: Callable[[Tensor, Tensor], Tensor]) -> tuple[int, Tensor]:
        w, first = torch.tensor([3.0, 3.0], dtype=F64), None
        for step in range(1, 200):
            gradient = torch.stack([w[0], torch.tanh(w[1])])
            hessian = torch.stack([torch.ones((), dtype=F64), 1 - torch.tanh(w[1]) ** 2])
            delta = update(gradient, hessian)
            first = delta if first is None else first
            w = w + delta
            if float(w[0] ** 2 / 2 + torch.log(torch.exp(w[1]) + torch.exp(-w[1]))) - math.log(2) < 0.15:
                return step, first
        raise AssertionError("did not arrive")

    def with_block(block: str) -> Callable[[Tensor, Tensor], Tensor]:
        def update(gradient: Tensor, hessian: Tensor) -> Tensor:
            metric, g = DiagonalMetric(LayerVector(hessian[:, None])), LayerVector(gradient[:, None])
            norms = metric.dual_norm_sq(g, "layer" if block == "network" else block)
            return block_step([metric.solve(g).vector], [norms], 0.3, block).step[0].weight[:, 0]

        return update

    plain, _ = run(lambda g, h: -0.03 * g / h)
    one, first_of_one = run(with_block("network"))
    two, first_of_two = run(with_block("weight"))
    assert plain > 50
    assert (one, two) == (9, 9)
    assert float(first_of_two[0] / first_of_one[0]) == pytest.approx(3.49, abs=0.005)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -1.0}, r"eps=-1.0: must be in"),
        ({"eps": math.nan}, "eps=nan"),
        ({"length": math.nan}, "length=nan"),
        ({"length": math.inf}, "length=inf"),
        ({"norms_sq": []}, "1 directions and 0 norms"),
    ],
)
def test_bad_values_of_a_block_step(kwargs, message):
    good = {"norms_sq": [(torch.ones(()),)], "length": 0.1, "block": "layer"}
    with pytest.raises(ValueError, match=message):
        block_step([LayerVector(torch.ones(2, 2))], **{**good, **kwargs})


# -- Eq. (5) ------------------------------------------------------------------------------------------------------


def jacobian(q: int, p: int, rank: int, log_condition: float, g: torch.Generator) -> Tensor:
    """With chosen singular values."""
    left = torch.linalg.qr(torch.randn(q, q, generator=g, dtype=F64)).Q[:, :rank]
    right = torch.linalg.qr(torch.randn(p, p, generator=g, dtype=F64)).Q[:, :rank]
    return left @ torch.diag(torch.logspace(0, -log_condition, rank, dtype=F64)) @ right.T


def solve(J: Tensor, v: Tensor, radius: float, **kwargs):
    return geodesic_step(lambda x: J @ x, lambda u: J.T @ u, eigenpairs(J @ J.T), v, radius, **kwargs)


def dense_solution(J: Tensor, v: Tensor, radius: float, beta: float) -> tuple[Tensor, float]:
    """By bisection on lambda over P x P solves."""
    metric, eye = J.T @ J, torch.eye(J.shape[1], dtype=J.dtype)
    unconstrained = beta / 2 * torch.linalg.pinv(metric, hermitian=True) @ v
    if not bool(v.any()):
        return v, 0.0
    if torch.linalg.norm(metric @ unconstrained - beta / 2 * v) < 1e-10 * beta * torch.linalg.norm(v):
        if float(torch.linalg.norm(unconstrained)) <= radius:
            return unconstrained, 0.0
    low, high = 0.0, beta * float(torch.linalg.norm(v)) / (2 * radius)
    for _ in range(200):
        middle = (low + high) / 2
        theta = beta / 2 * torch.linalg.solve(metric + middle * eye, v)
        low, high = (middle, high) if float(torch.linalg.norm(theta)) > radius else (low, middle)
    return theta, middle


def check_kkt(J: Tensor, v: Tensor, radius: float, result, condition: float) -> None:
    """The conditions that characterise the minimum of a convex problem."""
    theta, lam, beta = result.step, float(result.multiplier), float(result.pull)
    tol = tolerance(condition=condition)["rtol"]
    size = beta * float(torch.linalg.norm(v)) + 1e-300
    assert float(torch.linalg.norm(2 * (J.T @ (J @ theta) + lam * theta) - beta * v)) <= tol * size
    assert float(result.kkt_residual) <= tol
    assert lam >= 0
    assert float(torch.linalg.norm(theta)) <= radius * (1 + tol)
    assert bool(result.ball_is_active) == (lam > 0)
    if lam > 0:
        assert float(torch.linalg.norm(theta)) == pytest.approx(radius, rel=tol)
    assert bool(result.converged)


@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 12),
    st.floats(0, 3),
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.sampled_from(["free", "in range", "almost in range"]),
    st.data(),
)
def test_the_minimum_in_the_ball(seed, q, p, log_condition, log_radius, log_pull, kind, data):
    g = generator(seed)
    rank = data.draw(st.integers(0, min(q, p)))
    J = jacobian(q, p, rank, log_condition, g)
    v = torch.randn(p, generator=g, dtype=F64)
    if kind != "free":
        noise = 1e-5 * v
        v = J.T @ torch.randn(q, generator=g, dtype=F64) + (noise if kind == "almost in range" else 0)
    radius, pull = 10**log_radius, 10**log_pull
    result = solve(J, v, radius, pull=pull)
    check_kkt(J, v, radius, result, condition=10 ** (2 * log_condition + 2))
    expected, lam = dense_solution(J, v, radius, pull)
    assert float(result.multiplier) == pytest.approx(lam, rel=1e-6, abs=1e-12 * pull / radius)
    scale = max(float(torch.linalg.norm(expected)), 1e-300)
    loose = tolerance(condition=10 ** (2 * log_condition + (5 if kind == "almost in range" else 2)))["rtol"]
    torch.testing.assert_close(result.step / scale, expected / scale, rtol=0, atol=max(loose, 1e-9))
    assert result.iterations <= 20
    if bool(v.any()):
        with pytest.raises(AssertionError):  # a step that is too short is no minimum
            check_kkt(J, v, radius, result._replace(step=0.9 * result.step), condition=10 ** (2 * log_condition))


@given(st.integers(0, 10_000), st.floats(-6, 3), st.floats(-3, 3))
def test_the_readable_knob_gives_the_same_as_the_pull_that_it_names(seed, log_relative, log_radius):
    g = generator(seed)
    J, v, radius = jacobian(4, 9, 4, 2.0, g), torch.randn(9, generator=g, dtype=F64), 10**log_radius
    one = solve(J, v, radius, relative_multiplier=10**log_relative)
    check_kkt(J, v, radius, one, condition=1e6)
    assert float(one.multiplier) == pytest.approx(10**log_relative * float((J @ J.T).trace()) / 4)
    assert float(one.relative_multiplier) == pytest.approx(10**log_relative)
    two = solve(J, v, radius, pull=float(one.pull))
    torch.testing.assert_close(two.step, one.step, rtol=1e-8, atol=1e-8 * radius)
    torch.testing.assert_close(two.multiplier, one.multiplier, rtol=1e-8, atol=0)


def test_many_targets_at_once():
    g = generator(5)
    J = jacobian(3, 8, 3, 1.0, g)
    kinds = [
        torch.randn(8, generator=g, dtype=F64),
        J.T @ torch.randn(3, generator=g, dtype=F64),
        torch.zeros(8, dtype=F64),
    ]
    V = torch.stack([*kinds, 100 * kinds[0]], 1)
    for knob in ({"pull": 0.05}, {"relative_multiplier": 0.1}):
        together = solve(J, V, 0.5, **knob)
        assert together.step.shape == V.shape
        for k in range(4):
            alone = solve(J, V[:, k], 0.5, **knob)
            torch.testing.assert_close(together.step[:, k], alone.step, rtol=1e-9, atol=1e-9)
            for name in ("multiplier", "pull", "ball_is_active", "kkt_residual", "converged"):
                torch.testing.assert_close(getattr(together, name)[k], getattr(alone, name), rtol=1e-9, atol=1e-9)


def test_degenerate_cases_by_hand():
    v = torch.tensor([3.0, 4.0], dtype=F64)
    zero = torch.zeros(2, 2, dtype=F64)
    result = solve(zero, v, 2.0, pull=1.0)  # J = 0: straight to the sphere, lambda = beta ||v|| / 2r
    torch.testing.assert_close(result.step, v * 0.4)
    assert float(result.multiplier) == pytest.approx(5 / 4)
    with pytest.raises(ValueError, match="J = 0"):
        solve(zero, v, 2.0, relative_multiplier=1.0)
    J = torch.eye(2, dtype=F64)
    for knob in ({"pull": 1.0}, {"relative_multiplier": 1.0}):
        result = solve(J, v * 0, 2.0, **knob)  # nowhere to go
        torch.testing.assert_close(result.step, v * 0)
        assert not bool(result.ball_is_active)
        assert float(result.multiplier) == float(result.kkt_residual) == 0
    result = solve(J, v, 2.6, pull=1.0)  # the unconstrained minimum v / 2 lies inside
    torch.testing.assert_close(result.step, v / 2)
    assert not bool(result.ball_is_active)
    result = solve(J, v, 2.5, pull=1.0)  # and here on the sphere
    torch.testing.assert_close(result.step, v / 2)
    doubled = torch.cat([J[:1], J[:1]])  # rank 1
    result = solve(doubled, torch.tensor([1.0, 0.0], dtype=F64), 10.0, pull=1.0)
    torch.testing.assert_close(result.step, torch.tensor([0.25, 0.0], dtype=F64))
    assert not bool(result.ball_is_active)


@given(st.integers(0, 10_000))
def test_the_multiplier_falls_as_the_ball_grows(seed):
    g = generator(seed)
    J, v = jacobian(4, 7, 3, 2.0, g), torch.randn(7, generator=g, dtype=F64)
    multipliers = [float(solve(J, v, r, pull=1.0, measure_residual=False).multiplier) for r in (0.01, 0.1, 1.0, 10.0)]
    assert multipliers == sorted(multipliers, reverse=True)
    assert len(set(multipliers)) == 4


@given(st.integers(0, 10_000), st.floats(-2, 2), st.floats(-2, 2))
def test_units_of_the_outputs_and_of_the_weights(seed, log_outputs, log_weights):
    """With lambda in units of diag K the path does not depend on the outputs' unit, and goes with the weights'."""
    g = generator(seed)
    J, v = jacobian(4, 7, 4, 1.0, g), torch.randn(7, generator=g, dtype=F64)
    one = solve(J, v, 0.3, relative_multiplier=0.01)
    a, b = 10**log_outputs, 10**log_weights
    two = solve(J * a / b, v * b, 0.3 * b, relative_multiplier=0.01)
    torch.testing.assert_close(two.step / b, one.step, **tolerance(condition=1e5))


def test_products_are_few():
    g = generator(6)
    J, v = jacobian(3, 40, 3, 1.0, g), torch.randn(40, generator=g, dtype=F64)
    pairs, calls = eigenpairs(J @ J.T), []

    def count(matrix: Tensor, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: (calls.append(name), matrix @ x)[1]

    result = geodesic_step(count(J, "J"), count(J.T, "T"), pairs, v, 0.1, pull=1.0, measure_residual=False)
    assert calls == ["J", "T"]
    assert result.kkt_residual is None
    geodesic_step(count(J, "J"), count(J.T, "T"), pairs, J.T @ J @ v, 0.1, pull=1.0)
    assert sorted(calls[2:]) == ["J"] * 3 + ["T"] * 4


def test_float32_targets_with_a_gram_matrix_in_float64():
    g = generator(7)
    J = jacobian(4, 9, 4, 1.0, g)
    v = torch.randn(9, generator=g)
    result = geodesic_step(
        lambda x: J.float() @ x, lambda u: J.T.float() @ u, eigenpairs(J @ J.T), v, 0.3, relative_multiplier=0.01
    )
    assert result.step.dtype == torch.float32
    expected = solve(J, v.double(), 0.3, relative_multiplier=0.01)
    torch.testing.assert_close(result.step.double(), expected.step, **tolerance(torch.float32, 100))


@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_slsqp_finds_the_same(radius):
    optimize = pytest.importorskip("scipy.optimize", reason="a general solver to compare with; comes with scikit-learn")
    g = generator(8)
    J, v, beta = jacobian(3, 6, 3, 1.0, g), torch.randn(6, generator=g, dtype=F64), 0.7
    metric, target = (J.T @ J).numpy(), v.numpy()
    found = optimize.minimize(
        lambda x: x @ metric @ x - beta * x @ target,
        0 * target,
        jac=lambda x: 2 * metric @ x - beta * target,
        constraints={"type": "ineq", "fun": lambda x: radius**2 - x @ x, "jac": lambda x: -2 * x},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    ours = solve(J, v, radius, pull=beta).step
    # SLSQP stops where the objective does not fall by more than 1e-15: its minimiser is good to about the root of that
    torch.testing.assert_close(ours, torch.from_numpy(found.x), rtol=0, atol=1e-6 * radius)


def test_an_interior_point_method_finds_the_same():
    """A second general solver, which works in another way: barriers and trust regions, by exact second derivatives."""
    optimize = pytest.importorskip("scipy.optimize", reason="a general solver to compare with; comes with scikit-learn")
    g = generator(9)
    J, v, beta, radius = jacobian(3, 6, 3, 1.0, g), torch.randn(6, generator=g, dtype=F64), 0.7, 0.3
    metric, target = (J.T @ J).numpy(), v.numpy()
    found = optimize.minimize(
        lambda x: x @ metric @ x - beta * x @ target,
        0.01 * target,
        jac=lambda x: 2 * metric @ x - beta * target,
        hess=lambda x: 2 * metric,
        constraints=optimize.NonlinearConstraint(
            lambda x: x @ x, 0.0, radius**2, jac=lambda x: 2 * x[None], hess=lambda x, w: 2 * w[0] * np.eye(6)
        ),
        method="trust-constr",
        options={"gtol": 1e-10, "xtol": 1e-12, "barrier_tol": 1e-10, "maxiter": 500},
    )
    ours = solve(J, v, radius, pull=beta).step
    torch.testing.assert_close(ours, torch.from_numpy(found.x), rtol=0, atol=1e-5 * radius)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(1.001 * ours, torch.from_numpy(found.x), rtol=0, atol=1e-5 * radius)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"radius": 0.0}, r"radius=0.0: must be in \(0, inf\)"),
        ({"radius": math.nan}, "radius=nan"),
        ({"pull": math.inf}, "pull=inf"),
        ({"pull": None}, "need exactly one"),
        ({"relative_multiplier": 1.0}, "need exactly one"),
        ({"pull": None, "relative_multiplier": -1.0}, "relative_multiplier=-1.0"),
        ({"v": torch.full((3,), math.nan, dtype=F64)}, "targets: got NaN or inf"),
        ({"v": torch.ones(3, 1, 1, dtype=F64)}, "need .P. or .P, S."),
    ],
)
def test_bad_values_of_a_geodesic_step(kwargs, message):
    with pytest.raises(ValueError, match=message):
        solve(torch.eye(3, dtype=F64), **{"v": torch.ones(3, dtype=F64), "radius": 1.0, "pull": 1.0, **kwargs})


@pytest.mark.parametrize("gram", [torch.ones(2, 3), torch.ones(0, 0), torch.full((2, 2), math.inf)], ids=str)
def test_bad_gram_matrices(gram):
    with pytest.raises(ValueError, match="gram: got"):
        eigenpairs(gram)
