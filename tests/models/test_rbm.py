"""The RBM's gradients against finite differences and exact enumeration; its features against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry.metric import NotPositiveDefiniteError
from torchgeom_optim.models.rbm import BernoulliRBM, RBMGradientFeatures

TOLERANCE = tolerance(condition=100)


def machine(num_visible: int = 4, num_hidden: int = 3, seed: int = 0) -> BernoulliRBM:
    rbm = BernoulliRBM(num_visible, num_hidden).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rbm.parameters():
            p.normal_(generator=generator)
    return rbm


def joint(rbm: BernoulliRBM) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """p(v, h) of every configuration, from the energy, in plain Python."""
    num_hidden, num_visible = rbm.weight.shape
    W, b, c = rbm.weight.tolist(), rbm.visible_bias.tolist(), rbm.hidden_bias.tolist()
    weights = {}
    for v in itertools.product((0, 1), repeat=num_visible):
        for h in itertools.product((0, 1), repeat=num_hidden):
            minus_energy = sum(b[j] * v[j] for j in range(num_visible)) + sum(c[i] * h[i] for i in range(num_hidden))
            minus_energy += sum(h[i] * W[i][j] * v[j] for i in range(num_hidden) for j in range(num_visible))
            weights[v, h] = math.exp(minus_energy)
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


def bits(count: int, width: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(2, (count, width), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("num_visible", "num_hidden"), [(4, 3), (2, 5)])
def test_likelihood_and_conditionals_by_enumeration(num_visible, num_hidden):
    rbm = machine(num_visible, num_hidden)
    p = joint(rbm)
    for v in itertools.product((0, 1), repeat=num_visible):
        x = torch.tensor([v], dtype=torch.float64)
        marginal = sum(q for (w, _), q in p.items() if w == v)
        torch.testing.assert_close(rbm.log_likelihood(x).item(), math.log(marginal), **TOLERANCE)
        active = [sum(q for (w, h), q in p.items() if w == v and h[i]) / marginal for i in range(num_hidden)]
        torch.testing.assert_close(rbm(x)[0].tolist(), active, **TOLERANCE)
    for h in itertools.product((0, 1), repeat=num_hidden):
        marginal = sum(q for (_, g), q in p.items() if g == h)
        active = [sum(q for (v, g), q in p.items() if g == h and v[j]) / marginal for j in range(num_visible)]
        found = rbm.visible_probabilities(torch.tensor([h], dtype=torch.float64))
        torch.testing.assert_close(found[0].tolist(), active, **TOLERANCE)


def test_statistics_are_the_gradient_of_the_free_energy():
    rbm, data = machine(), bits(6)
    expected = torch.autograd.grad(-rbm.free_energy(data).mean(), list(rbm.parameters()))
    torch.testing.assert_close(tuple(rbm.statistics(data)[name] for name, _ in rbm.named_parameters()), expected)


def test_gradient_against_finite_differences_and_enumeration():
    """Data term less the exact expectation is the slope of the exact log-likelihood."""
    rbm, data = machine(), bits(6)
    p = joint(rbm)
    expectation = {name: torch.zeros_like(parameter) for name, parameter in rbm.named_parameters()}
    for (v, h), q in p.items():
        visible, hidden = torch.tensor(v, dtype=torch.float64), torch.tensor(h, dtype=torch.float64)
        expectation["weight"] += q * hidden[:, None] * visible
        expectation["visible_bias"] += q * visible
        expectation["hidden_bias"] += q * hidden
    step = 1e-5
    for name, parameter in rbm.named_parameters():
        gradient = rbm.statistics(data)[name] - expectation[name]
        for place in itertools.product(*(range(size) for size in parameter.shape)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[place] += sign * step
                    values.append(rbm.log_likelihood(data).mean().item())
                    parameter[place] -= sign * step
            # Central differences: step^2 of truncation, eps / step of rounding.
            slope = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradient[place].item(), slope, rtol=1e-8, atol=1e-9)


def test_divergence_gradients_approach_the_exact_one():
    rbm, data = machine(), bits(2000)
    exact = torch.autograd.grad(rbm.log_likelihood(data).mean(), list(rbm.parameters()))
    generator = torch.Generator().manual_seed(3)
    chains = rbm.gibbs(bits(40_000, seed=2), 30, generator)
    gradients, after = rbm.divergence_gradients(data, chains, generator=generator)
    assert after.shape == chains.shape
    assert not torch.equal(after, chains)
    for found, expected in zip((gradients[name] for name, _ in rbm.named_parameters()), exact, strict=True):
        # Statistics lie in [0, 1]: standard error at most 1/2 / sqrt(40,000) = 0.0025; 5 sigma.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.0125)
        assert (found + expected).abs().max() > 0.0125  # a flipped sign would be seen
    _, from_data = rbm.divergence_gradients(data, generator=generator)
    assert from_data.shape == data.shape


@pytest.mark.parametrize("method", ["contrastive", "persistent"])
def test_fitting_raises_the_likelihood(method):
    generator = torch.Generator().manual_seed(0)
    data = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).repeat(50, 1)
    rbm = BernoulliRBM(6, 4, mean=data.mean(0), generator=generator)
    before = rbm.log_likelihood(data).mean().item()
    torch.testing.assert_close(before, -6 * math.log(2), rtol=0.02, atol=0)  # nothing but the means is known yet
    state = torch.get_rng_state()
    assert rbm.fit(data, epochs=60, batch_size=20, lr=0.2, method=method, generator=generator) is rbm
    assert torch.equal(state, torch.get_rng_state())
    assert rbm.log_likelihood(data).mean().item() > 0.5 * before  # log 1/2 is the best there is
    assert all(p.grad is None for p in rbm.parameters())


def test_a_seed_fixes_the_result():
    weights = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        rbm = BernoulliRBM(4, 3, generator=generator).fit(bits(30).float(), epochs=2, generator=generator)
        weights.append(rbm.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.equal(weights[0], weights[2])


def gradients_one_by_one(rbm: BernoulliRBM, data: Tensor, center: dict[str, Tensor]) -> Tensor:
    """Rows d log p(x_i) / d theta by autograd, with the expectation given."""
    rows = []
    for x in data:
        grads = torch.autograd.grad(-rbm.free_energy(x[None]).sum(), list(rbm.parameters()))
        parts = [g - center[name] for g, (name, _) in zip(grads, rbm.named_parameters(), strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("unit_length", [False, True])
def test_features_against_their_formula(power, unit_length):
    rbm, data, chains = machine(), torch.rand(7, 4, dtype=torch.float64), bits(9)
    features = RBMGradientFeatures(rbm, data, chains, damping=0.3, power=power, unit_length=unit_length)
    rows = gradients_one_by_one(rbm, data, rbm.statistics(chains))
    moments = rows.square().mean(0)
    expected = rows / (moments + 0.3 * moments.mean()).sqrt()
    expected = expected.sign() * expected.abs() ** power
    expected = expected / expected.norm(dim=1, keepdim=True) if unit_length else expected
    torch.testing.assert_close(features(data), expected, **TOLERANCE)
    out = torch.empty(2, features.num_features, dtype=torch.float64)
    assert features(data[:2], out) is out
    torch.testing.assert_close(out, expected[:2], **TOLERANCE)


def test_linear_layer_on_features_that_are_not_formed():
    rbm, data = machine(), torch.rand(7, 4, dtype=torch.float64)
    features = RBMGradientFeatures(rbm, data, bits(9))
    weight = torch.randn(5, features.num_features, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(features.linear(data, weight), features(data) @ weight.T, **TOLERANCE)
    (found,) = torch.autograd.grad(features.linear(data, weight).square().sum(), weight)
    (expected,) = torch.autograd.grad((features(data) @ weight.T).square().sum(), weight)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    with pytest.raises(ValueError, match=r"power=0\.5"):
        RBMGradientFeatures(rbm, data, bits(9), power=0.5).linear(data, weight)


def test_features_are_of_the_parameters_at_the_time():
    rbm, data = machine(), torch.rand(7, 4, dtype=torch.float64)
    features = RBMGradientFeatures(rbm, data, generator=torch.Generator().manual_seed(0))
    before = features(data)
    rbm.fit(data, epochs=1)
    torch.testing.assert_close(features(data), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BernoulliRBM(0, 3), "num_visible=0"),
        (lambda: BernoulliRBM(4, 3, mean=torch.zeros(3)), r"\[3\]: \[4\] is needed"),
        (lambda: machine(30, 21).log_partition(), "21 hidden"),
        (lambda: machine().fit(bits(5), method="exact"), "method='exact'"),
        (lambda: machine().fit(bits(5), epochs=0), "epochs=0"),
        (lambda: machine().fit(bits(5), lr=math.nan), "lr=nan"),
        (lambda: machine().fit(bits(5), momentum=1.0), r"momentum=1\.0"),
        (lambda: machine().fit(bits(5), weight_decay=math.inf), "weight_decay=inf"),
        (lambda: machine().fit(2 * bits(5)), r"\[0, 1\]"),
        (lambda: machine().fit(bits(5) * math.nan), "nan"),
        (lambda: machine().fit(bits(5, width=3)), r"\[N, 4\] is needed"),
        (lambda: RBMGradientFeatures(machine(), bits(5), damping=-1.0), r"damping=-1\.0"),
        (lambda: RBMGradientFeatures(machine(), bits(5), power=0.0), r"power=0\.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_coordinate_that_never_varies_needs_damping():
    data = bits(5)
    data[:, 0] = 0
    with pytest.raises(NotPositiveDefiniteError):
        RBMGradientFeatures(machine(), data, data, damping=0.0)


def test_a_run_that_diverges_leaves_the_weights():
    rbm = machine()
    before = {name: p.clone() for name, p in rbm.named_parameters()}
    with pytest.raises(FloatingPointError, match="Try lr="):
        rbm.fit(bits(20), epochs=2, batch_size=1, lr=1e308)
    torch.testing.assert_close(dict(rbm.named_parameters()), before, rtol=0, atol=0)
