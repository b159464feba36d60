"""Layers that every signal has to pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchgeom_optim import WhiteningSGD
from torchgeom_optim.models.reference import lenet, mlp_deep, resnet8, resnet20


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:5]:
            x = x + torch.relu_(layer(x))
        return self.layers[5](x.view(3, -1).t().relu_().t())


@pytest.mark.parametrize(
    ("build", "shape", "length"),
    [
        (lambda: nn.Linear(3, 2), (4, 3), 1),
        (Skipping, (3, 3), 2),
        (lenet, (2, 3, 32, 32), 5),
        (mlp_deep, (2, 784), 10),
        (resnet8, (2, 3, 8, 8), 4),  # stem, two projections, head
        (resnet20, (2, 3, 8, 8), 4),
    ],
)
def test_residual_branches_do_not_count(build, shape, length):
    model = build()
    optimizer = WhiteningSGD(model)
    model(torch.randn(shape)).square().mean().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["chain_length"] == length
    assert WhiteningSGD(model, chain_length=7).param_groups[0]["chain_length"] == 7
