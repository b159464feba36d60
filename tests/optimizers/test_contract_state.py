"""What a user of torch.optim expects of every optimizer: saving, loading and copying."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

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
from torchgeom_optim.optimizers.metric_grid import FINEST_BLOCK
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

DTYPES = [torch.float64, torch.float32, torch.bfloat16]

every_case = pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=repr)


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    mean_loss(model(x)).backward()


# -- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_a_resumed_run_is_the_same_run_bit_for_bit(case: OptimizerCase, dtype):
    model, batches = small_net(dtype=dtype), small_batches(8, dtype=dtype)
    optimizer = case(model)
    train(model, optimizer, batches[:4])
    resumed = small_net(seed=5, dtype=dtype)
    resumed.load_state_dict(saved(model.state_dict()))
    other = case(resumed, lr=0.5)
    other.load_state_dict(saved(optimizer.state_dict()))
    losses = train(model, optimizer, batches[4:])
    torch.testing.assert_close(train(resumed, other, batches[4:]), losses, rtol=0, atol=0)
    assert_same_parameters(resumed, model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@every_case
def test_loading_between_the_passes_does_not_forget_the_first(case: OptimizerCase):
    models = [small_net(), small_net()]
    *earlier, last = small_batches(3)
    for model, loads in zip(models, (False, True), strict=True):
        optimizer = case(model)
        train(model, optimizer, earlier)
        optimizer.zero_grad()
        loss = mean_loss(model(last))
        if loads:
            optimizer.load_state_dict(saved(optimizer.state_dict()))
        loss.backward()
        optimizer.step()
    assert_same_parameters(*models)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.has_statistics], ids=repr)
def test_statistics_of_coarse_parameters_are_kept_in_float32(case: OptimizerCase, dtype):
    model = small_net(dtype=dtype)
    optimizer = case(model)
    train(model, optimizer, small_batches(2, dtype=dtype))
    other = case(model)
    other.load_state_dict(saved(optimizer.state_dict()))
    for state in (optimizer.state, other.state):
        kept = {
            key: value.dtype
            for values in state.values()
            for key, value in values.items()
            if isinstance(value, torch.Tensor) and "momentum" not in key
        }
        assert set(kept.values()) <= {torch.float32}, kept


@every_case
def test_load_state_dict_does_not_modify_what_it_is_given(case: OptimizerCase):
    model = small_net()
    optimizer = case(model)
    train(model, optimizer, small_batches(2))
    given = optimizer.state_dict()
    before, groups = tensors_of(given), copy.deepcopy(given["param_groups"])
    keys = {index: list(values) for index, values in given["state"].items()}
    case(small_net()).load_state_dict(given)
    assert {index: list(values) for index, values in given["state"].items()} == keys
    assert given["param_groups"] == groups
    torch.testing.assert_close(tensors_of(given), before, rtol=0, atol=0)


@every_case
def test_checkpoint_of_another_model_is_refused_and_nothing_changes(case: OptimizerCase):
    def net(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    x = torch.randn(6, 4)
    ours, other = net(5), net(7)
    optimizer, foreign = case(ours, momentum=0.9), case(other, momentum=0.9)
    for model, opt in ((ours, optimizer), (other, foreign)):
        train(model, opt, [x])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"shape.*another model"):
        optimizer.load_state_dict(foreign.state_dict())
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), tensors_of(before), rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    short = optimizer.state_dict()
    short["param_groups"] = [{**short["param_groups"][0], "params": [0]}]
    with pytest.raises(ValueError, match="size of"):  # torch's own message
        optimizer.load_state_dict(short)
    train(ours, optimizer, [x])


@pytest.mark.parametrize(("metric", "block"), FINEST_BLOCK.items())
def test_statistics_alone_tell_another_model(metric, block):
    ours, other, same, x = nn.Linear(4, 5), nn.Linear(4, 3), nn.Linear(4, 5), torch.randn(6, 4)
    build = partial(BlockNaturalGradient, lr=0.01, metric=metric, block=block)
    optimizer, foreign, fitting = build(ours), build(other), build(same)
    for model, opt in ((ours, optimizer), (other, foreign), (same, fitting)):
        train(model, opt, [x])
    before = tensors_of(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"shape.*another model"):
        optimizer.load_state_dict(foreign.state_dict())
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), before, rtol=0, atol=0)
    optimizer.load_state_dict(fitting.state_dict())


@every_case
def test_checkpoint_of_a_newer_version_is_refused(case: OptimizerCase):
    optimizer = case(small_net())
    given = optimizer.state_dict()
    given["param_groups"][0]["state_version"] = 999
    with pytest.raises(ValueError, match="version 999"):
        optimizer.load_state_dict(given)


# -- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_case
def test_model_and_optimizer_copy_together_and_go_on_alike(case: OptimizerCase, how):
    model, batches = small_net(), small_batches(6)
    optimizer = case(model)
    train(model, optimizer, batches[:3])
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    losses = train(model, optimizer, batches[3:])
    torch.testing.assert_close(train(twin, other, batches[3:]), losses, rtol=0, atol=0)
    assert_same_parameters(twin, model)


@every_case
def test_copies_may_be_made_between_backward_and_step(case: OptimizerCase):
    model, batches = small_net(), small_batches(3)
    optimizer = case(model)
    train(model, optimizer, batches[:1])
    backward(model, optimizer, batches[1])
    for twin, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        reference, original = copy.deepcopy((model, optimizer))
        for net in (twin, reference):  # torch copies parameters without their gradients
            for p, q in zip(net.parameters(), model.parameters(), strict=True):
                p.grad = q.grad.clone()
        original.step()
        other.step()
        assert_same_parameters(twin, reference)
    optimizer.step()
    assert_same_parameters(twin, model)
    torch.testing.assert_close(train(twin, other, batches[2:]), train(model, optimizer, batches[2:]), rtol=0, atol=0)
    assert_same_parameters(twin, model)


@every_case
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(case: OptimizerCase):
    model, batches = small_net(), small_batches(2)
    optimizer = case(model)
    train(model, optimizer, batches[:1])
    other = copy.deepcopy(optimizer)
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert mine.isdisjoint(id(p) for group in other.param_groups for p in group["params"])
    before = tensors_of(other.state_dict())
    train(model, optimizer, batches[1:])
    torch.testing.assert_close(tensors_of(other.state_dict()), before, rtol=0, atol=0)


@every_case
def test_a_copy_of_the_model_alone_is_free(case: OptimizerCase):
    model, batches = small_net(), small_batches(3)
    optimizer = case(model)
    train(model, optimizer, batches[:1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = tensors_of(optimizer.state_dict())
        train(twin, torch.optim.SGD(twin.parameters(), 0.01), batches[1:])
        torch.testing.assert_close(tensors_of(optimizer.state_dict()), before, rtol=0, atol=0)
        assert twin(batches[0]).shape == (8, 3)
        train(twin, case(twin), batches[1:])  # and can get an optimizer of its own
    optimizer.zero_grad()
    if case.has_statistics:  # what the copies saw is not taken for a pass of this model
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError):
            optimizer.step()


@every_case
def test_hooks_go_with_the_optimizer(case: OptimizerCase):
    model = small_net()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    optimizer = case(model)
    train(model, optimizer, small_batches(1))
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    assert hooks() > 0 or not case.has_statistics
    del optimizer, scheduler
    gc.collect()
    assert hooks() == 0
