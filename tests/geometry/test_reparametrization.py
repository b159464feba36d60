"""The constants of Eqs. (5) and (12), and Eq. (3) as a change of coordinates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.cases import whitening_without_bound
from tests.oracles import tolerance
from torchgeom_optim.geometry.moments import Moments, channel_moments, running_moments
from torchgeom_optim.geometry.reparametrization import fan_in_scale, guarded_second_moment, reparametrized_gradient

SEEDS = st.integers(0, 10_000)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fan_in_scale_is_the_inverse_root_of_fan_in_times_sharing():
    assert fan_in_scale(27, 100) == pytest.approx(1 / math.sqrt(2700), rel=1e-15)
    assert fan_in_scale(27, 1) != pytest.approx(fan_in_scale(27, 100))


@given(SEEDS, st.integers(1, 20), st.floats(-3, 3), st.floats(0, 0.99))
def test_the_guard_keeps_whitened_inputs_at_unit_size(seed, steps, log_scale, decay):
    """E_batch[alpha^2 (x - mu)^2] <= 1, however fast the inputs drift."""
    running = None
    for step in range(steps):
        x = draw(seed + step, 6, 4) * 10.0 ** (log_scale * (step % 3)) + 5.0 * (step % 2)
        batch = channel_moments(x)
        running = running_moments(running or batch, batch, decay)
        q = guarded_second_moment(running, batch)
        z_sq = ((x - running.mean) ** 2).mean(0) / q
        assert (z_sq <= 1 + 1e-9).all()
        assert (q >= running.variance).all()
    uncentred = guarded_second_moment(running.about_zero(), batch.about_zero())
    assert ((x**2).mean(0) / uncentred <= 1 + 1e-9).all()


def test_without_the_guard_they_would_not_be():
    past, x = Moments(4, torch.zeros(1), torch.ones(1)), torch.full((4, 1), 100.0)
    running = running_moments(past, channel_moments(x), 0.95)
    assert ((x - running.mean) ** 2).mean() / running.variance > 10
    assert ((x - running.mean) ** 2).mean() / guarded_second_moment(running, channel_moments(x)) <= 1 + 1e-6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("by_unit", [False, True])
@given(seed=SEEDS)
def test_the_direction_is_the_chain_rule_of_the_change_of_coordinates(seed, by_unit, kernel, groups):
    """With w = alpha beta v and w0 = beta v0 - sum mu w: d = T T' gradient, T the Jacobian of (v, v0) -> (w, w0)."""
    if groups > 1 and not kernel:
        return
    m, n = 4, 6
    mu, alpha = draw(seed, n), draw(seed + 1, n).exp()
    beta = draw(seed + 2, m).exp() if by_unit else torch.tensor(0.7, dtype=torch.float64).expand(m)
    w_grad, b_grad = draw(seed + 3, m, n // groups, *kernel), draw(seed + 4, m)
    inputs_of = torch.arange(n).view(groups, -1).repeat_interleave(m // groups, 0)  # of unit j
    trailing = [1] * len(kernel)

    def to_w(v: Tensor, v0: Tensor) -> tuple[Tensor, Tensor]:
        w = v * alpha[inputs_of].view(m, -1, *trailing) * beta.view(m, 1, *trailing)
        return w, beta * v0 - (mu[inputs_of].view(m, -1, *trailing) * w).flatten(1).sum(1)

    at = (torch.zeros_like(w_grad), torch.zeros_like(b_grad))
    _, pull = torch.func.vjp(to_w, *at)
    _, expected = torch.func.jvp(to_w, at, pull((w_grad, b_grad)))
    scale, output_scale = (alpha**2, beta**2) if by_unit else (alpha**2 * beta[0] ** 2, float(beta[0]) ** 2)
    actual = reparametrized_gradient(w_grad, b_grad, mu, scale, output_scale, groups)
    torch.testing.assert_close(actual, tuple(expected), **tolerance(condition=1e3))
    wrong = reparametrized_gradient(w_grad, b_grad, -mu, scale, output_scale, groups)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, tuple(expected), **tolerance(condition=1e3))

    weight_only, none = reparametrized_gradient(w_grad, None, None, scale, output_scale, groups)
    assert none is None
    _, expected = torch.func.jvp(
        lambda v: to_w(v, at[1])[0], at[:1], torch.func.vjp(lambda v: to_w(v, at[1])[0], at[0])[1](w_grad)
    )
    torch.testing.assert_close(weight_only, expected, **tolerance(condition=1e3))


def function_step(layer: nn.Linear, x: Tensor, target: Tensor, **settings: float) -> Tensor:
    """How the outputs change in one step."""
    before = layer(x).detach()
    optimizer = whitening_without_bound(layer, 0.1, **settings)
    (layer(x) - target).square().sum().div(len(x)).backward()
    optimizer.step()
    return layer(x).detach() - before


@pytest.mark.parametrize("bias", [False, True])
@given(seed=SEEDS, log_scale=st.floats(-4, 4), damping=st.sampled_from([0.0, 0.01, 1.0]))
def test_rescaling_a_layers_inputs_leaves_the_step_of_its_function(seed, log_scale, damping, bias):
    x, target, scale = draw(seed, 9, 4) + 1, draw(seed + 1, 9, 3), 10.0**log_scale
    one, two = (nn.Linear(4, 3, bias=bias).double() for _ in range(2))
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        two.weight.div_(scale)
    expected = function_step(one, x, target, damping=damping)
    torch.testing.assert_close(
        function_step(two, x * scale, target, damping=damping), expected, **tolerance(condition=1e4)
    )


@given(seed=SEEDS)
def test_rescaling_and_shifting_each_input_too_without_damping(seed):
    """What whitening is for. The shift is taken up by the bias."""
    x, target = draw(seed, 9, 4), draw(seed + 1, 9, 3)
    scale, shift = (2 * draw(seed + 2, 4)).exp(), draw(seed + 3, 4)
    one, two = (nn.Linear(4, 3).double() for _ in range(2))
    with torch.no_grad():
        two.weight.copy_(one.weight / scale)
        two.bias.copy_(one.bias - two.weight @ shift)
    expected = function_step(one, x, target, damping=0.0)
    actual = function_step(two, x * scale + shift, target, damping=0.0)
    torch.testing.assert_close(actual, expected, **tolerance(condition=1e6))
    for layer in (one, two):  # as no rule does that only knows the fan-in
        layer.zero_grad()
    actual = function_step(two, x * scale + shift, target, rule="fan_in")
    expected = function_step(one, x, target, rule="fan_in")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_batch_of_one_takes_a_step_of_ordinary_size():
    layer = nn.Linear(20, 3)
    optimizer = whitening_without_bound(layer, 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(1, 20)).sub(1).square().mean().backward()
        optimizer.step()
        assert all(p.abs().max() < 2 for p in layer.parameters())


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("constant", ["one input", "all inputs"])
def test_inputs_without_variance_give_finite_steps(constant, bias, damping, value):
    layer = nn.Linear(4, 3, bias=bias)
    optimizer = whitening_without_bound(layer, 0.1, damping=damping)
    for _ in range(3):
        x = torch.randn(8, 4)
        x[:, 0 if constant == "one input" else slice(None)] = value
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        assert all(p.abs().max() < 10 for p in layer.parameters())
