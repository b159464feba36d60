from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests import oracles
from tests.zoo import ZOO
from torchgeom_optim.diagnostics import METRICS, Diagnostics, History, LogSpaced, Options
from torchgeom_optim.diagnostics.agreement import gaussian_effective_rank
from torchgeom_optim.geometry.gram_accumulator import layer_of

EVERYTHING = ["full", "spectrum"]


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def batches(num: int, size: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(num)
    ]


def train(model, criterion, optimizer, data, on_step=None):
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step()
    return losses


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def expected_from(rows: torch.Tensor, p: int) -> dict[str, float]:
    b, mean = len(rows), rows.mean(0)
    cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in itertools.combinations(rows, 2)]
    trace = float(rows.var(0, correction=1).sum())
    signal = float(mean.square().sum()) - trace / b
    rank = float(rows.norm() ** 2 / torch.linalg.matrix_norm(rows, 2) ** 2)
    return {
        "gradient_confusion": max(0.0, *(-c for c in cosines)),
        "gradient_diversity": float(rows.square().sum() / rows.sum(0).square().sum()),
        "gradient_coherence": float(b * mean.square().sum() / rows.square().sum()),
        "relative_gradient_rank": rank / gaussian_effective_rank(b, p),
        "gradient_noise_scale": trace / signal if signal > 0 else math.inf,
        "gradient_norm": float(mean.norm()),
        "fisher_trace": float(rows.square().sum() / b),
    }


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


def hooks_of(model, criterion, optimizer):
    modules = [*model.modules(), criterion]
    return (
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
        + sum(len(p._backward_hooks or ()) for p in model.parameters())
        + len(optimizer._optimizer_step_pre_hooks)
        + len(optimizer._optimizer_step_post_hooks)
    )


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


def test_the_two_step_number_and_what_the_optimizer_knows():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []

    def flat(tensors):
        return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()

    def note(optimizer, args, kwargs):
        seen.append((flat(model.parameters()), flat(p.grad for p in model.parameters())))

    optimizer.register_step_pre_hook(note)
    with Diagnostics(model, criterion, every=2, metrics="free").attach(optimizer) as diagnostics:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        train(model, criterion, optimizer, batches(5), scheduler.step)
    first, third, fifth = diagnostics.history
    assert (first.learning_rate, third.learning_rate, fifth.learning_rate) == (0.1, 0.025, 0.00625)
    assert math.isnan(first.values["weight_condition_number_two_step"])
    assert any("no step before" in note for note in first.notes)
    for record, k in ((third, 2), (fifth, 4)):
        (w0, g0), (w1, g1) = seen[k - 1], seen[k]
        expected = (g1 - g0).norm() * w0.norm() / ((w1 - w0).norm() * g0.norm())
        assert record.values["weight_condition_number_two_step"] == pytest.approx(float(expected), rel=1e-4)
        assert record.values["gradient_norm"] == pytest.approx(float(g1.norm()), rel=1e-5)
        assert record.values["weight_norm"] == pytest.approx(float(w1.norm()), rel=1e-5)


