"""Tables from what the benchmarks wrote: read a result, find its rows, pick a number, set a table in Markdown."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

__all__ = ["Row", "cell", "environment_line", "load", "markdown", "pick", "tables"]

Row = Mapping[str, Any]
_LISTS = ("rows", "summary", "best", "claims", "conclusions")  # under which benchmarks keep their tables
_WIDEST = 80  # characters of a cell
_NOT_FINITE = ("nan", "inf", "-inf")  # as JSON holds them: a run that diverged is a result


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The committed result of a question, or None where there is none yet.

    Args:
        name: of the benchmark.
        folder: of the results.

    Returns:
        The record that :func:`benchmarks.harness.write_result` wrote.
    """
    path = folder / f"{name}.json"
    record: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return None if record is None or record["smoke"] else record


def tables(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Every table in a result, by name: the one that was printed, lists of rows, timings, and groups of figures.

    Args:
        record: a result.

    Returns:
        Name to rows whose values are numbers, words or None. An empty mapping where nothing has the form of a table.
    """
    found: dict[str, list[Row]] = {}
    if record.get("rows"):
        found["rows"] = _flat_rows(record["rows"])
    numbers = record["numbers"]
    for name in _LISTS:
        rows = numbers.get(name)
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            found.setdefault(name, _flat_rows(rows))
    timed = [row for job, timing in _timings(numbers) for row in _timing_rows(job, timing)]
    if timed:
        found["timing"] = timed
    for name, group in numbers.items():
        if not found and isinstance(group, Mapping) and all(isinstance(entry, Mapping) for entry in group.values()):
            found[name] = [{name: key, **_scalars(entry)} for key, entry in group.items()]
    return found


def pick(record: Mapping[str, Any] | None, where: Mapping[str, object], column: str) -> list[float]:
    """Numbers of a result: from the first table that has rows of these values with such a column.

    Args:
        record: a result, or None.
        where: column to value; all must be there. In a text * stands for anything; the first that fits is taken.
        column: whose numbers are taken; * stands for anything, as above.

    Returns:
        A number for each row that matches; an empty list where nothing does.
    """
    for rows in {} if record is None else tables(record).values():
        of = [row for row in rows if all(_matches(row.get(key), value) for key, value in where.items())]
        of = [row for row in of if all(row.get(key) == of[0].get(key) for key in where)]
        numbers = [value for row in of if (value := _number(row, column)) is not None]
        if numbers:
            return numbers
    return []


def markdown(rows: Sequence[Row], columns: Sequence[str] = (), most: int = 40) -> str:
    """Rows as a Markdown table, numbers to three significant digits.

    Args:
        rows: at least one.
        columns: which ones; by default all that have a value, in order of appearance.
        most: rows at most; a line below says how many were left out.

    Returns:
        Lines of text, without a closing line break.
    """
    there = dict.fromkeys(key for row in rows for key, value in row.items() if value not in ("", None))
    named = list(columns or there)
    right = [any(isinstance(row.get(name), int | float) for row in rows) for name in named]
    lines = [
        "| " + " | ".join(named) + " |",
        "| " + " | ".join("---:" if number else "---" for number in right) + " |",
        *("| " + " | ".join(cell(row.get(name)) for name in named) + " |" for row in rows[:most]),
    ]
    if len(rows) > most:
        lines += ["", f"{len(rows) - most} more rows are in the JSON."]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A value as it stands in a table.

    Args:
        value: a number, a text or None.

    Returns:
        Three significant digits of a number; a text without what would end the cell.

    Example:
        >>> cell(0.012345), cell(123456.0), cell(7), cell(True), cell(None), cell("a|b")
        ('0.0123', '123,456', '7', 'yes', '', 'a/b')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def environment_line(record: Mapping[str, Any]) -> str:
    """Where and when a result was measured, in a line.

    Args:
        record: a result.

    Returns:
        Command, versions, processor, threads, commit and date; and whether something is still to be measured.
    """
    at = record["environment"]
    changed = " (sources changed)" if at["dirty"] else ""
    where = f"torch {at['torch']}, {at['cpu']}, {at['threads']} thread{'s' if at['threads'] != 1 else ''}"
    when = f"commit {str(at['commit'])[:7]}{changed}, {at['date'][:10]}"
    unfinished = "; not all of it is measured yet" if record.get("unfinished") else ""
    return f"`{record['command']}`; {where}; {when}{unfinished}"


def _flat_rows(rows: Sequence[Row]) -> list[Row]:
    return [_scalars(row) for row in rows]


def _scalars(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is None or isinstance(value, int | float | str)}


def _timings(numbers: Mapping[str, Any], job: str = "") -> Iterator[tuple[str, Row]]:
    """What :func:`benchmarks.harness.time_interleaved` returned, wherever it stands, with the names that lead there."""
    if "baseline" in numbers and "candidates" in numbers:
        yield job, numbers
        return
    for key, value in numbers.items():
        if isinstance(value, Mapping):
            yield from _timings(value, job if key == "timing" else f"{job}, {key}" if job else key)


def _timing_rows(job: str, timing: Row) -> list[Row]:
    return [
        {
            "job": job,
            "candidate": name,
            "ms": 1e3 * figures["seconds"]["median"],
            f"ratio to {timing['baseline']}": figures["ratio"]["median"],
            "quartiles": f"{figures['ratio']['lower']:.3f}-{figures['ratio']['upper']:.3f}",
        }
        for name, figures in timing["candidates"].items()
    ]


def _matches(value: object, wanted: object) -> bool:
    both = isinstance(value, str) and isinstance(wanted, str)
    return fnmatch.fnmatchcase(str(value), str(wanted)) if both else value == wanted


def _number(row: Row, column: str) -> float | None:
    value = next((row[name] for name in row if fnmatch.fnmatchcase(name, column)), None)
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in _NOT_FINITE):
        return None
    return float(value)
