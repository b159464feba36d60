"""Free weights in frozen gates: the base at the start, J dw to first order, multilinear beyond."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from tests.oracles import tolerance
from torchgeom_optim.models import GatedNetwork, UnsupportedBaseError


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(2, 3)).double()


X = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def logits_at(gated: GatedNetwork, weights: dict[str, torch.Tensor], record: dict[str, torch.Tensor]) -> torch.Tensor:
    named = {f"weights.{place}": weights[name] for name, place in gated._names.items()}
    previous = {name: p.detach().clone() for name, p in gated.named_parameters()}
    gated.load_state_dict({**previous, **named})
    result = gated.logits(record).detach()
    gated.load_state_dict(previous)
    return result


@pytest.mark.parametrize("block", [0, 4])
def test_it_starts_as_the_base(block):
    model = network()
    torch.testing.assert_close(GatedNetwork(model, 3, block=block)(X), model(X), **tolerance(condition=10))


def test_its_derivative_at_the_base_is_that_of_the_base():
    model = network()
    gated = GatedNetwork(model, 3, block=4)
    own = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in own.items()}
    _, expected = jvp(lambda w: functional_call(model, w, (X,)), (own,), (direction,))
    named = {f"weights.{place}": name for name, place in gated._names.items()}
    start = {key: own[name] for key, name in named.items()}
    tangents = {key: direction[name] for key, name in named.items()}
    record = gated.record(X)
    rest = {name: p.detach() for name, p in gated.named_parameters() if name not in start}

    def at(step: float) -> torch.Tensor:
        moved = {key: value + step * tangents[key] for key, value in start.items()}
        gated.load_state_dict({**rest, **moved})
        return gated.logits(record).detach()

    # A polynomial of degree 3 in the step: four values give its derivative exactly.
    h = 0.25
    derivative = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    torch.testing.assert_close(derivative, expected, **tolerance(condition=1000))


def test_it_is_affine_in_each_layer():
    model = network()
    gated, record = GatedNetwork(model, 3, block=0), None
    record = gated.record(X)
    own = {name: p.detach() for name, p in model.named_parameters()}
    for layer in ("0", "3", "6"):
        moved = {name: torch.randn_like(p) if name.startswith(layer) else p for name, p in own.items()}
        middle = {name: (own[name] + moved[name]) / 2 for name in own}
        ends = logits_at(gated, own, record) + logits_at(gated, moved, record)
        torch.testing.assert_close(logits_at(gated, middle, record), ends / 2, **tolerance(condition=100))


def test_training_moves_the_copy_alone():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    gated = GatedNetwork(model, 3, block=4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(gated.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gated(X), torch.tensor([0, 1, 2, 0, 1])).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gated.parameters())


def test_a_convolution_may_come_last():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    gated = GatedNetwork(model.double(), 3, block=6)
    assert gated.block_in.shape == (6, 4)
    torch.testing.assert_close(gated(X), model(X), **tolerance(condition=10))


def test_refusals():
    with pytest.raises(ValueError, match="block=-1"):
        GatedNetwork(network(), 3, block=-1)
    with pytest.raises(UnsupportedBaseError, match="GELU"):
        GatedNetwork(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), 2)
    last = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(UnsupportedBaseError, match="last layer 1 is BatchNorm1d"):
        GatedNetwork(last, 3)
    assert GatedNetwork(last, 3, block=0)(torch.randn(4, 2)).shape == (4, 3)
