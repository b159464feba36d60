"""The dashboard shows what the history holds: drawn data are read back from the figure."""

from __future__ import annotations

import io
import math
import sys

import pytest

from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.plots import dashboard

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

LAYERS = ("conv1", "conv2", "head")


def run(count: int = 6, steps=None, **fields) -> History:
    history = History()
    for k in range(count):
        given = {
            "loss": 2.0 - 0.2 * k,
            "values": {
                "gradient_coherence": 0.1,
                "gradient_noise_scale": 100.0 + k,
                "top_curvature": 5.0,
                "my_own_metric": float(k),
            },
            "layers": {
                "gradient_norm": dict.fromkeys(LAYERS, 1.0),
                "weight_norm": {name: 2.0 ** (j + 1) for j, name in enumerate(LAYERS)},
                "gradient_coherence": dict.fromkeys(LAYERS, 0.1),
            },
            "spectrum": {"fisher": (4.0, 1.0, 0.0), "data": (9.0, 3.0)} if k % 2 == 0 else {},
        }
        step = steps[k] if steps else 10 * k
        history.append(Record(step=step, time_s=0.1, batch_size=64, learning_rate=0.1, **{**given, **fields}))
    return history


def parts(figure) -> dict:
    """Axes by title; the loss has none."""
    drawn = [axes for strip in figure.subfigs for axes in strip.axes if axes.get_visible()]
    return {axes.get_title(loc="left") or axes.get_ylabel(): axes for axes in drawn}


def line(axes, label: str) -> list[float]:
    (found,) = (one for one in axes.lines if one.get_label() == label)
    return list(found.get_ydata())


def saved(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=40)
    return stream.getvalue()


def test_everything_recorded_is_drawn():
    history = run()
    axes = parts(dashboard(history))
    assert list(axes["loss"].lines[0].get_ydata()) == history.column("loss")
    assert list(axes["loss"].lines[0].get_xdata()) == history.column("step")
    assert list(axes["learning rate"].lines[0].get_ydata()) == [0.1] * 6
    assert line(axes["Do the samples agree?"], "coherence") == [0.1] * 6
    assert line(axes["Gradient noise scale"], "noise scale") == history.column("gradient_noise_scale")
    assert line(axes["Gradient noise scale"], "batch size") == [64] * 6
    assert line(axes["Top curvature"], "2 / learning rate") == [20.0] * 6
    assert line(axes["my own metric"], "my_own_metric") == history.column("my_own_metric")
    assert "Gradient diversity" not in axes  # nothing was recorded
    assert "confusion" not in [one.get_label() for one in axes["Do the samples agree?"].lines]


def test_layers_are_rows_in_their_order():
    axes = parts(dashboard(run()))
    heat_map = axes["|gradient| / |weights|, by layer"]
    assert heat_map.collections[0].get_array().tolist() == [[1 / 2] * 6, [1 / 4] * 6, [1 / 8] * 6]
    assert [text.get_text() for text in heat_map.get_yticklabels()] == list(LAYERS)
    assert heat_map.yaxis_inverted()  # the input's side on top
    assert "gradient coherence, by layer" in axes


def test_spectra_stand_side_by_side():
    axes = parts(dashboard(run()))
    fisher, data = axes["Spectrum: fisher"], axes["Spectrum: data"]
    assert len(fisher.lines) == len(data.lines) == 3
    assert list(fisher.lines[0].get_ydata())[:2] == [4.0, 1.0]
    assert math.isnan(fisher.lines[0].get_ydata()[2])  # a log axis has no zero
    assert fisher.get_position().y0 == data.get_position().y0


def test_the_title_names_what_stands_out():
    assert dashboard(run()).get_suptitle() == "nothing stands out"
    broken = run(loss=math.nan)
    assert dashboard(broken).get_suptitle() == "loss is no number"
    assert sum(one.get_color() == "#b3261e" for one in parts(dashboard(broken))["loss"].lines) == 6


def test_evenly_spaced_logarithms_get_a_logarithmic_axis():
    assert parts(dashboard(run(steps=[0, 1, 2, 10, 100, 1000])))["loss"].get_xscale() == "symlog"
    assert parts(dashboard(run()))["loss"].get_xscale() == "linear"


@pytest.mark.parametrize(
    "history",
    [
        run(1, values={}),
        run(2, steps=[5, 5], values={}, spectrum={}),
        run(values={}, layers={}, spectrum={}),
        run(
            layers={},
            spectrum={},
            values={"gradient_diversity": math.nan, "top_curvature": -1.0, "gradient_noise_scale": math.inf},
        ),
        run(values={}, spectrum={}, layers={"gradient_coherence": {"a_rather_long_name_of_a_layer.0.conv": math.nan}}),
        run(
            values={},
            spectrum={},
            layers={"gradient_norm": {f"l{k}": 0.0 for k in range(60)}, "weight_norm": {"l0": 0.0}},
        ),
    ],
    ids=["one record", "same step twice", "loss alone", "not finite", "nan layer", "many layers without weights"],
)
def test_odd_histories_are_drawn(history):
    assert saved(dashboard(history)).startswith(b"\x89PNG")


def test_a_figure_of_the_user_is_drawn_into():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 8))
    assert dashboard(run(2), figure) is figure
    assert figure.get_size_inches().tolist() == [6, 8]
    assert figure.subfigs


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="history is empty"):
        dashboard(History())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"torchgeom-optim\[plots\]"):
        dashboard(run(1))
