"""Small problems with a Jacobian, and its rows by autograd one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.oracles import tolerance

HEADS = ["outputs", "loss", "log_probabilities", "sqrt_probabilities"]
CLOSE = tolerance(condition=1e3)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def head_arguments(of: str, targets: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {"of": of}
    if of in ("loss", "log_probabilities"):
        arguments["targets"] = targets
    if of == "loss":
        arguments["loss_fn"] = nn.CrossEntropyLoss(label_smoothing=0.1)
    return arguments


def head_of_sample(of: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], Tensor]:
    def values(i: int) -> Tensor:
        z = model(x[i : i + 1])
        if of == "outputs":
            return z
        if of == "loss":
            return F.cross_entropy(z, y[i : i + 1], label_smoothing=0.1)
        p = z.exp() / z.exp().sum()
        return p[0, y[i]].log() if of == "log_probabilities" else 2 * p.sqrt()

    return values


def small_mlp(seed: int = 0, inputs: int = 3, outputs: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def data(n: int = 5, inputs: int = 3, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


class Rounded(nn.Module):
    """Tells the backward pass something of its own, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.kind == "no_grad":
            with torch.no_grad():
                scale = self.fc.weight.norm()
            return y * scale
        if self.kind == "function":
            return Straight.apply(y)
        if self.kind == "branch":
            return y if float(y.detach().sum()) > 0 else 2 * y
        if self.kind == "tensor hook" and y.requires_grad:
            y.register_hook(lambda g: 3 * g)
        if self.kind == "custom":
            return y * self.fc.bias
        if self.kind == "checkpoint":
            return checkpoint(self.fc, torch.tanh(x), use_reentrant=False)
        if self.kind == "reentrant":
            return checkpoint(self.fc, torch.tanh(x).requires_grad_(), use_reentrant=True)
        return y


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient on as it is; nothing that a transform could use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()
