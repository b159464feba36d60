"""The networks of the gradient conditioning thesis, by kind and depth.

Depth is the number of layers with weights. The thesis trains fully connected networks with orthogonal weights and ReLU
or CReLU, the looks-linear network, and convolutional networks with and without normalisation and skip connections, of
11 to 200 layers, and names none of their widths; those here are ours, chosen for 32 x 32 images and few cores.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["THESIS_NETWORKS", "CReLU", "convolutional", "looks_linear", "orthogonal_mlp", "thesis_network"]


class CReLU(nn.Module):
    """Concatenated ReLU, [ReLU(x), ReLU(-x)] along axis 1: twice as many features.

    Source: Shang et al. (2016), Eq. (2). The thesis's Def. 3.8 writes -ReLU(x) for the second half, with which its
    own Eq. (3.23) would not hold; we follow Eq. (3.23).

    Example:
        >>> CReLU()(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 0., 0., 2.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, 2 n, ...] of [N, n, ...]."""
        return torch.cat([F.relu(x), F.relu(-x)], 1)


def orthogonal_mlp(
    depth: int = 11,
    *,
    activation: Literal["relu", "crelu"] = "relu",
    width: int = 64,
    in_features: int = 3072,
    num_classes: int = 10,
    gain: float = 1.0,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Fully connected network with orthogonal weights and zero biases.

    Args:
        depth: layers with weights, at least 2.
        activation: "relu", or "crelu", which doubles the inputs of all layers but the first.
        width: outputs of a hidden layer.
        in_features: numbers per sample.
        num_classes: outputs.
        gain: factor on the weights; 2 ** 0.5 keeps the size of the features under ReLU.
        batch_norm: whether a batch norm stands before every activation.

    Returns:
        The network; input [N, ...] is flattened to [N, in_features], output [N, num_classes].

    Raises:
        ValueError: the depth is below 2, or an unknown activation.

    Example:
        >>> sum(isinstance(layer, nn.Linear) for layer in orthogonal_mlp(5))
        5
    """
    if activation not in ("relu", "crelu"):
        raise ValueError(f"activation={activation!r}: must be 'relu' or 'crelu'.")
    doubling = 2 if activation == "crelu" else 1
    network = _fully_connected(
        depth, width, in_features, num_classes, doubling, CReLU if doubling == 2 else nn.ReLU, batch_norm
    )
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return network


