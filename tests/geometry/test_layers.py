import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import tolerance
from torchgeom_optim.geometry import factors as factors_module
from torchgeom_optim.geometry.convolution_factor import (
    ConvolutionFactor,
    _pixels_first,
    _through_grouped_convolution,
    _through_patches,
)
from torchgeom_optim.geometry.factors import (
    OuterFactor,
    RowFactor,
    TokenFactor,
    _positions_first,
    inner_products,
    through_rows,
)
from torchgeom_optim.geometry.layers import LayerRule, factors_of_call, register_rule, rule_for

NUM_SAMPLES, NUM_GRADS = 3, 2


class Conv1D(nn.Module):
    """An imitation of Hugging Face's transposed linear layer."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"

LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), (4,)),
    "linear, two more axes": (lambda: nn.Linear(4, 5), (2, 3, 4)),
    "transposed linear": (lambda: Conv1D(5, 4), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=3, dilation=2, groups=2), (2, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 5, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding="same"), (3, 4, 5)),
    "conv2d same, even": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 6, 6)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 5)),
    "conv2d reflect same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect"), (2, 4, 5)),
    "conv2d replicate": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="replicate"), (2, 4, 5)),
    "conv2d padding beyond": (lambda: nn.Conv2d(2, 3, 2, stride=3, padding=4), (2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 2, (1, 2, 2), padding=(0, 1, 1), stride=(2, 1, 2)), (2, 3, 3, 4)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4, eps=1e-3), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "batch norm, vectors": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "batch norm, images": (lambda: nn.BatchNorm2d(3).eval(), (3, 2, 4)),
    "batch norm over the batch": (lambda: nn.BatchNorm2d(3), (3, 2, 4)),
}


def layer_and_batch(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    build, sample_shape = LAYERS[name]
    torch.manual_seed(seed)
    layer = build().double()
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    x = torch.randn(NUM_SAMPLES, *sample_shape, dtype=torch.float64)
    output = layer(x)
    return layer, x, torch.randn(NUM_SAMPLES, NUM_GRADS, *output.shape[1:], dtype=torch.float64)


def gradients(layer: nn.Module, x: Tensor, output_grads: Tensor) -> dict[str, Tensor]:
    """Every row by an autograd call of its own: name -> [N, C, P]."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in layer.named_parameters()}
    for i, c in itertools.product(range(output_grads.shape[0]), range(output_grads.shape[1])):
        only = torch.zeros_like(output_grads[:, 0])
        only[i] = output_grads[i, c]
        grads = torch.autograd.grad(layer(x), list(layer.parameters()), only)
        for name, grad in zip(found, grads, strict=True):
            found[name].append(grad.reshape(-1))
    return {name: torch.stack(rows).view(*output_grads.shape[:2], -1) for name, rows in found.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_and_inner_products_of_every_layer(name: str):
    layer, x, output_grads = layer_and_batch(name)
    rule = rule_for(layer)
    assert rule is not None
    assert rule.applies(layer, x)
    factors = factors_of_call(rule, layer, x, output_grads, ("weight", "bias"))
    expected = gradients(layer, x, output_grads)
    assert factors.keys() >= expected.keys()
    for parameter, J in expected.items():
        factor = factors[parameter]
        torch.testing.assert_close(factor.rows(), J, **tolerance(condition=10))
        assert factor.num_units * factor.unit_numel == J.shape[-1]
        middle = factor.num_units // 2 // factor.unit_step * factor.unit_step
        parts = torch.cat([factor.rows(0, middle), factor.rows(middle, factor.num_units)], -1)
        torch.testing.assert_close(parts, J, **tolerance(condition=10))
        K = torch.einsum("icp,jdp->icjd", J, J)
        torch.testing.assert_close(inner_products([factor]), K, **tolerance(condition=1000))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(inner_products([factor]), -K, **tolerance(condition=1000))


@pytest.mark.parametrize("name", ["linear", "linear, two more axes", "transposed linear", "conv1d", "conv2d"])
def test_two_batches_and_several_uses(name: str, monkeypatch: pytest.MonkeyPatch):
    uses, other, J, J_other = [], [], 0, 0
    layer, _, _ = layer_and_batch(name)
    for seed, (collected, count) in enumerate([(uses, 3), (uses, 3), (other, 2)]):
        _, x, g = layer_and_batch(name, seed + 1)
        x, g = x[:count], g[:count, : 3 - count // 2]
        collected.append(factors_of_call(rule_for(layer), layer, x, g, ("weight",))["weight"])
        rows = gradients(layer, x, g)["weight"]
        J, J_other = (J + rows, J_other) if collected is uses else (J, rows)
    for workspace in (factors_module.WORKSPACE_BYTES, 100):  # in one piece, and in the smallest
        monkeypatch.setattr(factors_module, "WORKSPACE_BYTES", workspace)
        for left, right, a, b in ((uses, None, J, J), (uses, other, J, J_other), (other, uses, J_other, J)):
            expected = torch.einsum("icp,jdp->icjd", a, b)
            torch.testing.assert_close(inner_products(left, right), expected, **tolerance(condition=1000))


def test_uses_of_different_kinds():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (3, 4), generator=generator)
    a, g, e = (torch.randn(3, *shape, generator=generator).double() for shape in [(1, 2, 5), (2, 1, 2, 6), (2, 4, 5)])
    linear, embedding = OuterFactor(a, g), TokenFactor(tokens, e, 6)
    J = torch.einsum("ngta,ncgto->ncoa", a, g).flatten(2)
    one_hot = nn.functional.one_hot(tokens, 6).double()
    J_embedding = torch.einsum("ntv,nctd->ncvd", one_hot, e).flatten(2)
    explicit = RowFactor(torch.randn(3, 2, 30).double(), 5)
    for left, right, rows, columns in [
        ([linear, embedding], None, J + J_embedding, J + J_embedding),
        ([embedding], None, J_embedding, J_embedding),
        ([embedding, explicit], [linear], J_embedding + explicit.values, J),
        ([embedding], [linear, linear], J_embedding, 2 * J),
        ([embedding], [TokenFactor(tokens[:2] * 0, e[:2], 6)], J_embedding, None),
    ]:
        if columns is None:
            columns = torch.zeros(2, 2, 6, 5).double()
            columns[:, :, 0] = e[:2].sum(2)
            columns = columns.flatten(2)
        expected = torch.einsum("icp,jdp->icjd", rows, columns)
        torch.testing.assert_close(inner_products(left, right), expected, **tolerance(condition=1000))
    apart = TokenFactor(tokens + 6, e, 12)
    torch.testing.assert_close(
        inner_products([TokenFactor(tokens, e, 12)], [apart]), torch.zeros(3, 2, 3, 2, dtype=torch.float64)
    )


@st.composite
def convolutions(draw: st.DrawFn) -> ConvolutionFactor:
    axes, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, stride, padding, dilation = (
        tuple(draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 3), (1, 3), (0, 3), (1, 2))
    )
    size = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 7)) for d, k, p in zip(dilation, kernel, padding, strict=True)
    )
    positions = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(3, 2 * groups, *size, generator=generator, dtype=torch.float64)
    g = torch.randn(3, draw(st.integers(1, 2)), 3 * groups, *positions, generator=generator, dtype=torch.float64)
    return ConvolutionFactor(x, g, kernel, stride, padding, dilation, groups)


