"""Slow, dense, obvious versions of what the package computes. They share no code with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def tolerance(dtype: torch.dtype = torch.float64, condition: float = 1.0) -> dict[str, float]:
    """Relative and absolute tolerance that rounding in ``dtype`` at this condition number explains."""
    tol = 50 * torch.finfo(dtype).eps * condition
    return {"rtol": tol, "atol": tol}


def per_sample_gradients(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Gradient of every sample's own loss, one ``autograd.grad`` per sample: name -> [N, *shape]."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(inputs)):
        loss = loss_fn(model(inputs[i : i + 1]), targets[i : i + 1])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), grads, strict=True)])
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(named)}


def jacobian(values: Callable[[int], Tensor], num_samples: int, parameters: list[nn.Parameter]) -> Tensor:
    """Rows d values(i)[c] / d parameters in the order (sample, entry), one ``autograd.grad`` each: [N C, P]."""
    rows = []
    for i in range(num_samples):
        for entry in values(i).reshape(-1):
            grads = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)
