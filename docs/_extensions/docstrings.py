"""Docstrings as they are written here, made into what reStructuredText takes.

An indented formula between paragraphs becomes a literal block, and |x| stays what it is: bars are no substitutions.
"""

from __future__ import annotations

import re
from typing import Any

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note|Warning):$")
_SPECIAL = re.compile(r"(?<!\\)\||(?<=\w)_(?=\W|$)|(?<=\[)\*")
_LITERAL = re.compile(r"(``.+?``|:\w+:`.+?`|`.+?`)")


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite the lines of a docstring in place; Sphinx calls this before napoleon does."""
    made: list[str] = []
    in_section = in_formula = False
    for number, line in enumerate(lines):
        in_section = bool(_SECTION.match(line)) or (in_section and (not line or line.startswith(" ")))
        starts = line.startswith("    ") and not in_section and not in_formula and (not number or not lines[number - 1])
        if starts and not _follows_list_or_literal(made):
            made += ["::", ""]
            in_formula = True
        elif line and not line.startswith(" "):
            in_formula = False
        prompt = line.lstrip().startswith((">>>", "..."))
        made.append(line if in_formula or prompt else _escaped(line))
    lines[:] = made


def _follows_list_or_literal(made: list[str]) -> bool:
    last = next((line for line in reversed(made) if line), "")
    return last.endswith("::") or last.lstrip().startswith(("- ", "* ", "1. ", "2. ", "3. ")) or last.startswith(" ")


def _escaped(line: str) -> str:
    """Bars, underscores that end a word and asterisks that open a list, escaped outside of literals."""
    parts = _LITERAL.split(line)
    return "".join(part if number % 2 else _SPECIAL.sub(r"\\\g<0>", part) for number, part in enumerate(parts))


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True}
