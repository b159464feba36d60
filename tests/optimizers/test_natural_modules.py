"""Every kind of parameter gets its step, whatever the metric; where there is nothing to go by it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import (
    NATURAL_MEMBERS,
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


DIAGONALS = ("diagonal", "quasi_diagonal", "fisher_diagonal", "fisher_quasi_diagonal")


class Tokens(nn.Module):
    """Embedding, attention, recurrence, norms, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.block(self.embed(tokens)))[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("metric", "block"), NATURAL_MEMBERS)
def test_nothing_is_left_untrained(metric, block, tied):
    model = Tokens()
    if not tied:
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    before = copy.deepcopy(model)
    # a metric made of small gradients makes large steps
    optimizer = BlockNaturalGradient(model, 1e-4 if "diagonal" in metric else 0.01, metric, block)
    tokens = torch.randint(7, (6, 5))
    losses = train(model, optimizer, [tokens] * 20, lambda y: F.cross_entropy(y.flatten(0, 1), tokens.flatten()))
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q), name
        assert torch.isfinite(p).all(), name
    assert losses[-1] < losses[0]
    rules = {row.name: row.rule for row in optimizer.report()}
    own = {"kronecker": "kronecker_diagonal" if block == "unit" else "kronecker"}.get(metric, metric)
    assert rules["block.linear1.weight"] == own
    assert rules["block.norm1.weight"] == ("diagonal" if metric in DIAGONALS else "identity")
    assert set(rules.values()) <= {own, "identity", "diagonal"}


def test_one_hot_inputs_of_an_embedding_are_those_of_a_linear_layer():
    tokens, table = torch.randint(5, (9,)), torch.randn(5, 3, dtype=F64)
    embedding, linear = nn.Embedding(5, 3, _weight=table.clone()), nn.Linear(5, 3, bias=False, dtype=F64)
    with torch.no_grad():
        linear.weight.copy_(table.T)
    for metric, block in NATURAL_MEMBERS:
        if metric.endswith("whitening"):
            continue
        steps = []
        for layer, x in ((embedding, tokens), (linear, F.one_hot(tokens, 5).to(F64))):
            model = copy.deepcopy(layer)
            optimizer = BlockNaturalGradient(model, 0.1, metric, block, norm_decay=0.0)
            for _ in range(3):
                optimizer.zero_grad()
                model(x).sin().sum(-1).mean().backward()
                optimizer.step()
            steps.append(model.weight.detach())
        torch.testing.assert_close(steps[0], steps[1].T, **tolerance(condition=1e6))


def test_complex_parameters_are_stepped_as_their_real_twins():
    z = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    r = nn.Parameter(torch.view_as_real(z.detach()).clone())
    for metric, block in (("identity", "weight"), ("identity", "unit"), ("diagonal", "layer")):
        optimizers = [BlockNaturalGradient([p], 0.1, metric, block, momentum=0.9) for p in (z, r)]
        for _ in range(3):
            r.grad = torch.randn(3, 2, 2, dtype=F64)
            z.grad = torch.view_as_complex(r.grad.clone())
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(torch.view_as_real(z), r, **tolerance())


def test_a_bias_that_is_frozen_for_a_while():
    for metric, block in NATURAL_MEMBERS:
        model = small_net(dtype=F64)
        optimizer = BlockNaturalGradient(model, 0.01, metric, block, inverse_interval=5)
        for trains in (True, False, True):
            model.head.bias.requires_grad_(trains)
            bias = model.head.bias.detach().clone()
            train(model, optimizer, batches(2))
            assert torch.equal(bias, model.head.bias) != trains
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_decay_is_decoupled():
    ours, theirs = pair()
    train(ours, BlockNaturalGradient(ours, 0.1, "identity", "layer", weight_decay=0.5), batches(1))
    with torch.no_grad():
        grads = copy.deepcopy(theirs)
    train(grads, BlockNaturalGradient(grads, 0.1, "identity", "layer"), batches(1))
    for p, q, start in zip(ours.parameters(), grads.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.05 * start, **tolerance())


@pytest.mark.parametrize(("metric", "block"), NATURAL_MEMBERS)
def test_zero_gradients_and_dead_units_are_no_trouble(metric, block):
    model = small_net(dtype=F64)
    with torch.no_grad():
        model.hidden.weight[:2] = 0.0
        model.head.weight[:, :2] = 0.0  # two units that are never heard of
    for factors in ((0.0, 0.0), (0.0, 1.0, 0.0, 1.0)):
        twin = copy.deepcopy(model)
        optimizer = BlockNaturalGradient(twin, 0.01, metric, block)
        for factor in factors:
            train(twin, optimizer, batches(1), lambda y, factor=factor: factor * mean_loss(y))
        assert all(torch.isfinite(p).all() for p in twin.parameters())
        torch.testing.assert_close(twin.hidden.weight[:2], model.hidden.weight[:2], rtol=0, atol=0)
        if not any(factors):
            assert_same_parameters(twin, model)


@pytest.mark.parametrize("metric", ["quasi_diagonal", "fisher_quasi_diagonal"])
def test_a_unit_that_is_nearly_silent_hardly_moves(metric):
    """Damping is a share of the layer's mean: else every unit moves by the same length, however small its gradients."""
    model = nn.Linear(3, 2).to(F64)
    x, before = torch.randn(8, 3, dtype=F64), copy.deepcopy(model)
    optimizer = BlockNaturalGradient(model, 0.01, metric, "unit", norm_decay=0.9, decay=0.9)
    for _ in range(2):
        before = copy.deepcopy(model)
        train(model, optimizer, [x], lambda y: (y * torch.tensor([1.0, 1e-4], dtype=F64)).square().mean())
    loud, silent = (model.weight - before.weight).norm(dim=1)
    assert 0 < silent < 10 * loud
