"""The page that the demonstration ends in: figures, captions, tables, and nothing from the network.

What stands on the page is a list of sections (data); :func:`html` sets it into ``page.html``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from examples.demo.charts import Axis, HeatMap, LineChart, Series, picture, svg
from examples.demo.measuring import Findings
from examples.demo.training import Run, Setting, table, title_of
from torchgeom_optim.diagnostics import History, summary

__all__ = ["Report", "html", "overview", "sections", "tiles"]

_HERE = Path(__file__).resolve().parent
_CHARTS_STYLE = (_HERE / "charts.css").read_text(encoding="utf-8")
_PAGE_STYLE = (_HERE / "page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Report:
    """All that the page tells.

    Attributes:
        title: what was trained on what.
        settings: the optimizers; the last one's first network is the one that was taken apart.
        runs: of each optimizer, one a seed.
        findings: in that network.
        num_test: images that accuracies are taken on.
        environment: versions and processor, in a line.
        seconds: that the demonstration took.
    """

    title: str
    settings: Sequence[Setting]
    runs: Sequence[Sequence[Run]]
    findings: Findings
    num_test: int
    environment: str
    seconds: float


@dataclass(frozen=True)
class Section:
    """A heading, words, figures with captions, a table, and words as the library printed them."""

    heading: str
    text: str
    figures: Sequence[tuple[LineChart | HeatMap, str]] = ()
    rows: Sequence[Sequence[str]] = ()
    printed: str = ""
    code: str = ""


def html(report: Report) -> str:
    """The page.

    Args:
        report: what it tells.

    Returns:
        One HTML document that needs nothing else.
    """
    template = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"torchgeom-optim: {report.title}"),
        style=_PAGE_STYLE + _CHARTS_STYLE,
        heading="One network, looked at five ways",
        lead=escape(
            f"{report.title[:1].upper()}{report.title[1:]}. Trained with tuned SGD and with WhiteningSGD as it comes, "
            "watched while it trained, and then taken apart: every number on this page was measured a moment ago, "
            "on this machine."
        ),
        tiles="\n".join(f"<li><b>{escape(number)}</b>{escape(what)}</li>" for number, what in tiles(report)),
        sections="\n".join(map(_section, sections(report))),
        footer=escape(f"{report.environment}; {report.seconds:.0f} seconds in all. Written by examples/quickstart.py."),
    )


def overview(report: Report) -> str:
    """The figures of the README: an SVG file with the loss, the spectrum, the reduction and the path.

    Args:
        report: what was measured.

    Returns:
        The file's text, coloured for light and for dark.
    """
    charts = [
        ("train: SGD against WhiteningSGD", _loss(report, "epochs")),
        ("measure: eigenvalues of the Fisher matrix", _spectrum(report.findings)),
        ("reduce: few directions of weight space", _reduction(report.findings)),
        ("sparsify: walk where the function stays", _path(report.findings)),
    ]
    colours = _PAGE_STYLE[: _PAGE_STYLE.index("* {")]
    return picture(charts, 2, colours + "svg { background: var(--paper); }" + _CHARTS_STYLE)


def tiles(report: Report) -> list[tuple[str, str]]:
    """The numbers to remember, each with what it is.

    Args:
        report: what was measured.

    Returns:
        Number and words.
    """
    found = report.findings
    losses = [statistics.median(run.curve.loss[-1] for run in runs) for runs in report.runs]
    shown = [
        (
            f"{losses[0] / max(losses[-1], 1e-12):.3g} x",
            "tuned SGD's final training loss over that of WhiteningSGD as it comes",
        ),
        (
            f"{found.sloppiness['that hold 90% of the trace']:.0f}",
            f"of {found.num_weights:,} directions hold 90% of the Fisher matrix's trace",
        ),
        (
            f"{found.cut[-1]:.0%}",
            f"of the weights cut without labels; accuracy {found.walked[0]:.1%} before, {found.walked[-1]:.1%} after",
        ),
    ]
    if found.gradnet is not None:
        shown.append(
            (f"{found.gradnet:.1%}", f"accuracy of a GradNet around the network, whose own is {found.accuracy:.1%}")
        )
    return shown


def sections(report: Report) -> list[Section]:
    """What stands on the page, in order.

    Args:
        report: what was measured.

    Returns:
        The sections.
    """
    found, ours = report.findings, title_of(report.settings[-1])
    one_image = 1.0 / report.num_test
    return [
        Section(
            "Training",
            "Both optimizers start from the same weights and see the same batches; both step sizes decay linearly to "
            f"zero. SGD has the best learning rate and momentum of a grid; {ours} has no learning rate to choose.",
            figures=[
                (
                    _loss(report, "epochs"),
                    "Training loss after each epoch: one thin line for each seed, the thick one their median. Lower "
                    "is better; the scale is logarithmic.",
                ),
                (
                    _loss(report, "seconds"),
                    f"The same over the seconds of training: a step of {ours} costs more, and the curve has to "
                    "pay for it.",
                ),
            ],
            rows=table(report.settings, [[run.curve for run in runs] for runs in report.runs]),
            code=f"optimizer = {ours}(model)",
        ),
        Section(
            "Diagnostics",
            "While the networks trained, a Diagnostics object read the inner products of all samples' gradients from "
            "the backward pass that happens anyway. The training is bit for bit the same with it and without.",
            figures=[
                (
                    _agreement(report),
                    "Coherence: what one step gains for all samples, as a share of what each would gain by a step of "
                    "its own. At 1 all gradients agree; at the dashed line, one over the batch size, each pulls its "
                    "own way.",
                ),
                (
                    _layers(report.runs[-1][0].history, ours),
                    f"Norm of each layer's gradient through the training with {ours}, input above, output below. A "
                    "layer much paler than its neighbours would be one that does not learn.",
                ),
            ],
            printed=summary(report.runs[-1][0].history),
            code="diagnostics = Diagnostics(model, criterion, every=10).attach(optimizer)",
        ),
        Section(
            "Fisher spectrum",
            "Which directions of weight space change the predictions at all? The eigenvalues of the Fisher matrix "
            "say, and all that are not zero come from a matrix the size of the data.",
            figures=[
                (
                    _spectrum(found),
                    "Eigenvalues by rank, both scaled to a largest one of 1. Those of the network fall over many "
                    "decades (it is sloppy), as those of the images do, which come to an end with the pixels.",
                ),
            ],
            rows=[("of the Fisher matrix", ""), *((name, f"{value:.4g}") for name, value in found.sloppiness.items())],
            code="spectrum = fisher_spectrum(model, inputs)",
        ),
        Section(
            "Reduction",
            "The network in its most important directions, in one shot: no labels, no training. Beside it the same "
            "share of single weights, the largest ones.",
            figures=[
                (
                    _reduction(found),
                    "Test accuracy against the share of directions, or of weights, that is kept. What a network knows "
                    "is spread over weights and concentrated in directions.",
                ),
            ],
            rows=[
                ("kept", "directions", "largest weights"),
                *(
                    (f"{k:.0%}", f"{a:.1%}", f"{b:.1%}")
                    for k, a, b in zip(found.shares, found.reduced, found.truncated, strict=True)
                ),
            ],
            code="reduced = reduce_model(model, inputs, num_directions=0.1)",
        ),
        Section(
            "Geodesic sparsification",
            "A walk through weight space to a sparse network, along a path on which the outputs hardly change: "
            "whenever weights go, the others make up for them. Inputs alone are needed.",
            figures=[
                (
                    _path(found),
                    "Test accuracy against the share of weights that are exactly zero. Each point of the walk is a "
                    "usable network; the dashed line cuts the smallest weights and lets the others stand.",
                ),
            ],
            rows=[
                ("cut", "along the path", "by magnitude"),
                *(
                    (f"{k:.0%}", f"{a:.1%}", f"{b:.1%}")
                    for k, a, b in zip(found.cut, found.walked, found.pruned, strict=True)
                ),
            ],
            code="sparsifier = GeodesicSparsifier(model, target=Sparsity(0.95))",
        ),
        Section(
            "GradNet",
            "A classifier on the tangent space of the network, which itself may not change. A network that has fitted "
            "its training data leaves it little to gain. "
            f"One test image more or less is {one_image:.2%}: a difference of a few images says little."
            if found.gradnet is not None
            else "This network does not allow one: it has layers that are not piecewise linear.",
            rows=[]
            if found.gradnet is None
            else [
                ("", "test accuracy"),
                ("the network", f"{found.accuracy:.1%}"),
                ("GradNet around it", f"{found.gradnet:.1%}"),
            ],
            code="gradnet = GradNet(model, num_classes=10).fit(loader, epochs=3)",
        ),
    ]


def _section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.heading)}</h2><p>{escape(section.text)}</p>"]
    if section.code:
        parts.append(f"<pre><code>{escape(section.code)}</code></pre>")
    shown = [
        f"<figure>{svg(chart)}<figcaption>{escape(words)}</figcaption></figure>" for chart, words in section.figures
    ]
    if section.rows:
        heading, *rows = section.rows
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heading)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        place = "table" if len(shown) < 2 else "table row"  # beside one figure, below two
        shown.append(f'<div class="{place}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
    parts.append(f'<div class="figures">{"".join(shown)}</div>')
    if section.printed:
        parts.append(
            f"<p>What the library makes of it, "
            f"<code>diagnostics.summary()</code>:</p><pre>{escape(section.printed)}</pre>"
        )
    return "".join(parts) + "</section>"


def _loss(report: Report, over: str) -> LineChart:
    series = []
    for color, (setting, runs) in enumerate(zip(report.settings, report.runs, strict=True)):
        length = min(len(run.curve.loss) for run in runs)
        along = [list(map(float, range(length))) if over == "epochs" else run.curve.seconds[:length] for run in runs]
        series += [Series("", x, run.curve.loss[:length], color, "thin") for x, run in zip(along, runs, strict=True)]
        middle = [statistics.median(column) for column in zip(*(run.curve.loss[:length] for run in runs), strict=True)]
        series.append(
            Series(title_of(setting), [statistics.median(x) for x in zip(*along, strict=True)], middle, color)
        )
    return LineChart(f"Training loss over {over}", Axis(over), Axis("training loss", log=True), series)


def _agreement(report: Report) -> LineChart:
    series = []
    for color, (setting, runs) in enumerate(zip(report.settings, report.runs, strict=True)):
        history = runs[0].history
        values = history.column("gradient_coherence")
        series.append(Series(title_of(setting), history.column("step"), values, color))
    history = report.runs[0][0].history
    series.append(Series("1 / batch", history.column("step"), [1 / r.batch_size for r in history], 3, "dashed"))
    return LineChart(
        "Coherence of the gradients over steps", Axis("step"), Axis("gradient coherence", log=True), series
    )


def _layers(history: History, optimizer: str) -> HeatMap:
    layers = list(history[0].layers["gradient_norm"])
    values = [[record.layers["gradient_norm"].get(layer, math.nan) for record in history] for layer in layers]
    steps = [str(record.step) for record in history]
    return HeatMap(f"Gradient norm by layer, {optimizer}", "step", steps, layers, values)


def _spectrum(found: Findings) -> LineChart:
    def scaled(label: str, values: list[float], color: int) -> Series:
        return Series(label, [float(k) for k in range(1, len(values) + 1)], [v / values[0] for v in values], color)

    return LineChart(
        "Eigenvalues of the Fisher matrix and of the data",
        Axis("rank", log=True),
        Axis("eigenvalue / largest", log=True),
        [scaled("Fisher matrix", found.fisher, 1), scaled("images", found.data, 2)],
    )


def _reduction(found: Findings) -> LineChart:
    return LineChart(
        "Accuracy of the network in few directions",
        Axis("share kept", log=True, percent=True),
        Axis("test accuracy", percent=True, limits=(0.0, 1.0)),
        [
            Series("most important directions", found.shares, found.reduced, 1, "dots"),
            Series("largest weights", found.shares, found.truncated, 0, "dashed"),
        ],
    )


def _path(found: Findings) -> LineChart:
    return LineChart(
        "Accuracy along the way to a sparse network",
        Axis("share of weights cut", percent=True, limits=(0.0, 1.0)),
        Axis("test accuracy", percent=True, limits=(0.0, 1.0)),
        [
            Series("along the path", found.cut, found.walked, 1, "dots"),
            Series("by magnitude", found.cut, found.pruned, 0, "dashed"),
        ],
    )
