"""A small network in a training loop, and what is expected of its gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from torchgeom_optim.diagnostics import METRICS
from torchgeom_optim.diagnostics.agreement import gaussian_effective_rank

EVERYTHING = ["full", "spectrum"]


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def batches(num: int, size: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(num)
    ]


def train(model, criterion, optimizer, data, on_step=None):
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step()
    return losses


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def expected_from(rows: torch.Tensor, p: int) -> dict[str, float]:
    b, mean = len(rows), rows.mean(0)
    cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in itertools.combinations(rows, 2)]
    trace = float(rows.var(0, correction=1).sum())
    signal = float(mean.square().sum()) - trace / b
    rank = float(rows.norm() ** 2 / torch.linalg.matrix_norm(rows, 2) ** 2)
    return {
        "gradient_confusion": max(0.0, *(-c for c in cosines)),
        "gradient_diversity": float(rows.square().sum() / rows.sum(0).square().sum()),
        "gradient_coherence": float(b * mean.square().sum() / rows.square().sum()),
        "relative_gradient_rank": rank / gaussian_effective_rank(b, p),
        "gradient_noise_scale": trace / signal if signal > 0 else math.inf,
        "gradient_norm": float(mean.norm()),
        "fisher_trace": float(rows.square().sum() / b),
    }


def hooks_of(model, criterion, optimizer):
    modules = [*model.modules(), criterion]
    return (
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
        + sum(len(p._backward_hooks or ()) for p in model.parameters())
        + len(optimizer._optimizer_step_pre_hooks)
        + len(optimizer._optimizer_step_post_hooks)
    )


def same_gram_metrics(record, other, rel=1e-4):
    for name, source in METRICS.items():
        if source == "gram" and name in record.values:
            assert record.values[name] == pytest.approx(other.values[name], rel=rel), name
