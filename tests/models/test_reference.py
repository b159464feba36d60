"""The reference networks are the ones that networks.md and the papers describe."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchgeom_optim.models import REFERENCE_NETWORKS, PlainResNet, lenet, reference_network, vgg11, vgg_small


def conv(c: int, m: int, k: int) -> int:
    return m * (c * k * k + 1)


def linear(n: int, m: int) -> int:
    return m * (n + 1)


def chain(count: Callable[..., int], widths: list[int], *args: int) -> int:
    return sum(count(a, b, *args) for a, b in itertools.pairwise(widths))


def residual(blocks: int) -> int:
    """Parameters of a PlainResNet: the stem, each stage's blocks, a shortcut where the width changes."""
    total = conv(3, 16, 3) + linear(64, 10)
    for before, width in ((16, 16), (16, 32), (32, 64)):
        total += conv(before, width, 3) + (2 * blocks - 1) * conv(width, width, 3)
        total += conv(before, width, 1) if before != width else 0
    return total


def resnet18_count() -> int:
    """He et al. (2016), Table 1, without biases in front of batch norms."""
    total = 64 * 3 * 9 + 2 * 64 + linear(512, 10)
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += 9 * before * width + 3 * 9 * width**2 + 4 * 2 * width
        total += before * width + 2 * width if before != width else 0
    return total


def transformer(vocabulary: int, width: int = 48, context: int = 48, blocks: int = 2) -> int:
    block = 4 * width + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    return (vocabulary + context) * width + blocks * block + 2 * width + linear(width, vocabulary)


VGG11 = [3, 64, 128, 256, 256, 512, 512, 512, 512]
COUNTS = {
    "lenet": chain(conv, [3, 6, 16], 5) + chain(linear, [16 * 5 * 5, 120, 84, 10]),
    "vgg_small": chain(conv, [3, 32, 64, 128, 128], 3) + chain(linear, [128 * 4 * 4, 256, 10]),
    "cnn3": chain(conv, [3, 32, 64, 128], 3) + linear(2048, 10),
    "resnet18": resnet18_count(),
    "resnet8": residual(1),
    "resnet20": residual(3),
    "mlp2": chain(linear, [784, 256, 256, 10]),
    "mlp_wide": chain(linear, [784, 1000, 1000, 10]),
    "mlp_deep": chain(linear, [784] + [128] * 9 + [10]),
    "mlp_thin": chain(linear, [784, 64, 10]),
    "cnn_small": chain(conv, [1, 16, 16], 5) + linear(16 * 7 * 7, 10),
    "cnn_small_cifar": chain(conv, [3, 32, 32, 64], 3) + linear(64 * 4 * 4, 10),
    "char_gpt": transformer(128),
    "allcnn9": chain(conv, [3, 8, 8, 16, 16, 16, 32, 32, 32, 10], 3),
    "vgg11": chain(conv, VGG11, 3) + chain(linear, [512, 512, 10]),
}
SHAPES = {"mnist": (2, 1, 28, 28), "cifar": (2, 3, 32, 32)}
ON_MNIST = {"mlp2", "mlp_wide", "mlp_deep", "mlp_thin", "cnn_small"}


def built(name: str) -> nn.Module:
    if name == "resnet18":
        pytest.importorskip("torchvision", reason="resnet18 is torchvision's")
    return reference_network(name)


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_every_network_has_a_closed_formula():
    assert COUNTS.keys() == REFERENCE_NETWORKS.keys()


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_parameter_count(name):
    assert parameter_count(built(name)) == COUNTS[name]


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_docstring_states_the_parameter_count(name):
    assert f"{COUNTS[name]:,} parameters" in " ".join((REFERENCE_NETWORKS[name].__doc__ or "").split())


@pytest.mark.parametrize("name", sorted(REFERENCE_NETWORKS.keys() - {"char_gpt"}))
def test_logits_and_every_parameter_gets_a_gradient(name):
    network = built(name)
    logits = network(torch.randn(SHAPES["mnist" if name in ON_MNIST else "cifar"]))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_char_gpt_sees_no_later_character():
    network = reference_network("char_gpt", vocabulary_size=11).double()
    tokens = torch.randint(11, (3, 48))
    changed = tokens.clone()
    changed[:, 20:] = (tokens[:, 20:] + 1) % 11
    before, after = network(tokens), network(changed)
    assert before.shape == (3, 48, 11)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-12)
    assert (before[:, 20:] - after[:, 20:]).abs().amin(dim=(0, 2)).gt(0).all()


