"""What every optimizer refuses: bad values, models that do not fit, a step without statistics. Nothing may change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.cases import (
    OPTIMIZER_CASES,
    OptimizerCase,
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    tensors_of,
    train,
)
from torchgeom_optim.optimizers import WhiteningSGD

every_case = pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=repr)
with_statistics = pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.has_statistics], ids=repr)
ONE_OF_EACH = list({case.optimizer: case for case in reversed(OPTIMIZER_CASES)}.values())
REFUSALS = [(case, refusal) for case in ONE_OF_EACH for refusal in case.refuses]
REFUSALS_ONCE = [(case, refusal) for case in ONE_OF_EACH for refusal in case.refuses_once]


@pytest.mark.parametrize(("case", "refusal"), [*REFUSALS, *REFUSALS_ONCE], ids=str)
def test_bad_values_are_refused(case: OptimizerCase, refusal):
    settings, error, message = refusal
    model = small_net()
    with pytest.raises(error, match=message):
        case(model, **settings)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("case", "refusal"), REFUSALS, ids=str)
def test_bad_values_of_a_group_are_refused(case: OptimizerCase, refusal):
    settings, error, message = refusal
    model = small_net()
    with pytest.raises(error, match=message):
        case([{"params": model.conv.parameters()}, {"params": model.head.parameters(), **settings}], model=model)

    optimizer = case(model.conv.parameters(), model=model)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": model.head.parameters(), **settings})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, small_batches(1))


@every_case
def test_a_message_says_where_the_value_stands(case: OptimizerCase):
    model = small_net()
    with pytest.raises(ValueError, match="group 1"):
        case([{"params": model.conv.parameters()}, {"params": model.head.parameters(), "lr": -1.0}], model=model)


@every_case
def test_a_model_must_own_the_parameters(case: OptimizerCase):
    model, other = small_net(), small_net(seed=2)
    with pytest.raises(ValueError, match="does not own"):
        case(model.parameters(), model=other)
    with pytest.raises(ValueError, match="does not own"):
        case([*model.parameters(), nn.Parameter(torch.zeros(2))], model=model)
    optimizer = case(model)
    with pytest.raises(ValueError, match="does not own"):
        optimizer.add_param_group({"params": other.parameters()})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, small_batches(1))


@every_case
def test_what_is_no_model_is_refused(case: OptimizerCase):
    model = small_net()
    with pytest.raises(TypeError, match=r"need a torch\.nn\.Module"):
        case(model.parameters(), model="net")
    with pytest.raises(ValueError, match="two models"):
        case(model, model=small_net())
    case(model, model=model)
    with pytest.raises(ValueError, match="empty parameter list"):
        case([])
    with pytest.raises(TypeError):
        case(torch.zeros(3))


@every_case
def test_a_parameter_may_stand_in_one_group_only(case: OptimizerCase):
    model = small_net()
    optimizer = case(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.head.weight]})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, small_batches(1))


@pytest.mark.parametrize("steps_before", [0, 2])
@with_statistics
def test_a_step_without_statistics_is_refused_and_changes_nothing(case: OptimizerCase, steps_before):
    model = small_net()
    optimizer = case(model)
    train(model, optimizer, small_batches(steps_before))
    optimizer.zero_grad()
    with torch.no_grad():
        model(small_batches(1)[0])  # a pass without gradients is none
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RuntimeError, match=r"'conv'.*no pass with gradients.*need.*[Ii]f the model is compiled.*rule='sgd'"
    ):
        optimizer.step()
    assert_same_parameters(model, before)
    assert {k: list(v) for k, v in optimizer.state_dict()["state"].items()} == {
        k: list(v) for k, v in state["state"].items()
    }
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), tensors_of(state), rtol=0, atol=0)
    train(model, optimizer, small_batches(1))  # and afterwards all is well


@with_statistics
def test_a_layer_that_is_never_called_is_named(case: OptimizerCase):
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called = nn.Linear(4, 4)
            self.used = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.called(x), self.used.weight, self.used.bias)

    model, x = Functional(), torch.randn(5, 4)
    optimizer = case(model)
    mean_loss(model(x)).backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"'used'.*rule='sgd'"):
        optimizer.step()
    assert_same_parameters(model, before)
    groups = [{"params": model.called.parameters()}, {"params": model.used.parameters(), "rule": "sgd"}]
    train(model, case(groups, model=model), [x])  # the advice helps


@with_statistics
def test_a_layer_that_sits_a_step_out_goes_by_what_is_known_of_it(case: OptimizerCase):
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), "one": nn.Linear(4, 2), "two": nn.Linear(4, 2)})
    optimizer = case(model)
    x = torch.randn(6, 4)

    def backward(head: str) -> None:
        mean_loss(model[head](model["trunk"](x))).backward()

    backward("one")
    before = copy.deepcopy(model["two"])
    optimizer.step()  # head two has no gradient
    assert_same_parameters(model["two"], before)
    optimizer.zero_grad(set_to_none=False)
    backward("two")
    before = copy.deepcopy(model["two"])
    optimizer.step()  # head one has a gradient of zeros, and no new inputs
    assert not torch.equal(model["two"].weight, before.weight)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.has_statistics], ids=repr)
def test_a_batch_with_gradients_that_are_not_finite_is_refused_and_changes_nothing(case: OptimizerCase, value):
    batches = small_batches(4)
    plain, model = small_net(), small_net()
    optimizer, other = case(model), case(plain)
    train(plain, other, batches)
    train(model, optimizer, batches[:2])
    before = tensors_of([model.state_dict(), optimizer.state_dict()])
    bad = batches[2].clone()
    bad[3, 1, 2, 2] = value
    with pytest.raises(FloatingPointError, match=r"got gradients.*need finite.*Nothing was changed"):
        train(model, optimizer, [bad])
    torch.testing.assert_close(tensors_of([model.state_dict(), optimizer.state_dict()]), before, rtol=0, atol=0)
    train(model, optimizer, batches[2:])  # as if there had been no such batch
    assert_same_parameters(model, plain)


@pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.optimizer is WhiteningSGD][:3], ids=repr)
def test_whoever_wants_it_may_step_along_gradients_that_are_not_finite(case: OptimizerCase):
    model = small_net()
    optimizer = case(model, error_if_nonfinite=False)
    train(model, optimizer, [torch.full_like(small_batches(1)[0], torch.inf)])
    assert not all(p.isfinite().all() for p in model.parameters())


@every_case
def test_what_is_no_checkpoint_is_refused(case: OptimizerCase):
    model = small_net()
    optimizer = case(model)
    train(model, optimizer, small_batches(1))
    before = tensors_of(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"got a dict with the keys \['shift'.*need.*state_dict\(\).*Nothing was"):
        optimizer.load_state_dict(model.state_dict())
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), before, rtol=0, atol=0)
