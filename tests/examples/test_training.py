"""The demonstration trains as it says, and means what its table says."""

from __future__ import annotations

import math

import pytest
import torch

from examples.datasets import Dataset, stand_in
from examples.demo import training
from examples.demo.training import (
    LEARNING_RATES,
    MOMENTA,
    OURS,
    SEEDS,
    TASKS,
    TUNED,
    TUNING_SEED,
    Curve,
    Setting,
    Task,
    train,
)
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.models import mlp_thin

TINY = Task(lambda: mlp_thin(in_features=64), "tiny", epochs=2)


@pytest.fixture
def data() -> Dataset:
    return stand_in("digits", 130, 20)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, WhiteningSGD])
def test_everything_random_follows_from_the_seed(data, optimizer):
    setting = Setting(optimizer, 0.03, 0.9) if optimizer is torch.optim.SGD else OURS
    first, again, other = (train(TINY, data, setting, seed, lambda _: None).curve for seed in (1, 1, 2))
    assert first.loss == again.loss
    assert first.loss != other.loss
    assert len(first.loss) == len(first.accuracy) == len(first.seconds) == TINY.epochs + 1


def test_both_optimizers_start_alike_and_then_differ(data):
    sgd, whitening = (
        train(TINY, data, Setting(optimizer, 0.03, 0.9), 1, lambda _: None).curve
        for optimizer in (torch.optim.SGD, WhiteningSGD)
    )
    assert sgd.loss[0] == whitening.loss[0]
    assert sgd.loss[1] != whitening.loss[1]


def test_a_run_that_diverges_ends_and_counts_as_infinitely_bad(data):
    curve = train(TINY, data, Setting(torch.optim.SGD, 1e30, 0.0), 1, lambda _: None).curve
    assert not math.isfinite(curve.loss[-1])
    assert training._mean_loss(curve) == math.inf


def test_search_names_the_best_and_an_edge(data, monkeypatch, capsys):
    monkeypatch.setattr(training, "LEARNING_RATES", (1e-4, 0.03, 1e30))
    monkeypatch.setattr(training, "MOMENTA", (0.0,))
    found = training.tune(TINY, data)
    assert len(found) == 3
    printed = capsys.readouterr().out
    assert "best for SGD: lr=0.03, momentum=0\n" in printed
    assert "without a learning rate: " in printed
    monkeypatch.setattr(training, "LEARNING_RATES", (1e-4, 0.03))
    training.tune(TINY, data)
    assert "best for SGD: lr=0.03, momentum=0 (at the edge of the grid)" in capsys.readouterr().out


def test_table_counts_epochs_and_takes_medians():
    settings = (Setting(torch.optim.SGD, 0.1, 0.9), OURS)
    slow = [Curve([2.0, 1.0, last], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0]) for last in (0.5, 0.6, 0.9)]
    fast = [Curve([2.0, 0.4, 0.2], [0.1, 0.8, 0.9], [0.0, 1.5, 3.0]) for _ in range(3)]
    rows = training.as_text(training.table(settings, [slow, fast])).splitlines()
    assert rows[2].split() == ["SGD", "0.1", "0.9", "0.6", "30.0%", "2", "2.0"]
    assert rows[3].split() == ["WhiteningSGD", "none", "0", "0.2", "90.0%", "1", "3.0"]
    rows = training.as_text(training.table(settings, [fast, slow])).splitlines()
    assert "not reached" in rows[3]


@pytest.mark.parametrize("name", TASKS)
def test_settings_are_points_of_the_grid_and_not_at_its_edge(name):
    setting = TUNED[name]
    assert setting.optimizer is torch.optim.SGD
    assert setting.lr in LEARNING_RATES[1:-1]
    assert setting.momentum in MOMENTA
    assert TUNING_SEED not in SEEDS
