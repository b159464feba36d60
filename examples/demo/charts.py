"""Charts as SVG text, coloured by classes alone, so that the page that holds them decides on light and dark.

Nothing here knows what is drawn. Coordinates are those of a box of 400 by 260, which a page may scale: at 375 pixels
the text is still ten pixels high, and side by side on a wide screen it is that of the text around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "HeatMap", "LineChart", "Series", "picture", "svg"]

WIDTH, HEIGHT = 400.0, 260.0
_LEFT, _RIGHT, _BOTTOM = 56.0, 18.0, 44.0
_LINE = 16.0  # between rows of the legend
_CHARACTER = 6.3  # mean width of a character of the text, a little more than most fonts have


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        label: in the legend; an empty one is left out there.
        x: abscissas.
        y: ordinates; points that are not finite, or not positive on a logarithmic axis, are left out.
        color: 0 to 3, of the page's colours.
        kind: "line", "thin" (one of many), "dots" (a line with its points) or "dashed".
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    kind: str = "line"


@dataclass(frozen=True)
class Axis:
    """What is along an axis.

    Attributes:
        label: with its unit.
        log: logarithmic.
        percent: shares, written as percentages.
        limits: ends; those of the data by default.
    """

    label: str
    log: bool = False
    percent: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class LineChart:
    """Lines over two axes; ``title`` is what a screen reader says."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]


@dataclass(frozen=True)
class HeatMap:
    """A field of numbers, the darker the larger; ``values[row][column]``, taken logarithmically."""

    title: str
    x_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]