@given(convolutions())
def test_all_routes_of_a_convolution_agree(factor: ConvolutionFactor):
    expected = through_rows([factor], [factor])
    tol = tolerance(condition=1000 * math.prod(factor.kernel_size))
    outer = factor.as_outer()
    torch.testing.assert_close(_through_patches(factor, factor), expected, **tol)
    torch.testing.assert_close(_positions_first(outer, outer, 0, 3), expected, **tol)
    torch.testing.assert_close(inner_products([factor]), expected, **tol)
    if factor.groups == 1:
        torch.testing.assert_close(_pixels_first(factor, factor), expected, **tol)
    if factor.num_grads == 1:
        torch.testing.assert_close(_through_grouped_convolution(factor), expected, **tol)


def test_a_rule_speaks_only_for_what_it_knows():
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class OtherConvolution(nn.Conv2d):
        def _conv_forward(self, *args: Tensor) -> Tensor:
            return super()._conv_forward(*args) * 2

    assert rule_for(Same(2, 2)) is rule_for(nn.Linear(2, 2)) is not None
    assert rule_for(Other(2, 2)) is None
    assert rule_for(OtherConvolution(1, 1, 1)) is None
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    assert rule_for(patched) is None
    assert rule_for(nn.LSTM(2, 2)) is None
    tokens = torch.zeros(3, 2, dtype=torch.long)
    for embedding in (nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2, scale_grad_by_freq=True)):
        assert not rule_for(embedding).applies(embedding, tokens)
    unbatched = nn.Conv2d(1, 1, 1)
    assert not rule_for(unbatched).applies(unbatched, torch.zeros(1, 2, 2))


def test_a_rule_of_the_users():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    register_rule(Scale, LayerRule(lambda m, x, g, names: {"weight": RowFactor(g * x[:, None])}, ("weight",)))
    assert rule_for(Scale()) is not None
    with pytest.raises(TypeError, match="pass the class of the layer"):
        register_rule(Scale(), LayerRule(lambda *_: {}))
