"""Records: what is written is what is read, however the run ended."""

from __future__ import annotations

import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchgeom_optim.diagnostics.history import History, Record

NAMES = st.text(min_size=1, max_size=8)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
RECORDS = st.builds(
    Record,
    step=st.integers(0, 10**9),
    time_s=st.floats(0, 1e6),
    loss=NUMBERS,
    batch_size=st.integers(1, 4096),
    values=st.dictionaries(NAMES, NUMBERS, max_size=3),
    layers=st.dictionaries(NAMES, st.dictionaries(NAMES, NUMBERS, max_size=2), max_size=2),
    notes=st.lists(st.text(max_size=12), max_size=2).map(tuple),
    learning_rate=st.none() | NUMBERS,
    spectrum=st.dictionaries(NAMES, st.lists(NUMBERS, max_size=3).map(tuple), max_size=2),
    vector_layers=st.lists(NAMES, max_size=2).map(tuple),
)


def record(step: int = 0, **fields) -> Record:
    given = {"time_s": 0.1, "loss": 2.0, "batch_size": 8, "values": {"gradient_norm": 1.0 + step}}
    return Record(step=step, **{**given, **fields})


def history_of(*records: Record) -> History:
    history = History()
    for one in records:
        history.append(one)
    return history


def same(one: Record, other: Record) -> bool:
    return repr(one) == repr(other)  # nan is not equal to itself, and its repr is


@given(RECORDS)
def test_json_round_trip_of_any_record(one):
    line = one.to_json()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert same(Record.from_json(line), one)


def test_a_changed_number_is_seen():
    assert not same(Record.from_json(record(loss=2.0).to_json()), record(loss=math.nextafter(2.0, 3.0)))


def test_every_append_is_on_disk_at_once(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    for step in range(3):
        history.append(record(step, loss=math.nan, values={"gradient_norm": math.inf}))
        assert len(History.from_jsonl(path)) == step + 1
    again = History.from_jsonl(path)
    assert all(map(same, again, history))
    assert again.path is None


@pytest.mark.parametrize("torn", ["whole", "without its line break", "half", "zeros", "empty"])
def test_a_torn_last_line_costs_that_line_alone(tmp_path, torn):
    path = tmp_path / "run.jsonl"
    history = History(path)
    for step in range(3):
        history.append(record(step))
    lines = path.read_bytes().splitlines(keepends=True)
    last = {
        "whole": lines[2],
        "without its line break": lines[2][:-1],
        "half": lines[2][: len(lines[2]) // 2],
        "zeros": b"\0" * 7,
        "empty": b"",
    }[torn]
    path.write_bytes(b"".join([*lines[:2], last]))
    kept = [0, 1, 2] if torn.startswith("w") else [0, 1]
    assert History.from_jsonl(path).column("step") == kept
    resumed = History(path, resume=True)
    resumed.append(record(9))
    assert resumed.column("step") == [*kept, 9]
    assert History.from_jsonl(path).column("step") == [*kept, 9]


def test_a_spoilt_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(f"{record(0).to_json()}\nnonsense\n{record(1).to_json()}\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: 'nonsense.*must be a record"):
        History.from_jsonl(path)


@pytest.mark.parametrize("line", ["[]", "{}", "3", '{"step": 1}', '{"step": "x", "time_s": 0, "loss": 0}', ""])
def test_what_is_no_record_is_refused(line):
    with pytest.raises(ValueError, match="must be a record"):
        Record.from_json(line)


def test_another_runs_file_is_not_mixed_up(tmp_path):
    path = tmp_path / "run.jsonl"
    History(path).append(record())
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"resume=True continues it"):
        History(path)
    assert path.read_bytes() == before
    (tmp_path / "empty.jsonl").touch()
    assert len(History(tmp_path / "empty.jsonl")) == 0


def test_columns():
    history = history_of(
        record(0, learning_rate=0.5, layers={"weight_norm": {"0": 3.0}}),
        record(1, values={}, layers={"weight_norm": {"0": 4.0, "2": 5.0}}),
    )
    assert history.column("step") == [0, 1]
    assert history.column("weight_norm/0") == [3.0, 4.0]
    assert history.column("gradient_norm")[0] == 1.0
    assert math.isnan(history.column("gradient_norm")[1])
    assert math.isnan(history.column("learning_rate")[1])
    assert list(history.layer_columns("weight_norm")) == ["0", "2"]
    assert math.isnan(history.layer_columns("weight_norm")["2"][0])
    assert history.layer_columns("other") == {}
    assert history.metrics() == ["gradient_norm"]
    with pytest.raises(KeyError, match=r"no record has it; there are .*gradient_norm"):
        history.column("gradient_nrom")
    assert History().column("loss") == History().column("anything") == []


def test_it_is_a_sequence():
    history = history_of(*(record(step) for step in range(4)))
    assert len(history) == 4
    assert history[-1].step == 3
    assert [one.step for one in history[1:3]] == [1, 2]
    assert [one.step for one in reversed(history)] == [3, 2, 1, 0]
    assert repr(history) == "History(4 records, steps 0 to 3, path=None)"
    assert repr(History()) == "History(0 records, path=None)"
    assert list(pickle.loads(pickle.dumps(history))) == list(history)


def test_subscribers_get_numbers_and_step():
    seen = []
    history = History()
    unsubscribe = history.subscribe(lambda numbers, step: seen.append((step, numbers)))
    one = record(7, learning_rate=0.5, layers={"weight_norm": {"0": 3.0}})
    history.append(one)
    assert seen == [(7, {"loss": 2.0, "gradient_norm": 8.0, "learning_rate": 0.5, "weight_norm/0": 3.0})]
    seen[0][1].clear()  # a subscriber's dictionary is its own
    assert history[0].flat() == one.flat() != {}
    unsubscribe()
    unsubscribe()
    history.append(record(8))
    assert len(seen) == 1
    with pytest.raises(TypeError, match="must be callable"):
        history.subscribe(None)


def test_a_failing_subscriber_stops_nothing(tmp_path):
    def broken(numbers, step):
        raise OSError("no network")

    seen = []
    history = History(tmp_path / "run.jsonl")
    history.subscribe(broken)
    history.subscribe(lambda numbers, step: seen.append(step))
    with pytest.warns(RuntimeWarning, match="could not log step 3: OSError"):
        history.append(record(3))
    assert seen == [3]
    assert len(history) == len(History.from_jsonl(history.path)) == 1


def test_pandas():
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = history_of(record(0, layers={"weight_norm": {"0": 3.0}}), record(5, values={})).to_pandas()
    assert list(frame["step"]) == [0, 5]
    assert frame["weight_norm/0"][0] == 3.0
    assert math.isnan(frame["gradient_norm"][1])
    assert len(History().to_pandas()) == 0


def test_a_record_prints_as_a_table():
    record = Record(
        step=3,
        time_s=0.1,
        loss=2.5,
        batch_size=8,
        values={"weight_norm": 4.0, "fisher_trace": 12.5},
        layers={"weight_norm": {"0": 3.0, "2": 2.0}},
        notes=("batch norm couples the samples",),
    )
    first, norm, trace, note = str(record).splitlines()
    assert first == "step 3: loss 2.5, 8 samples, measured in 0.1 s"
    assert norm.split(maxsplit=2) == ["weight_norm", "4", "(layers 2 to 3)"]
    assert trace.split() == ["fisher_trace", "12.5"]
    assert note == "Note: batch norm couples the samples"
