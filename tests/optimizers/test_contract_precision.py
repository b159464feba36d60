"""Mixed precision and compiled models: the same training, or an error that says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

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

every_case = pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=repr)
with_statistics = pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.has_statistics], ids=repr)

# -- mixed precision ---------------------------------------------------------------------------------------------


@with_statistics
def test_statistics_under_autocast_are_taken_in_full_precision(case: OptimizerCase):
    model = small_net()
    optimizer = case(model)
    for x in small_batches(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x)
        mean_loss(outputs).backward()
        optimizer.step()
    for values in optimizer.state.values():
        assert {v.dtype for v in values.values() if isinstance(v, Tensor)} <= {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("case", [case for case in OPTIMIZER_CASES if case.has_statistics], ids=repr)
def test_a_step_taken_under_autocast_is_the_same_step(case: OptimizerCase):
    one, two = small_net(), small_net()
    for model in (one, two):
        optimizer = case(model)
        for x in small_batches(2):
            optimizer.zero_grad()
            mean_loss(model(x)).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=model is two):
                optimizer.step()
    assert_same_parameters(two, one)


@pytest.mark.parametrize("reset", ["optimizer", "model"])
@every_case
def test_a_step_that_the_scaler_skips_leaves_no_trace(case: OptimizerCase, reset):
    clean, scaled = small_net(), small_net()
    batches = small_batches(4)
    train(clean, case(clean), batches)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = case(scaled, **({"loss_scale": scaler.get_scale} if case.sees_output_grads else {}))
    scales = set()
    zero_grad = {"optimizer": optimizer.zero_grad, "model": scaled.zero_grad}[reset]

    def attempt(x: Tensor) -> None:
        zero_grad()
        scaler.scale(mean_loss(scaled(x))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        scales.add(scaler.get_scale())

    for number, x in enumerate(batches):
        if number in (0, 2):
            before = tensors_of([optimizer.state_dict(), scaled.state_dict()])
            attempt(torch.full_like(x, torch.inf))
            after = tensors_of([optimizer.state_dict(), scaled.state_dict()])
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        attempt(x)
    assert len(scales) > 1
    assert_same_parameters(scaled, clean, rtol=1e-5, atol=1e-6)


# -- compiled models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", [OPTIMIZER_CASES[1], OPTIMIZER_CASES[2]], ids=repr)
def test_a_compiled_model_trains_as_an_eager_one(case: OptimizerCase, backend):
    torch.compiler.reset()
    eager, batches = small_net(), small_batches(5)
    other = small_net()
    compiled = torch.compile(other, backend=backend)
    losses = train(eager, case(eager), batches)
    optimizer = case(compiled)
    first = train(compiled, optimizer, batches[:3])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # sets its hooks anew
    torch.testing.assert_close([*first, *train(compiled, optimizer, batches[3:])], losses)
    assert_same_parameters(other, eager, rtol=1e-5, atol=1e-6)
    assert [row.name for row in optimizer.report()] == [name for name, _ in other.named_parameters()]


@pytest.mark.parametrize("case", [OPTIMIZER_CASES[0]], ids=repr)
def test_a_model_that_was_compiled_too_early_is_not_trained_by_another_rule(case: OptimizerCase):
    torch.compiler.reset()
    model, (x,) = small_net(), small_batches(1)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    optimizer = case(compiled)
    before = copy.deepcopy(model)
    mean_loss(compiled(x)).backward()
    with pytest.raises(RuntimeError, match=r"compiled.*torch\.compiler\.reset"):
        optimizer.step()
    assert_same_parameters(model, before)
    torch.compiler.reset()  # the advice helps
    train(compiled, optimizer, [x])
    assert not torch.equal(model.conv.weight, before.conv.weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", list({case.optimizer: case for case in OPTIMIZER_CASES[-3::-1]}.values()), ids=repr)
def test_a_compiled_step_is_the_step(case: OptimizerCase):
    """Compiled in parts: what looks at the calls of layers, and what asks for a number, stays outside of the graphs."""
    torch.compiler.reset()
    eager, other, batches = small_net(), small_net(), small_batches(3)
    train(eager, case(eager), batches)
    optimizer = case(other)
    step = torch.compile(optimizer.step, backend="eager")
    for x in batches:
        optimizer.zero_grad()
        mean_loss(other(x)).backward()
        step()
    assert_same_parameters(other, eager, rtol=1e-5, atol=1e-6)
