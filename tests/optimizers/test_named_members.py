"""The named members of the family against torch's optimizers, WhiteningSGD and the paper's lines."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.cases import (
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    train,
    whitening_without_bound,
)
from tests.oracles import tolerance
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64


def pair() -> tuple[nn.Module, nn.Module]:
    return small_net(dtype=F64), small_net(dtype=F64)


def batches(number: int, **kwargs) -> list[Tensor]:
    return small_batches(number, dtype=F64, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=str)
def test_rmsprop_is_that_of_torch(settings):
    def smooth() -> nn.Module:  # without dead units: at eps = 0 torch divides their 0 by 0
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)

    ours, theirs, other = smooth(), smooth(), smooth()
    train(ours, BlockNaturalGradient.rmsprop(ours.parameters(), 0.01, 0.9, 0.0, **settings), batches(30))
    train(theirs, torch.optim.RMSprop(theirs.parameters(), 0.01, alpha=0.9, eps=0.0, **settings), batches(30))
    assert_same_parameters(ours, theirs, **tolerance(condition=1e3))
    train(other, BlockNaturalGradient.rmsprop(other, 0.01, 0.9, 0.0, norm_start="first", **settings), batches(30))
    with pytest.raises(AssertionError):  # a start at the first batch is another optimizer
        assert_same_parameters(other, theirs, **tolerance(condition=1e3))


def test_rmsprop_with_eps_under_the_root():
    ours, theirs = pair()
    train(ours, BlockNaturalGradient.rmsprop(ours, 0.01, norm_decay=0.9, eps=1e-3), batches(10))
    squares = [torch.zeros_like(p) for p in theirs.parameters()]
    for x in batches(10):  # §3.4, lambda = 0.1
        theirs.zero_grad()
        mean_loss(theirs(x)).backward()
        with torch.no_grad():
            for p, r in zip(theirs.parameters(), squares, strict=True):
                r.copy_(0.9 * r + 0.1 * p.grad**2)
                p -= 0.01 * p.grad / torch.sqrt(1e-3 + r)
    assert_same_parameters(ours, theirs, **tolerance(condition=1e3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rule", ["fan_in", "whitening"])
def test_units_with_the_expectation_of_section_3_5_are_those_of_whitening_sgd(rule, momentum):
    ours, theirs = pair()
    if rule == "fan_in":
        optimizer = BlockNaturalGradient.fan_in(ours, 0.05, momentum=momentum)
    else:
        optimizer = BlockNaturalGradient(
            ours, 0.05, "whitening", "unit", expectation="fan_in", decay=0.9, momentum=momentum
        )
    train(ours, optimizer, batches(10))
    train(theirs, whitening_without_bound(theirs, 0.05, momentum, rule=rule, decay=0.9), batches(10))
    assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


@pytest.mark.parametrize("block", ["layer", "network"])
def test_normalized_sgd_moves_by_the_learning_rate(block):
    model = small_net(dtype=F64)
    optimizer = BlockNaturalGradient.normalized_sgd(model, 0.03, block)
    for x in batches(3):
        before = copy.deepcopy(model)
        train(model, optimizer, [x])
        moves = {n: (p - dict(before.named_parameters())[n]).detach() for n, p in model.named_parameters()}
        cosine = -sum(float((moves[n] * p.grad).sum()) for n, p in model.named_parameters())
        assert cosine > 0
        layers = [["conv.weight", "conv.bias"], ["hidden.weight"], ["head.weight", "head.bias"], ["shift"]]
        for names in layers if block == "layer" else [list(moves)]:
            length = math.sqrt(sum(float(moves[n].square().sum()) for n in names))
            assert length == pytest.approx(0.03, rel=1e-9)
