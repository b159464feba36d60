"""Which passes an optimizer takes into account: accumulation, reuse, validation, checkpointing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.cases import (
    OPTIMIZER_CASES,
    OptimizerCase,
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    train,
)
from tests.oracles import tolerance
from torchgeom_optim.geometry.capture import private_pass
from torchgeom_optim.optimizers import layers

every_case = pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=repr)
with_statistics = pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.has_statistics], ids=repr)


@pytest.fixture(autouse=True)
def measure_on_all_samples(monkeypatch):
    """Not on some, which depend on the order: what is tested holds of what is measured on."""
    for name in ("_PROBED_ROWS", "_PROBED_IMAGES", "_PROBED_CALLS"):
        monkeypatch.setattr(layers, name, 64)


def double_net() -> nn.Module:
    return small_net(dtype=torch.float64)


def double_batches(number: int, num_samples: int = 8) -> list[Tensor]:
    return small_batches(number, num_samples, dtype=torch.float64)


# -- one large batch, however it is cut -------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [6, 1, 5]], ids=str)
@every_case
def test_gradient_accumulation_is_one_large_batch(case: OptimizerCase, sizes):
    whole, parts, batches = double_net(), double_net(), double_batches(4, num_samples=12)
    optimizer, other = case(whole), case(parts)
    train(whole, optimizer, batches)
    for x in batches:
        other.zero_grad()
        for part in x.split(sizes):
            (mean_loss(parts(part)) * len(part) / len(x)).backward()
        other.step()
    assert_same_parameters(parts, whole, **tolerance(condition=1e3))


@every_case
def test_gradient_accumulation_under_a_loss_that_sums(case: OptimizerCase):
    whole, parts, batches = double_net(), double_net(), double_batches(4, num_samples=12)
    settings = {"lr": 1e-4, **({"loss_reduction": "sum"} if case.has_statistics else {})}
    optimizer, other = case(whole, **settings), case(parts, **settings)
    train(whole, optimizer, batches, lambda y: mean_loss(y) * len(y))
    for x in batches:
        other.zero_grad()
        for part in x.split(5):
            (mean_loss(parts(part)) * len(part)).backward()
        other.step()
    assert_same_parameters(parts, whole, **tolerance(condition=1e3))


@every_case
def test_several_losses_in_one_backward_pass(case: OptimizerCase):
    one, two, (x,) = double_net(), double_net(), double_batches(1)
    for model, passes in ((one, 1), (two, 2)):
        optimizer = case(model)
        outputs = model(x)
        losses = [outputs.square().sum(-1).mean(), outputs.exp().sum(-1).mean()]
        if passes == 1:
            sum(losses).backward()
        else:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        optimizer.step()
    if not case.sees_output_grads:  # of which E[g^2] is that of the first pass to arrive
        assert_same_parameters(two, one, **tolerance(condition=1e3))


@every_case
def test_the_order_of_samples_does_not_matter(case: OptimizerCase):
    one, two, batches = double_net(), double_net(), double_batches(3)
    train(one, case(one), batches)
    train(two, case(two), [x.flip(0) for x in batches])
    assert_same_parameters(two, one, **tolerance(condition=1e3))


@every_case
def test_a_layer_called_twice_is_one_call_with_all_inputs(case: OptimizerCase):
    one, two = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    two.load_state_dict(one.state_dict())
    optimizer, other = case(one), case(two)
    for _ in range(3):
        a, b = torch.randn(2, 6, 4, dtype=torch.float64)
        for opt in (optimizer, other):
            opt.zero_grad()
        mean_loss(one(torch.stack([a, b], 1)).flatten(1)).backward()
        mean_loss(torch.cat([two(a), two(b)], 1)).backward()
        optimizer.step()
        other.step()
    if not case.sees_output_grads:  # a sequence of two counts as 12 samples, two calls as 6 each
        assert_same_parameters(two, one, **tolerance(condition=1e3))
    assert all(torch.isfinite(p).all() for p in two.parameters())


# -- passes that count for nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@every_case
def test_validation_between_the_steps_adds_nothing(case: OptimizerCase, gradients):
    plain, watched, batches = small_net(), small_net(), small_batches(4)
    optimizer = case(watched)
    losses = train(plain, case(plain), batches)
    for x, expected in zip(batches, losses, strict=True):
        kept = []
        for place in range(3):  # before the step, between the passes, between backward and step
            with torch.set_grad_enabled(gradients):
                kept.append(watched.eval()(100 * x))
            watched.train()
            if place == 0:
                optimizer.zero_grad()
            elif place == 1:
                loss = mean_loss(watched(x))
                loss.backward()
        optimizer.step()
        assert torch.equal(loss, expected)
    assert_same_parameters(watched, plain)


@every_case
def test_functional_transforms_and_private_passes_leave_no_trace(case: OptimizerCase):
    plain, watched, batches = small_net(), small_net(), small_batches(3)
    optimizer = case(watched)
    train(plain, case(plain), batches)
    for x in batches:
        optimizer.zero_grad()
        mean_loss(watched(x)).backward()
        parameters = dict(watched.named_parameters())
        call = lambda p, sample: mean_loss(torch.func.functional_call(watched, p, (sample[None],)))  # noqa: E731
        torch.func.vmap(torch.func.grad(call), in_dims=(None, 0))(parameters, 100 * x)
        torch.func.jvp(lambda z: watched(z), (x,), (x,))
        with private_pass():
            torch.autograd.grad(mean_loss(watched(100 * x)), list(parameters.values()))
        optimizer.step()
    assert_same_parameters(watched, plain)


@every_case
def test_a_pass_that_is_differentiated_twice_counts_once(case: OptimizerCase):
    """As for the gradient with respect to the inputs that a gradient penalty takes."""
    one, two, batches = double_net(), double_net(), double_batches(2)
    optimizer, other = case(one), case(two)
    for x in batches:
        x = x.requires_grad_()
        for model, opt in ((one, optimizer), (two, other)):
            opt.zero_grad()
            loss = mean_loss(model(x))
            if model is two:
                torch.autograd.grad(loss, x, create_graph=True)
            loss.backward(retain_graph=model is two)
            if model is two:
                grads = [p.grad.clone() for p in model.parameters()]
                loss.backward()
                for p, grad in zip(model.parameters(), grads, strict=True):
                    p.grad = grad
            opt.step()
    assert_same_parameters(two, one, **tolerance(condition=1e3))


@every_case
def test_gradients_from_autograd_grad(case: OptimizerCase):
    one, two, batches = small_net(), small_net(), small_batches(3)
    train(one, case(one), batches)
    optimizer = case(two)
    for x in batches:
        parameters = list(two.parameters())
        grads = torch.autograd.grad(mean_loss(two(x)), parameters)
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        optimizer.step()
    assert_same_parameters(two, one)


# -- layers as networks have them --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 4), (3, 5, 4)], ids=str)
@every_case
def test_in_place_activations(case: OptimizerCase, shape):
    def net(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.LeakyReLU(0.1, inplace), nn.Linear(5, 3)]
        return nn.Sequential(*layers)

    one, two, batches = net(False), net(True), [torch.randn(shape) for _ in range(3)]
    train(one, case(one), batches)
    train(two, case(two), batches)
    assert_same_parameters(two, one)


@every_case
def test_tensor_hooks_of_the_user_come_first(case: OptimizerCase):
    """A hook that scales the gradient at a layer's output acts like a scaled loss."""
    one, two, (x,) = nn.Linear(4, 3).double(), nn.Linear(4, 3).double(), [torch.randn(6, 4, dtype=torch.float64)]
    two.load_state_dict(one.state_dict())
    for model in (one, two):
        optimizer = case(model)
        y = model(x)
        if model is two:
            y.register_hook(lambda grad: 3 * grad)
        (mean_loss(y) * (3 if model is one else 1)).backward()
        optimizer.step()
    assert_same_parameters(two, one, **tolerance())