def looks_linear(
    depth: int = 40, *, width: int = 64, in_features: int = 3072, num_classes: int = 10, batch_norm: bool = False
) -> nn.Sequential:
    """Looks-linear network: CReLU after mirrored weights, exactly linear at initialisation.

        [W, -W] CReLU(x) = W ReLU(x) - W ReLU(-x) = W x          Def. 3.9, Eq. (3.23)

    Source: Balduzzi et al. (2017). W is orthogonal, biases are zero; the two halves are separate weights and part
    company in training.

    Args:
        depth: layers with weights, at least 2.
        width: outputs of a hidden layer.
        in_features: numbers per sample.
        num_classes: outputs.
        batch_norm: whether a batch norm stands before every activation, which the thesis needed at 40 layers; the
            network is then linear in evaluation mode.

    Returns:
        The network; input [N, ...] is flattened to [N, in_features], output [N, num_classes].

    Raises:
        ValueError: the depth is below 2.

    Example:
        >>> network, x = looks_linear(6, in_features=3), torch.randn(2, 3)
        >>> torch.testing.assert_close(network(-2 * x), -2 * network(x))
    """
    network = _fully_connected(depth, width, in_features, num_classes, 2, CReLU, batch_norm)
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for k, layer in enumerate(linear):
            if k == 0:
                nn.init.orthogonal_(layer.weight)
            else:
                half = nn.init.orthogonal_(torch.empty(layer.out_features, layer.in_features // 2))
                layer.weight.copy_(torch.cat([half, -half], 1))
            nn.init.zeros_(layer.bias)
    return network


def convolutional(
    depth: int = 26,
    *,
    normalised: bool = True,
    skip: bool = False,
    width: int = 16,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Sequential:
    """Convolutional network in three stages of growing width, with or without normalisation and skip connections.

    A 3x3 stem; depth - 2 convolutions 3x3 in three stages of ``width``, twice and four times that many channels, the
    second and third starting with stride 2, in blocks of two (the last of one where they do not come out even);
    global average pooling; a linear layer. A block is relu(f(x)), or relu(x + f(x)) with skip connections, x going
    through a 1x1 convolution where the shape changes (not counted in the depth). He initialisation.

    Args:
        depth: layers with weights, at least 5.
        normalised: whether every convolution is followed by a batch norm; biases otherwise.
        skip: whether there are skip connections.
        width: channels of the first stage.
        in_channels: channels of the images.
        num_classes: outputs.

    Returns:
        The network; input [N, in_channels, H, W], output [N, num_classes].

    Raises:
        ValueError: the depth is below 5.
    """
    if depth < 5:
        raise ValueError(f"depth={depth}: must be at least 5, a stem, three stages and the output; 26 is the default.")
    num = depth - 2
    stages = [k * 3 // num for k in range(num)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = _convolution(in_channels, width, 1, normalised)
    layers["relu"] = nn.ReLU()
    channels, before, k = width, 0, 0
    while k < num:
        own = [stages[k]] if k + 1 == num else [stages[k], stages[k + 1]]
        plan: list[tuple[int, int, int]] = []  # channels in, channels out, stride
        for stage in own:
            plan.append((channels, width * 2**stage, 2 if stage > before else 1))
            channels, before = width * 2**stage, stage
        layers[f"block{len(layers) - 1}"] = _Block(plan, normalised, skip)
        k += len(own)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(channels, num_classes)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


class _Block(nn.Module):
    """relu(f(x)) or relu(shortcut(x) + f(x)), f being one convolution or two with a ReLU between."""

    def __init__(self, plan: list[tuple[int, int, int]], normalised: bool, skip: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for k, (channels, out_channels, stride) in enumerate(plan):
            if k:
                parts.append(nn.ReLU())
            parts.append(_convolution(channels, out_channels, stride, normalised))
        self.body = nn.Sequential(*parts)
        self.shortcut: nn.Module | None = None
        if skip:
            channels, out_channels = plan[0][0], plan[-1][1]
            stride = math.prod(stride for _, _, stride in plan)
            same = channels == out_channels and stride == 1
            self.shortcut = (
                nn.Identity() if same else _convolution(channels, out_channels, stride, normalised, kernel=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, C', H', W'] of [N, C, H, W]."""
        result: Tensor = self.body(x)
        return F.relu(result if self.shortcut is None else result + self.shortcut(x))


def _convolution(channels: int, out_channels: int, stride: int, normalised: bool, kernel: int = 3) -> nn.Module:
    layer = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=not normalised)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels)) if normalised else layer


def _fully_connected(
    depth: int,
    width: int,
    in_features: int,
    num_classes: int,
    doubling: int,
    activation: Callable[[], nn.Module],
    batch_norm: bool,
) -> nn.Sequential:
    if depth < 2:
        raise ValueError(f"depth={depth}: must be at least 2, a hidden layer and the output; 11 is common.")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = in_features
    for k in range(1, depth):
        layers[f"linear{k}"] = nn.Linear(features, width)
        if batch_norm:
            layers[f"norm{k}"] = nn.BatchNorm1d(width)
        layers[f"activation{k}"] = activation()
        features = doubling * width
    layers["output"] = nn.Linear(features, num_classes)
    return nn.Sequential(layers)


def _orthogonal_crelu(depth: int) -> nn.Sequential:
    return orthogonal_mlp(depth, activation="crelu")


def _looks_linear_normalised(depth: int) -> nn.Sequential:
    return looks_linear(depth, batch_norm=True)


def _plain_conv(depth: int) -> nn.Sequential:
    return convolutional(depth, normalised=False)


def _plain_resnet(depth: int) -> nn.Sequential:
    return convolutional(depth, normalised=False, skip=True)


def _resnet(depth: int) -> nn.Sequential:
    return convolutional(depth, skip=True)


#: Kind -> function of the depth, for 3 x 32 x 32 images and 10 classes.
THESIS_NETWORKS: dict[str, Callable[[int], nn.Sequential]] = {
    "orthogonal_relu": orthogonal_mlp,
    "orthogonal_crelu": _orthogonal_crelu,
    "looks_linear": looks_linear,
    "looks_linear_norm": _looks_linear_normalised,
    "conv": _plain_conv,
    "conv_norm": convolutional,
    "conv_skip": _plain_resnet,
    "conv_norm_skip": _resnet,
}


def thesis_network(kind: str, depth: int) -> nn.Sequential:
    """A network of the thesis by its kind and depth.

    Args:
        kind: a key of ``THESIS_NETWORKS``.
        depth: layers with weights.

    Returns:
        The network, in training mode; input [N, 3, 32, 32], output [N, 10].

    Raises:
        ValueError: unknown kind, or too small a depth.
    """
    if kind not in THESIS_NETWORKS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(THESIS_NETWORKS)}; 'conv_norm_skip' trains best.")
    return THESIS_NETWORKS[kind](depth)
