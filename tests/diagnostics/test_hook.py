from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import multiprocessing
import os
import pickle
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests import oracles
from tests.diagnostics.loops import EVERYTHING, batches, expected_from, hooks_of, network, sgd, train
from tests.zoo import ZOO
from torchgeom_optim.diagnostics import METRICS, Diagnostics, History, LogSpaced, Options
from torchgeom_optim.geometry.gram_accumulator import layer_of


@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_riding_on_the_loop_against_single_samples_gradients(case):
    model, criterion = case.model(), nn.CrossEntropyLoss()
    x, y = case.batch(5)
    gradients = oracles.per_sample_gradients(model, criterion, x, y)
    with Diagnostics(model, criterion, every=1).attach() as diagnostics:
        (3.0 * criterion(model(x), y)).backward()
    (record,) = diagnostics.history
    rows = torch.cat([g.reshape(5, -1) for g in gradients.values()], 1)
    assert record.loss == pytest.approx(float(criterion(model(x), y).detach()))
    assert record.batch_size == 5
    for name, value in expected_from(rows, rows.shape[1]).items():
        assert_close(record.values[name], value, **oracles.tolerance(condition=1e4))
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    assert record.values["weight_norm"] == pytest.approx(float(weights.norm()))
    by_layer: dict[str, list[torch.Tensor]] = {}
    for name, g in gradients.items():
        by_layer.setdefault(layer_of(name), []).append(g.reshape(5, -1))
    assert list(record.layers["gradient_diversity"]) == list(by_layer)
    for layer, parts in by_layer.items():
        own = torch.cat(parts, 1)
        assert_close(
            record.layers["fisher_trace"][layer], float(own.square().sum() / 5), **oracles.tolerance(condition=1e3)
        )


def test_measuring_without_attaching_gives_the_same():
    model, criterion = network().double().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    x = x.double()
    riding = Diagnostics(model, criterion, every=1, metrics="full").attach()
    criterion(model(x), y).backward()
    riding.close()
    alone = Diagnostics(model, criterion, metrics="full").measure(x, y)
    for name, value in riding.history[0].values.items():
        if METRICS[name] != "step":
            assert_close(alone.values[name], value, rtol=1e-6, atol=1e-9)
    assert alone.loss == pytest.approx(riding.history[0].loss)
    assert alone.layers.keys() == riding.history[0].layers.keys()


@pytest.mark.parametrize("metrics", ["free", "default", EVERYTHING])
@pytest.mark.parametrize("per_layer", [True, False])
def test_training_is_bit_for_bit_what_it_is_without(metrics, per_layer):
    results = []
    for attached in (False, True):
        model, criterion = network(dropout=0.3), nn.CrossEntropyLoss()
        optimizer = sgd(model)
        diagnostics = Diagnostics(model, criterion, every=2, metrics=metrics, per_layer=per_layer)
        if attached:
            diagnostics.attach(optimizer)
        torch.manual_seed(5)
        losses = train(model, criterion, optimizer, batches(5))
        results.append((losses, model.state_dict(), torch.get_rng_state(), optimizer.state_dict()["state"]))
        diagnostics.close()
        assert len(diagnostics.history) == (3 if attached else 0)
    (losses, weights, rng, state), (losses2, weights2, rng2, state2) = results
    assert losses == losses2
    assert all(torch.equal(t, weights2[name]) for name, t in weights.items())
    assert torch.equal(rng, rng2)
    assert all(torch.equal(state[k]["momentum_buffer"], state2[k]["momentum_buffer"]) for k in state)
    values = diagnostics.history[-1].values
    assert all(math.isfinite(v) or name == "gradient_noise_scale" for name, v in values.items()), values
    assert bool(diagnostics.history[-1].layers) == per_layer


@pytest.mark.parametrize("how", ["close", "exception", "forgotten"])
def test_no_hook_and_no_tensor_is_left(how):
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    x, y = batches(1)[0]
    ref = weakref.ref(x)
    diagnostics = Diagnostics(model, criterion, every=1, metrics="cheap").attach(optimizer)
    assert hooks_of(model, criterion, optimizer) > 0
    if how == "exception":
        with contextlib.suppress(KeyError), diagnostics:
            criterion(model(x), y).backward()
            raise KeyError
        assert len(diagnostics.history) == 1  # what had been measured is kept
    else:
        train(model, criterion, optimizer, [(x, y), (x, y)])
        if how == "close":
            diagnostics.close()
            diagnostics.close()
        else:
            diagnostics = None
            gc.collect()
    assert hooks_of(model, criterion, optimizer) == 0
    del x
    gc.collect()
    assert ref() is None
    if diagnostics is not None:
        held = [v for v in vars(diagnostics).values() if isinstance(v, torch.Tensor)]
        assert held == []
        assert diagnostics._steps._previous is diagnostics._waiting is None


