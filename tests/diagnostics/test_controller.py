"""The rate follows from the records, and keeps torch's conventions for schedulers."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from torchgeom_optim.diagnostics.controller import ConsistencyLR, advise_batch_size
from torchgeom_optim.diagnostics.history import History, Record


def record(step: int = 0, *, curvature: float | None = 2.0, coherence: float | None = None, **values) -> Record:
    values |= {} if curvature is None else {"top_curvature": curvature}
    values |= {} if coherence is None else {"gradient_coherence": coherence}
    return Record(step=step, time_s=0.0, loss=1.0, batch_size=8, values=values)


def made(history: History, *, rates=(0.1,), momentum: float = 0.0, **settings):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    return optimizer, ConsistencyLR(optimizer, history, **{"max_factor": math.inf, **settings})


def stepped(optimizer, scheduler) -> list[float]:
    optimizer.step()
    scheduler.step()
    return [group["lr"] for group in optimizer.param_groups]


def test_the_rate_is_the_change_over_the_curvature():
    history = History()
    optimizer, scheduler = made(history, change=1.5, signal_power=0.0)
    assert stepped(optimizer, scheduler) == [0.1]  # nothing is known yet
    history.append(record(curvature=5.0))
    assert stepped(optimizer, scheduler) == pytest.approx([0.3])
    assert scheduler.get_last_lr() == pytest.approx([0.3])
    assert stepped(optimizer, scheduler) == pytest.approx([0.3])  # and no record changes nothing


def test_the_curvature_along_the_gradient_comes_first():
    history = History()
    optimizer, scheduler = made(history, signal_power=0.0)
    history.append(record(curvature=50.0, weight_condition_number=30.0, gradient_norm=2.0, weight_norm=6.0))
    assert stepped(optimizer, scheduler) == pytest.approx([1 / 10])
    assert scheduler.curvature == pytest.approx(10.0)


def test_on_a_quadratic_it_takes_the_newton_step():
    from torchgeom_optim.diagnostics import Diagnostics

    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False).double()
    x, y = torch.full((4, 1), 3.0, dtype=torch.float64), torch.full((4, 1), 6.0, dtype=torch.float64)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=1e-3), torch.nn.MSELoss()
    with Diagnostics(
        model, criterion, every=1, metrics=["weight_condition_number", "gradient_norm", "weight_norm"]
    ).attach(optimizer) as diagnostics:
        scheduler = ConsistencyLR(optimizer, diagnostics, signal_power=0.0, max_factor=math.inf)
        for _ in range(2):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 18)  # the Hessian of mean (3 w - 6)^2
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 1), 2.0, dtype=torch.float64))


def test_the_signal_is_the_share_of_the_true_gradient():
    # b = 8, c = 1/2: |G|^2 / |h|^2 = (b c - 1) / ((b - 1) c) = 3 / 3.5
    history = History()
    optimizer, scheduler = made(history, signal_power=0.5)
    history.append(record(coherence=0.5))
    assert stepped(optimizer, scheduler) == pytest.approx([0.5 * math.sqrt(6 / 7)])
    assert scheduler.signal == pytest.approx(6 / 7)
    history.append(record(coherence=0.0))  # noise alone, averaged with what was known
    stepped(optimizer, scheduler)
    assert scheduler.signal == pytest.approx((0.8 * 3 / 7 - 1 / 7) / (0.8 * 0.5))


def test_signal_has_a_floor():
    history = History()
    optimizer, scheduler = made(history, signal_power=1.0)
    history.append(record(coherence=0.05))
    assert stepped(optimizer, scheduler) == pytest.approx([0.5e-3])


def test_all_averages_are_over_logarithms_and_parts():
    history = History()
    optimizer, scheduler = made(history, signal_power=0.0, smoothing=0.5)
    history.append(record(curvature=1.0))
    history.append(record(1, curvature=8.0))
    assert stepped(optimizer, scheduler) == pytest.approx([8 ** (-2 / 3)])


def test_groups_momentum_and_bounds():
    history = History()
    optimizer, scheduler = made(history, rates=(0.1, 0.4), momentum=0.75, signal_power=0.0)
    history.append(record())
    assert stepped(optimizer, scheduler) == pytest.approx([0.125, 0.5])
    history = History()
    optimizer, scheduler = made(history, max_factor=2.0, max_lr=0.3, signal_power=0.0)
    found = []
    for _ in range(3):
        history.append(record(curvature=1e-3))
        found += stepped(optimizer, scheduler)
    assert found == pytest.approx([0.2, 0.3, 0.3])
    for _ in range(2):
        history.append(record(curvature=1e9))
        found += stepped(optimizer, scheduler)
    assert found[3:] == pytest.approx([0.3 / 2, 0.3 / 4])


@pytest.mark.parametrize("curvature", [None, math.nan, math.inf, -1.0, 0.0])
def test_records_that_say_nothing_change_nothing(curvature):
    history = History()
    optimizer, scheduler = made(history)
    history.append(record(curvature=curvature, coherence=0.5))
    assert stepped(optimizer, scheduler) == [0.1]


def test_state_dict_goes_on_where_it_was():
    def feed(history):
        history.append(record(curvature=3.0, coherence=0.4))

    history = History()
    optimizer, scheduler = made(history)
    feed(history)
    stepped(optimizer, scheduler)
    state = copy.deepcopy(scheduler.state_dict())
    assert not any(isinstance(value, History | torch.optim.Optimizer) for value in state.values())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    other = History()
    other.append(record(curvature=1e6))  # of an earlier run: seen already
    resumed_optimizer, resumed = made(other)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(loaded)
    assert scheduler.state_dict() == state
    for one in (history, other):
        one.append(record(curvature=7.0, coherence=0.3))
    assert stepped(optimizer, scheduler) == stepped(resumed_optimizer, resumed) != [0.1]


def test_records_of_before_are_not_its_own():
    history = History()
    history.append(record(curvature=1e6))
    assert stepped(*made(history)) == [0.1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"change": 0.0}, r"change=0.0: must be in \(0, inf\)"),
        ({"change": math.nan}, "change=nan"),
        ({"signal_power": 1.5}, r"signal_power=1.5: must be in \[0, 1\]"),
        ({"smoothing": 1.0}, r"smoothing=1.0: must be in \[0, 1\)"),
        ({"max_factor": 1.0}, r"max_factor=1.0: must be above 1"),
        ({"max_lr": 0.0}, r"max_lr=0.0: must be above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        made(History(), **settings)


def test_a_source_without_history():
    with pytest.raises(TypeError, match="must be a History, or have one"):
        made(torch.nn.Linear(1, 1))


def advised(values, **settings):
    history = History()
    history.append(record(curvature=None, **values))
    return advise_batch_size(history, **settings)


def test_batch_advice():
    advice = advised({"gradient_noise_scale": 90.0})
    assert (advice.size, advice.noise_scale) == (90, 90.0)
    assert advice.progress_per_step == advice.progress_per_sample == 0.5
    assert advised({"gradient_noise_scale": 90.0}, progress_per_step=0.9).size == 810
    assert advised({"gradient_noise_scale": 90.0}, most=64).size == 64
    assert advised({"gradient_noise_scale": 90.0}, most=64).progress_per_step == pytest.approx(64 / 154)
    assert advised({"gradient_noise_scale": 0.01}).size == 1
    assert advised({"coherence": 0.25}).size == 6  # b (1 - c) / (b c - 1)
    assert advised({"coherence": 0.1}, most=512).size == 512
    with pytest.raises(ValueError, match="lost in the noise"):
        advised({"coherence": 0.1})
    with pytest.raises(ValueError, match="no record has gradient_coherence"):
        advised({})
    with pytest.raises(ValueError, match=r"progress_per_step=1.0: must be in \(0, 1\)"):
        advised({"gradient_noise_scale": 90.0}, progress_per_step=1.0)
    with pytest.raises(ValueError, match="most=0"):
        advised({"gradient_noise_scale": 90.0}, most=0)
