"""Kept coefficients that make up for dropped directions, against dense least squares."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import tolerance
from torchgeom_optim.geometry.mini_batches import MiniBatch
from torchgeom_optim.models import ReducedModel, decompose, reduce_gradually, reduce_model, reduction_decomposition
from torchgeom_optim.models.reduction_compensation import compensate


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, outputs)).double()


def inputs(num: int = 60) -> Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@torch.no_grad()
def distance(reduced: ReducedModel, coefficients: Tensor | None, model: nn.Module, x: Tensor) -> float:
    """Of 2 sqrt(p), between a network and a reduced one at these coefficients, or its own."""
    at = {} if coefficients is None else {"coefficients": coefficients}
    found = torch.func.functional_call(reduced, at, (x,)).softmax(-1).sqrt()
    return float(2 * (found - model(x).softmax(-1).sqrt()).norm())


def jacobian(reduced: ReducedModel, x: Tensor) -> Tensor:
    """Of 2 sqrt(p) by the coefficients, by autograd through the reduced network itself."""
    own = reduced.coefficients.detach()

    def f(c: Tensor) -> Tensor:
        return 2 * torch.func.functional_call(reduced, {"coefficients": c}, (x,)).softmax(-1).sqrt().flatten()

    return torch.autograd.functional.jacobian(f, own)


@pytest.mark.parametrize("basis", ["kronecker", "pixels", "exact"])
def test_one_round_is_the_damped_least_squares_answer(basis: str) -> None:
    model, x = network(), inputs()
    reduced = decompose(model, x, basis=basis).reduced(30, measure=False, compensate=0)
    J = jacobian(reduced, x)
    change = (2 * model(x).softmax(-1).sqrt() - 2 * reduced(x).softmax(-1).sqrt()).flatten().detach()
    lam = float(J.square().sum()) / len(J)
    theta = torch.linalg.solve(J.T @ J + lam * torch.eye(30).double(), J.T @ change)
    start = reduced.coefficients.detach().clone()
    compensate(reduced, model, MiniBatch(x, None, len(x)), rounds=1, iterations=300, damping=1.0, held_out=0.0)
    moved = reduced.coefficients.detach() - start
    part = min((0.25, 0.5, 0.75, 1.0), key=lambda part: distance(reduced, start + part * theta, model, x))
    # Conjugate gradients end at 1e-4 of the first gradient.
    torch.testing.assert_close(moved, part * theta, rtol=0, atol=5e-3 * float(theta.norm()))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.zeros(30).double(), moved, rtol=0, atol=5e-3 * float(theta.norm()))


def test_the_length_of_a_step_is_chosen_on_samples_that_it_was_not_computed_from() -> None:
    model, x = network(), inputs(100)
    x[8:] *= 4  # 45 coefficients follow eight samples, to the harm of others
    reduced = decompose(model, x).reduced(45, measure=False, compensate=0)
    start, before = reduced.coefficients.detach().clone(), distance(reduced, None, model, x[8:])
    options = {"rounds": 1, "iterations": 100, "damping": 1e-6}
    compensate(reduced, model, MiniBatch(x[:8], None, 8), held_out=0.0, **options)
    assert distance(reduced, None, model, x[8:]) > 1.2 * before
    reduced.coefficients.data.copy_(start)
    compensate(reduced, model, MiniBatch(x, None, 100), held_out=0.92, **options)
    assert distance(reduced, None, model, x[8:]) < before


def test_predictions_come_nearer_and_the_network_stays() -> None:
    model, x = network(), inputs(200)
    before = copy.deepcopy(model.state_dict())
    plain = reduce_model(model, x, 0.3, compensate=0)
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
    reduced = decompose(model, x, basis="pixels", metric="outputs").reduced(4, measure=False, compensate=0)
    kept = reduced.merge().weight.detach()[0] != 0
    best = torch.linalg.lstsq(x[:, kept], model(x)[:, 0].detach()).solution
    compensate(
        reduced,
        model,
        MiniBatch(x, None, len(x)),
        rounds=20,
        iterations=50,
        damping=1e-9,
        held_out=0.0,
        metric="outputs",
    )
    torch.testing.assert_close(reduced.merge().weight.detach()[0, kept], best, rtol=1e-6, atol=1e-6)


def test_where_nothing_was_dropped_nothing_moves_and_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), inputs()
    called: list[int] = []
    monkeypatch.setattr(reduction_decomposition, "compensated", lambda reduced, *_, **__: called.append(1))
    assert torch.equal(reduce_model(model, x, 1.0).coefficients, decompose(model, x).coordinates)
    reduce_gradually(model, x, 20, steps=3)
    assert not called
    reduce_model(model, x, 20)
    assert called
    monkeypatch.undo()
    reduced = decompose(model, x).reduced(1.0, measure=False)
    before = reduced.coefficients.detach().clone()
    compensate(reduced, model, MiniBatch(x, None, len(x)))
    torch.testing.assert_close(reduced.coefficients.detach(), before, **tolerance(condition=1e4))


def test_bad_input() -> None:
    model, x = network(), inputs(20)
    samples = MiniBatch(x, None, len(x))
    reduced = decompose(model, x).reduced(10, measure=False, compensate=0)
    before = reduced.coefficients.detach().clone()
    for options, message in (
        ({"rounds": 0}, "rounds=0: must be at least 1"),
        ({"iterations": 0}, "iterations=0: must be at least 1"),
        ({"damping": 0.0}, r"damping=0.0: must be in \(0, inf\)"),
        ({"damping": math.nan}, r"damping=nan: must be in \(0, inf\)"),
        ({"held_out": 1.0}, r"held_out=1.0: must be in \[0, 1\)"),
        ({"metric": "ficher"}, "metric='ficher': must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            compensate(reduced, model, samples, **options)
    with pytest.raises(ValueError, match="finite"):
        compensate(reduced, model, MiniBatch(x * math.nan, None, len(x)))
    assert torch.equal(reduced.coefficients.detach(), before)
    with pytest.raises(ValueError, match="compensate=-1: must be at least 0"):
        reduce_model(model, x, 10, compensate=-1)


def test_a_failure_in_a_later_round_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), inputs(20)
    reduced = decompose(model, x).reduced(10, measure=False, compensate=0)
    before, merge, rounds = reduced.coefficients.detach().clone(), reduced.merge, []

    def failing() -> nn.Module:
        rounds.append(reduced.coefficients.detach().clone())
        if len(rounds) == 3:  # once for the samples held out, and once a round
            raise OSError("gone")
        return merge()

    monkeypatch.setattr(reduced, "merge", failing)
    with pytest.raises(OSError, match="gone"):
        compensate(reduced, model, MiniBatch(x, None, len(x)))
    assert not torch.equal(rounds[2], before)  # the first round had moved them
    assert torch.equal(reduced.coefficients.detach(), before)


def test_compensation_is_the_default_of_complete_bases_ranked_by_loss_alone() -> None:
    model, x = network(), inputs(100)
    for options, moved in (
        ({}, True),
        ({"basis": "pixels"}, True),
        ({"importance": "eigenvalue"}, False),
        ({"basis": "pixels", "importance": "magnitude"}, False),
        ({"basis": "exact"}, False),
    ):
        decomposition = decompose(model, x, **options)
        reduced = reduce_model(model, x, 20, **options)
        projected = decomposition.coordinates[decomposition.ranked[:20].sort().values]
        assert torch.equal(reduced.coefficients, projected) != moved
        assert torch.equal(reduce_model(model, x, 20, compensate=0, **options).coefficients, projected)
    decomposition = decompose(model, x)
    point, plain = (decomposition.curve([20], x, compensate=rounds)[0] for rounds in (None, 0))
    assert point.bhattacharyya < plain.bhattacharyya
