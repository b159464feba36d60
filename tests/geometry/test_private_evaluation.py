"""A guest in the user's program: evaluated as in evaluation mode, and nothing is left changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.geometry.oracles_jacobian import (
    CLOSE,
    data,
    small_mlp,
)
from tests.oracles import tolerance
from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.jacobian import Jacobian


def test_leaves_no_trace() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    model = nn.utils.spectral_norm(model[5]) and model
    x = torch.randn(4, 1, 4, 4).double()
    model.train()
    model[3].eval()
    model(x).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    attribute = model[5].weight
    modes = [m.training for m in model.modules()]
    seen: list[Tensor] = []
    random = torch.get_rng_state()
    with Capture([model[0]], lambda module, x, y: seen.append), torch.no_grad():
        J = Jacobian(model, DataLoader(x, batch_size=2), of="sqrt_probabilities")
        J.gram()
        J @ torch.ones(J.shape[1]).double()
        J.T @ torch.ones(J.shape[0]).double()
        assert not torch.is_grad_enabled()
    assert seen == []
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [m.training for m in model.modules()]
    assert model[5].weight is attribute
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_training_modes_are_evaluated_as_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, _ = data()
    training = Jacobian(model.train(), x).dense()
    torch.testing.assert_close(training, Jacobian(model.eval(), x).dense(), rtol=0, atol=0)
    torch.testing.assert_close(training, Jacobian(model, x, keep_modes=True).dense(), rtol=0, atol=0)


def test_modes_are_put_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().train()
    with pytest.raises(RuntimeError):
        Jacobian(model, torch.randn(4, 7).double())
    assert all(m.training for m in model.modules())


def test_autocast_of_the_caller_is_not_felt() -> None:
    model, (x, _) = small_mlp().float(), data()
    expected = Jacobian(model, x.float()).gram()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(Jacobian(model, x.float()).gram(), expected, **tolerance(torch.float32, 10))


def test_inference_mode_of_the_caller_is_not_felt() -> None:
    model = small_mlp()
    expected = Jacobian(model, data()[0]).dense()
    with torch.inference_mode():
        J = Jacobian(model, data()[0])
        v, u = torch.randn(J.shape[1], 2).double(), torch.randn(J.shape[0], 2).double()
        results = J @ v, J.T @ u, J.gram()
    for got, wanted in zip(results, (expected @ v, expected.T @ u, expected @ expected.T), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_compiled_model_runs_uncompiled() -> None:
    model, (x, _) = small_mlp(), data()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(Jacobian(compiled, x).dense(), Jacobian(model, x).dense(), rtol=0, atol=0)
