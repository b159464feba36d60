"""A history as one picture: the loss above, the metrics below it, layers as heat maps, spectra as they move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torchgeom_optim._optional import optional_import
from torchgeom_optim.diagnostics.checks import SHATTERED_INPUT_RANK
from torchgeom_optim.diagnostics.history import History
from torchgeom_optim.diagnostics.reading import verdicts

__all__ = ["dashboard"]

_MOST_LAYERS_NAMED = 24
_WARNING = "#b3261e"
_REFERENCE = {"color": "0.45", "linestyle": "--", "linewidth": 1.0}


def dashboard(history: History, figure: Any = None) -> Any:
    """Draw all that a history holds.

    Loss and learning rate stand above; below, one panel for each group of metrics that was recorded, heat maps of six
    metrics by layer at most (input above, output below), and spectra, one line for each record, the data's beside the
    network's. Dashed lines are what a number is to be held against: the batch size, 2 / learning rate, the thesis's
    boundary for the rank of input gradients. Steps where the loss was no number are marked in red, and the title names
    what stands out (:func:`~torchgeom_optim.diagnostics.reading.verdicts`).

    Args:
        history: at least one record.
        figure: a ``matplotlib.figure.Figure`` to draw into, such as ``pyplot.figure()`` if a window is to show it;
            by default a new one that pyplot does not know of.

    Returns:
        The figure; ``dashboard(history).savefig("run.png")``.

    Raises:
        ValueError: there is no record.
        ImportError: matplotlib is not installed.
    """
    if not len(history):
        raise ValueError("history is empty: a record is needed; train up to a step that the schedule names.")
    panels, maps, spectra = _panels(history), _heat_maps(history), _spectra(history)
    rows: list[tuple[float, Sequence[_Loss | _Panel | _HeatMap | _Spectrum | None]]] = [(1.2, [_Loss()])]
    rows += [(1.0, row) for row in _in_rows(panels, 4)]
    rows += [(min(2.2, 0.7 + 0.09 * max(len(content.layers) for content in maps)), row) for row in _in_rows(maps, 3)]
    rows += [(1.3, row) for row in _in_rows(spectra, 2)]
    heights = [height for height, _ in rows]
    if figure is None:
        figure = optional_import("matplotlib.figure", "dashboard").Figure(figsize=(14, 0.6 + 2.3 * sum(heights)))
    figure.set_layout_engine("constrained")
    # A strip each, so that the long names of layers move no other row's margins.
    strips = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for strip, (_, contents) in zip(strips, rows, strict=True):
        for axes, content in zip(strip.subplots(1, len(contents), squeeze=False)[0], contents, strict=True):
            if content is None:
                axes.set_visible(False)
            else:
                content.draw(strip, axes, history)
    found = [f"{verdict.kind} in {verdict.layer}" if verdict.layer else verdict.kind for verdict in verdicts(history)]
    title = "; ".join(dict.fromkeys(found)) or "nothing stands out"
    figure.suptitle(title, color=_WARNING if found else "0.3", fontsize=13, fontweight="bold" if found else "normal")
    return figure


class _Loss:
    """Loss, learning rate, and where the loss was no number."""

    def draw(self, figure: Any, axes: Any, history: History) -> None:
        steps, losses = history.column("step"), history.column("loss")
        axes.plot(steps, _shown(losses), color="C0", marker="." if len(steps) < 60 else None)
        axes.set_ylabel("loss", color="C0")
        finite = [loss for loss in losses if math.isfinite(loss)]
        if finite and 0.0 < 10.0 * min(finite) < max(finite):
            _log_axis(axes, finite)
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                axes.axvline(step, color=_WARNING, linewidth=1.2, alpha=0.7)
        rates = history.column("learning_rate")
        if any(map(math.isfinite, rates)):
            right = axes.twinx()
            right.plot(steps, rates, color="0.6", linewidth=1.0, drawstyle="steps-post")
            right.set_ylabel("learning rate", color="0.45")
            right.set_ylim(bottom=0.0)
            right.tick_params(labelsize=8)
            right.spines["top"].set_visible(False)
            axes.set_zorder(right.get_zorder() + 1)
            axes.patch.set_visible(False)
        _style(axes, steps)


@dataclass(frozen=True)
class _Panel:
    """Some metrics that share an axis: label -> column."""

    title: str
    lines: dict[str, str]
    log: bool = False
    limits: tuple[float, float] | None = None

    def draw(self, figure: Any, axes: Any, history: History) -> None:
        steps = history.column("step")
        drawn: list[float] = []
        for label, column in self.lines.items():
            values = _shown(history.column(column), positive=self.log)
            axes.plot(steps, values, label=label, marker="." if len(steps) < 40 else None, linewidth=1.4)
            drawn += values
        reference, values = self.reference(history)
        if reference:
            axes.plot(steps, values, label=reference, **_REFERENCE)
            drawn += values
        if self.log:
            _log_axis(axes, drawn)
        if self.limits:
            axes.set_ylim(*self.limits)
        axes.set_title(self.title, fontsize=10, loc="left")
        if len(axes.lines) > 1:
            axes.legend(fontsize=7.5, frameon=False, loc="best")
        _style(axes, steps)

    def reference(self, history: History) -> tuple[str, list[float]]:
        """Label and values of the dashed line that the numbers are to be held against; an empty label for none."""
        columns, rates = self.lines.values(), history.column("learning_rate")
        if "gradient_noise_scale" in columns:
            return "batch size", history.column("batch_size")
        if "relative_input_gradient_rank" in columns:
            return f"shattered inputs: {SHATTERED_INPUT_RANK} at first", [SHATTERED_INPUT_RANK] * len(history)
        if "top_curvature" in columns and any(rate > 0.0 for rate in rates):
            return "2 / learning rate", [2.0 / rate if rate > 0.0 else math.nan for rate in rates]
        return "", []


@dataclass(frozen=True)
class _HeatMap:
    """A metric by layer: a row for each layer, a column for each record."""

    title: str
    layers: dict[str, list[float]]
    log: bool

    def draw(self, figure: Any, axes: Any, history: History) -> None:
        colors = optional_import("matplotlib.colors", "dashboard")
        rows = [_shown(row, positive=self.log) for row in self.layers.values()]
        seen = [value for row in rows for value in row if math.isfinite(value)] or [1.0]
        norm = (colors.LogNorm if self.log else colors.Normalize)(min(seen), max(seen))
        steps, names = history.column("step"), list(self.layers)
        cells = axes.pcolormesh(_edges(steps), range(len(names) + 1), rows, norm=norm, cmap="viridis")
        axes.set_facecolor("0.85")  # where there is no number
        axes.invert_yaxis()
        shown = range(0, len(names), math.ceil(len(names) / _MOST_LAYERS_NAMED))
        axes.set_yticks([k + 0.5 for k in shown], [_short(names[k]) for k in shown], fontsize=7)
        bar = figure.colorbar(cells, ax=axes, pad=0.02)
        if self.log:
            _log_axis(bar.ax, seen)
        bar.ax.tick_params(which="both", labelsize=7)
        axes.set_title(self.title, fontsize=10, loc="left")
        _style(axes, steps, grid=False)


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues over their number, a line for each record that has them."""

    name: str

    def draw(self, figure: Any, axes: Any, history: History) -> None:
        cm, colors = optional_import("matplotlib.cm", "dashboard"), optional_import("matplotlib.colors", "dashboard")
        records = [record for record in history if self.name in record.spectrum]
        span = colors.Normalize(records[0].step, max(records[-1].step, records[0].step + 1))
        drawn: list[float] = []
        for record in records:
            values = _shown(record.spectrum[self.name], positive=True)
            axes.plot(range(1, len(values) + 1), values, color=cm.viridis(span(record.step)), linewidth=1.3)
            drawn += values
        _log_axis(axes, drawn)
        largest = max((value for value in drawn if math.isfinite(value)), default=1.0)
        if min((value for value in drawn if math.isfinite(value)), default=1.0) < largest * 10.0**-_SPECTRUM_DECADES:
            axes.set_ylim(largest * 10.0**-_SPECTRUM_DECADES, 3.0 * largest)
        axes.set_xlabel("number of the eigenvalue", fontsize=8)
        axes.set_title(f"Spectrum: {self.name.replace('_', ' ')}", fontsize=10, loc="left")
        if len(records) > 1:
            bar = figure.colorbar(cm.ScalarMappable(span, "viridis"), ax=axes, pad=0.02)
            bar.set_label("step", fontsize=8)
            bar.ax.tick_params(labelsize=7)
        _style(axes, None)


