"""What a BlockNaturalGradient remembers: left alone by a refused step, of its own metric, and taken over from SGD."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.cases import (
    NATURAL_MEMBERS,
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    tensors_of,
    train,
)
from tests.oracles import tolerance
from torchgeom_optim.geometry.metric import NotPositiveDefiniteError
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64


def pair() -> tuple[nn.Module, nn.Module]:
    return small_net(dtype=F64), small_net(dtype=F64)


def batches(number: int, **kwargs) -> list[Tensor]:
    return small_batches(number, dtype=F64, **kwargs)


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["kronecker", "exact"])
def test_a_batch_without_finite_gradients_is_an_error_and_changes_nothing(metric, what):
    model = small_net(dtype=F64)
    # Without looking at gradients beforehand, as is the default off the CPU.
    settings = {"inverse_interval": 1, "momentum": 0.9, "error_if_nonfinite": False}
    optimizer = BlockNaturalGradient(model, 0.01, metric, **settings)
    train(model, optimizer, batches(2))
    before, state = copy.deepcopy(model), tensors_of(optimizer.state_dict())
    optimizer.zero_grad()
    (mean_loss(model(batches(1)[0])) * what).backward()
    with pytest.raises(NotPositiveDefiniteError):
        optimizer.step()
    assert_same_parameters(model, before)
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), state, rtol=0, atol=0)
    train(model, optimizer, batches(2))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_checkpoint_of_another_metric_is_refused():
    one, two = pair()
    optimizers = [BlockNaturalGradient(m, 0.01, metric) for m, metric in ((one, "kronecker"), (two, "identity"))]
    train(one, optimizers[0], batches(1))
    before = copy.deepcopy(optimizers[1].state_dict())
    with pytest.raises(ValueError, match="metric 'kronecker', need 'identity'"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state_dict() == before
    other = BlockNaturalGradient(two, 0.01, "kronecker", "network", momentum=0.9)
    three = small_net(dtype=F64)
    units = BlockNaturalGradient(three, 0.01, "kronecker_diagonal", "unit", norm_decay=0.9)
    train(three, units, batches(1))
    whole = BlockNaturalGradient(two, 0.01, "kronecker_diagonal", "layer")
    with pytest.raises(ValueError, match=r"norm_sq.*other blocks"):
        whole.load_state_dict(units.state_dict())
    other.load_state_dict(optimizers[0].state_dict())


def test_momentum_of_sgd_is_taken_over():
    """At the first step the momentum goes through the same map as the gradient does."""
    ours, theirs = pair()
    sgd = torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9)
    train(theirs, sgd, batches(3))
    ours.load_state_dict(theirs.state_dict())
    for metric, block in NATURAL_MEMBERS:
        model = copy.deepcopy(ours)
        optimizer = BlockNaturalGradient(model, 0.01, metric, block, momentum=0.9, norm_decay=0.0)
        optimizer.load_state_dict(sgd.state_dict())
        x = batches(1)[0]
        mean_loss(model(x)).backward()
        with torch.no_grad():  # a gradient that is parallel to the momentum: then so are their directions
            for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
                p.grad = sgd.state[q]["momentum_buffer"] / 4
        optimizer.step()
        twin = copy.deepcopy(ours)
        plain = BlockNaturalGradient(twin, 0.01, metric, block, norm_decay=0.0)
        mean_loss(twin(x)).backward()
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        plain.step()
        for p, q, start in zip(model.parameters(), twin.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(p - start, (1 + 0.9 * 4) * (q - start), **tolerance(condition=1e4))


@pytest.mark.parametrize("expectation", ["average", "per_sample"])
@pytest.mark.parametrize(("metric", "block"), NATURAL_MEMBERS)
def test_a_layer_whose_inputs_are_not_known_is_an_error_that_leaves_those_before_it_alone(metric, block, expectation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(F64)
    x = torch.randn(8, 4, dtype=F64)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, sgd, [x])
    optimizer = BlockNaturalGradient(model, 0.01, metric, block, expectation=expectation, momentum=0.9)
    optimizer.load_state_dict(sgd.state_dict())  # by which the second layer is known, but not what it sees
    for _ in range(2):
        train(model[0], optimizer, [x])
        model[1].zero_grad()
    before, state = copy.deepcopy(model), tensors_of(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    mean_loss(model[0](x)).backward()
    for p in model[1].parameters():
        p.grad = torch.ones_like(p)
    if expectation == "average" and metric in ("identity", "diagonal", "quasi_diagonal"):
        optimizer.step()  # which need not know
        return
    with pytest.raises(RuntimeError, match=r"what its inputs are like is not known.*Nothing was changed"):
        optimizer.step()
    assert_same_parameters(model, before)
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), state, rtol=0, atol=0)