class Blocks(nn.Module):
    """Blocks that can be recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None, *, reuse: bool = True) -> None:
        super().__init__()
        self.reuse = reuse
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, self.blocks[1]] if self.reuse else self.blocks:  # one of them twice
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@every_case
def test_activation_checkpointing_changes_nothing(case: OptimizerCase, reentrant, autocast):
    # Nested backward passes look like gradient accumulation: N of Eq. (5) would then count a reused block twice.
    reuse = not (reentrant and case.name == "second_order")

    def run(reentrant: bool | None) -> nn.Module:
        torch.manual_seed(0)
        model = Blocks(reentrant, reuse=reuse)
        # Which layers lie in a row does not show in the graph of a reentrant checkpoint.
        optimizer = case(model, **({"chain_length": 4} if "trust_radius" in case.kwargs else {}))
        for _ in range(4):
            x = torch.randn(16, 6, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = model(x)
            optimizer.zero_grad()
            mean_loss(outputs).backward()
            optimizer.step()
        return model

    # The calls are pooled in another order; torch adds the gradients of a reused bf16 weight in bf16 or in float32.
    close = {"rtol": 1e-2, "atol": 2e-3} if autocast and reentrant else {"rtol": 1e-5, "atol": 1e-6}
    assert_same_parameters(run(reentrant), run(None), **close)


@pytest.mark.parametrize("reentrant", [None, False, True])
@with_statistics
def test_activation_checkpointing_still_frees_the_activations(case: OptimizerCase, reentrant):
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    optimizer = case(block)
    inner: list[weakref.ref[Tensor]] = []  # inputs of the second layer
    block[1].register_forward_hook(lambda _, args, y: inner.append(weakref.ref(y)))
    x = torch.randn(4, 6, requires_grad=True)
    outputs = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
    assert (inner[0]() is not None) == (reentrant is None)
    mean_loss(outputs).backward()
    optimizer.step()
    del outputs
    gc.collect()
    assert all(reference() is None for reference in inner)
