"""A setting that diverges is a row that no claim is won by."""

from __future__ import annotations

import argparse
import json
import math

import torch

from benchmarks import which_gradnet_settings_matter as question
from examples.datasets import stand_in
from torchgeom_optim.models import GradNet, NonFiniteLossError


def options(folder) -> argparse.Namespace:
    told = {"images": 100, "epochs": 1, "test": 50, "smoke": True, "output": folder, "command": "", "environment": {}}
    return argparse.Namespace(**told)


def test_settings_that_diverge_are_rows(monkeypatch, tmp_path):
    bench = question._Bench(stand_in("mnist", 160, 50), 0, options(tmp_path))
    monkeypatch.setitem(question.OPTIMIZERS, "SGD .02", lambda parameters: torch.optim.SGD(parameters, 1e30))
    own, diverged = bench.paper([question.Setting("own", "as it is"), question.Setting("own", "", {}, "SGD .02")])
    assert "diverged" not in own
    assert 0 <= own["accuracy"] <= 1
    assert diverged["diverged"]
    assert math.isnan(diverged["accuracy"])
    assert not math.isfinite(diverged["last_loss"])

    def diverge(*_, **__):
        raise NonFiniteLossError(math.inf, 1)

    monkeypatch.setattr(GradNet, "fit", diverge)
    (run,) = bench.ours("linearised, damping", "1.0", "linearised", {"damping": 1.0})
    assert run["diverged"]
    assert run["last_loss"] == math.inf
    runs = [{**run, "seed": 0}, {**run, "seed": 1, "accuracy": 0.5, "last_loss": 1.0, "diverged": False}]
    question._write(runs, stand_in("mnist", 160, 50), options(tmp_path))
    (row,) = json.loads((tmp_path / f"{question.NAME}.json").read_text())["rows"]
    assert (row["seeds"], row["diverged"], row["accuracy"], row["last_loss"]) == (2, 1, 0.5, 1.0)


def test_no_claim_is_won_by_a_setting_that_diverged():
    def run(figure, setting, accuracy):
        return {"figure": figure, "setting": setting, "accuracy": accuracy, "seed": 0, "diverged": accuracy != accuracy}

    runs = [run(question.BEST, "as it is", 0.9), run("Fig. 4, optimizer", "Adam .001", math.nan)]
    (row,) = question._conclusions(runs, 1000)
    assert (row["verdict"], row["lead by seed"]) == ("holds", [0.9])
    runs[1] = run("Fig. 4, optimizer", "Adam .001", 0.95)
    assert question._conclusions(runs, 1000)[0]["verdict"] == "fails"
    runs[0] = run(question.BEST, "as it is", math.nan)
    assert question._conclusions(runs, 1000)[0]["verdict"] == "fails"


def test_the_best_rate_of_each_optimizer_stands_for_it():
    rows = [
        (question.BEST, "as it is", 0.8),
        *(("Fig. 4, optimizer", *row) for row in [("SGD .1", 0.9), ("Adam", 0.85)]),
    ]
    runs = [{"figure": f, "setting": s, "accuracy": a, "seed": 0} for f, s, a in rows]
    (row,) = question._conclusions(runs, 10_000)
    assert row["verdict"] == "holds"
    assert math.isclose(row["lead by seed"][0], 0.05)
    assert row["best of the others by seed"] == ["Adam"]
