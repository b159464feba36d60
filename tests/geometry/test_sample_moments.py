"""Moments of the samples' gradients, and mean lengths, against loops over the samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import per_sample_gradients, tolerance
from torchgeom_optim.geometry.layers import factors_of_call, rule_for
from torchgeom_optim.geometry.matrix_metric import KroneckerMetric
from torchgeom_optim.geometry.metric import (
    BLOCKS,
    DiagonalMetric,
    IdentityMetric,
    LayerMetric,
    LayerVector,
    QuasiDiagonalMetric,
    WhiteningMetric,
)
from torchgeom_optim.geometry.sample_moments import SampleMoments, mean_dual_norm_sq, sample_moments

F64 = torch.float64


def called(layer: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The samples' gradients of sum(sin(y)), the layer's input, and the gradients at its output."""
    grads = per_sample_gradients(layer, lambda y, _: torch.sin(y).sum(), x, x)
    y = layer(x).detach().requires_grad_()
    return grads, x, torch.autograd.grad(torch.sin(y).sum(), y)[0]


LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (5, 3)),
    "sequence": (lambda: nn.Linear(3, 2), (5, 4, 3)),
    "without bias": (lambda: nn.Linear(3, 2, bias=False), (5, 3)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, padding=1), (3, 2, 4, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, (2, 1), stride=2, groups=2), (3, 4, 5, 4)),
    "one position": (lambda: nn.Conv1d(4, 2, 3, groups=2), (6, 4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_means_over_the_samples_gradients(name):
    make, shape = LAYERS[name]
    layer = make().to(F64)
    grads, x, g = called(layer, torch.randn(*shape, dtype=F64))
    factors = factors_of_call(rule_for(layer), layer, x, g[:, None], ("weight", "bias"))
    of_bias = grads.get("bias")
    found = sample_moments(factors["weight"], of_bias, with_row=True)
    weight = grads["weight"].flatten(2)
    torch.testing.assert_close(found.weight, weight.square().mean(0), **tolerance(condition=100))
    if of_bias is None:
        assert found.bias is found.bias_row is None
        return
    torch.testing.assert_close(found.bias, of_bias.square().mean(0), **tolerance(condition=100))
    torch.testing.assert_close(found.bias_row, (weight * of_bias[..., None]).mean(0), **tolerance(condition=100))
    assert sample_moments(factors["weight"], of_bias).bias_row is None
    with pytest.raises(AssertionError):  # the mean gradient's square is another thing
        torch.testing.assert_close(found.weight, weight.mean(0).square(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", [(6,), (4, 3)])
def test_moments_of_an_embedding(shape):
    layer = nn.Embedding(5, 2, dtype=F64)
    tokens = torch.randint(5, shape)
    grads, x, g = called(layer, tokens)
    factor = factors_of_call(rule_for(layer), layer, x, g[:, None], ("weight",))["weight"]
    torch.testing.assert_close(sample_moments(factor).weight, grads["weight"].square().mean(0), **tolerance())


def metrics(m: int, n: int, generator: torch.Generator) -> dict[str, LayerMetric]:
    def positive(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=F64) + 0.3

    mean = torch.randn(m, n, generator=generator, dtype=F64)
    return {
        "identity": IdentityMetric(),
        "diagonal": DiagonalMetric(LayerVector(positive(m, n), positive(m))),
        "quasi": QuasiDiagonalMetric(positive(m), mean, positive(m, n)),
        "whitening": WhiteningMetric(mean[0], positive(n), positive(m)),
        "whitening, one scale": WhiteningMetric(mean[0], positive(n), 0.7),
        "not centred": WhiteningMetric(None, positive(n), positive(m)),
    }


@given(
    st.sampled_from(["identity", "diagonal", "quasi", "whitening", "whitening, one scale", "not centred"]),
    st.sampled_from(BLOCKS),
    st.integers(0, 10_000),
)
def test_mean_length_of_the_samples_gradients(kind, block, seed):
    g = torch.Generator().manual_seed(seed)
    metric = metrics(3, 4, g)[kind]
    if block == "weight" and metric.finest_block == "unit":
        block = "unit"
    weight, bias = (torch.randn(6, *s, generator=g, dtype=F64) for s in ((3, 4), (3,)))
    moments = SampleMoments(weight.square().mean(0), (weight * bias[..., None]).mean(0), bias.square().mean(0))
    found = mean_dual_norm_sq(metric, moments, block)
    each = [metric.dual_norm_sq(LayerVector(w, b), block) for w, b in zip(weight, bias, strict=True)]
    expected = tuple(torch.stack(parts).mean(0) for parts in zip(*each, strict=True))
    torch.testing.assert_close(found, expected, **tolerance(condition=1e3))
    of_mean = metric.dual_norm_sq(LayerVector(weight.mean(0), bias.mean(0)), block)
    for bound, part in zip(found, of_mean, strict=True):  # the bound of the paper
        assert bool((part <= bound * (1 + 1e-9)).all())


def test_without_a_bias_nothing_is_centred():
    metric = WhiteningMetric(None, torch.tensor([2.0, 3.0]))
    (found,) = mean_dual_norm_sq(metric, SampleMoments(torch.tensor([[1.0, 10.0]])), "unit")
    torch.testing.assert_close(found, torch.tensor([32.0]))


def test_what_is_missing_is_named():
    g = torch.Generator().manual_seed(0)
    moments = SampleMoments(torch.ones(3, 4, dtype=F64), None, torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="with_row=True"):
        mean_dual_norm_sq(metrics(3, 4, g)["whitening"], moments)
    with pytest.raises(ValueError, match="couples the parameters of one unit"):
        mean_dual_norm_sq(metrics(3, 4, g)["quasi"], moments, "weight")
    eye = torch.eye(4, dtype=F64)[None]
    with pytest.raises(TypeError, match=r"KroneckerMetric.*effective dimension"):
        mean_dual_norm_sq(KroneckerMetric.factorise(eye, eye), moments)
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    factor = factors_of_call(rule_for(layer), layer, x, torch.randn(5, 2, 2), ("weight",))["weight"]
    with pytest.raises(ValueError, match="2 gradients per sample; need one"):
        sample_moments(factor)
