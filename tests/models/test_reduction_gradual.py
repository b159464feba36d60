"""Gradual reduction and distillation without labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import tolerance
from torchgeom_optim.geometry.mini_batches import MiniBatch
from torchgeom_optim.models import distil, reduce_gradually, reduce_model, reduction_gradual
from torchgeom_optim.models.reduction_gradual import _Batch, _Distillation, kept_at


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def inputs(num: int = 200) -> Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def divergence(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        log_p, log_q = model(x).log_softmax(-1), other(x).log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def test_the_schedule() -> None:
    for k, weights in ((10, 1000), (7, 7), (1, 50890)):
        numbers = [kept_at(i / 20, k, weights) for i in range(21)]
        assert (numbers[0], numbers[-1]) == (weights, k)
        assert numbers == sorted(numbers, reverse=True)
    assert kept_at(0.5, 10, 1000) == math.ceil(10 * 100**0.25)


@pytest.mark.parametrize(("basis", "importance"), [("kronecker", "loss"), ("pixels", "magnitude")])
def test_gradual_is_closer_to_the_network_than_one_shot(basis: str, importance: str) -> None:
    model, x = network(), inputs()
    options = {"basis": basis, "importance": importance}
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    reduced = reduce_gradually(model, x, 0.1, steps=120, batch_size=32, lr=2e-2, importance_samples=64, **options)
    assert len(reduced.coefficients) == reduced.num_directions == round(0.1 * 123)
    assert reduced.coefficients.grad is None
    one_shot = reduce_model(model, x, 0.1, **options)
    assert divergence(model, reduced, x) < 0.8 * divergence(model, one_shot, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert reduced.report is not None
    assert reduced.report.at.num_directions == reduced.num_directions
    torch.testing.assert_close(reduced.merge()(x), reduced(x), **tolerance(condition=1e3))


@pytest.mark.parametrize(("settle", "first_of_the_last"), [(0.0, 39), (0.5, 20)])
def test_no_direction_is_dropped_while_the_network_settles(settle: float, first_of_the_last: int) -> None:
    numbers: list[int] = []

    def noting(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, 1e-3)
        optimizer.register_step_pre_hook(lambda o, *_: numbers.append(o.param_groups[0]["params"][0].numel()))
        return optimizer

    reduce_gradually(network(), inputs(), 12, steps=40, every=1, settle=settle, optimizer=noting)
    assert len(numbers) == 40
    assert numbers == sorted(numbers, reverse=True)
    if settle:
        assert numbers[first_of_the_last:] == [12] * (40 - first_of_the_last)
    assert numbers[first_of_the_last - 1] > 12


def test_the_same_generator_gives_the_same_network_and_a_loader_will_do() -> None:
    model, x = network(), inputs(64)
    one, same, other = (
        reduce_gradually(model, x, 20, steps=20, batch_size=16, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one(x), same(x))
    assert not torch.equal(one(x), other(x))
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(16)]  # labels are not looked at
    loaded = reduce_gradually(model, batches, 20, steps=20)
    relabelled = reduce_gradually(model, [(part, labels + 1) for part, labels in batches], 20, steps=20)
    assert torch.equal(loaded(x), relabelled(x))


def test_distillation_follows_the_teacher_and_any_optimizer_trains_the_coefficients() -> None:
    model, x = network(), inputs()
    reduced = reduce_model(model, x, 0.3, compensate=0)
    start = divergence(model, reduced, x)
    positions = reduced.positions.clone()
    assert distil(reduced, model, x, steps=60, batch_size=50, lr=1e-2) is reduced
    assert divergence(model, reduced, x) < 0.5 * start
    assert torch.equal(reduced.positions, positions)
    assert reduced.report is None
    by_hand = reduce_model(model, x, 0.3, compensate=0)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        wanted = model(x).softmax(-1)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(x), wanted).backward()
        optimizer.step()
    assert divergence(model, by_hand, x) < start


@pytest.mark.parametrize("room", [2**28, 100])
def test_the_teacher_sees_each_sample_of_a_whole_once_where_there_is_room(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction_gradual, "_REMEMBERED_BYTES", room)
    seen: list[int] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                seen.extend((x[:, 0] * 1e6).round().long().tolist())
            return x

    model, x = network(), inputs(50)
    reduced = reduce_model(model, x, 60)
    teacher = nn.Sequential(Noting(), model)
    distil(reduced, teacher, x, steps=40, batch_size=16)  # 16 into 50: every pass leaves out two others
    whole = reduced.coefficients.detach().clone()
    assert len(set(seen)) == 50
    assert len(seen) == (50 if room > 100 else 640)
    monkeypatch.undo()
    again = reduce_model(model, x, 60)
    distil(again, model, x, steps=40, batch_size=16)
    torch.testing.assert_close(again.coefficients.detach(), whole, **tolerance(condition=1e4))
    seen.clear()
    distil(again, teacher, [x[:30], x[30:]], steps=4)  # a loader may give others each time
    assert len(seen) == 100


def test_by_seconds_and_by_outputs() -> None:
    ticks = iter(range(1000))
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double(), inputs(64)
    reduced = reduce_gradually(
        model, x, 10, metric="outputs", seconds=30.0, clock=lambda: float(next(ticks)), every=5, batch_size=16
    )
    assert reduced.num_directions == 10
    assert next(ticks) == 31  # asked once at the start and once a step


def test_what_the_optimizer_knows_of_kept_coefficients_is_kept() -> None:
    model, x = network(), inputs()
    reduced = reduce_model(model, x, 20)
    training = _Distillation(model, reduced, "fisher", None, -1, lambda p: torch.optim.Adam(p, lr=1e-2))
    training.step(_Batch(MiniBatch(x, None, len(x))), 1.0)
    state = training._optimizer.state[reduced.coefficients]
    values, average = reduced.coefficients.detach().clone(), state["exp_avg"].clone()
    chosen = torch.tensor([1, 4, 7])
    training.keep(chosen)
    state = training._optimizer.state[reduced.coefficients]
    assert torch.equal(reduced.coefficients.detach(), values[chosen])
    assert torch.equal(state["exp_avg"], average[chosen])
    assert len(training._optimizer.state) == 1
    before = reduced.coefficients.detach().clone()
    training.step(_Batch(MiniBatch(x, None, len(x))), 1.0)
    assert not torch.equal(reduced.coefficients.detach(), before)


def test_bad_input() -> None:
    model, x = network(), inputs(32)
    for options, message in (
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"every": 0}, "every=0: must be at least 1"),
        ({"lr": math.nan}, r"lr=nan: must be in \(0, inf\)"),
        ({"settle": 1.0}, r"settle=1.0: must be in \[0, 1\)"),
        ({"seconds": 0.0}, r"seconds=0.0: must be in \(0, inf\)"),
        ({"num_directions": 1000}, r"num_directions=1000: must be in \[1, 123\]"),
        ({"lr": 1e308, "steps": 4}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce_gradually(model, x, **{"num_directions": 10, "steps": 2, **options})
    with pytest.raises(ValueError, match="metric='ficher': must be one of"):
        distil(reduce_model(model, x, 10), model, x, metric="ficher")
    with pytest.raises(ValueError, match="the data ran dry: they must give mini-batches each time"):
        reduce_gradually(model, iter([x[:20], x[20:]]), 10, steps=5)