def test_memory_does_not_grow_over_a_thousand_measurements():
    """A batch that stayed each time would be 125 MiB in the end, a gradient 63."""
    model, criterion = nn.Linear(4096, 2), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = torch.randn(8, 4096), torch.arange(8) % 2

    def tensors() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    with Diagnostics(model, criterion, every=1, metrics=["default", "free"]).attach(optimizer) as diagnostics:
        train(model, criterion, optimizer, [(x.clone(), y) for _ in range(50)])
        before, resident = tensors(), resident_mib()
        for _ in range(950):
            train(model, criterion, optimizer, [(x.clone(), y)])
        assert tensors() <= before
        if resident is not None:
            assert resident_mib() - resident < 30
        assert len(diagnostics.history) == 1000
        assert diagnostics.history[-1].values["gradient_norm"] > 0


def resident_mib() -> float | None:
    """What the process has in memory; None where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if path.exists() else None


def test_two_on_one_model_do_not_notice_each_other():
    alone: list[dict[str, float]] = []
    for together in (False, True):
        model, criterion = network(), nn.CrossEntropyLoss()
        optimizer = sgd(model)
        first = Diagnostics(model, criterion, every=2, metrics="cheap").attach(optimizer)
        second = Diagnostics(model, criterion, every=1, metrics="full")
        if together:
            second.attach(optimizer)
        train(model, criterion, optimizer, batches(3))
        first.close()
        second.close()
        alone.append([dict(record.values) for record in first.history])
        if together:
            assert [record.step for record in second.history] == [0, 1, 2]
            assert second.history[0].values["gradient_norm"] == first.history[0].values["gradient_norm"]
    torch.testing.assert_close(*alone, equal_nan=True, rtol=0, atol=0)


def test_a_schedule_is_asked_once_for_each_step():
    asked = []

    def schedule(step):
        asked.append(step)
        return step % 2 == 0

    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    with Diagnostics(model, criterion, every=schedule, metrics="free").attach(optimizer) as diagnostics:
        train(model, criterion, optimizer, batches(4))
    assert asked == [0, 1, 2, 3, 4, 5]
    assert [record.step for record in diagnostics.history] == [0, 2]
    with Diagnostics(model, criterion, every=LogSpaced(3), metrics="free").attach(optimizer) as diagnostics:
        train(model, criterion, optimizer, batches(6))
    assert [record.step for record in diagnostics.history] == [0, 1, 2, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="a process is forked and killed")
def test_a_run_that_is_killed_keeps_what_it_had(tmp_path):
    def run() -> None:
        model, criterion = network(), nn.CrossEntropyLoss()
        optimizer = sgd(model)
        with Diagnostics(model, criterion, every=1, history=History(tmp_path / "run.jsonl")).attach(optimizer):
            train(model, criterion, optimizer, batches(3))
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    records = History.from_jsonl(tmp_path / "run.jsonl")
    assert [record.step for record in records] == [0, 1, 2]
    assert all(math.isfinite(record.values["gradient_norm"]) for record in records)


def test_copies_of_the_model_are_not_watched():
    model, criterion = network(), nn.CrossEntropyLoss()
    with Diagnostics(model, criterion, every=1).attach() as diagnostics:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            criterion(twin(batches(1)[0][0]), batches(1)[0][1]).backward()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert len(diagnostics.history) == 0
    assert hooks_of(model, criterion, sgd(model)) == 0


def test_refusals():
    model, criterion = network(), nn.CrossEntropyLoss()
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        Diagnostics(frozen, criterion)
    with pytest.raises(TypeError, match="model is a function"):
        Diagnostics(lambda x: x, criterion)
    with pytest.raises(ValueError, match="every=0"):
        Diagnostics(model, criterion, every=0)
    with pytest.raises(ValueError, match="metrics='all'"):
        Diagnostics(model, criterion, metrics="all")
    with pytest.raises(ValueError, match="reduction='none'"):
        Diagnostics(model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(TypeError, match="criterion='mse'"):
        Diagnostics(model, "mse")
    with pytest.raises(TypeError, match="a function cannot be watched"):
        Diagnostics(model, nn.functional.cross_entropy).attach()
    diagnostics = Diagnostics(model, criterion)
    with pytest.raises(TypeError, match="optimizer is a str"):
        diagnostics.attach("sgd")
    with pytest.raises(ValueError, match="none of the model's parameters"):
        diagnostics.attach(sgd(network()))
    assert hooks_of(model, criterion, sgd(model)) == 0
    with diagnostics.attach(sgd(model)), pytest.raises(RuntimeError, match="attached already"):
        diagnostics.attach()
    for options in (
        {"perturbations": "none"},
        {"groups": 1},
        {"perturbation_size": math.nan},
        {"num_input_samples": 0},
        {"mask_fraction": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Options(**options)
