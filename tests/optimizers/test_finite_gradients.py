"""Gradients are looked at through their sums, which may overflow or cancel: neither must mislead."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torchgeom_optim.optimizers.distributed import Ranks
from torchgeom_optim.optimizers.finite_gradients import require_finite_gradients


def look(*grads: Tensor) -> None:
    parameters = [nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    names = {p: f"p{number}" for number, p in enumerate(parameters)}
    require_finite_gradients(parameters, lambda: names, Ranks(), always=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_the_largest_of_finite_gradients_are_finite(dtype):
    largest = torch.finfo(dtype).max
    look(torch.full((300, 2), largest, dtype=dtype), torch.full((), -largest, dtype=dtype), torch.zeros(0, dtype=dtype))


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.nan, math.inf]])
def test_those_that_are_not_are_named(bad):
    grad = torch.zeros(40, 30)
    grad.view(-1)[torch.randperm(grad.numel())[: len(bad)]] = torch.tensor(bad)
    overflows = torch.full((3,), torch.finfo(torch.float32).max)
    with pytest.raises(FloatingPointError, match=r"of 1 of 3 parameters \(p1\)"):
        look(overflows, grad, torch.ones(2, dtype=torch.float64))


def test_sparse_gradients_are_looked_at_too():
    def sparse(value: float) -> Tensor:
        return torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[value, 0.0]]), (4, 2))

    look(sparse(1.0))
    with pytest.raises(FloatingPointError, match=r"of 1 of 2 parameters \(p1\)"):
        look(torch.ones(2), sparse(math.nan))


def test_no_gradients_are_finite():
    look()
