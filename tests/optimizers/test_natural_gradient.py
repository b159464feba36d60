"""BlockNaturalGradient against dense solves of matrices that are written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import (
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    train,
)
from tests.oracles import tolerance
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64


def pair() -> tuple[nn.Module, nn.Module]:
    return small_net(dtype=F64), small_net(dtype=F64)


def batches(number: int, **kwargs) -> list[Tensor]:
    return small_batches(number, dtype=F64, **kwargs)


def seen(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every layer, of the sum of the samples' losses."""
    inputs, outputs = {}, {}
    handles = [
        m.register_forward_hook(
            lambda m, args, y, n=n: (inputs.update({n: args[0]}), outputs.update({n: y}))[2:] or None
        )
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    loss = mean_loss(model(x)) * len(x)
    grads = torch.autograd.grad(loss, list(outputs.values()))
    for handle in handles:
        handle.remove()
    return {n: (inputs[n].detach(), g) for n, g in zip(outputs, grads, strict=True)}


def patches_and_grads(module: nn.Module, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per group: patches [N, T, q] with a 1 if there is a bias, and output gradients [N, T, m]."""
    if isinstance(module, nn.Linear):
        found = [(x[:, None], g[:, None])]
    else:
        found = [
            (
                F.unfold(part, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2),
                out.flatten(2).transpose(1, 2),
            )
            for part, out in zip(x.chunk(module.groups, 1), g.chunk(module.groups, 1), strict=True)
        ]
    if module.bias is None:
        return found
    return [(torch.cat([a, torch.ones_like(a[..., :1])], -1), out) for a, out in found]


def dense_factors(module: nn.Module, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    factors = []
    for a, out in patches_and_grads(module, x, g):
        big_a = sum(torch.outer(p, p) for sample in a for p in sample) / len(a)
        big_b = sum(torch.outer(p, p) for sample in out for p in sample) / (len(a) * a.shape[1])
        factors.append((big_a, big_b))
    return factors


def dense_fisher(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    groups = patches_and_grads(module, x, g)
    rows = torch.cat([torch.einsum("ntm,ntq->nmq", out, a) for a, out in groups], 1).flatten(1)
    return rows.T @ rows / len(rows)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def rows_of(module: nn.Module, grads: bool = True) -> Tensor:
    weight, bias = (p if p is None or not grads else p.grad for p in (module.weight, module.bias))
    rows = weight.reshape(len(weight), -1)
    return (rows if bias is None else torch.cat([rows, bias[:, None]], 1)).detach()


def dense_metric(
    metric: str, module: nn.Module, past: object, decay: float, x: Tensor, g: Tensor
) -> tuple[object, Tensor]:
    """New averages of a layer, and the whole damped matrix G."""

    def average(before, now):
        return now if before is None else decay * before + (1 - decay) * now

    if metric in ("kronecker", "kronecker_diagonal"):
        now = dense_factors(module, x, g)
        past = past or [(None, None)] * len(now)
        past = [(average(a, a1), average(b, b1)) for (a, b), (a1, b1) in zip(past, now, strict=True)]
        root, blocks = math.sqrt(0.04), []
        for a, b in past:
            b = torch.diag(b.diagonal()) if metric == "kronecker_diagonal" else b
            blocks.append(torch.kron(damped(b, root), damped(a, root)))
        return past, torch.block_diag(*blocks)
    if metric == "exact":
        past = average(past, dense_fisher(module, x, g))
        return past, damped(past, 0.04)
    rows = rows_of(module)
    if metric == "diagonal":
        past = average(past, rows.square())
        return past, torch.diag(past.flatten() + 0.04 * past.mean())
    past = average(past, rows[:, :, None] * rows[:, None, :])  # quasi-diagonal: what is not kept is dropped below
    if module.bias is None:
        on_diagonal = past.diagonal(dim1=1, dim2=2).flatten()
        return past, torch.diag(on_diagonal + 0.04 * on_diagonal.mean())
    blocks, diagonals = [], past.diagonal(dim1=1, dim2=2)
    for block in past:
        row, corner, diagonal = block[:-1, -1], block[-1, -1] + 0.04 * diagonals[:, -1].mean(), block.diagonal()[:-1]
        inner = torch.outer(row, row) / corner
        inner.diagonal().copy_(diagonal + 0.04 * diagonals[:, :-1].mean())
        blocks.append(torch.cat([torch.cat([inner, row[:, None]], 1), torch.cat([row, corner[None]])[None]]))
    return past, torch.block_diag(*blocks)


GRID = [
    ("diagonal", "weight"), ("diagonal", "unit"), ("diagonal", "network"),
    ("quasi_diagonal", "unit"), ("quasi_diagonal", "layer"),
    ("kronecker", "layer"), ("kronecker", "network"), ("kronecker", "unit"), ("exact", "layer"), ("exact", "network"),
]  # fmt: skip


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@pytest.mark.parametrize(("metric", "block"), GRID)
def test_steps_are_those_of_dense_solves(metric, block):
    """Eq. (11) line by line over some steps; layers only, the others are left to plain SGD in both."""
    model, twin = pair()
    kind = "kronecker_diagonal" if (metric, block) == ("kronecker", "unit") else metric
    layers = [p for _, m in layers_of(model) for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in layers)]
    optimizer = BlockNaturalGradient(
        [{"params": layers}, {"params": rest, "rule": "sgd", "lr": 0.0}],
        0.02, metric, block, model=model, damping=0.04, decay=0.7, norm_decay=0.8, eps=1e-6, inverse_interval=1,
    )  # fmt: skip
    pasts, averages = {}, {}
    for x in batches(4):
        train(model, optimizer, [x])
        calls = seen(twin, x)
        twin.zero_grad()
        mean_loss(twin(x)).backward()
        directions, values = {}, {}
        for name, module in layers_of(twin):
            pasts[name], dense = dense_metric(kind, module, pasts.get(name), 0.7, *calls[name])
            rows = rows_of(module)
            u = torch.linalg.solve(dense, rows.flatten()).view(rows.shape)
            product = u * rows
            now = {"weight": product, "unit": product.sum(1, keepdim=True)}.get(block, product.sum())
            averages[name] = now if name not in averages else 0.8 * averages[name] + 0.2 * now
            directions[name], values[name] = u, averages[name]
        total = sum(values.values()) if block == "network" else None
        with torch.no_grad():
            for name, module in layers_of(twin):
                step = -0.02 * directions[name] / torch.sqrt(1e-6 + (values[name] if total is None else total))
                k = module.weight[0].numel()
                module.weight += step[:, :k].view(module.weight.shape)
                if module.bias is not None:
                    module.bias += step[:, k]
        assert_same_parameters(model, twin, **tolerance(condition=1e6))


@pytest.mark.parametrize("metric", ["kronecker", "exact"])
def test_inverses_are_taken_as_often_as_asked(metric):
    """With both intervals 3, steps 2 and 3 use the matrices of step 1; a function of the step says the same."""
    models = [small_net(dtype=F64) for _ in range(4)]
    intervals = [
        {"factor_interval": 3, "inverse_interval": 3},
        {"factor_interval": lambda step: 3, "inverse_interval": lambda step: 3},
        {"decay": 0.0, "factor_interval": 1, "inverse_interval": 3},  # looked at and not used
        {"factor_interval": 1, "inverse_interval": 1},
    ]
    steps = []
    for model, kwargs in zip(models, intervals, strict=True):
        optimizer = BlockNaturalGradient(model, 0.02, metric, **{"decay": 0.0, **kwargs})
        train(model, optimizer, batches(6))
        steps.append(optimizer.state[model.head.weight]["step"])
    for model in models[1:3]:
        assert_same_parameters(model, models[0])
    assert steps == [6] * 4
    with pytest.raises(AssertionError):
        assert_same_parameters(models[3], models[0], rtol=1e-3)


def test_the_length_of_a_step_in_the_metric_is_the_learning_rate():
    model = small_net(dtype=F64)
    optimizer = BlockNaturalGradient.trpo(model, 0.05, metric="exact", damping=0.1, inverse_interval=1)
    before, x = copy.deepcopy(model), batches(1)[0]
    calls = seen(model, x)
    train(model, optimizer, [x])
    length_sq = 0.0
    for (name, module), (_, old) in zip(layers_of(model), layers_of(before), strict=True):
        move = (rows_of(module, grads=False) - rows_of(old, grads=False)).flatten()
        length_sq += float(move @ damped(dense_fisher(old, *calls[name]), 0.1) @ move)
    for name in ("norm.weight", "norm.bias", "shift"):  # identity
        move = (dict(model.named_parameters())[name] - dict(before.named_parameters())[name]).detach()
        length_sq += float(move.square().sum())
    assert math.sqrt(length_sq) == pytest.approx(0.05, rel=1e-9)
