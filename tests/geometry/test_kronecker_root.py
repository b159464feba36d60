"""The Kronecker metric's root, and the costs of cutting, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim.geometry.function_metric import FunctionMetric
from torchgeom_optim.geometry.kronecker import kronecker_factors
from torchgeom_optim.geometry.kronecker_root import KroneckerRoot, averaged_factors

SAMPLES = 40


def one_layer() -> FunctionMetric:
    """A linear layer's outputs: J'J is exactly 1 (x) A, with the bias's column."""
    return FunctionMetric(nn.Linear(3, 2).double(), torch.randn(SAMPLES, 3, dtype=torch.float64))


def columns(operator, size: int) -> torch.Tensor:
    return torch.stack([operator(e) for e in torch.eye(size, dtype=torch.float64)], 1)


def exact_root(J: FunctionMetric, damping: float = 1e-24) -> KroneckerRoot:
    return KroneckerRoot(J.vectors, kronecker_factors(J), J.dense().square().sum(0) / SAMPLES, damping)


def test_of_one_linear_layer_it_is_the_metric():
    J = one_layer()
    root = exact_root(J)
    R = columns(root.product, 8)
    M = J.dense().T @ J.dense() / SAMPLES
    torch.testing.assert_close(R.T @ R, M, rtol=1e-9, atol=1e-9)  # each factor is damped by 1e-12
    torch.testing.assert_close(columns(root.transposed_product, 8), R.T)
    torch.testing.assert_close(root.diagonal(), M.diagonal(), rtol=1e-9, atol=1e-9)


def test_the_damping_is_a_share_of_the_mean_diagonal():
    J = one_layer()
    M = J.dense().T @ J.dense() / SAMPLES
    more = columns(exact_root(J, 0.5).product, 8)
    eigenvalues = torch.linalg.eigvalsh(more.T @ more)
    assert float(eigenvalues[0]) > 0.4 * float(M.diagonal().mean())


def test_the_cost_of_a_weight_is_the_loss_that_the_others_cannot_compensate():
    J = one_layer()
    w = torch.randn(8, dtype=torch.float64)
    M = J.dense().T @ J.dense() / SAMPLES
    found = exact_root(J).cost_of_weights(w)
    for p in range(8):
        rest = [i for i in range(8) if i != p]
        theta = torch.linalg.solve(M[rest][:, rest], M[rest, p] * w[p])
        step = torch.zeros(8, dtype=torch.float64)
        step[p], step[rest] = -w[p], theta
        torch.testing.assert_close(found[p], step @ M @ step, rtol=1e-7, atol=1e-9)  # condition of M


def test_the_cost_of_a_unit_is_that_of_its_whole_row():
    J = one_layer()
    w = torch.randn(8, dtype=torch.float64)
    M = J.dense().T @ J.dense() / SAMPLES
    found = J.vectors.named(exact_root(J).cost_of_units(w))
    for unit in range(2):
        row = torch.zeros(2, 3, dtype=torch.float64)
        bias = torch.zeros(2, dtype=torch.float64)
        row[unit], bias[unit] = 1, 1
        v = w * J.vectors.flat({"weight": row, "bias": bias})
        cost = found["weight"][unit].sum() + found["bias"][unit]
        torch.testing.assert_close(cost, v @ M @ v, rtol=1e-9, atol=1e-9)


def test_a_convolution_has_the_trace_that_it_has():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2)).double()
    J = FunctionMetric(model, torch.randn(5, 2, 6, 6, dtype=torch.float64))
    diagonal = J.dense().square().sum(0) / 5
    root = KroneckerRoot(J.vectors, kronecker_factors(J), diagonal, 1e-24)
    named, found = J.vectors.named(diagonal), J.vectors.named(root.diagonal())
    for layer in ("0", "3"):
        expected, got = (x[f"{layer}.weight"].sum() + x[f"{layer}.bias"].sum() for x in (named, found))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0.0)


def test_averages_weigh_by_samples():
    J, K = one_layer(), one_layer()
    first, memory = averaged_factors({}, kronecker_factors(J), 0.5)
    torch.testing.assert_close(first[0].inputs, kronecker_factors(J)[0].inputs)
    second, memory = averaged_factors(memory, kronecker_factors(K), 0.5)
    before, now = kronecker_factors(J)[0].inputs, kronecker_factors(K)[0].inputs
    torch.testing.assert_close(second[0].inputs, before / 3 + now * 2 / 3)
    assert memory["weight"][2] == 1.5 * SAMPLES


def test_a_layer_that_nothing_reaches_is_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[2].weight)
    J = FunctionMetric(model, torch.randn(10, 3, dtype=torch.float64))
    root = KroneckerRoot(J.vectors, kronecker_factors(J), J.dense().square().sum(0) / 10, 1e-3)
    known = J.vectors.named(root.diagonal() > 0)
    assert not bool(known["0.weight"].any())
    assert bool(known["2.weight"].all())
    assert bool(torch.isfinite(root.cost_of_weights(torch.ones(26, dtype=torch.float64))).all())


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_bad_damping(damping):
    with pytest.raises(ValueError, match=r"must be in \(0, inf\)"):
        KroneckerRoot(one_layer().vectors, [], torch.ones(8), damping)


def test_values_at_other_weights_and_the_estimated_diagonal():
    J = one_layer()
    w = torch.randn(8, dtype=torch.float64)
    inside = J.vectors.flat(J.vectors.values())
    torch.testing.assert_close(J.values(w) - J.values(), J @ (w - inside), **tolerance(condition=100))
    with torch.no_grad():
        J.model.weight.add_(1.0)
    assert bool((J.values(inside) != J.values()).any())
    exact = J.dense().square().sum(0)
    estimate = J.estimated_diagonal(400)
    # 400 draws: a relative standard deviation of 0.07 at most for one entry; five of them.
    torch.testing.assert_close(estimate, exact, rtol=0.36, atol=0.0)
    assert [batch.size for batch in J.mini_batches()] == [SAMPLES]
