"""Capture hands over what a pass computes anyway, once per call, and changes nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo import ZOO, Case
from torchgeom_optim.geometry.capture import Capture, private_pass

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)


class Record:
    """Every call, and the gradients that came back for it."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.grads: list[tuple[int, Tensor]] = []

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor):
        number = len(self.calls)
        self.calls.append((module, x, y))
        return lambda grad: self.grads.append((number, grad))


def run(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(0)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_watching_changes_nothing(case: Case, training):
    model = case.model().train(training)
    inputs, targets = case.batch()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    loss, grads = run(model, inputs, targets)
    after = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    record = Record()
    with Capture([m for m in model.modules() if isinstance(m, LAYERS)], record):
        watched_loss, watched_grads = run(model, inputs, targets)
    torch.testing.assert_close(watched_loss, loss, rtol=0, atol=0)
    torch.testing.assert_close(
        {k: v for k, v in watched_grads.items() if v is not None},
        {k: v for k, v in grads.items() if v is not None},
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(dict(model.named_buffers()), after, rtol=0, atol=0)
    assert model.training == training
    numbers = [number for number, _ in record.grads]
    assert sorted(set(numbers)) == sorted(numbers)  # each call once
    for number, grad in record.grads:
        assert grad.shape == record.calls[number][2].shape
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, LAYERS))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)),
        (nn.Linear(4, 3), (2, 5, 4)),
        (nn.Linear(4, 3, bias=False), (2, 5, 4)),
        (nn.Linear(4, 3), (4,)),
        (nn.Conv2d(2, 3, 2), (4, 2, 3, 3)),
        (nn.Conv2d(2, 3, 2), (2, 3, 3)),
        (nn.Conv1d(2, 3, 2), (2, 5)),
        (nn.LayerNorm(4), (5, 4)),
    ],
    ids=str,
)
def test_the_output_gradient_is_that_of_the_layers_own_output(layer, shape, inplace):
    """Whatever happens to the output afterwards, in place or not."""
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    y = layer(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad((y.relu() ** 3).sum(), y)
    record = Record()
    with Capture([layer], record):
        output = layer(x)
        (output.relu_() if inplace else output.relu()).pow(3).sum().backward()
    ((_, seen_x, _),) = record.calls
    ((_, grad),) = record.grads
    assert seen_x is x
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-13)


def test_weights_in_place_through_a_slice():
    layer, x, record = nn.Linear(4, 3), torch.randn(2, 5, 4), Record()
    with Capture([layer], record):
        output = layer(x)
        output[:, 0] *= 2
        output.sum().backward()
    ((_, grad),) = record.grads
    expected = torch.ones(2, 5, 3)
    expected[:, 0] = 2
    torch.testing.assert_close(grad, expected)


def test_keyword_inputs_and_hooks_of_others():
    layer, x, record = nn.Linear(4, 3), torch.randn(5, 4), Record()
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"input": 2 * kwargs["input"]}), with_kwargs=True
    )
    layer.register_forward_hook(lambda module, args, output: output + 1)
    with Capture([layer], record):
        layer(input=x).sum().backward()
    ((module, seen_x, seen_y),) = record.calls
    assert module is layer
    torch.testing.assert_close(seen_x, 2 * x)  # what the layer itself got and returned
    torch.testing.assert_close(seen_y, nn.functional.linear(2 * x, layer.weight, layer.bias))


def test_passes_that_are_not_reported():
    layer, x, record = nn.Linear(4, 3), torch.randn(5, 4), Record()
    capture = Capture([layer], record)
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    parameters = dict(layer.named_parameters())
    call = lambda p, sample: torch.func.functional_call(layer, p, (sample,)).sum()  # noqa: E731
    torch.func.vmap(torch.func.grad(call), in_dims=(None, 0))(parameters, x)
    torch.func.jacrev(call)(parameters, x)
    torch.func.jvp(lambda z: layer(z), (x,), (x,))
    with private_pass():
        layer(x).sum().backward()
    assert not record.calls
    with private_pass(capture):
        layer(x).sum().backward()
    assert len(record.calls) == 1
    capture.close()
    capture.close()
    layer(x)
    assert len(record.calls) == 1


def test_private_passes_nest_and_end_with_an_error():
    layer, x, outer, inner = nn.Linear(4, 3), torch.randn(5, 4), Record(), Record()
    with Capture([layer], outer) as one, Capture([layer], inner) as two:
        with private_pass(one):
            try:
                with private_pass(two):
                    layer(x)
                    raise ZeroDivisionError
            except ZeroDivisionError:
                layer(x)
        assert (len(outer.calls), len(inner.calls)) == (1, 1)
        layer(x)
        assert (len(outer.calls), len(inner.calls)) == (2, 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_gets_its_gradient_once(reentrant):
    layer, x, record = nn.Linear(4, 4), torch.randn(5, 4, requires_grad=True), Record()
    with Capture([layer], record):
        checkpoint(lambda z: layer(z).tanh(), x, use_reentrant=reentrant).sum().backward()
    assert len(record.grads) == 1


def test_a_gradient_comes_once_per_backward_pass():
    layer, x, record = nn.Linear(4, 4), torch.randn(5, 4), Record()
    with Capture([layer], record):
        loss = layer(x).pow(2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        layer(x)  # never differentiated
    assert [number for number, _ in record.grads] == [0, 0]


# -- lifetimes ---------------------------------------------------------------------------------------------------


class Owner:
    """Has a method for an observer, as an optimizer does."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        self.capture = Capture([module], self.on_call)

    def on_call(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        self.calls += 1


def test_hooks_go_when_the_owner_of_the_observer_goes():
    layer = nn.Linear(4, 3)
    owner = Owner(layer)
    layer(torch.zeros(1, 4))
    assert owner.calls == 1
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None
    assert not layer._forward_hooks


def test_hooks_go_with_the_capture():
    layer, record = nn.Linear(4, 3), Record()
    capture = Capture([layer], record)
    capture.add([other := nn.Linear(3, 3)])
    other(layer(torch.zeros(1, 4)))
    assert len(record.calls) == 2
    del capture
    gc.collect()
    assert not layer._forward_hooks
    assert not other._forward_hooks


def test_a_model_that_is_watched_copies_and_pickles_and_its_copies_are_silent():
    layer, record = nn.Linear(4, 3), Record()
    with Capture([layer], record):
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin(torch.zeros(1, 4)).sum().backward()
            assert not record.calls
            with Capture([twin], again := Record()):
                twin(torch.zeros(1, 4)).sum().backward()
            assert len(again.grads) == 1
        layer(torch.zeros(1, 4))
    assert len(record.calls) == 1


def test_no_activation_outlives_its_graph():
    layer = nn.Linear(4, 3)
    with Capture([layer], lambda module, x, y: lambda grad: None):
        y = layer(torch.zeros(1, 4))
        alive = weakref.ref(y)
        y.sum().backward()
        del y
        gc.collect()
        assert alive() is None
