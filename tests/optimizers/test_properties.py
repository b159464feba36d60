"""What the theory of the reparametrization promises, over drawn layers and scales; and rules that change."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.cases import whitening_without_bound
from tests.oracles import tolerance

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(6, 20), st.integers(0, 2**16))


def train(layer: nn.Module, inputs: list[Tensor], targets: list[Tensor], **settings) -> nn.Module:
    optimizer = whitening_without_bound(layer, **settings)
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        (layer(x) - y).square().sum(1).mean().backward()
        optimizer.step()
    return layer


def drawn(n: int, m: int, num_samples: int, steps: int = 5) -> tuple[nn.Linear, list[Tensor], list[Tensor]]:
    layer = nn.Linear(n, m).double()
    inputs = [torch.randn(num_samples, n, dtype=torch.float64) for _ in range(steps)]
    return layer, inputs, [torch.randn(num_samples, m, dtype=torch.float64) for _ in range(steps)]


@given(SHAPES, st.floats(-2, 2), st.floats(-3, 3), st.sampled_from([0.0, 0.9]))
def test_scale_and_shift_of_the_inputs_change_nothing(shape, log_scale, shift, momentum):
    n, m, num_samples, seed = shape
    torch.manual_seed(seed)
    layer, inputs, targets = drawn(n, m, num_samples)
    scale = 10**log_scale
    other = copy.deepcopy(layer)  # the same function of a x + b
    with torch.no_grad():
        other.weight /= scale
        other.bias -= shift * other.weight.sum(1)
    train(layer, inputs, targets, lr=0.1, momentum=momentum)
    train(other, [scale * x + shift for x in inputs], targets, lr=0.1, momentum=momentum)
    condition = 1e4 * (1 + abs(shift) / scale) ** 2
    torch.testing.assert_close(other(scale * inputs[0] + shift), layer(inputs[0]), **tolerance(condition=condition))


def test_plain_sgd_feels_the_scale_of_the_inputs():
    layer, inputs, targets = drawn(4, 3, 10)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight /= 3
    train(layer, inputs, targets, lr=0.1, rule="sgd")
    train(other, [3 * x for x in inputs], targets, lr=0.1, rule="sgd")
    assert not torch.allclose(other(3 * inputs[0]), layer(inputs[0]), rtol=1e-2)


@given(SHAPES)
def test_the_order_of_samples_and_of_inputs_changes_nothing(shape):
    n, m, num_samples, seed = shape
    torch.manual_seed(seed)
    layer, inputs, targets = drawn(n, m, num_samples)
    columns, rows = torch.randperm(n), torch.randperm(num_samples)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(layer.weight[:, columns])
    train(layer, inputs, targets, lr=0.1)
    train(other, [x[rows][:, columns] for x in inputs], [y[rows] for y in targets], lr=0.1)
    torch.testing.assert_close(other.weight, layer.weight[:, columns], **tolerance(condition=1e4))
    torch.testing.assert_close(other.bias, layer.bias, **tolerance(condition=1e4))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("rule", ["sgd", "fan_in", "whitening_second_order"])
def test_a_rule_that_is_changed_by_hand_is_followed_and_reported(rule):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    other = copy.deepcopy(model)
    x = torch.randn(8, 4, dtype=torch.float64)
    changed, fresh = whitening_without_bound(model, 0.1), whitening_without_bound(other, 0.1, rule=rule)
    changed.param_groups[0]["rule"] = rule
    for step in range(3):
        one_step(model, changed, x + step)
        one_step(other, fresh, x + step)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert {row.rule for row in changed.report()} == {rule}


def test_a_rule_that_does_not_exist_is_refused_at_the_next_step():
    model = nn.Linear(4, 3)
    optimizer = whitening_without_bound(model, 0.1)
    one_step(model, optimizer, torch.randn(5, 4))
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.param_groups[0]["rule"] = "whiten"
    with pytest.raises(ValueError, match=r"rule='whiten'.*must be one of"):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_calls_of_a_step_that_was_skipped_are_forgotten(set_to_none, num_passes):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    other = copy.deepcopy(model)
    optimizer, reference = whitening_without_bound(model, 0.1), whitening_without_bound(other, 0.1)
    x = torch.randn(8, 4, dtype=torch.float64)
    for batch in (x, x + 1):
        for part, one in ((model, optimizer), (other, reference)):
            one_step(part, one, batch)
    for _ in range(num_passes):
        model(torch.full_like(x, 1e6)).square().mean().backward()
    model.zero_grad(set_to_none=set_to_none)  # the step is skipped, and the optimizer not told
    model(x + 2).square().mean().backward()
    optimizer.step()
    one_step(other, reference, x + 2)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_a_shallow_copy_of_a_layer_can_be_called():
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = whitening_without_bound(model, 0.1)
    copied = copy.copy(model[0])
    copied(torch.randn(5, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="no pass with gradients went through it"):
        optimizer.step()
