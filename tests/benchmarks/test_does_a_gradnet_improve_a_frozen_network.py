"""A fit that diverges is a row, and a base that was given up is tried again when it gets more epochs."""

from __future__ import annotations

import copy
import json
import math

import torch

from benchmarks import does_a_gradnet_improve_a_frozen_network as question
from benchmarks.harness import benchmark_parser, start
from examples.datasets import stand_in
from torchgeom_optim.models import GradNet, NonFiniteLossError


def result(folder, runs=()) -> question._Result:
    (folder / f"{question.NAME}.json").write_text(json.dumps({"numbers": {"runs": list(runs)}}))
    threads = torch.get_num_threads()
    options = start(benchmark_parser(None), ["--output", str(folder)])
    torch.set_num_threads(threads)
    options.again = False
    return question._Result(options)


def test_a_fit_that_diverges_is_a_row(monkeypatch, tmp_path):
    def diverge(*_, **__):
        raise NonFiniteLossError(math.inf, 1)

    bench = question._Bench(stand_in("mnist", 200, 50), "mnist", 0, True)
    monkeypatch.setattr(GradNet, "fit", diverge)
    run = bench.run("MNIST .92", "paper")
    assert math.isnan(run["accuracy"])
    found = result(tmp_path)
    for seed, accuracy in enumerate([math.nan, 0.5, 0.7]):
        found.add({"case": "MNIST .92", "seed": seed, "method": "paper", **run, "accuracy": accuracy})
    found = question._Result(found.options)  # from the file, where nan is a word
    found.write()
    (row,) = json.loads((tmp_path / f"{question.NAME}.json").read_text())["rows"]
    assert (row["seeds"], row["diverged"], row["least"], row["accuracy"]) == (3, 1, 0.5, 0.6)


def test_other_gates_hold_the_early_weights(monkeypatch):
    seen = []
    fit = GradNet.fit
    monkeypatch.setattr(GradNet, "fit", lambda net, *a, **k: (seen.append(copy.deepcopy(net)), fit(net, *a, **k))[1])
    bench = question._Bench(stand_in("mnist", 200, 50), "mnist", 0, True)
    bench.run("MNIST .92", "gated")
    assert bench.run("MNIST .92", question.OTHER_GATES)["accuracy"] > 0
    own, other = seen
    assert all(torch.equal(a, b) for a, b in zip(own.head.parameters(), other.head.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(own.base.parameters(), other.base.parameters(), strict=True))


def test_a_base_that_was_given_up_is_tried_with_more_epochs(tmp_path):
    case = "CIFAR-10 (JPEG) .72"
    old = {"case": case, "seed": 0, "method": question.NOT_REACHED, "base": 0.7, "accuracy": 0.7, "seconds": 0.0}
    assert not result(tmp_path, [{**old, "epochs": 0}]).has(case, 0, "gated")
    found = result(tmp_path, [{**old, "epochs": question._late_epochs(case)}])
    assert found.has(case, 0, "gated")
    assert not found.has(case, 1, "gated")
    found.add({**old, "method": "gated", "epochs": 6})
    assert [run["method"] for run in found.runs] == ["gated"]


def test_a_choice_of_methods_makes_no_whole_result(tmp_path):
    every = [(c, s, m) for seeds, cases, methods in question.PLAN for s in seeds for c in cases for m in methods]
    runs = [
        {"case": c, "seed": s, "method": m, "accuracy": 0.5, "base": 0.4, "epochs": 1, "seconds": 1}
        for c, s, m in every
    ]
    assert result(tmp_path, runs).is_whole()
    threads = torch.get_num_threads()
    result(tmp_path, [run for run in runs if run["method"] != "paper"])
    question.main(["--output", str(tmp_path), "--methods", "gated"])
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / f"{question.NAME}.json").read_text())["unfinished"] is True
