"""Formulas drawn as SVG paths by matplotlib: the pages need no network, no TeX and no fonts, and follow the theme.

A displayed formula is cut at ``\\qquad``, so that its parts go below each other where the screen is narrow.
"""

from __future__ import annotations

import re
from functools import cache
from html import escape
from typing import Any

import matplotlib
from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath, text_to_path

SIZE = 16.0  # px of the text around it
LETTER = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
# What matplotlib does not know, or sets too close.
INSTEAD = {r"\tfrac": r"\frac", r"\le": r"\leq", r"\ne": r"\neq", r"\sum_i": r"\sum_i\,", r"\top": r"\mathsf{T}"}


@cache
def drawn(tex: str) -> str:
    """A formula as SVG in units of the text's own size.

    Args:
        tex: what would stand between dollars.

    Returns:
        An element; its baseline is that of the line.

    Raises:
        ValueError: matplotlib cannot read it.
    """
    text = " ".join(tex.split())
    for command, instead in INSTEAD.items():
        text = re.sub(re.escape(command) + r"(?![a-zA-Z])", lambda _, instead=instead: instead, text)
    with matplotlib.rc_context({"mathtext.fontset": "stix"}):
        font = FontProperties(size=SIZE)
        width, height, depth = text_to_path.get_text_width_height_descent(f"${text}$", font, ismath=True)
        path = TextPath((0, 0), f"${text}$", prop=font)
    # Ink may leave the box that the letters are set in.
    left, right = (
        (min(0.0, *path.vertices[:, 0]), max(width, *path.vertices[:, 0])) if len(path.vertices) else (0.0, width)
    )
    top, bottom = height - depth + 1, -depth - 1
    commands = (
        LETTER[code]
        + " ".join(f"{-value if k % 2 else value:.2f}" for k, value in enumerate(points) if code != Path.CLOSEPOLY)
        for points, code in path.iter_segments(simplify=False)
    )
    box = f"{left:.2f} {-top:.2f} {right - left:.2f} {top - bottom:.2f}"
    size = f"width:{(right - left) / SIZE:.3f}em;height:{(top - bottom) / SIZE:.3f}em"
    return (
        f'<svg class="formula" role="img" aria-label="{escape(text)}" viewBox="{box}" '
        f'style="{size};vertical-align:{bottom / SIZE:.3f}em"><path d="{"".join(commands)}"/></svg>'
    )


def inline(translator: Any, node: nodes.math) -> None:
    """A formula in a line."""
    translator.body.append(drawn(node.astext()))
    raise nodes.SkipNode


def displayed(translator: Any, node: nodes.math_block) -> None:
    """A formula of its own."""
    parts = re.split(r"\\qquad(?![a-zA-Z])", node.astext().strip().replace(r"\frac", r"\dfrac"))
    translator.body.append(f'<div class="formulas">{" ".join(drawn(part) for part in parts if part.strip())}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer("drawn", (inline, None), (displayed, None))
    return {"parallel_read_safe": True}
