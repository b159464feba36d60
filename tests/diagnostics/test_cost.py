"""What a measurement will cost."""

from __future__ import annotations

import torch
from torch import nn

from tests.diagnostics.loops import batches, network
from torchgeom_optim.diagnostics import METRICS, Diagnostics


def test_a_prediction_before_the_first_measurement():
    model, criterion = network(), nn.CrossEntropyLoss()
    (x, y), *_ = batches(1)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    costs = {
        name: Diagnostics(model, criterion, metrics=name).predict_cost(x, y) for name in ("free", "default", "full")
    }
    assert costs["free"].total_seconds == 0.0
    assert 0 < costs["default"].total_seconds < costs["full"].total_seconds
    assert 0 < costs["free"].peak_bytes < costs["default"].peak_bytes < costs["full"].peak_bytes
    assert "MiB" in str(costs["full"])
    assert set(costs["full"].seconds) == set(METRICS.values()) - {"spectrum"} - {"weights"}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    spectrum = Diagnostics(model, criterion, metrics="spectrum").predict_cost(x, y)
    assert spectrum.bytes["spectrum"] > 3 * 8 * 24**2
