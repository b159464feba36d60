"""The event files are read back by TensorBoard's own reader."""

from __future__ import annotations

import math
import sys

import pytest

from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.tensorboard import TensorBoardLog

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def record(step: int, loss: float = 0.5) -> Record:
    layers = {"weight_norm": {"conv.0": 2.0}}
    return Record(step=step, time_s=0.1, loss=loss, batch_size=8, values={"weight_norm": 4.0}, layers=layers)


def test_event_files_hold_every_number(tmp_path):
    history = History()
    log = TensorBoardLog(tmp_path / "run")
    history.subscribe(log)
    history.append(record(3))
    assert scalars(tmp_path / "run")["diagnostics/loss"] == [(3, 0.5)]  # flushed while the run goes on
    history.append(record(7, math.nan))
    log.close()
    read = scalars(tmp_path / "run")
    assert read["diagnostics/weight_norm/conv.0"] == [(3, 2.0), (7, 2.0)]
    assert read["diagnostics/weight_norm"] == [(3, 4.0), (7, 4.0)]
    assert math.isnan(read["diagnostics/loss"][1][1])


def test_a_writer_of_the_user_stays_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        with TensorBoardLog(writer, prefix="mine/") as log:
            log({"loss": 1.0}, 0)
        writer.add_scalar("after", 2.0, 1)
    assert scalars(tmp_path) == {"mine/loss": [(0, 1.0)], "after": [(1, 2.0)]}


def test_neither_a_path_nor_a_writer():
    with pytest.raises(TypeError, match=r"folder=3: must be a path or a SummaryWriter"):
        TensorBoardLog(3)


def test_without_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"torchgeom-optim\[records\]"):
        TensorBoardLog(tmp_path / "run")
    assert not (tmp_path / "run").exists()
