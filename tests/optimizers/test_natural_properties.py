"""What the theory promises of every member: the length of each block's step, and what rescalings leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.cases import assert_same_parameters, mean_loss, train
from tests.oracles import tolerance
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64
LR = 0.03


def drawn(seed: int, linear: bool = False) -> tuple[nn.Sequential, list[Tensor]]:
    """A small network without dead units, and batches with more samples than a layer has parameters."""
    g = torch.Generator().manual_seed(seed)
    between = nn.Identity() if linear else nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 3), between, nn.Linear(3, 3)).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
        model[0].bias.add_(2.0)
    return model, [torch.randn(40, 4, generator=g, dtype=F64) for _ in range(3)]


# -- the length of a step ------------------------------------------------------------------------------------------


def dense_metric(metric: str, module: nn.Linear, x: Tensor, g: Tensor, damping: float) -> Tensor:
    """G of one batch over the rows [weights, bias] of the units, written out."""
    a = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    m, q = g.shape[1], a.shape[1]
    rows = torch.einsum("nj,ni->nji", g, a)  # the samples' gradients
    mean = rows.mean(0)

    def floor(diagonal: Tensor, share: float) -> Tensor:
        return share * diagonal.mean()

    if metric == "identity":
        return torch.eye(m * q, dtype=F64)
    if metric in ("diagonal", "fisher_diagonal"):
        square = mean.square() if metric == "diagonal" else rows.square().mean(0)
        return torch.diag((square + floor(square, damping)).flatten())
    if metric == "exact":
        flat = rows.flatten(1)
        fisher = flat.T @ flat / len(flat)
        return fisher + floor(fisher.diagonal(), damping) * torch.eye(m * q, dtype=F64)
    if metric.startswith("kronecker"):
        factors = [v.T @ v / len(v) for v in (a, g)]
        factors[1] = torch.diag(factors[1].diagonal()) if metric.endswith("diagonal") else factors[1]
        damped = [f + floor(f.diagonal(), damping**0.5) * torch.eye(len(f), dtype=F64) for f in factors]
        return torch.kron(damped[1], damped[0])
    blocks, squares = [], (mean if metric == "quasi_diagonal" else rows).square().reshape(-1, m, q).mean(0)
    for j in range(m):
        if metric.endswith("whitening"):
            mu, v = x.mean(0), x.var(0, unbiased=False)
            centre = torch.eye(q, dtype=F64)
            centre[-1, :-1] = mu
            spread = torch.cat([v + floor(v, damping), torch.ones(1, dtype=F64)])
            block = centre.T @ torch.diag(spread) @ centre
            if metric == "scale_free_whitening":  # in units of the outputs' variance
                y_sq = module(x).detach().var(0, unbiased=False)
                block = block / (y_sq[j] + damping * (y_sq.mean() + 0.01 * v.mean()))
            blocks.append(block)
            continue
        second = torch.outer(mean[j], mean[j]) if metric == "quasi_diagonal" else rows[:, j].T @ rows[:, j] / len(rows)
        row, diagonal = second[:-1, -1], second.diagonal()[:-1]
        corner = second[-1, -1] + floor(squares[:, -1], damping)
        inner = torch.outer(row, row) / corner
        inner.diagonal().copy_(diagonal + floor(squares[:, :-1], damping))
        blocks.append(torch.cat([torch.cat([inner, row[:, None]], 1), torch.cat([row, corner[None]])[None]]))
    return torch.block_diag(*blocks)


LENGTHS = [
    (metric, block)
    for metric, finest in [
        ("identity", 0), ("diagonal", 0), ("fisher_diagonal", 0), ("quasi_diagonal", 1), ("fisher_quasi_diagonal", 1),
        ("whitening", 1), ("scale_free_whitening", 1), ("kronecker_diagonal", 1), ("kronecker", 2), ("exact", 2),
    ]
    for block in ("weight", "unit", "layer", "network")[finest:]
]  # fmt: skip


@pytest.mark.parametrize(("metric", "block"), LENGTHS)
def test_every_block_moves_by_the_learning_rate_in_its_metric(metric, block):
    """Eqs. (9) and (10): before any averaging the length of each block's step is eta."""
    model, (x, *_) = drawn(1)
    after = copy.deepcopy(model)
    train(after, BlockNaturalGradient(after, LR, metric, block, norm_decay=0.0, eps=0.0, damping=0.2), [x])
    hidden = torch.relu(model[0](x)).detach()
    outputs = model[2](hidden).detach().requires_grad_()
    (of_outputs,) = torch.autograd.grad(mean_loss(outputs) * len(x), outputs)
    of_hidden = (of_outputs @ model[2].weight.detach()) * (hidden > 0)
    lengths_sq = []
    for k, inputs, g in ((0, x, of_hidden), (2, hidden, of_outputs)):
        both = [torch.cat([m[k].weight, m[k].bias[:, None]], 1).detach() for m in (model, after)]
        move = both[1] - both[0]
        size = {"weight": 1, "unit": move.shape[1]}.get(block, move.numel())
        dense = dense_metric(metric, model[k], inputs, g, 0.2)
        for place in range(0, move.numel(), size):
            part = slice(place, place + size)
            lengths_sq.append(move.flatten()[part] @ dense[part, part] @ move.flatten()[part])
    lengths_sq = [sum(lengths_sq)] if block == "network" else lengths_sq
    expected = torch.full((len(lengths_sq),), LR**2, dtype=F64)
    torch.testing.assert_close(torch.stack(lengths_sq), expected, **tolerance(condition=1e5))