_PANELS = (
    _Panel(
        "Do the samples agree?",
        {"coherence": "gradient_coherence", "confusion": "gradient_confusion"},
        limits=(-0.03, 1.03),
    ),
    _Panel("Gradient diversity", {"diversity": "gradient_diversity"}, log=True),
    _Panel(
        "Relative gradient rank",
        {"of weights": "relative_gradient_rank", "of inputs": "relative_input_gradient_rank"},
        log=True,
    ),
    _Panel("Gradient noise scale", {"noise scale": "gradient_noise_scale"}, log=True),
    _Panel("Top curvature", {"curvature": "top_curvature"}, log=True),
    _Panel(
        "Condition number of the gradient",
        {
            "weights, sampled": "weight_condition_number",
            "weights, two steps": "weight_condition_number_two_step",
            "weights, exact": "weight_condition_number_exact",
            "inputs": "input_condition_number",
        },
        log=True,
    ),
    _Panel(
        "Does the gradient outlast a step?",
        {
            "least cosine": "weight_gradient_cosine",
            "coherence": "weight_gradient_coherence",
            "diversity": "weight_gradient_diversity",
        },
    ),
    _Panel("Norms", {"weights": "weight_norm", "gradient": "gradient_norm", "tr Fisher": "fisher_trace"}, log=True),
    _Panel("Spectrum: decades", {"Fisher": "fisher_decades", "data": "data_decades"}),
    _Panel("Spectrum: slope of its logarithm", {"Fisher": "fisher_slope", "data": "data_slope"}),
    _Panel(
        "Spectrum: effective dimension",
        {"Fisher": "fisher_effective_dimension", "data": "data_effective_dimension"},
        log=True,
    ),
    _Panel(
        "Spectrum: stiff fraction",
        {"Fisher": "fisher_stiff_fraction", "data": "data_stiff_fraction"},
        limits=(-0.03, 1.03),
    ),
)
# With more metrics by layer than a look can take in these come first; a spectrum's other summaries stay in records.
_FIRST_MAPS = (
    "gradient_coherence",
    "relative_gradient_rank",
    "gradient_confusion",
    "weight_condition_number",
    "weight_gradient_cosine",
)
_MOST_MAPS = 6
_NOT_DRAWN = ("fisher_spectrum_trace", "fisher_participation_ratio", "data_participation_ratio")
_SPECTRUM_DECADES = 12  # below is round-off


