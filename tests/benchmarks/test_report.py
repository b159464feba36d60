"""benchmarks/README.md is that of the results, and copes with whatever form their rows have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as runner
from benchmarks import does_a_gradnet_improve_a_frozen_network, report, which_gradnet_settings_matter
from benchmarks.asked import ASKED, PAPERS, Asked
from benchmarks.harness import environment
from benchmarks.results_tables import cell, environment_line, load, markdown, pick, tables

TIMING = {
    "baseline": "SGD",
    "candidates": {
        name: {"seconds": {"median": s}, "ratio": {"lower": r, "median": r, "upper": r}, "cpu_ratio": {}}
        for name, s, r in (("SGD", 0.01, 1.0), ("ours", 0.02, 2.0), ("ours, slower", 0.05, 5.0))
    },
}
ROWS = [
    {"network": "lenet", "method": "ours", "seed": 1, "loss": 1.0},
    {"network": "lenet", "method": "ours, tuned", "seed": 1, "loss": 7.0},
    {"network": "lenet", "method": "ours", "seed": 2, "loss": 3.0, "curve": [1, 2]},
    {"network": "lenet", "method": "SGD", "seed": 1, "loss": "inf"},
]


def record(numbers: dict[str, Any], rows: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    at = {**environment(), "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "dirty": False}
    made = {"name": "q", "smoke": False, "command": "python -m q", "environment": at, "seeds": [1], "numbers": numbers}
    return {**made, **({} if rows is None else {"rows": rows}), **more}


def test_the_committed_file_is_current():
    assert report.README.read_text(encoding="utf-8") == report.render(), "run python -m benchmarks.report"


def test_every_question_and_every_paper_is_there():
    text = report.render()
    names = {path.stem for path in (report.ROOT / "benchmarks").glob("*_*.py")} - {"results_tables"}
    assert set(report.questions()) == names - {"__init__", "__main__"}
    assert all(f"`{name}`" in text for name in names - {"__init__", "__main__"})
    assert all(title in text for title in PAPERS.values())
    assert all(question.endswith((".", "?")) for question in report.questions().values())


def test_every_figure_asks_a_question_that_exists():
    assert {asked.question for asked in ASKED} <= report.questions().keys()
    assert {asked.paper for asked in ASKED} == PAPERS.keys()
    assert len({(asked.paper, asked.what) for asked in ASKED}) == len(ASKED)


def test_without_results_all_is_said_to_be_missing(tmp_path):
    text = report.render(tmp_path)
    assert text.count(report.MISSING) == len(report.questions()) + len(ASKED)


@pytest.mark.parametrize(
    ("made", "where", "found"),
    [
        (record({"rows": ROWS}), {"method": "ours"}, [1.0, 3.0]),
        (record({"best": ROWS}), {"method": "ours"}, [1.0, 3.0]),
        (record({"other": 1}, ROWS), {"method": "ours"}, [1.0, 3.0]),
        (record({"rows": ROWS}), {"method": "ours, *"}, [7.0]),
        (record({"rows": ROWS}), {"method": "o*", "network": "lenet"}, [1.0, 3.0]),  # of the first that fits alone
        (record({"rows": ROWS}), {"method": "SGD"}, [float("inf")]),
        (record({"rows": ROWS}), {"method": "Adam"}, []),
        (record({"rows": ROWS}), {"nowhere": 1}, []),
        (record({"cases": {"a": {"method": "ours", "loss": 2.0}}}), {"method": "ours"}, [2.0]),
        (record({"text": "nothing"}), {"method": "ours"}, []),
        (None, {"method": "ours"}, []),
    ],
)
def test_numbers_are_found_in_whatever_form(made, where, found):
    assert pick(made, where, "loss") == found


@pytest.mark.parametrize(
    "numbers", [{"lenet": TIMING}, {"lenet": {"timing": TIMING, "extra": 1}}, {"a": {"lenet": TIMING}}]
)
def test_timings_are_found_wherever_they_stand(numbers):
    (rows,) = tables(record(numbers)).values()
    assert [row["candidate"] for row in rows] == ["SGD", "ours", "ours, slower"]
    assert pick(record(numbers), {"job": "*lenet", "candidate": "ours"}, "ratio to *") == [2.0]
    assert pick(record(numbers), {"candidate": "ours"}, "ms") == [20.0]


def test_only_rows_of_the_right_size_are_taken():
    rows = [{"method": "ours", "P": 1_900, "seconds": 1.0}, {"method": "ours", "P": 100_000, "seconds": 9.0}]
    asked = Asked("fim", "", "x", "q", "seconds", "method", {"": "ours"}, weights=2_000)
    assert asked.numbers(record({"rows": rows}), "ours") == [1.0]


def test_tables_in_markdown():
    rows = [{"name": "a|b", "ms": 1.23456, "empty": None}, {"name": "c", "ms": 12345.6, "new": True}]
    assert markdown(rows).splitlines() == [
        "| name | ms | new |",
        "| --- | ---: | ---: |",
        "| a/b | 1.23 |  |",
        "| c | 12,346 | yes |",
    ]
    assert markdown(rows, ["ms"], most=1).splitlines()[2:] == ["| 1.23 |", "", "1 more rows are in the JSON."]
    assert cell("x" * 100) == "x" * 79 + "…"
    assert cell(float("inf")) == "inf"


def test_smoke_runs_are_no_results(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(record({}, smoke=True)))
    assert load("q", tmp_path) is None
    assert load("nothing", tmp_path) is None


def test_a_result_of_this_machine_is_left_out_and_any_other_is_not(tmp_path):
    threads = environment()["threads"]

    def done(made: dict[str, Any], begun: Path = tmp_path / "begun") -> bool:
        (tmp_path / "q.json").write_text(json.dumps(made))
        return runner.is_done("q", threads, tmp_path, begun)

    assert not runner.is_done("q", threads, tmp_path / "nothing", tmp_path)
    assert done(record({}))
    for key, value in (("cpu", "another"), ("torch", "1.0"), ("threads", threads + 1)):
        other = record({})
        other["environment"][key] = value
        assert not done(other), key
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "q").touch()
    assert not done(record({}))  # it was interrupted
    assert runner.is_from_here("q", threads, tmp_path)
    assert not runner.is_from_here("q", threads + 1, tmp_path)
    (tmp_path / "begun" / "q").unlink()
    assert done(record({}))
    assert not done(record({}, unfinished=True))  # its time was over
    assert runner.is_from_here("q", threads, tmp_path)


def test_the_runner_marks_what_it_begins_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    commands = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: Any) -> Done:
        commands.append(command)
        assert (tmp_path / command[2].removeprefix("benchmarks.")).exists() == ("--smoke" not in command)
        Done.returncode = int(command[2].endswith("b"))
        return Done()

    monkeypatch.setattr(runner, "BEGUN", tmp_path)
    monkeypatch.setattr(runner, "questions", lambda: dict.fromkeys("abc", "?"))
    monkeypatch.setattr(runner, "is_done", lambda name, threads: name == "c")
    monkeypatch.setattr(runner, "is_from_here", lambda name, threads: name != "a")
    monkeypatch.setattr(
        runner, "_options_of", lambda name: {"a": '"--resume"', "b": "", "c": '"--again" "--resume"'}[name]
    )
    monkeypatch.setattr(runner.subprocess, "run", run)
    with pytest.raises(SystemExit, match="failed: b"):
        runner.main(["--root", "DIR"])
    assert [command[2:] for command in commands] == [
        [f"benchmarks.{name}", "--root", "DIR", "--threads", "1"] for name in "ab"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    runner.main(["--only", "c", "--again"])
    assert commands[-1][2:] == ["benchmarks.c", "--threads", "1", "--again"]
    runner.main(["--only", "c", "--smoke"])
    assert commands[-1][2:] == ["benchmarks.c", "--threads", "1", "--smoke"]
    monkeypatch.setattr(runner, "is_done", lambda name, threads: False)  # it was interrupted, and has a result of here
    runner.main(["--only", "c"])
    assert commands[-1][2:] == ["benchmarks.c", "--threads", "1", "--resume"]
    monkeypatch.setattr(runner, "is_whole", lambda name: False)
    with pytest.raises(SystemExit, match=r"^unfinished.*same command: c$"):
        runner.main(["--only", "c"])
    with pytest.raises(SystemExit, match=r"^failed: b; unfinished.*: a$"):
        runner.main(["--only", "a", "b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    monkeypatch.setattr(runner, "is_done", lambda name, threads: name == "c")
    count = len(commands)
    runner.main(["--list"])
    assert len(commands) == count
    assert "c: done" in capsys.readouterr().out


@pytest.mark.parametrize("question", [does_a_gradnet_improve_a_frozen_network, which_gradnet_settings_matter])
def test_a_benchmark_whose_time_is_over_says_so(question, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        question.main(["--smoke", "--minutes", "0", "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert "0.0 minutes are over; start again to go on" in capsys.readouterr().out
    made = json.loads((tmp_path / f"{question.NAME}.json").read_text())
    assert made["unfinished"] is True
    assert environment_line(made).endswith("; not all of it is measured yet")
    assert "measured yet" not in environment_line(record({}))
