"""The harness takes turns, divides round by round, and never lets a smoke run pass for a measurement."""

from __future__ import annotations

import functools
import gc
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def started(*arguments: str):
    return harness.start(harness.benchmark_parser("a question"), list(arguments))


def test_candidates_take_turns_on_fresh_batches():
    seen = []
    candidates = {name: lambda batch, name=name: seen.append((name, batch)) for name in "abc"}
    made = []
    harness.time_interleaved(
        candidates,
        baseline="a",
        rounds=3,
        make_batch=lambda number: made.append(number) or number,
        calls_per_round=2,
        warmup_rounds=0,
    )
    order = [name for name, _ in seen[::2]]
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    for name in "abc":
        assert [batch for who, batch in seen if who == name] == [0, 1, 2, 3, 4, 5]
    assert len(made) == len(seen)  # every call has a batch of its own


def test_ratios_are_taken_round_by_round(monkeypatch):
    # The machine is three times slower in the second round; within each round b costs twice what a costs.
    times = iter([(1.0, 1.0), (2.0, 2.0), (6.0, 6.0), (3.0, 3.0), (1.0, 1.0), (2.0, 2.0)])
    monkeypatch.setattr(harness, "_timed", lambda call, arguments: next(times))
    timing = harness.time_interleaved({"a": int, "b": int}, baseline="a", rounds=3, warmup_rounds=0)
    assert timing["candidates"]["b"]["ratio"] == {"lower": 2.0, "median": 2.0, "upper": 2.0}
    assert timing["candidates"]["a"]["ratio"]["median"] == 1.0
    assert timing["candidates"]["a"]["seconds"]["median"] == 1.0
    rows = harness.timing_rows(timing, network="lenet")
    assert [row["candidate"] for row in rows] == ["a", "b"]
    assert rows[1]["ratio to a"] == 2.0


def test_processor_time_in_units_of_another_candidate_too(monkeypatch):
    times = iter([(1.0, 1.0), (1.0, 2.0), (1.0, 4.0), (1.0, 6.0), (1.0, 24.0), (1.0, 3.0)])
    monkeypatch.setattr(harness, "_timed", lambda call, arguments: next(times))
    timing = harness.time_interleaved(
        dict.fromkeys("abc", int), baseline="a", rounds=2, warmup_rounds=0, other_baselines=["b"]
    )  # processor seconds of a, b, c: 1, 2, 4 and, starting with b, 3, 6, 24
    rows = harness.timing_rows(timing)
    assert [row["cpu ratio"] for row in rows] == [1.0, 2.0, 6.0]
    assert [row["cpu ratio to b"] for row in rows] == [0.5, 1.0, 3.0]


def test_garbage_collection_is_as_before():
    def fails():
        raise RuntimeError("a candidate")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="a candidate"):
        harness.time_interleaved({"a": fails}, baseline="a", rounds=1)
    assert gc.isenabled()


def test_extra_memory_is_that_of_the_work_alone():
    prepare = functools.partial(torch.ones, 2**24)  # 64 MiB, which must not count
    assert 120 < harness.extra_memory(prepare, functools.partial(torch.repeat_interleave, repeats=2), threads=1) < 170


def test_work_that_fails_in_its_process_has_no_memory(capfd):
    assert math.isnan(harness.extra_memory(int, len, threads=1))
    assert "TypeError" in capfd.readouterr().err


def test_bad_requests():
    with pytest.raises(ValueError, match="baseline='b': must be one of"):
        harness.time_interleaved({"a": int}, baseline="b", rounds=1)
    with pytest.raises(ValueError, match="rounds=0"):
        harness.time_interleaved({"a": int}, baseline="a", rounds=0)
    with pytest.raises(ValueError, match="baseline='b': must be one of"):
        harness.time_interleaved({"a": int}, baseline="a", rounds=1, other_baselines=["b"])


def test_quartiles():
    assert harness.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == {"lower": 2.0, "median": 3.0, "upper": 4.0}
    assert math.isnan(harness.quartiles([1.0, float("nan")])["median"])


@pytest.mark.usefixtures("threads_restored")
def test_a_result_names_its_environment_and_no_path(tmp_path, capsys):
    options = started("--root", "/secret/data", f"--output={tmp_path}", "--threads", "1")
    numbers = {"loss": torch.tensor([1.0, 2.0]), "nan": float("nan"), "count": np.int64(3)}
    path = harness.write_result("a_question", numbers, options, seeds=[1, 2], rows=[{"candidate": "a", "ms": 1.23456}])
    text = path.read_text()
    record = json.loads(text)
    assert record["numbers"] == {"loss": [1.0, 2.0], "nan": "nan", "count": 3}
    assert record["seeds"] == [1, 2]
    assert record["smoke"] is False
    assert {"torch", "python", "cpu", "threads", "commit", "dirty", "date"} <= record["environment"].keys()
    assert record["command"].endswith("--root DIR --output=DIR --threads 1")
    assert "/secret" not in text
    assert str(Path.home()) not in text
    assert "1.235" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("threads_restored")
def test_a_smoke_run_replaces_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    path = harness.write_result("q", {}, started("--smoke"), seeds=[])
    assert path.is_relative_to(tmp_path / "elsewhere")
    assert json.loads(path.read_text())["smoke"] is True
    assert harness.write_result("q", {}, started(), seeds=[]) == tmp_path / "results" / "q.json"
    with pytest.raises(SystemExit):
        started("--smoke", "--output", str(tmp_path / "results"))


def test_threads_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        started("--threads", "0")
    assert "must be at least 1" in capsys.readouterr().err


def test_table_aligns_numbers_and_leaves_blanks():
    lines = harness.format_table([{"name": "a", "ms": 1.0}, {"name": "long", "note": "x"}]).splitlines()
    assert lines == ["name  ms  note", "----  --  ----", "a      1", "long      x"]
