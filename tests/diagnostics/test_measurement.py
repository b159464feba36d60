"""What is measured of a batch: in which mode and precision, with which options, and what cannot be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests import oracles
from tests.diagnostics.loops import batches, expected_from, network, same_gram_metrics, sgd, train
from torchgeom_optim.diagnostics import Diagnostics, Options


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
