"""The example scripts run, in a small setting, and show what they say they show."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest


def script(name: str, *needed: str) -> Any:
    for library in ("sklearn", *needed):
        pytest.importorskip(library, reason=f"the example {name} takes {library}")
    return importlib.import_module(f"examples.{name}")


@pytest.mark.slow
def test_resnet_learns_from_images():
    losses = script("train_resnet", "torchvision", "tqdm").main(["--epochs", "2", "--images", "256"])
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_lightning_trains_and_records():
    diagnostics = script("lightning_training", "lightning").main(["--epochs", "2"])
    losses = diagnostics.history.column("loss")
    assert len(losses) == 5
    assert losses[-1] < 0.5 * losses[0]
    assert not diagnostics.is_attached


@pytest.mark.slow
def test_huggingface_trains_and_records():
    diagnostics = script("huggingface_training", "transformers", "accelerate").main(["--steps", "41"])
    losses = diagnostics.history.column("loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert all(map(math.isfinite, diagnostics.history.column("gradient_diversity")))


def test_what_is_broken_is_named_and_what_is_not_is_left_in_peace():
    found = script("diagnose_network").main(["--steps", "60"])
    assert found["healthy"] == []
    assert "dead layer" in found["dead_layer"]
    assert {"loss is no number", "learning rate too high"} & set(found["learning_rate_too_high"])


def test_compressed_networks_keep_their_accuracy():
    found = script("compress_network").main(["--epochs", "4", "--steps", "2"])
    assert found["dense"] > 0.85
    for way in ("reduced", "sparse", "narrow"):
        assert found[way] > found["dense"] - 0.15, way
