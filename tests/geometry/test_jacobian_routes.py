"""Which way products and rows of a Jacobian go, and that it is what the backward pass computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.geometry.oracles_jacobian import (
    CLOSE,
    Rounded,
    data,
    small_mlp,
    trainable,
)
from tests.oracles import jacobian as oracle
from torchgeom_optim.geometry.jacobian import Jacobian


@pytest.mark.parametrize("kind", ["no_grad", "function", "branch", "tensor hook", "checkpoint"])
def test_is_what_the_backward_pass_computes(kind: str) -> None:
    model, (x, _) = Rounded(kind).double(), data(4)
    expected = oracle(lambda i: model(x[i : i + 1]), 4, trainable(model))
    for dtype in (None, torch.float64):
        J = Jacobian(model, x, dtype=dtype, batch_size=1 if kind == "branch" else None)
        v, u = torch.randn(J.shape[1], 2).double(), torch.randn(J.shape[0], 2).double()
        torch.testing.assert_close(J @ v, expected @ v, **CLOSE)
        torch.testing.assert_close(J.T @ u, expected.T @ u, **CLOSE)
        torch.testing.assert_close(J.gram(), expected @ expected.T, **CLOSE)
    if kind == "no_grad":
        assert J.ways["product"].startswith("backward")


def test_padding_tokens_that_the_first_samples_do_not_show() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten(), nn.Linear(4, 2)).double()
    tokens = torch.tensor([[1, 2], [3, 4], [0, 0], [0, 1]])
    J = Jacobian(model, tokens)
    v = torch.randn(J.shape[1]).double()
    torch.testing.assert_close(J @ v, J.dense() @ v, **CLOSE)


def test_ways_are_told() -> None:
    J = Jacobian(small_mlp(), data()[0])
    assert J.ways == {}
    J @ torch.ones(J.shape[1]).double()
    J.gram()
    assert J.ways["product"].startswith("forward mode")
    assert J.ways["gram"] == "layers' factors for 4 of 4 parameters"
    custom = Jacobian(Rounded("custom").double(), data()[0])
    custom.gram()
    assert custom.ways["gram"] == "layers' factors for 1 of 2 parameters, rows for the others"
    assert custom.ways["rows"] == "samples batched by vmap"