def svg(chart: LineChart | HeatMap) -> str:
    """A chart as an ``svg`` element, for a page that colours the classes ``c0`` to ``c3``, ``grid`` and ``axis``.

    Args:
        chart: what to draw.

    Returns:
        The element.
    """
    height, body = _drawn(chart)
    title = escape(chart.title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{title}">{body}</svg>'


def picture(charts: Sequence[tuple[str, LineChart | HeatMap]], columns: int, style: str) -> str:
    """Several charts with headings as an SVG file of its own.

    Args:
        charts: heading and chart.
        columns: charts beside each other.
        style: the style sheet.

    Returns:
        The file's text.
    """
    drawn = [(heading, *_drawn(chart)) for heading, chart in charts]
    row_height = max(height for _, height, _ in drawn) + 34
    rows = -(-len(drawn) // columns)
    parts = []
    for k, (heading, _, body) in enumerate(drawn):
        x, y = (k % columns) * WIDTH, (k // columns) * row_height
        text = f'<text class="heading" x="12" y="22">{escape(heading)}</text>'
        parts.append(f'<g transform="translate({x:g} {y:g})">{text}<g transform="translate(0 34)">{body}</g></g>')
    size = f'viewBox="0 0 {columns * WIDTH:g} {rows * row_height:g}" width="{columns * WIDTH:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def _drawn(chart: LineChart | HeatMap) -> tuple[float, str]:
    return _lines(chart) if isinstance(chart, LineChart) else _field(chart)


def _lines(chart: LineChart) -> tuple[float, str]:
    legend, top = _legend([s for s in chart.series if s.label])
    points = [_points(s, chart) for s in chart.series]
    every = [p for line in points for p in line]
    low_x, high_x = _ends([x for x, _ in every], chart.x)
    low_y, high_y = _ends([y for _, y in every], chart.y)
    bottom = top + HEIGHT - _BOTTOM
    at_x = _scale(chart.x.log, low_x, high_x, _LEFT, WIDTH - _RIGHT)
    at_y = _scale(chart.y.log, low_y, high_y, bottom, top + 8)
    parts = [legend]
    for value in _ticks(chart.y, low_y, high_y):
        y = at_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _number(value, chart.y), "end"))
    for value in _ticks(chart.x, low_x, high_x):
        parts.append(_text(at_x(value), bottom + 16, _number(value, chart.x), "middle"))
    parts.append(f'<line class="axis" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 36, chart.x.label, "middle", "label"))
    middle = (top + bottom) / 2
    turned = f'transform="rotate(-90 11 {middle:.1f})"'
    parts.append(
        f'<text class="label" x="11" y="{middle:.1f}" text-anchor="middle" {turned}>{escape(chart.y.label)}</text>'
    )
    for series, line in zip(chart.series, points, strict=True):
        places = [(at_x(x), at_y(y)) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{series.kind} c{series.color}" points="{path}"/>')
        if series.kind == "dots":
            parts += [f'<circle class="dot c{series.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return top + HEIGHT, "".join(parts)


def _field(chart: HeatMap) -> tuple[float, str]:
    logs = [[math.log10(v) if math.isfinite(v) and v > 0 else math.nan for v in row] for row in chart.values]
    known = [v for row in logs for v in row if not math.isnan(v)] or [0.0]
    low, high = min(known), max(known)
    left = 8 + _CHARACTER * max(len(name) for name in chart.rows)
    width, height = (WIDTH - _RIGHT - left) / len(chart.columns), 18.0
    top, bottom = 24.0, 24.0 + height * len(chart.rows)
    parts = [_text(left, 14, f"{10**low:.1e} (light) to {10**high:.1e} (full colour)", "start")]
    for r, (name, row) in enumerate(zip(chart.rows, logs, strict=True)):
        y = top + r * height
        parts.append(_text(left - 6, y + 13, name, "end"))
        for c, value in enumerate(row):
            if not math.isnan(value):
                shade = 0.08 + 0.92 * (value - low) / ((high - low) or 1.0)
                place = f'x="{left + c * width:.1f}" y="{y:g}" width="{width - 0.8:.1f}" height="{height - 1:g}"'
                parts.append(f'<rect class="cell" {place} fill-opacity="{shade:.2f}"/>')
    for c in range(0, len(chart.columns), max(1, -(-len(chart.columns) // 6))):
        parts.append(_text(left + (c + 0.5) * width, bottom + 15, chart.columns[c], "middle"))
    parts.append(_text((left + WIDTH) / 2, bottom + 34, chart.x_label, "middle", "label"))
    return bottom + 44, "".join(parts)


def _legend(series: Sequence[Series]) -> tuple[str, float]:
    """The legend above the chart, in as many rows as it takes, and where the chart begins."""
    parts, x, y = [], _LEFT, 12.0
    for line in series:
        width = 26 + _CHARACTER * len(line.label) + 12
        if x > _LEFT and x + width > WIDTH:
            x, y = _LEFT, y + _LINE
        parts.append(
            f'<line class="{line.kind} c{line.color}" x1="{x:g}" x2="{x + 20:g}" y1="{y - 4:g}" y2="{y - 4:g}"/>'
        )
        parts.append(_text(x + 26, y, line.label, "start"))
        x += width
    return "".join(parts), y + 6 if series else 0.0


def _points(series: Series, chart: LineChart) -> list[tuple[float, float]]:
    def shown(value: float, axis: Axis) -> bool:
        return math.isfinite(value) and (value > 0 or not axis.log)

    pairs = zip(series.x, series.y, strict=True)
    return [(x, y) for x, y in pairs if shown(x, chart.x) and shown(y, chart.y)]


def _ends(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    low, high = axis.limits or (min(values, default=1.0), max(values, default=2.0))
    if low == high:
        return (low / 2, high * 2) if axis.log else (low - 0.5, high + 0.5)
    return low, high


def _scale(log: bool, low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    def linear(value: float) -> float:
        return start + (end - start) * (value - low) / (high - low)

    def logarithmic(value: float) -> float:
        return start + (end - start) * math.log(value / low) / math.log(high / low)

    return logarithmic if log else linear


def _ticks(axis: Axis, low: float, high: float) -> list[float]:
    """Round numbers between the ends: powers of ten, or steps of 1, 2 or 5 times one."""
    if axis.log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        powers = [10.0**k for k in range(first, last + 1, max(1, (last - first) // 5))]
        if len(powers) > 2:
            return powers
        between = [factor * 10.0**k for k in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [value for value in between if low <= value <= high] or [low, high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= (high - low) / 5)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float, axis: Axis) -> str:
    if axis.percent:
        return f"{100 * value:.3g}%"
    exponent = math.log10(value) if value > 0 else 0.0
    if axis.log and abs(exponent) > 2 and math.isclose(exponent, round(exponent), abs_tol=1e-9):
        return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
