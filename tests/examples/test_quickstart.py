"""The demonstration runs, draws, and means what its table says."""

from __future__ import annotations

import math
import re

import pytest
import torch

from examples import quickstart
from examples.datasets import Dataset, stand_in
from examples.quickstart import LEARNING_RATES, MOMENTA, OURS, SEEDS, TASKS, TUNED, TUNING_SEED, Curve, Setting, Task
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.models import mlp_thin

TINY = Task(lambda: mlp_thin(in_features=64), "tiny", epochs=2)


@pytest.fixture
def data() -> Dataset:
    return stand_in("digits", 130, 20)


def test_runs_from_the_command_line_and_draws(tmp_path, capsys):
    for library in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(library, reason="the demonstration takes the extra 'demo'")
    picture = tmp_path / "new folder" / "curves.png"
    quickstart.main(["--epochs", "1", "--seeds", "5", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert "deep MLP, 64-(128)x9-10 on digits, 1,500 images" in printed
    assert "WhiteningSGD" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--threads", "0"], ["--data", "mnist"]])
def test_bad_arguments_end_with_a_message(arguments, monkeypatch, capsys):
    monkeypatch.delenv("TORCHGEOM_DATA", raising=False)
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    assert re.search("must be at least 1|pass --root DIR", capsys.readouterr().err)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, WhiteningSGD])
def test_everything_random_follows_from_the_seed(data, optimizer):
    setting = Setting(optimizer, 0.03, 0.9) if optimizer is torch.optim.SGD else OURS
    first, again, other = (quickstart.train(TINY, data, setting, seed, lambda _: None) for seed in (1, 1, 2))
    assert first.loss == again.loss
    assert first.loss != other.loss
    assert len(first.loss) == len(first.accuracy) == len(first.seconds) == TINY.epochs + 1


def test_both_optimizers_start_alike_and_then_differ(data):
    sgd, whitening = (
        quickstart.train(TINY, data, Setting(optimizer, 0.03, 0.9), 1, lambda _: None)
        for optimizer in (torch.optim.SGD, WhiteningSGD)
    )
    assert sgd.loss[0] == whitening.loss[0]
    assert sgd.loss[1] != whitening.loss[1]


def test_a_run_that_diverges_ends_and_counts_as_infinitely_bad(data):
    curve = quickstart.train(TINY, data, Setting(torch.optim.SGD, 1e30, 0.0), 1, lambda _: None)
    assert not math.isfinite(curve.loss[-1])
    assert quickstart._mean_loss(curve) == math.inf


def test_search_names_the_best_and_an_edge(data, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "LEARNING_RATES", (1e-4, 0.03, 1e30))
    monkeypatch.setattr(quickstart, "MOMENTA", (0.0,))
    found = quickstart.tune(TINY, data)
    assert len(found) == 3
    printed = capsys.readouterr().out
    assert "best for SGD: lr=0.03, momentum=0\n" in printed
    assert "without a learning rate: " in printed
    monkeypatch.setattr(quickstart, "LEARNING_RATES", (1e-4, 0.03))
    quickstart.tune(TINY, data)
    assert "best for SGD: lr=0.03, momentum=0 (at the edge of the grid)" in capsys.readouterr().out


def test_table_counts_epochs_and_takes_medians():
    settings = (Setting(torch.optim.SGD, 0.1, 0.9), OURS)
    slow = [Curve([2.0, 1.0, last], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0]) for last in (0.5, 0.6, 0.9)]
    fast = [Curve([2.0, 0.4, 0.2], [0.1, 0.8, 0.9], [0.0, 1.5, 3.0]) for _ in range(3)]
    rows = quickstart.table(settings, [slow, fast]).splitlines()
    assert rows[2].split() == ["SGD", "0.1", "0.9", "0.6", "30.0%", "2", "2.0"]
    assert rows[3].split() == ["WhiteningSGD", "none", "0", "0.2", "90.0%", "1", "3.0"]
    rows = quickstart.table(settings, [fast, slow]).splitlines()
    assert "not reached" in rows[3]


@pytest.mark.parametrize("name", TASKS)
def test_settings_are_points_of_the_grid_and_not_at_its_edge(name):
    setting = TUNED[name]
    assert setting.optimizer is torch.optim.SGD
    assert setting.lr in LEARNING_RATES[1:-1]
    assert setting.momentum in MOMENTA
    assert TUNING_SEED not in SEEDS
