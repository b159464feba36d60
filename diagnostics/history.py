"""What was measured, step by step: typed records, kept in memory and, line by line, on disk."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, overload

from torchgeom_optim._optional import optional_import

__all__ = ["History", "Record"]

# Fields of a record that hold one number, besides the metrics.
_OWN_COLUMNS = ("step", "time_s", "loss", "batch_size", "learning_rate")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement.

    Args:
        step: number of the training step, from 0.
        time_s: how long the measurement took, seconds.
        loss: mean loss of the batch; nan or inf as it came.
        values: metric -> value for the whole network, such as ``"gradient_diversity"``.
        layers: metric -> layer's name -> value.
        batch_size: samples in the batch (of all processes together).
        notes: what a reader of the numbers has to know ("batch norm couples the samples", ...).
        learning_rate: of the first parameter group, None without an optimizer.
        spectrum: name -> eigenvalues in descending order, such as ``"fisher"`` and ``"data"``.
        vector_layers: layers that have no matrix, such as normalisations: their gradients are of another size.

    Example:
        >>> record = Record(step=3, time_s=0.1, loss=2.5, batch_size=8, values={"weight_norm": 4.0},
        ...                 layers={"weight_norm": {"0": 3.0}})
        >>> record.flat()
        {'loss': 2.5, 'weight_norm': 4.0, 'weight_norm/0': 3.0}
    """

    step: int
    time_s: float
    loss: float
    batch_size: int
    values: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    learning_rate: float | None = None
    spectrum: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    vector_layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"step {self.step}: loss {self.loss:.4g}, {self.batch_size} samples, measured in {self.time_s:.3g} s"]
        for metric, value in self.values.items():
            by_layer = self.layers.get(metric, {}).values()
            layers = f"  (layers {min(by_layer):.3g} to {max(by_layer):.3g})" if by_layer else ""
            lines.append(f"{metric:<32}{value:>10.4g}{layers}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def flat(self) -> dict[str, float]:
        """What a logger is given: the loss, the learning rate, ``metric``, and ``metric/layer``; no spectrum."""
        flat = {"loss": self.loss, **self.values}
        if self.learning_rate is not None:
            flat["learning_rate"] = self.learning_rate
        for metric, by_layer in self.layers.items():
            flat.update({f"{metric}/{layer}": value for layer, value in by_layer.items()})
        return flat

    def to_json(self) -> str:
        """One line of strict JSON, without the line break; nan and inf become the strings of these names."""
        return json.dumps({entry.name: _to_plain(getattr(self, entry.name)) for entry in fields(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record that :meth:`to_json` wrote; fields of later versions are ignored.

        Args:
            line: one line of JSON.

        Returns:
            The record, every float bit for bit (all nans are alike).

        Raises:
            ValueError: not JSON, or not a record.
        """
        try:
            raw = json.loads(line)
            learning_rate = raw.get("learning_rate")
            return cls(
                step=int(raw["step"]),
                time_s=float(raw["time_s"]),
                loss=float(raw["loss"]),
                batch_size=int(raw["batch_size"]),
                values=_floats(raw["values"]),
                layers={metric: _floats(by_layer) for metric, by_layer in raw.get("layers", {}).items()},
                notes=tuple(str(note) for note in raw.get("notes", ())),
                learning_rate=None if learning_rate is None else float(learning_rate),
                spectrum={name: tuple(map(float, row)) for name, row in raw.get("spectrum", {}).items()},
                vector_layers=tuple(map(str, raw.get("vector_layers", ()))),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{line[:60]!r}: must be a record as Record.to_json writes it ({error!r}).") from error


class History(Sequence[Record]):
    """Records in the order in which they came; a sequence that can only grow.

    With a path every record is written the moment it comes, one JSON object a line, and the file is closed again:
    a run that is killed keeps all that it had, but for a line that it was just writing, which is left out on reading.

    Args:
        path: file to append to; None keeps the records in memory alone.
        resume: continue a file that has records already: they are read first. A last line that was torn is cut off.

    Raises:
        FileExistsError: the file has something in it, and ``resume`` is False.

    Example:
        >>> history = History()
        >>> history.append(Record(step=0, time_s=0.1, loss=2.5, batch_size=8, values={"gradient_norm": 4.0}))
        >>> history.column("gradient_norm")
        [4.0]
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, resume: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self._records: list[Record] = []
        self._logs: list[Callable[[dict[str, float], int], object]] = []
        if self.path is not None and self.path.exists() and self.path.stat().st_size:
            if not resume:
                raise FileExistsError(
                    f"path={str(path)!r}: it holds records of another run, and must be new or empty; resume=True "
                    "continues it, History.from_jsonl reads it."
                )
            self._records, whole = _read(self.path)
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def append(self, record: Record) -> None:
        """Keep a record, write it to the file, and pass it to whoever subscribed.

        A subscriber that fails is warned about and asked again next time: training goes on, and nothing is lost here.

        Args:
            record: what was measured.
        """
        self._records.append(record)
        if self.path is not None:
            # The line break comes first where a file ends without one, so that two records never share a line.
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    start = "" if file.read(1) == b"\n" else "\n"
                else:
                    start = ""
                file.write(f"{start}{record.to_json()}\n".encode())
        for log in self._logs:
            try:
                log(record.flat(), record.step)
            except Exception as error:
                warnings.warn(f"{log!r} could not log step {record.step}: {error!r}", RuntimeWarning, stacklevel=2)

    def subscribe(self, log: Callable[[dict[str, float], int], object]) -> Callable[[], None]:
        """Pass every coming record on as ``log(numbers, step)``, the numbers as in :meth:`Record.flat`.

        Weights & Biases: ``history.subscribe(lambda numbers, step: run.log(numbers, step=step))``; MLflow:
        ``history.subscribe(lambda numbers, step: mlflow.log_metrics(numbers, step=step))``; TensorBoard:
        :class:`torchgeom_optim.diagnostics.tensorboard.TensorBoardLog`.

        Args:
            log: called with a new dictionary for each record.

        Returns:
            A function that ends the subscription; calling it again does nothing.

        Raises:
            TypeError: ``log`` cannot be called.
        """
        if not callable(log):
            raise TypeError(f"log={log!r}: must be callable as log(numbers, step); wandb's is run.log.")
        self._logs.append(log)

        def unsubscribe() -> None:
            self._logs[:] = [other for other in self._logs if other is not log]

        return unsubscribe

    def column(self, name: str) -> list[float]:
        """One number through time, nan where a record lacks it.

        Args:
            name: ``"loss"``, ``"step"``, ``"time_s"``, ``"batch_size"``, ``"learning_rate"``, a metric, or
                ``"metric/layer"``.

        Returns:
            As many numbers as there are records.

        Raises:
            KeyError: no record has it.
        """
        rows = [_row(record) for record in self._records]
        if rows and name not in _OWN_COLUMNS and not any(name in row for row in rows):
            known = sorted({key for row in rows for key in row})
            raise KeyError(f"{name!r}: no record has it; there are {', '.join(known)}.")
        return [row.get(name, math.nan) for row in rows]

    def layer_columns(self, metric: str) -> dict[str, list[float]]:
        """A metric's layers through time, in the order in which the records name them.

        Args:
            metric: such as ``"gradient_norm"``.

        Returns:
            Layer -> as many numbers as there are records, nan where one lacks it; empty if no record has the metric.
        """
        names = dict.fromkeys(layer for record in self._records for layer in record.layers.get(metric, {}))
        return {
            layer: [record.layers.get(metric, {}).get(layer, math.nan) for record in self._records] for layer in names
        }

    def metrics(self) -> list[str]:
        """Names of the whole-network metrics, in the order in which the records bring them."""
        return list(dict.fromkeys(name for record in self._records for name in record.values))

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, a row for each record and the columns of :meth:`column`; needs pandas."""
        pandas = optional_import("pandas", "History.to_pandas")
        columns = dict.fromkeys(["step", *(key for record in self._records for key in _row(record))])
        return pandas.DataFrame([_row(record) for record in self._records], columns=list(columns))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> History:
        """Read what a history with a path wrote; the file is not written to again.

        Args:
            path: a file of JSON lines. A last line that was torn is left out.

        Returns:
            The records, in memory.

        Raises:
            ValueError: a line other than the last is no record; the message gives its number.
        """
        history = cls()
        history._records, _ = _read(Path(path))
        return history

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return self._records[index]

    def __repr__(self) -> str:
        steps = f", steps {self[0].step} to {self[-1].step}" if self._records else ""
        return f"History({len(self)} records{steps}, path={None if self.path is None else str(self.path)!r})"


def _row(record: Record) -> dict[str, float]:
    own = {name: getattr(record, name) for name in _OWN_COLUMNS}
    return {**{name: value for name, value in own.items() if value is not None}, **record.flat()}


def _read(path: Path) -> tuple[list[Record], int]:
    """The records of a file, and how many of its bytes are whole lines."""
    records, whole = [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(Record.from_json(line.decode("utf-8", errors="replace")))
        except ValueError as error:
            if number == len(lines):
                break  # torn: the writer was killed in the middle of it
            raise ValueError(f"{path.name}, line {number}: {error}") from error
        whole += len(line)
    return records, whole


def _floats(raw: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in raw.items()}


def _to_plain(value: Any) -> Any:
    """The same in what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(name): _to_plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
