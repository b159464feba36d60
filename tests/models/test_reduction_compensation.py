"""Kept coefficients that make up for dropped directions, against dense least squares."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import tolerance
from torchgeom_optim.geometry.mini_batches import MiniBatch
from torchgeom_optim.models import ReducedModel, decompose, reduce_model
from torchgeom_optim.models.reduction_compensation import compensate


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, outputs)).double()


def inputs(num: int = 60) -> Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def jacobian(reduced: ReducedModel, x: Tensor) -> Tensor:
    """Of 2 sqrt(p) by the coefficients, by autograd through the reduced network itself."""
    own = reduced.coefficients.detach()

    def f(c: Tensor) -> Tensor:
        return 2 * torch.func.functional_call(reduced, {"coefficients": c}, (x,)).softmax(-1).sqrt().flatten()

    return torch.autograd.functional.jacobian(f, own)


@pytest.mark.parametrize("basis", ["kronecker", "pixels", "exact"])
def test_one_round_is_the_damped_least_squares_answer(basis: str) -> None:
    model, x = network(), inputs()
    reduced = decompose(model, x, basis=basis).reduced(30, measure=False)
    J = jacobian(reduced, x)
    change = (2 * model(x).softmax(-1).sqrt() - 2 * reduced(x).softmax(-1).sqrt()).flatten().detach()
    lam = float(J.square().sum()) / len(J)
    theta = torch.linalg.solve(J.T @ J + lam * torch.eye(30).double(), J.T @ change)
    wanted = reduced.coefficients.detach() + theta
    found = compensate(reduced, model, MiniBatch(x, None, len(x)), rounds=1, iterations=300, damping=1.0)
    # Conjugate gradients end at 1e-4 of the first gradient.
    torch.testing.assert_close(found.coefficients.detach(), wanted, rtol=0, atol=5e-3 * float(theta.norm()))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wanted - theta, wanted, rtol=0, atol=5e-3 * float(theta.norm()))


def test_predictions_come_nearer_and_the_network_stays() -> None:
    model, x = network(), inputs(200)
    before = copy.deepcopy(model.state_dict())
    plain = reduce_model(model, x, 0.3)
    better = reduce_model(model, x, 0.3, compensate=2, batch_size=64)
    assert plain.report is not None
    assert better.report is not None
    assert better.report.at.bhattacharyya < 0.7 * plain.report.at.bhattacharyya
    assert torch.equal(better.positions, plain.positions)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(better.merge()(x), better(x), **tolerance(condition=1e3))
    assert better.coefficients.requires_grad


def test_a_linear_network_reaches_the_least_squares_answer_in_one_round() -> None:
    x = inputs()
    x[:, 5] = x[:, 0] + 0.1 * x[:, 5]  # so that a dropped weight can be made up for
    model = nn.Linear(6, 1, bias=False).double()
    reduced = decompose(model, x, basis="pixels", metric="outputs").reduced(4, measure=False)
    kept = reduced.merge().weight.detach()[0] != 0
    best = torch.linalg.lstsq(x[:, kept], model(x)[:, 0].detach()).solution
    compensate(reduced, model, MiniBatch(x, None, len(x)), rounds=20, iterations=50, damping=1e-9, metric="outputs")
    torch.testing.assert_close(reduced.merge().weight.detach()[0, kept], best, rtol=1e-6, atol=1e-6)


def test_where_nothing_was_dropped_nothing_moves() -> None:
    model, x = network(), inputs()
    reduced = decompose(model, x).reduced(1.0, measure=False)
    before = reduced.coefficients.detach().clone()
    compensate(reduced, model, MiniBatch(x, None, len(x)))
    torch.testing.assert_close(reduced.coefficients.detach(), before, **tolerance(condition=1e4))


def test_bad_input() -> None:
    model, x = network(), inputs(20)
    samples = MiniBatch(x, None, len(x))
    reduced = decompose(model, x).reduced(10, measure=False)
    before = reduced.coefficients.detach().clone()
    for options, message in (
        ({"rounds": 0}, "rounds=0: must be at least 1"),
        ({"iterations": 0}, "iterations=0: must be at least 1"),
        ({"damping": 0.0}, r"damping=0.0: must be in \(0, inf\)"),
        ({"damping": math.nan}, r"damping=nan: must be in \(0, inf\)"),
        ({"metric": "ficher"}, "metric='ficher': must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            compensate(reduced, model, samples, **options)
    with pytest.raises(ValueError, match="finite"):
        compensate(reduced, model, MiniBatch(x * math.nan, None, len(x)))
    assert torch.equal(reduced.coefficients.detach(), before)


def test_a_failure_in_a_later_round_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), inputs(20)
    reduced = decompose(model, x).reduced(10, measure=False)
    before, merge, rounds = reduced.coefficients.detach().clone(), reduced.merge, []

    def failing() -> nn.Module:
        rounds.append(reduced.coefficients.detach().clone())
        if len(rounds) == 2:
            raise OSError("gone")
        return merge()

    monkeypatch.setattr(reduced, "merge", failing)
    with pytest.raises(OSError, match="gone"):
        compensate(reduced, model, MiniBatch(x, None, len(x)))
    assert not torch.equal(rounds[1], before)  # the first round had moved them
    assert torch.equal(reduced.coefficients.detach(), before)