def _panels(history: History) -> list[_Panel]:
    """The panels that have numbers, reduced to these; a metric that none of them knows has its own."""
    there = [name for name in history.metrics() if any(map(math.isfinite, history.column(name)))]
    known = [
        replace(panel, lines={label: column for label, column in panel.lines.items() if column in there})
        for panel in _PANELS
    ]
    columns = {column for panel in known for column in panel.lines.values()}
    others = [_Panel(name.replace("_", " "), {name: name}) for name in there if name not in {*columns, *_NOT_DRAWN}]
    return [panel for panel in known if panel.lines] + others


def _heat_maps(history: History) -> list[_HeatMap]:
    """One for each metric that is recorded by layer, but that gradients are held against weights."""
    columns = {name: history.layer_columns(name) for name in dict.fromkeys(n for r in history for n in r.layers)}
    maps = []
    if "gradient_norm" in columns and "weight_norm" in columns:
        gradients, weights = columns.pop("gradient_norm"), columns.pop("weight_norm")
        relative = {
            layer: [g / w if w > 0.0 else math.nan for g, w in zip(row, weights[layer], strict=True)]
            for layer, row in gradients.items()
            if layer in weights
        }
        maps.append(_HeatMap("|gradient| / |weights|, by layer", relative, log=True))
    first = {name: columns[name] for name in _FIRST_MAPS if name in columns}
    columns = {**first, **columns}
    linear = {"gradient_coherence", "gradient_confusion", "weight_gradient_cosine", "weight_gradient_coherence"}
    maps += [
        _HeatMap(f"{name.replace('_', ' ')}, by layer", layers, name not in linear) for name, layers in columns.items()
    ]
    return [content for content in maps if content.layers][:_MOST_MAPS]


def _spectra(history: History) -> list[_Spectrum]:
    return [_Spectrum(name) for name in dict.fromkeys(name for record in history for name in record.spectrum)]


def _in_rows(contents: Sequence[Any], columns: int) -> list[list[Any]]:
    """Rows of at most so many; the last one is filled up with None, so that all are of one width."""
    columns = min(columns, len(contents))
    rows = [list(contents[k : k + columns]) for k in range(0, len(contents), columns)] if contents else []
    return [row + [None] * (columns - len(row)) for row in rows]


def _style(axes: Any, steps: Sequence[float] | None, grid: bool = True) -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color="0.92", linewidth=0.7)
    if steps and len(steps) > 4 and steps[-1] - steps[-2] > 4 * max(1, steps[1] - steps[0]):
        axes.set_xscale("symlog", linthresh=1.0)  # for steps that are spaced evenly on such an axis
        axes.set_xlim(left=steps[0])


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis whose ticks are plain numbers wherever few powers of ten lie inside."""
    ticker = optional_import("matplotlib.ticker", "dashboard")
    seen = [value for value in values if math.isfinite(value) and value > 0.0]
    if not seen:
        return
    axes.set_yscale("log")
    if 1e-3 < min(seen) and max(seen) < 1e4:
        axes.yaxis.set_major_formatter("{x:g}")
    if max(seen) < 20.0 * min(seen):
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2.0, 3.0, 5.0)))
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    else:
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _shown(values: Sequence[float], *, positive: bool = False) -> list[float]:
    """Nan in place of what an axis cannot show."""
    return [value if math.isfinite(value) and (value > 0.0 or not positive) else math.nan for value in values]


def _edges(steps: Sequence[float]) -> list[float]:
    """Borders of cells around the steps, rising, as a mesh needs them, even if a step is there twice."""
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    if not middles:
        return [steps[0] - 0.5, steps[0] + 0.5]
    edges = [max(0.0, 2 * steps[0] - middles[0]), *middles, 2 * steps[-1] - middles[-1]]
    for k in range(1, len(edges)):
        edges[k] = max(edges[k], edges[k - 1] + 1e-9)
    return edges


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"…{name[-21:]}"
