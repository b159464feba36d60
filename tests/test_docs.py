"""The code in docs/ runs, page by page as a reader takes it, and what it names exists."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))
FORMULA = re.compile(r"\$\$(.*?)\$\$|\$([^$]+)\$", flags=re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SYSTEMS = ("whitening", "natural_gradient", "diagnostics", "spectra", "geodesics", "gradnet")


def blocks(page: Path) -> list[str]:
    return PYTHON.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile("\n".join(blocks(page)), str(page), "exec"), {"__name__": "page"})
    assert not list(tmp_path.iterdir())  # an example leaves nothing behind


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_s_page_has_all_its_parts(system):
    text = (ROOT / "docs" / f"{system}.md").read_text(encoding="utf-8")
    assert "**What for.**" in text
    assert "**When not.**" in text
    for heading in ("## The mathematics", "## An example", "## What was measured"):
        assert heading in text
    assert "```{measured}" in text


def test_measured_figures_are_of_questions_that_exist():
    from benchmarks.report import questions

    named = {name for page in PAGES for name in re.findall(r"^```\{measured\} (\w+)$", page.read_text(), re.MULTILINE)}
    assert len(named) > 8
    assert named <= questions().keys()


def test_formulas_are_drawn_in_the_colour_of_the_text():
    drawing = pytest.importorskip("matplotlib") and runpy.run_path(str(ROOT / "docs" / "_extensions" / "drawn_math.py"))
    formulas = {
        part
        for page in PAGES
        for long, short in FORMULA.findall(re.sub(r"```.*?```|`.*?`", "", page.read_text("utf-8"), flags=re.DOTALL))
        for part in (long or short).split(r"\qquad")
        if part.strip()
    }
    assert len(formulas) > 40
    for formula in formulas:
        svg = drawing["drawn"](formula)
        assert re.search(r'<path d="M[-\d. ]+', svg), formula
        assert "fill" not in svg
    with pytest.raises(ValueError, match="Unknown symbol"):
        drawing["drawn"](r"\nosuchcommand")
