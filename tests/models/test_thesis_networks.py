from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.oracles import tolerance
from torchgeom_optim.models import thesis_networks
from torchgeom_optim.models.thesis_networks import THESIS_NETWORKS, CReLU, thesis_network


def weighted(network):
    return [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d) and not is_shortcut(m)]


def is_shortcut(module):
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


@pytest.mark.parametrize("kind", THESIS_NETWORKS)
@pytest.mark.parametrize("depth", [5, 11, 26])
def test_depth_is_the_number_of_layers_with_weights(kind, depth):
    network = thesis_network(kind, depth)
    assert len(weighted(network)) == depth
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    has_norm = any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())
    assert has_norm == ("norm" in kind)
    skips = [m.shortcut for m in network.modules() if getattr(m, "shortcut", None) is not None]
    assert bool(skips) == ("skip" in kind)


@pytest.mark.parametrize("depth", [2, 7, 40])
def test_looks_linear_is_exactly_linear_at_initialisation(depth):
    network = thesis_networks.looks_linear(depth, width=9, in_features=6, num_classes=4).double()
    product = torch.eye(6, dtype=torch.float64)
    for layer in weighted(network):
        n = layer.in_features if layer.in_features == product.shape[0] else layer.in_features // 2
        product = layer.weight[:, :n] @ product
    x = 3 * torch.randn(20, 6, dtype=torch.float64)
    assert_close(network(x), x @ product.T, **tolerance(condition=10 * depth))
    assert_close(product[:, :4].shape, torch.Size([4, 4]))
    # Not so with independent halves.
    other = thesis_networks.orthogonal_mlp(depth, activation="crelu", width=9, in_features=6, num_classes=4).double()
    assert not torch.allclose(other(-x), -other(x))


def test_looks_linear_stays_isometric_at_any_depth_and_leaves_linearity_when_trained():
    network = thesis_networks.looks_linear(30, width=8, in_features=8, num_classes=8)
    x = torch.randn(5, 8)
    assert_close(network(x).norm(dim=1), x.norm(dim=1), rtol=1e-4, atol=0.0)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    nn.functional.cross_entropy(network(x), torch.arange(5)).backward()
    optimizer.step()
    assert not torch.allclose(network(-x), -network(x), atol=1e-4)
    normed = thesis_networks.looks_linear(6, width=8, in_features=8, num_classes=8, batch_norm=True).eval()
    assert_close(normed(-x), -normed(x))


def test_orthogonal_weights_and_zero_biases():
    network = thesis_networks.orthogonal_mlp(4, width=6, in_features=10, gain=2.0)
    for layer in weighted(network):
        W = layer.weight
        small = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        assert_close(small, 4 * torch.eye(len(small)), rtol=1e-5, atol=1e-5)
        assert not layer.bias.any()


def test_concatenated_relu():
    x = torch.randn(2, 3, 4, 4)
    assert_close(CReLU()(x)[:, :3] - CReLU()(x)[:, 3:], x)
    assert (CReLU()(x) >= 0).all()


def test_a_skip_connection_goes_round_its_block():
    network = thesis_networks.convolutional(8, skip=True, normalised=False, width=4)
    block = network.block1
    x = torch.randn(2, 4, 8, 8).relu()
    with torch.no_grad():
        for p in block.body.parameters():
            p.zero_()
    assert_close(block(x), x)
    strides = [m.stride[0] for m in weighted(network) if isinstance(m, nn.Conv2d)]
    assert sorted(strides) == [1] * 5 + [2] * 2


def test_refusals():
    with pytest.raises(ValueError, match="kind='resnet'"):
        thesis_network("resnet", 26)
    with pytest.raises(ValueError, match="depth=1"):
        thesis_network("looks_linear", 1)
    with pytest.raises(ValueError, match="depth=4"):
        thesis_network("conv", 4)
    with pytest.raises(ValueError, match="activation='tanh'"):
        thesis_networks.orthogonal_mlp(activation="tanh")
