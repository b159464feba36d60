"""The loop as it is watched: closures, scales, accumulation, losses and arguments of every kind."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.diagnostics.loops import EVERYTHING, batches, network, same_gram_metrics, sgd, train
from torchgeom_optim.diagnostics import Diagnostics, History


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


@pytest.mark.parametrize(
    ("loss_of", "criterion", "said"),
    [
        (
            lambda model, x, y: nn.functional.cross_entropy(model(x), y),
            nn.CrossEntropyLoss(),
            "CrossEntropyLoss module",
        ),
        (lambda model, x, y: nn.CrossEntropyLoss()(model[:](x), y), nn.CrossEntropyLoss(), "the model was not called"),
    ],
)
def test_a_loop_that_it_sees_nothing_of_is_told_what_is_missing(loss_of, criterion, said):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    diagnostics = Diagnostics(model, criterion, every=2)
    assert diagnostics.summary() == "No records yet: attach(optimizer) and train, or call measure(x, y)."
    diagnostics.attach(optimizer)
    assert diagnostics.summary() == "No records yet: no step that the schedule names was taken."
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    for step in range(3):
        loss_of(model, x, y).backward()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            optimizer.step()
        assert [str(w.message).split(",")[0] for w in warned] == ["diagnostics: step 0 was to be measured"][step:]
    assert said in diagnostics.summary()
    assert diagnostics.summary().startswith("No records yet: step 2")
    diagnostics.close()


@pytest.mark.parametrize("place", [0, 1])
def test_a_model_that_returns_its_loss_in_a_tuple(place):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, x, y):
            logits = self.body(x)
            found = [logits]
            found.insert(place, nn.functional.cross_entropy(logits, y))
            return tuple(found)

    model, x, y = Returning(), torch.randn(8, 4), torch.randint(2, (8,))
    wanted = Diagnostics(model.body, nn.CrossEntropyLoss()).measure(x, y)
    with Diagnostics(model, every=1).attach() as diagnostics:
        model(x, y)[place].backward()
    assert_close(diagnostics.history[0].loss, wanted.loss)
    same_gram_metrics(diagnostics.history[0], wanted)


def test_a_model_that_returns_no_loss_is_told_to_bring_a_criterion():
    model = nn.Linear(4, 2)
    with Diagnostics(model, every=1).attach(), pytest.raises(ValueError, match=r"shape \[8, 2\].*give what the loop"):
        model(torch.randn(8, 4))
