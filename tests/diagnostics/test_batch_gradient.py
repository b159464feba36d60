from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests import oracles
from tests.zoo import ZOO, Case
from torchgeom_optim.diagnostics.batch_gradient import BatchGradient
from torchgeom_optim.geometry.per_sample import Batch

CROSS_ENTROPY = nn.CrossEntropyLoss()
SMALL = [case for case in ZOO if case.name in ("mlp", "tied_linear", "transformer", "parametrized", "bare_parameter")]


def gradient_of(case: Case, loss_fn=CROSS_ENTROPY, num_samples=4, **options):
    model = case.model()
    x, y = case.batch(num_samples)
    return model, x, y, BatchGradient(model, loss_fn, Batch(x, y), **options)


@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_it_is_the_mean_of_the_samples_gradients(case):
    model, x, y, gradient = gradient_of(case)
    expected = oracles.per_sample_gradients(model, CROSS_ENTROPY, x, y)
    h = gradient()
    assert h.keys() == expected.keys()
    for name, rows in expected.items():
        assert_close(h[name], rows.mean(0), **oracles.tolerance(condition=100))


@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_samples_and_reductions(case):
    model, x, y, gradient = gradient_of(case)
    expected = oracles.per_sample_gradients(model, CROSS_ENTROPY, x, y)
    for i, h in zip((2, 0), gradient.of_samples((2, 0)), strict=True):
        for name, rows in expected.items():
            assert_close(h[name], rows[i], **oracles.tolerance(condition=100))
    h = gradient()
    for loss_fn in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="none")):
        other = BatchGradient(model, loss_fn, Batch(x, y))
        for name, value in other().items():
            assert_close(value, h[name], **oracles.tolerance(condition=100))
        for name, value in other.of_samples([1])[0].items():
            assert_close(value, expected[name][1], **oracles.tolerance(condition=100))
    assert_close(gradient.mean_loss(), CROSS_ENTROPY(model(x), y).detach(), **oracles.tolerance())
    assert gradient.num_outputs() == 3


@pytest.mark.parametrize("case", SMALL, ids=repr)
def test_moved_weights(case):
    model, x, y, gradient = gradient_of(case)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shift = {name: 0.1 * torch.randn_like(p) for name, p in named.items()}
    moved = gradient(shift)
    with torch.no_grad():
        for name, p in named.items():
            p.add_(shift[name])
    expected = torch.autograd.grad(CROSS_ENTROPY(model(x), y), list(named.values()), materialize_grads=True)
    for value, name in zip(expected, named, strict=True):
        assert_close(moved[name], value, **oracles.tolerance(condition=100))


def test_products_with_the_hessian():
    case = next(case for case in ZOO if case.name == "mlp")
    model, x, y, gradient = gradient_of(case)
    parameters = list(model.parameters())
    first = torch.autograd.grad(CROSS_ENTROPY(model(x), y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    H = oracles.jacobian(lambda i: flat, 1, parameters)
    v = torch.randn(len(H), dtype=torch.float64)
    Hv, h = gradient.with_hessian(lambda product, h: (product(v), h))
    assert_close(Hv, H @ v, **oracles.tolerance(condition=100))
    assert_close(h, flat.detach(), **oracles.tolerance())
    linear = BatchGradient(nn.Linear(2, 1), lambda outputs: outputs.mean(), Batch(torch.ones(3, 2)), reduction="mean")
    assert linear.with_hessian(lambda product, h: product(h)).tolist() == [0.0, 0.0, 0.0]


def test_input_gradients():
    case = next(case for case in ZOO if case.name == "mlp")
    model, x, y, gradient = gradient_of(case)
    (found,) = gradient.of_inputs()
    for i in range(len(x)):
        one = x[i : i + 1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(CROSS_ENTROPY(model(one), y[i : i + 1]), one)
        assert_close(found[i : i + 1], expected, **oracles.tolerance(condition=100))
    assert not x.requires_grad
    tokens = next(case for case in ZOO if case.name == "tied_embedding")
    with pytest.raises(ValueError, match=r"torch\.int64: a gradient needs floating point"):
        gradient_of(tokens)[3].of_inputs()


def test_batch_statistics_or_frozen_ones():
    case = next(case for case in ZOO if case.name == "cnn3d")
    model, x, y, gradient = gradient_of(case)
    evaluated = gradient()
    model.train()
    frozen = BatchGradient(model, CROSS_ENTROPY, Batch(x, y), freeze_statistics=True)()
    coupled = gradient()
    parameters = dict(model.named_parameters())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected = torch.autograd.grad(CROSS_ENTROPY(model(x), y), list(parameters.values()))
    for name, value in zip(parameters, expected, strict=True):
        assert_close(frozen[name], evaluated[name], **oracles.tolerance(condition=100))
        assert_close(coupled[name], value, **oracles.tolerance(condition=100))
    assert not torch.allclose(coupled["0.weight"], evaluated["0.weight"])
    assert any(not torch.equal(b, buffers[name]) for name, b in model.named_buffers())  # the loop's own pass


def test_one_dropout_mask_and_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 3))
    gradient = BatchGradient(model, CROSS_ENTROPY, Batch(torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])))
    state = torch.get_rng_state()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first, second = gradient(), gradient()
    gradient.of_samples([0, 1])
    gradient.of_inputs()
    gradient.with_hessian(lambda product, h: product(h))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    torch.rand(1)
    assert not torch.equal(gradient()["3.weight"], first["3.weight"])


def test_refusals():
    batch = Batch(torch.ones(3, 2))
    with pytest.raises(ValueError, match="reduction=None"):
        BatchGradient(nn.Linear(2, 1), lambda outputs: outputs.mean(), batch)()
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="keep no running statistics"):
        BatchGradient(model, lambda outputs: outputs.sum(1), batch, freeze_statistics=True)()
