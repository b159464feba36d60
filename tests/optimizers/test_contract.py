"""What a user of torch.optim expects of every optimizer: schedulers, groups, good manners."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.cases import (
    OPTIMIZER_CASES,
    OptimizerCase,
    SmallNet,
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    train,
)
from tests.oracles import tolerance
from torchgeom_optim.geometry import unit_trust

every_case = pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=repr)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    mean_loss(model(x)).backward()


# -- schedulers ---------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "warm up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 2, cycle_momentum=False),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@every_case
def test_schedulers_do_what_they_do_to_sgd(case: OptimizerCase, name, tensor_lr):
    settings = {"momentum": 0.9, "dampening": 0.0, "nesterov": False}
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    model, twin = small_net(), nn.Linear(2, 1)
    optimizer = case(model, lr=lr, **settings)
    sgd = torch.optim.SGD(twin.parameters(), copy.deepcopy(lr), **settings)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](sgd)
    for x in small_batches(6):
        train(model, optimizer, [x])
        sgd.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "plateau" else []))
        for key in ("lr", "momentum"):
            assert float(optimizer.param_groups[0][key]) == pytest.approx(float(sgd.param_groups[0][key]), rel=1e-12)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@every_case
def test_the_learning_rate_scales_the_step(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unit_trust, "_TAKEN_BACK", 0.0)  # which is of second order in lr
    moves = []
    for lr in (0.01, torch.tensor(0.02)):
        model = small_net(dtype=torch.float64)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = case(model, lr=0.01)  # a bound goes by what the learning rate is then
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer, small_batches(1, dtype=torch.float64))
        moves.append([after.detach() - p for after, p in zip(model.parameters(), before, strict=True)])
    torch.testing.assert_close([2 * m for m in moves[0]], moves[1], rtol=1e-6, atol=1e-12)  # lr is a float32 tensor


# -- groups -------------------------------------------------------------------------------------------------------


@every_case
def test_named_groups_with_values_of_their_own(case: OptimizerCase):
    model = small_net(dtype=torch.float64)
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "lr": 0.01},
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() <= 1], "lr": 0.0, "weight_decay": 0.0},
    ]
    optimizer = case(groups, model=model)
    assert optimizer.param_groups[0]["param_names"] == ["conv.weight", "hidden.weight", "head.weight"]
    before = copy.deepcopy(model)
    train(model, optimizer, small_batches(2, dtype=torch.float64))
    moved = {
        name: not torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    assert moved == {name: p.dim() > 1 for name, p in model.named_parameters()}


@every_case
def test_groups_make_no_difference_where_their_values_are_equal(case: OptimizerCase):
    one, two, batches = *(small_net(dtype=torch.float64) for _ in range(2)), small_batches(4, dtype=torch.float64)
    train(one, case(one), batches)
    by_kind = [
        {"params": [p for p in two.parameters() if p.dim() > 1]},
        {"params": [p for p in two.parameters() if p.dim() <= 1]},
    ]
    train(two, case(by_kind, model=two), batches)
    assert_same_parameters(two, one, **tolerance())


@every_case
def test_layers_added_later_are_stepped_as_if_there_from_the_start(case: OptimizerCase):
    one, two, batches = *(small_net(dtype=torch.float64) for _ in range(2)), small_batches(4, dtype=torch.float64)
    train(one, case(one), batches)
    optimizer = case(two.conv.parameters(), model=two)
    optimizer.add_param_group({"params": [two.shift, *two.norm.parameters(), *two.hidden.parameters()]})
    optimizer.add_param_group({"params": two.head.parameters()})
    train(two, optimizer, batches)
    assert_same_parameters(two, one, **tolerance())

    grown = nn.Sequential(two)
    optimizer = case(grown)
    train(grown, optimizer, batches[:1])
    grown.append(nn.Linear(3, 3).double())  # a layer that was not there
    optimizer.add_param_group({"params": grown[1].parameters()})
    before = copy.deepcopy(grown[1])
    train(grown, optimizer, batches[1:])
    assert all(not torch.equal(p, q) for p, q in zip(grown[1].parameters(), before.parameters(), strict=True))


# -- manners ------------------------------------------------------------------------------------------------------


@every_case
def test_gradients_modes_and_random_state_are_left_alone(case: OptimizerCase):
    model = small_net()
    model.norm.eval()
    optimizer = case(model)
    for x in small_batches(2):
        backward(model, optimizer, x)
        grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
        rng = torch.random.get_rng_state()
        modes = [m.training for m in model.modules()]
        optimizer.step()
        assert torch.equal(torch.random.get_rng_state(), rng)
        assert [m.training for m in model.modules()] == modes
        assert torch.is_grad_enabled()
        for p, (grad, value) in zip(model.parameters(), grads, strict=True):
            assert p.grad is grad
            torch.testing.assert_close(grad, value, rtol=0, atol=0)
            assert p.grad_fn is None
            assert p.is_leaf


@every_case
def test_the_forward_and_backward_pass_stay_as_they_are(case: OptimizerCase):
    model, twin = small_net(), small_net()
    optimizer = case(model)
    x = small_batches(1)[0]
    backward(model, optimizer, x)
    mean_loss(twin(x)).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.is_linear], ids=repr)
def test_the_step_follows_the_gradients_that_it_finds(case: OptimizerCase):
    """Clipping, and anything else that edits ``p.grad``, works as with SGD: the direction is linear in them."""
    moves = []
    for factor in (1.0, 0.25):
        model = small_net(dtype=torch.float64)
        optimizer = case(model, weight_decay=0.0)
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, optimizer, small_batches(1, dtype=torch.float64)[0])
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        nn.utils.clip_grad_norm_(model.parameters(), factor * float(norm))
        optimizer.step()
        moves.append([after.detach() - p for after, p in zip(model.parameters(), before, strict=True)])
    torch.testing.assert_close([m / 4 for m in moves[0]], moves[1], rtol=1e-4, atol=1e-12)  # clipping adds 1e-6


@every_case
def test_parameters_without_gradient_stay(case: OptimizerCase):
    model = small_net()
    model.hidden.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = case(model)
    train(model, optimizer, small_batches(3))
    moved = {
        name: not torch.equal(p, q)
        for (name, p), q in zip(model.named_parameters(), before.named_parameters(), strict=False)
        for q in [dict(before.named_parameters())[name]]
    }
    assert moved == {name: p.requires_grad for name, p in model.named_parameters()}
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient: nothing to do, nothing to complain about


@every_case
def test_closures(case: OptimizerCase):
    model, twin, batches = small_net(), small_net(), small_batches(3)
    optimizer, other = case(model), case(twin)
    losses = train(twin, other, batches)
    for x, expected in zip(batches, losses, strict=True):

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = mean_loss(model(x))
            loss.backward()
            return loss

        with torch.no_grad():
            torch.testing.assert_close(optimizer.step(closure).detach(), expected, rtol=0, atol=0)
    assert_same_parameters(model, twin)


@every_case
def test_maximize_climbs_what_the_others_descend(case: OptimizerCase):
    down, up = (small_net(dtype=torch.float64) for _ in range(2))
    batches = small_batches(3, dtype=torch.float64)
    train(down, case(down), batches)
    train(up, case(up, maximize=True), batches, lambda y: -mean_loss(y))
    assert_same_parameters(up, down, **tolerance())


@every_case
def test_step_hooks_are_called(case: OptimizerCase):
    model: SmallNet = small_net()
    optimizer = case(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, small_batches(1))
    assert seen == ["before", "after"]
