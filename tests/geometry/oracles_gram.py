"""Gram matrices from per-sample gradients that were formed one by one, and what a pass must leave as it was."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import per_sample_gradients, tolerance
from tests.zoo import ZOO

BY_NAME = {case.name: case for case in ZOO}


def gram_of(rows: Tensor) -> Tensor:
    rows = rows.reshape(len(rows), -1)
    return rows @ rows.T


def expected_grams(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    gradients = per_sample_gradients(model, F.cross_entropy, inputs, targets)
    return {name: gram_of(rows) for name, rows in gradients.items()}


def expected_input_gram(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    rows = []
    for i in range(len(inputs)):
        x = inputs[i : i + 1].clone().requires_grad_()
        rows.append(torch.autograd.grad(F.cross_entropy(model(x), targets[i : i + 1]), x)[0])
    return gram_of(torch.cat(rows))


def assert_grams_close(actual: dict[str, Tensor], expected: dict[str, Tensor], condition: float = 100.0) -> None:
    assert actual.keys() == expected.keys()
    for name, gram in expected.items():
        # An inner product of nearly orthogonal gradients is known relative to the gradients' lengths.
        scale = gram.diagonal().max().clamp_min(torch.finfo(gram.dtype).tiny)
        torch.testing.assert_close(actual[name] / scale, gram / scale, **tolerance(gram.dtype, condition), msg=name)


def state_of(model: nn.Module) -> list[object]:
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    values = [value.clone() for value in model.state_dict().values()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    return [grads, values, hooks, flags, [m.training for m in model.modules()], torch.get_rng_state()]


def assert_same_state(before: list[object], after: list[object]) -> None:
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("in backward")
