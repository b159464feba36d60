"""f(x) + J(x) dw against torch.func.jvp, on both ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.oracles import jacobian, tolerance
from torchgeom_optim.models import LinearisedNetwork

CNN = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
SMOOTH = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))


@pytest.fixture(params=[(CNN, "layer by layer"), (SMOOTH, "torch.func.jvp")], ids=["gates", "jvp"])
def linearised(request):
    model, way = request.param
    result = LinearisedNetwork.calibrated(model.double(), torch.randn(12, 1, 4, 4, dtype=torch.float64))
    assert result.way == way
    return model, result


def test_logits_are_the_value_and_its_derivative(linearised):
    model, net = linearised
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), model(x), **tolerance(condition=10))
    for V in net.coordinates:
        nn.init.normal_(V)
    moved = net.displacement()
    assert set(moved) == set(dict(model.named_parameters()))
    dw = {name: moved[name].detach() for name, _ in model.named_parameters()}
    f, tangent = torch.func.jvp(lambda w: functional_call(model, w, (x,)), (dict(model.named_parameters()),), (dw,))
    torch.testing.assert_close(net(x), f + tangent, **tolerance(condition=100))
    assert not torch.allclose(net(x), f - tangent)


def test_gradients_reach_the_coordinates_and_nothing_else(linearised):
    model, net = linearised
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    u = torch.randn(5, 3, dtype=torch.float64)
    (net(x) * u).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    # d/dV <u, J U(s V)U'> along a direction is <u, J dw(direction)>, J being the dense one.
    dense = jacobian(lambda i: model(x[i : i + 1]), 5, list(model.parameters()))
    grads = [V.grad.clone() for V in net.coordinates]
    for V in net.coordinates:
        nn.init.normal_(V)
    dw = net.displacement()
    vector = torch.cat([dw[name].reshape(-1) for name, _ in model.named_parameters()])
    pairing = sum((V.detach() * grad).sum() for V, grad in zip(net.coordinates, grads, strict=True))
    torch.testing.assert_close(pairing, (dense @ vector.detach()) @ u.reshape(-1), **tolerance(condition=1000))


def test_little_damping_whitens_the_fisher_matrix():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    net = LinearisedNetwork.calibrated(model, x, damping=1e-9)
    rows = jacobian(lambda i: 2 * torch.softmax(model(x[i : i + 1]), 1).sqrt(), 40, list(model.parameters()))
    fisher = rows.T @ rows / 40
    [V] = net.coordinates
    columns = []
    for k in range(V.numel()):
        with torch.no_grad():
            V.zero_().view(-1)[k] = 1.0
        dw = net.displacement()
        columns.append(torch.cat([dw[name].reshape(-1) for name, _ in model.named_parameters()]).detach())
    basis = torch.stack(columns, 1)
    lam = torch.diagonal(basis.T @ fisher @ basis)
    alive = lam > 0.5  # the logits' common shift changes no probability
    torch.testing.assert_close(lam[alive], torch.ones_like(lam[alive]), rtol=1e-5, atol=0)
    assert 1 <= int(alive.sum()) < len(lam)


def test_frozen_parameters_take_part():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    net = LinearisedNetwork.calibrated(model, torch.randn(9, 3))
    assert set(net.displacement()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_damping_out_of_range(damping):
    with pytest.raises(ValueError, match="damping"):
        LinearisedNetwork.calibrated(nn.Linear(3, 2), torch.randn(9, 3), damping=damping)


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="no parameters"):
        LinearisedNetwork.calibrated(nn.Flatten(), torch.randn(9, 3))
