"""Write benchmarks/README.md from the results and ``README.template.md``: ``python -m benchmarks.report``.

``--check`` only says whether the file is that of the results. What was asked for, with the papers' values, stands in
``benchmarks/asked.py``; what was tried and where to go on stands in the template, by hand.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.asked import ASKED, PAPERS, Asked
from benchmarks.harness import RESULTS, ROOT
from benchmarks.results_tables import cell, environment_line, load, markdown, tables

__all__ = ["questions", "render"]

README = ROOT / "benchmarks" / "README.md"
TEMPLATE = ROOT / "benchmarks" / "README.template.md"
MISSING = "not measured yet"


def questions() -> dict[str, str]:
    """Every benchmark that there is.

    Returns:
        Name to the first line of its docstring, which is its question.
    """
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        if "benchmark_parser" in imported:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def render(folder: Path = RESULTS) -> str:
    """The whole text.

    Args:
        folder: of the results.

    Returns:
        Markdown.
    """
    text = TEMPLATE.read_text(encoding="utf-8")
    for mark, part in (("questions", _questions(folder)), ("asked", _asked(folder)), ("results", _results(folder))):
        text = text.replace(f"<!-- {mark} -->", part)
    return text


def _questions(folder: Path) -> str:
    lines = ["| question | asks | measured |", "| --- | --- | --- |"]
    for name, question in questions().items():
        record = load(name, folder)
        measured = MISSING if record is None else record["environment"]["date"][:10]
        lines.append(f"| `{name}` | {question.replace('|', '/')} | {measured} |")
    return "\n".join(lines)


def _asked(folder: Path) -> str:
    parts = []
    for key, title in PAPERS.items():
        lines = [
            f"### {title}",
            "",
            "| | paper | asked for | ours | peers and baselines, same run | question |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_asked_row(asked, folder) for asked in ASKED if asked.paper == key),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _asked_row(asked: Asked, folder: Path) -> str:
    record = load(asked.question, folder)
    ours, peers = (
        "; ".join(filter(None, (_picked(asked, record, name, value) for name, value in names.items())))
        for names in (asked.ours, asked.peers)
    )
    what = f"{asked.where}: {asked.what}" if asked.where else asked.what
    return f"| {what} | {asked.value} | {asked.wanted} | {ours or MISSING} | {peers} | `{asked.question}` |"


def _picked(asked: Asked, record: dict[str, Any] | None, name: str, value: object) -> str:
    numbers = asked.numbers(record, value)
    if not numbers:
        return ""
    number = str(len(numbers)) if asked.count else cell(statistics.median(numbers))
    return f"{name} {number}".strip()


def _results(folder: Path) -> str:
    parts = []
    for name in sorted({path.stem for path in folder.glob("*.json")}):
        record = load(name, folder)
        if record is None:
            continue
        parts += [f"### {name}", environment_line(record)]
        shown = tables(record)
        if "rows" in shown:  # what the benchmark printed has the timings, and the table that it was made of
            shown = {name: rows for name, rows in shown.items() if name in ("rows", "claims", "conclusions")}
        parts += [markdown(rows) for rows in shown.values()] or ["No table: see the JSON."]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the file.

    Args:
        argv: arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not current")
    options = parser.parse_args(argv)
    text = render()
    if not options.check:
        README.write_text(text, encoding="utf-8")
        print(f"{README.relative_to(ROOT)} written")
    elif README.read_text(encoding="utf-8") != text:
        sys.exit("benchmarks/README.md is not that of the results: run python -m benchmarks.report")


if __name__ == "__main__":
    main()
