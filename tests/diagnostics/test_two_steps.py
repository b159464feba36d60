"""The condition number that two steps in a row tell."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.diagnostics.loops import batches, network, train
from torchgeom_optim.diagnostics import Diagnostics


def test_the_two_step_number_and_what_the_optimizer_knows():
    model, criterion = network().eval(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []

    def flat(tensors):
        return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()

    def note(optimizer, args, kwargs):
        seen.append((flat(model.parameters()), flat(p.grad for p in model.parameters())))

    optimizer.register_step_pre_hook(note)
    with Diagnostics(model, criterion, every=2, metrics="free").attach(optimizer) as diagnostics:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        train(model, criterion, optimizer, batches(5), scheduler.step)
    first, third, fifth = diagnostics.history
    assert (first.learning_rate, third.learning_rate, fifth.learning_rate) == (0.1, 0.025, 0.00625)
    assert math.isnan(first.values["weight_condition_number_two_step"])
    assert any("no step before" in note for note in first.notes)
    for record, k in ((third, 2), (fifth, 4)):
        (w0, g0), (w1, g1) = seen[k - 1], seen[k]
        expected = (g1 - g0).norm() * w0.norm() / ((w1 - w0).norm() * g0.norm())
        assert record.values["weight_condition_number_two_step"] == pytest.approx(float(expected), rel=1e-4)
        assert record.values["gradient_norm"] == pytest.approx(float(g1.norm()), rel=1e-5)
        assert record.values["weight_norm"] == pytest.approx(float(w1.norm()), rel=1e-5)