@pytest.mark.parametrize("by_name", [False, True])
def test_closures(by_name):
    """Optimizers that make the passes themselves: the first call of a closure is at the weights before the step."""
    records = []
    for with_closure in (False, True):
        model, criterion = network().eval(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        with Diagnostics(model, criterion, every=1, metrics=["free", "default"]).attach(optimizer) as diagnostics:
            for x, y in batches(3):

                def closure(x=x, y=y, model=model, criterion=criterion, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = criterion(model(x), y)
                    loss.backward()
                    return loss

                if not with_closure:
                    closure()
                    optimizer.step()
                else:
                    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                    assert loss.shape == ()
        records.append([record.values for record in diagnostics.history])
    torch.testing.assert_close(*records, rtol=0, atol=0, equal_nan=True)
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=4)
    with Diagnostics(model, criterion, every=1, metrics=["free", "default"]).attach(lbfgs) as diagnostics:
        for _ in range(2):
            lbfgs.step(lambda: (lbfgs.zero_grad(), (loss := criterion(model(x), y)).backward(), loss)[-1])
    assert [record.step for record in diagnostics.history] == [0, 1]
    assert math.isfinite(diagnostics.history[1].values["weight_condition_number_two_step"])


def same_gram_metrics(record, other, rel=1e-4):
    for name, source in METRICS.items():
        if source == "gram" and name in record.values:
            assert record.values[name] == pytest.approx(other.values[name], rel=rel), name


def test_loss_scales_and_accumulation_are_undone():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    data = batches(4)
    reference = Diagnostics(copy.deepcopy(model), criterion, metrics="cheap").measure(*data[0])
    for options in ({}, {"metrics": "free"}):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with Diagnostics(twin, criterion, every=2, **options).attach(optimizer) as diagnostics:
            for first, second in ((data[0], data[1]), (data[2], data[3])):
                optimizer.zero_grad()
                for x, y in (first, second):
                    scaler.scale(criterion(twin(x), y) / 2).backward()
                scaler.step(optimizer)
                scaler.update()
        (record,) = diagnostics.history  # of the first micro-batch, once a step
        assert record.loss == pytest.approx(reference.loss)
        if not options:
            same_gram_metrics(record, reference)


def test_a_step_that_the_scaler_skips_is_not_lost():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Diagnostics(model, criterion, every=1, metrics=["default", "free"]).attach(optimizer) as diagnostics:
        for k, (x, y) in enumerate(batches(3)):
            optimizer.zero_grad()
            scaler.scale(criterion(model(x * (math.inf if k == 1 else 1)), y)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [record.step for record in diagnostics.history] == [0, 1]
    assert math.isnan(diagnostics.history[1].loss)
    assert math.isnan(diagnostics.history[1].values["gradient_norm"])
    assert math.isfinite(diagnostics.history[1].values["weight_condition_number_two_step"])


def test_autocast():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    reference = Diagnostics(model, criterion, metrics="full").measure(x, y)
    with Diagnostics(model, criterion, every=1, metrics="full").attach() as diagnostics:
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(x), y)
        loss.backward()
    (record,) = diagnostics.history
    same_gram_metrics(record, reference, rel=0.1)
    assert record.values["weight_condition_number"] == pytest.approx(reference.values["weight_condition_number"])
    assert record.values["gradient_norm"] != reference.values["gradient_norm"]  # of the pass in bfloat16


def test_sums_and_losses_that_the_model_returns():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    reference = Diagnostics(model, criterion, metrics="cheap").measure(x, y)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x, labels):
            logits = self.body(x)
            return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}

    total = nn.CrossEntropyLoss(reduction="sum")
    owner = WithLoss()
    for network_, criterion_, run in (
        (model, total, lambda: total(model(x), y)),
        (owner, None, lambda: owner(x, labels=y)["loss"]),
    ):
        with Diagnostics(network_, criterion_, every=1, metrics="cheap").attach() as diagnostics:
            run().backward()
        (record,) = diagnostics.history
        same_gram_metrics(record, reference)
        assert record.loss == pytest.approx(reference.loss)
        for name in ("weight_condition_number", "relative_input_gradient_rank"):
            assert record.values[name] == pytest.approx(reference.values[name], rel=1e-3)
    alone = Diagnostics(owner, None).measure({"x": x, "labels": y})
    same_gram_metrics(alone, reference)


