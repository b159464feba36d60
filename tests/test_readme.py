"""What the README says runs, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_it_is_short_and_shows_four_uses():
    assert len(README.splitlines()) < 150
    assert [int(number) for number in re.findall(r"^\*\*(\d)\. ", README, re.MULTILINE)] == [1, 2, 3, 4]
    assert len(BLOCKS) == 4
    assert all(len(block.splitlines()) <= 15 for block in BLOCKS)


def test_its_picture_is_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures == ["docs/overview.svg"]
    assert (ROOT / pictures[0]).stat().st_size < 60_000


def test_links_lead_somewhere():
    links = re.findall(r"\]\(((?!http)[^)]*)\)", README)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_python_blocks_run(tmp_path):
    """A reader takes one after the other."""
    command = [sys.executable, "-W", "error", "-c", "\n".join(BLOCKS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " nan" not in done.stdout


def test_files_and_targets_that_are_named_exist():
    named = re.findall(r"`((?:torchgeom_optim|models|diagnostics|tests|examples|benchmarks|\.ci)/[\w./]*)`", README)
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", "\n".join(re.findall(r"`(make [^`]*)`", README))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_nothing_is_left_to_fill_in():
    for path in ("README.md", "CHANGELOG.md", "benchmarks/README.md"):
        assert "{{" not in re.sub(r"author = \{\{.*?\}\}", "", (ROOT / path).read_text(encoding="utf-8")), path


def test_version_is_the_one_of_the_changelog():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{version[1]}]" in changelog
    assert "\n## [Unreleased]\n" in changelog
    assert f"Version {version[1]}" in README
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