def test_char_gpt_refuses_a_window_longer_than_its_context():
    with pytest.raises(ValueError, match="context=48"):
        reference_network("char_gpt")(torch.zeros(1, 49, dtype=torch.int64))


@pytest.mark.parametrize("network", [lenet, vgg_small])
def test_batch_norm_follows_every_layer_but_the_last(network):
    plain, normed = network(), network(batch_norm=True)
    assert plain.state_dict().keys() <= normed.state_dict().keys()
    layers = list(normed)
    for layer, after in itertools.pairwise(layers):
        followed = isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d)
        assert followed == isinstance(layer, nn.Conv2d | nn.Linear)
    widths = [m.num_features for m in layers if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert parameter_count(normed) == parameter_count(plain) + 2 * sum(widths)
    without_bias = network(batch_norm=True, bias_before_norm=False)
    assert parameter_count(without_bias) == parameter_count(normed) - sum(widths)
    assert f"{parameter_count(normed):,} parameters" in " ".join(network.__doc__.split())


def test_a_folded_batch_norm_would_give_the_plain_network():
    # In evaluation mode, at its first running statistics (mean 0, variance 1), a norm is all but the identity.
    normed = lenet(batch_norm=True).double().eval()
    plain = lenet().double()
    plain.load_state_dict({k: v for k, v in normed.state_dict().items() if not k.startswith("norm")})
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(plain(x), normed(x), rtol=1e-3, atol=1e-5)  # BatchNorm's eps, 1e-5, four times


@pytest.mark.parametrize("name", ["lenet", "vgg_small", "cnn3", "cnn_small", "cnn_small_cifar"])
def test_other_image_sizes(name):
    assert reference_network(name, in_channels=2, image_size=20)(torch.randn(2, 2, 20, 20)).shape == (2, 10)


def test_image_too_small_for_the_poolings():
    with pytest.raises(ValueError, match=r"image_size=8: .*larger"):
        lenet(image_size=8)


def test_plain_resnet_has_no_normalisation_and_three_projections_at_most():
    network = reference_network("resnet20")
    assert isinstance(network, PlainResNet)
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert (kernels.count((3, 3)), kernels.count((1, 1))) == (19, 2)
    assert not any("Norm" in type(m).__name__ for m in network.modules())


def test_mlp_deep_keeps_the_scale_of_its_signal():
    # He et al.: E[y^2] stays put from layer to layer; at width 128, over ten of them, within a factor of 4.
    network = reference_network("mlp_deep")
    x = torch.randn(512, 784)
    logits = network(x)
    assert 2 / 4 < logits.square().mean() < 2 * 4


def test_vgg11_matches_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="the oracle is torchvision's vgg11")
    theirs = torchvision.models.vgg11().features
    ours = vgg11()
    shapes = [p.shape for p in theirs.parameters()]
    assert [p.shape for p in ours.parameters()][: len(shapes)] == shapes
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=False):
            mine.copy_(other)
    features = nn.Sequential(*list(ours)[: list(ours).index(ours.get_submodule("flatten"))])
    torch.testing.assert_close(features(images), theirs(images))


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_vgg11_refuses_a_bad_width(width):
    with pytest.raises(ValueError, match=r"width=.*\(0, 8\]"):
        vgg11(width=width)


def test_vgg11_narrower():
    quarter = [3] + [width // 4 for width in VGG11[1:]]
    expected = chain(conv, quarter, 3) + chain(linear, [128, 128, 10])
    assert parameter_count(vgg11(width=0.25)) == expected


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"name='lenett': must be one of lenet, .*did you mean 'lenet'\?"):
        reference_network("lenett")
    with pytest.raises(ValueError, match="common start"):
        reference_network("")


def test_resnet18_names_the_extra_without_torchvision(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"'torchvision': resnet18 needs it; .*torchgeom-optim\[vision\]"):
        reference_network("resnet18")
