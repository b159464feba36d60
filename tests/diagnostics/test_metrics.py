from __future__ import annotations

import pytest

from torchgeom_optim.diagnostics.metrics import METRICS, PRESETS, chosen_metrics


def test_presets_grow():
    default, cheap, full = (set(PRESETS[name]) for name in ("default", "cheap", "full"))
    assert set(PRESETS["free"]) < cheap
    assert default < cheap < full
    assert full | {"spectrum"} == set(METRICS)
    assert {METRICS[name] for name in default} == {"gram", "weights"}


def test_names_and_presets_mix():
    assert chosen_metrics("default") == PRESETS["default"]
    assert chosen_metrics(["top_curvature", "gradient_norm", "top_curvature"]) == ("gradient_norm", "top_curvature")
    assert set(chosen_metrics(["full", "spectrum"])) == set(METRICS)


def test_refusals():
    with pytest.raises(ValueError, match="did you mean 'gradient_diversity'"):
        chosen_metrics(["gradient_divresity"])
    with pytest.raises(ValueError, match="metrics='everything'"):
        chosen_metrics("everything")
    with pytest.raises(ValueError, match="at least one"):
        chosen_metrics([])