# -- rescalings ----------------------------------------------------------------------------------------------------


def rescaled(model: nn.Sequential, factors: Tensor) -> nn.Sequential:
    """Hidden units' incoming weights times, and outgoing ones divided by, positive factors: the same function."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(factors[:, None])
        other[0].bias.mul_(factors)
        other[2].weight.div_(factors)
    return other


def curved(outputs: Tensor) -> Tensor:
    """A loss whose gradients are no linear functions of a layer's inputs: for these the exact matrix is singular."""
    return (torch.sin(outputs) + outputs.square() / 4).sum(-1).mean()


def outputs_after(model: nn.Sequential, batches: list[Tensor], **settings) -> Tensor:
    train(model, BlockNaturalGradient(model, LR, eps=0.0, norm_decay=0.0, **settings), batches, curved)
    return model(batches[0]).detach()


INVARIANT_TO_UNITS = [
    ("kronecker", "layer"), ("kronecker", "network"), ("kronecker_diagonal", "unit"), ("exact", "layer"),
    ("scale_free_whitening", "unit"),
    ("diagonal", "weight"), ("diagonal", "unit"), ("fisher_diagonal", "layer"), ("fisher_quasi_diagonal", "unit"),
]  # fmt: skip
FACTORS = st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(lambda logs: 10 ** torch.tensor(logs, dtype=F64))