def test_batch_statistics_are_named_and_can_be_frozen():
    model, criterion = network(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    model(10 * x + 3)  # running statistics far from the batch's
    records = []
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for freeze in (False, True):
        with Diagnostics(model, criterion, every=1, freeze_statistics=freeze).attach() as diagnostics:
            model.load_state_dict({**model.state_dict(), **buffers})
            criterion(model(x), y).backward()
        records.append(diagnostics.history[0])
    coupled, frozen = records
    assert any("contribution" in note for note in coupled.notes)
    assert not any("contribution" in note for note in frozen.notes)
    model.load_state_dict({**model.state_dict(), **buffers})
    gradient = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    norm = torch.cat([g.reshape(-1) for g in gradient]).norm()
    assert coupled.values["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    same_gram_metrics(frozen, Diagnostics(model.eval(), criterion).measure(x, y))
    assert frozen.values["gradient_norm"] != pytest.approx(coupled.values["gradient_norm"], rel=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_compiled_model_is_measured_in_a_pass_of_its_own():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    reference = Diagnostics(model, criterion).measure(x, y)
    compiled = torch.compile(model, backend="eager")
    with Diagnostics(compiled, criterion, every=1).attach() as diagnostics:
        for _ in range(2):
            criterion(compiled(x), y).backward()
    assert len(diagnostics.history) == 2
    for record in diagnostics.history:
        same_gram_metrics(record, reference)
        assert list(record.layers["fisher_trace"]) == ["0", "1", "5"]
    in_place = network()
    in_place.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled the model in place"):
        Diagnostics(in_place, criterion).attach()


def test_validation_and_passes_without_end_do_not_count():
    model, criterion = network(), nn.CrossEntropyLoss()
    data = batches(5)
    with Diagnostics(model, criterion, every=lambda step: step in (1, 2)).attach() as diagnostics:
        for k, (x, y) in enumerate(data[:4]):
            with torch.no_grad():
                criterion(model(x), y)
            criterion(model(x), y)  # evaluated with grad enabled, never differentiated
            if k:
                criterion(model(x), y).backward()
        assert diagnostics.step == 3
    assert [record.step for record in diagnostics.history] == [1, 2]
    assert all(math.isfinite(record.values["gradient_norm"]) for record in diagnostics.history)


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


def test_a_loss_that_is_nan_is_recorded():
    model, criterion = network(), nn.CrossEntropyLoss()
    history = History()
    with Diagnostics(model.eval(), criterion, every=1, metrics=EVERYTHING, history=history).attach():
        (x, y), (x2, y2) = batches(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what could not be measured
            for inputs, targets in ((x, y), (x2 * math.nan, y2), (x2, y2)):
                criterion(model(inputs), targets).backward()
    assert [math.isnan(record.loss) for record in history] == [False, True, False]
    assert math.isnan(history[1].values["gradient_diversity"])
    assert math.isfinite(history[2].values["gradient_diversity"])


def test_training_with_losses_that_are_nan_is_what_it_is_without():
    data = [*batches(2), (torch.full((6, 1, 4, 4), math.nan), torch.zeros(6, dtype=torch.int64))]
    results = []
    for attached in (False, True):
        model, criterion = network(), nn.CrossEntropyLoss()
        optimizer = sgd(model)
        diagnostics = Diagnostics(model, criterion, every=1, metrics=EVERYTHING)
        if attached:
            diagnostics.attach(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what could not be measured
            train(model, criterion, optimizer, data)
        diagnostics.close()
        results.append(model.state_dict())
    assert [math.isnan(record.loss) for record in diagnostics.history] == [False, False, True]
    assert any(tensor.isnan().any() for tensor in results[0].values() if tensor.is_floating_point())
    assert_close(*results, rtol=0, atol=0, equal_nan=True)


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


def test_what_cannot_be_measured_is_noted_and_the_rest_is_measured():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    one = batches(1, size=1)[0]
    with (
        Diagnostics(model, criterion, every=1, metrics=["default", "weight_condition_number"]).attach(
            optimizer
        ) as diagnostics,
        pytest.warns(RuntimeWarning, match="a batch of one sample"),
    ):
        train(model, criterion, optimizer, [one, *batches(1), one])
    assert [math.isnan(record.values["gradient_diversity"]) for record in diagnostics.history] == [True, False, True]
    assert all(math.isfinite(record.values["weight_condition_number"]) for record in diagnostics.history)
    with pytest.raises(ValueError, match="a batch of one sample"):
        diagnostics.measure(*one)
    assert len(diagnostics.history) == 3


def test_a_criterion_that_gets_something_else_than_the_outputs():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    with (
        Diagnostics(model, criterion, every=1, metrics="cheap").attach() as diagnostics,
        pytest.warns(RuntimeWarning, match="cannot be computed anew"),
    ):
        criterion(2 * model(x), y).backward()
    (record,) = diagnostics.history
    assert any("not what the model returned" in note for note in record.notes)
    doubled = Diagnostics(model, lambda outputs, targets: criterion(2 * outputs, targets)).measure(x, y)
    same_gram_metrics(record, doubled)
    assert math.isnan(record.values["weight_condition_number"])


def test_arguments_that_a_pass_cannot_be_made_again_with():
    class Flexible(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, *args, scale):
            return self.body(args[0] * scale)

    model, criterion = Flexible().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    with Diagnostics(model, criterion, every=1, metrics="cheap").attach() as diagnostics:
        loss = criterion(model(x, scale=1.0), y)
        with pytest.warns(RuntimeWarning, match="cannot be computed anew"):
            loss.backward()
    (record,) = diagnostics.history
    assert any("by position alone, or by name alone" in note for note in record.notes)
    assert math.isfinite(record.values["gradient_coherence"])
    assert math.isnan(record.values["weight_condition_number"])
    assert record.batch_size == 6


def test_arguments_that_are_none():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x, mask=None, shift=None):
            x = x if mask is None else x * mask
            return self.body(x if shift is None else x + shift)

    class Needing(Masked):
        def forward(self, x, mask):
            return self.body(x if mask is None else x * mask)

    model, criterion = Masked().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    for others, reference in (({}, {"x": x}), ({"shift": x}, {"x": x, "shift": x})):
        wanted = Diagnostics(model, criterion, metrics="cheap").measure(reference, y)
        for args, kwargs in (
            ((x,), {"mask": None, **others}),
            ((), {"x": x, "mask": None, **others}),
            ((x, None), others),
        ):
            with Diagnostics(model, criterion, every=1, metrics="cheap").attach() as diagnostics:
                criterion(model(*args, **kwargs), y).backward()
            (record,) = diagnostics.history
            same_gram_metrics(record, wanted)
            number = wanted.values["weight_condition_number"]
            assert record.values["weight_condition_number"] == pytest.approx(number, rel=1e-3)
    model = Needing().eval()  # a pass without the argument is none
    with Diagnostics(model, criterion, every=1, metrics="cheap").attach() as diagnostics:
        loss = criterion(model(x, None), y)
        with pytest.warns(RuntimeWarning, match="cannot be computed anew"):
            loss.backward()
    (record,) = diagnostics.history
    assert any("holds a NoneType" in note for note in record.notes)
    assert math.isfinite(record.values["gradient_coherence"])


def test_several_losses_on_one_pass_are_not_mixed_up():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    with Diagnostics(model, criterion, every=1).attach() as diagnostics:
        outputs = model(x)
        loss = criterion(outputs, y) + criterion(outputs, y.flip(0))
        with pytest.warns(RuntimeWarning, match="called 2 times"):
            loss.backward()
    assert math.isnan(diagnostics.history[0].values["gradient_norm"])


def test_masked_moves_come_near():
    model, criterion = nn.Sequential(nn.Linear(50, 80), nn.Tanh(), nn.Linear(80, 4)), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 50), torch.randint(4, (8,))
    metrics = ["weight_condition_number", "weight_gradient_cosine", "gradient_norm"]
    exact = Diagnostics(model, criterion, metrics=metrics).measure(x, y)
    masked = Diagnostics(model, criterion, metrics=metrics, options=Options(mask_fraction=0.3)).measure(x, y)
    number = "weight_condition_number"
    assert masked.values[number] == pytest.approx(exact.values[number], rel=0.2)
    assert masked.values[number] != exact.values[number]
    assert any("coordinates" in note for note in masked.notes)


@pytest.mark.parametrize("perturbations", ["batch_gradient", "sample_gradients", "random"])
def test_options_and_the_same_numbers_again(perturbations):
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    options = Options(perturbations=perturbations, num_perturbations=3, groups=3)
    first, second = (Diagnostics(model, criterion, metrics="full", options=options).measure(x, y) for _ in range(2))
    assert first.values == pytest.approx(second.values, nan_ok=True)
    kappa = first.values["weight_condition_number"]
    assert 0 < kappa < 3 * first.values["weight_condition_number_exact"]
    assert (
        first.values["gradient_confusion"] <= Diagnostics(model, criterion).measure(x, y).values["gradient_confusion"]
    )


def test_groups_are_batches():
    """With groups, confusion and diversity are those of batch means, as in the thesis."""
    model, criterion = network().double().eval(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    x = x.double()
    means = []
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        gradient = torch.autograd.grad(criterion(model(x[part]), y[part]), list(model.parameters()))
        means.append(torch.cat([g.reshape(-1) for g in gradient]))
    means = torch.stack(means)
    expected = expected_from(means, means.shape[1])
    found = Diagnostics(model, criterion, options=Options(groups=3)).measure(x, y).values
    for name in ("gradient_confusion", "gradient_diversity"):
        assert_close(found[name], expected[name], **oracles.tolerance(condition=1e3))
        assert found[name] != Diagnostics(model, criterion).measure(x, y).values[name]


def test_copies_of_the_model_are_not_watched():
    model, criterion = network(), nn.CrossEntropyLoss()
    with Diagnostics(model, criterion, every=1).attach() as diagnostics:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            criterion(twin(batches(1)[0][0]), batches(1)[0][1]).backward()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert len(diagnostics.history) == 0
    assert hooks_of(model, criterion, sgd(model)) == 0


def test_a_prediction_before_the_first_measurement():
    model, criterion = network(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    costs = {
        name: Diagnostics(model, criterion, metrics=name).predict_cost(x, y) for name in ("free", "default", "full")
    }
    assert costs["free"].total_seconds == 0.0
    assert 0 < costs["default"].total_seconds < costs["full"].total_seconds
    assert 0 < costs["free"].peak_bytes < costs["default"].peak_bytes < costs["full"].peak_bytes
    assert "MiB" in str(costs["full"])
    assert set(costs["full"].seconds) == set(METRICS.values()) - {"spectrum"} - {"weights"}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    spectrum = Diagnostics(model, criterion, metrics="spectrum").predict_cost(x, y)
    assert spectrum.bytes["spectrum"] > 3 * 8 * 24**2


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


def test_a_loss_that_is_no_scalar_is_refused_at_once():
    class PerSample(nn.Module):
        def forward(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, targets, reduction="none")

    model, criterion = network(), PerSample()
    (x, y), *_ = batches(1)
    with (
        Diagnostics(model, criterion, every=1).attach() as diagnostics,
        pytest.raises(ValueError, match=r"a loss of shape \[6\]"),
    ):
        criterion(model(x), y)
    assert len(diagnostics.history) == 0
    with pytest.raises(TypeError, match="without a loss"), Diagnostics(OnlyLogits(), every=1).attach():
        OnlyLogits.last(x)


class OnlyLogits(nn.Module):
    last = None

    def __init__(self):
        super().__init__()
        self.body = network()
        OnlyLogits.last = self

    def forward(self, x):
        return {"logits": self.body(x)}