@given(st.sampled_from(INVARIANT_TO_UNITS), FACTORS, st.integers(0, 1000), st.sampled_from(["average", "per_sample"]))
def test_rescaling_of_hidden_units_changes_nothing(kind, factors, seed, expectation):
    """The metrics that follow gradients and inputs of single units; undamped, as damping knows units of a layer."""
    metric, block = kind
    model, batches = drawn(seed)
    settings = {"metric": metric, "block": block, "damping": 0.0, "inverse_interval": 1, "expectation": expectation}
    other = rescaled(model, factors)
    expected, found = outputs_after(model, batches, **settings), outputs_after(other, batches, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize(("metric", "block"), [("identity", "layer"), ("identity", "unit"), ("whitening", "unit")])
def test_others_feel_the_rescaling_of_units(metric, block):
    model, batches = drawn(1)
    other = rescaled(model, torch.tensor([5.0, 0.2, 3.0], dtype=F64))
    settings = {"metric": metric, "block": block, "damping": 0.0}
    expected, found = outputs_after(model, batches, **settings), outputs_after(other, batches, **settings)
    assert not torch.allclose(found, expected, rtol=1e-2)


@given(st.sampled_from(["whitening", "kronecker", "kronecker_diagonal", "exact"]), st.integers(0, 1000),
       st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(-2, 2))  # fmt: skip
def test_scale_and_shift_of_single_inputs_change_nothing(metric, seed, logs, shift):
    """Inputs a x + t, the weights and the bias compensating."""
    model, batches = drawn(seed)
    scale = 10 ** torch.tensor(logs, dtype=F64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.div_(scale)
        other[0].bias.sub_(other[0].weight @ torch.full((4,), shift, dtype=F64))
    block = "layer" if metric in ("kronecker", "exact") else "unit"
    settings = {"metric": metric, "block": block, "damping": 0.0, "inverse_interval": 1}
    expected = outputs_after(model, batches, **settings)
    optimizer = BlockNaturalGradient(other, LR, eps=0.0, norm_decay=0.0, **settings)
    train(other, optimizer, [x * scale + shift for x in batches], curved)
    found = other(batches[0] * scale + shift).detach()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


@given(st.integers(0, 1000))
def test_any_linear_change_of_the_hidden_units_changes_nothing_for_matrices(seed):
    """Not only diagonal ones: h -> M h between two linear layers; diagonals feel it."""
    model, batches = drawn(seed, linear=True)
    g = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=F64)).Q * torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(mixing @ model[0].weight)
        other[0].bias.copy_(mixing @ model[0].bias)
        other[2].weight.copy_(model[2].weight @ torch.linalg.inv(mixing))
    felt = []
    for metric in ("kronecker", "exact", "fisher_diagonal"):
        settings = {"metric": metric, "block": "layer", "damping": 0.0, "inverse_interval": 1}
        one, two = (outputs_after(copy.deepcopy(m), batches, **settings) for m in (model, other))
        felt.append(not torch.allclose(one, two, rtol=1e-7, atol=1e-7 * float(one.abs().max())))
    assert felt == [False, False, True]


@given(st.sampled_from(LENGTHS), st.integers(0, 1000))
def test_the_order_of_samples_and_units_changes_nothing(kind, seed):
    metric, block = kind
    model, batches = drawn(seed)
    g = torch.Generator().manual_seed(seed)
    units, order = torch.randperm(3, generator=g), torch.randperm(40, generator=g)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[units])
        other[0].bias.copy_(model[0].bias[units])
        other[2].weight.copy_(model[2].weight[:, units])
    for m, inputs in ((model, batches), (other, [x[order] for x in batches])):
        train(m, BlockNaturalGradient(m, LR, metric, block, damping=0.3), inputs)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[units])
        model[0].bias.copy_(model[0].bias[units])
        model[2].weight.copy_(model[2].weight[:, units])
    assert_same_parameters(other, model, **tolerance(condition=1e6))


# -- what float32 cannot hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [1e-18, 1e-20, 1e-25])
@pytest.mark.parametrize(
    ("metric", "block"), [("kronecker", "layer"), ("kronecker", "network"), ("kronecker_diagonal", "unit"),
                          ("exact", "layer")]
)  # fmt: skip
def test_slopes_whose_squares_vanish_move_nothing(metric, block, slope):
    """As of a classifier that is certain: its probabilities of other classes are 1e-20."""
    model, batches = drawn(0)
    model.float()
    before = copy.deepcopy(model)
    optimizer = BlockNaturalGradient(model, 0.1, metric=metric, block=block)
    for x in batches:
        optimizer.zero_grad()
        (model(x.float()).sin().mean() * slope).backward()
        optimizer.step()
    assert_same_parameters(model, before, rtol=1e-6, atol=1e-6)
