"""The networks that papers and figures are measured on, by name.

Layer lists are written as in Lafond, Vasilache and Bottou (2017), Fig. 2: C6(5x5) is a convolution with 6
output channels and 5 x 5 kernels, P2 a 2 x 2 max pooling with stride 2, F120 a linear layer with 120 outputs.
A ReLU follows every convolution and linear layer but the last, all layers have biases, and weights start as
PyTorch initialises them, unless a network says otherwise. All return logits.

A convolution k x k from c to m channels has m(ck^2 + 1) parameters, a linear layer from n to m has m(n + 1), a
batch or layer norm over n features has 2n. The counts below are for the default arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from torchgeom_optim._optional import optional_import
from torchgeom_optim.models.reference_modules import CharGPT, LayerStack, PlainResNet

__all__ = [
    "REFERENCE_NETWORKS",
    "allcnn9",
    "char_gpt",
    "cnn3",
    "cnn_small",
    "cnn_small_cifar",
    "lenet",
    "mlp2",
    "mlp_deep",
    "mlp_thin",
    "mlp_wide",
    "reference_network",
    "resnet8",
    "resnet18",
    "resnet20",
    "vgg11",
    "vgg_small",
]


def lenet(
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    batch_norm: bool = False,
    bias_before_norm: bool = True,
) -> nn.Sequential:
    """LeNet-type network C6(5x5)-P2-C16(5x5)-P2-F120-F84-F10, 62,006 parameters.

    Source: Lafond, Vasilache and Bottou (2017), Fig. 2; convolutions without padding. With ``batch_norm`` a
    batch norm stands between every layer but the last and its ReLU ("on all layers except the output layer",
    section 4.2), 62,458 parameters. The biases in front of it, which it cancels, are kept by default: the
    network then has the plain one's parameters under the plain one's names, and folding the norms away gives
    the plain one back.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, at least 16.
        num_classes: outputs.
        batch_norm: whether to insert batch norms.
        bias_before_norm: with ``batch_norm``, whether the layers in front of a norm keep their bias.

    Returns:
        The network; input [N, in_channels, image_size, image_size], output [N, num_classes].

    Example:
        >>> sum(p.numel() for p in lenet().parameters())
        62006
    """
    stack = LayerStack(in_channels, image_size, batch_norm, bias_before_norm)
    stack.conv(6, kernel=5).pool().conv(16, kernel=5).pool()
    return stack.linear(120).linear(84).output(num_classes)


def vgg_small(
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    batch_norm: bool = False,
    bias_before_norm: bool = True,
) -> nn.Sequential:
    """Small VGG C32-P2-C64-P2-C128-C128-P2-F256-F10 (3x3, padding 1), 767,946 parameters.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, at least 8.
        num_classes: outputs.
        batch_norm: whether to insert batch norms, as in :func:`lenet`; 769,162 parameters.
        bias_before_norm: with ``batch_norm``, whether the layers in front of a norm keep their bias.

    Returns:
        The network; input [N, in_channels, image_size, image_size], output [N, num_classes].
    """
    stack = LayerStack(in_channels, image_size, batch_norm, bias_before_norm)
    stack.conv(32).pool().conv(64).pool().conv(128).conv(128).pool()
    return stack.linear(256).output(num_classes)


def cnn3(*, in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Sequential:
    """Three convolutions C32-P2-C64-P2-C128-P2-F10 (3x3, padding 1), 113,738 parameters.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, at least 8.
        num_classes: outputs.

    Returns:
        The network; input [N, in_channels, image_size, image_size], output [N, num_classes].
    """
    stack = LayerStack(in_channels, image_size)
    return stack.conv(32).pool().conv(64).pool().conv(128).pool().output(num_classes)


def cnn_small(*, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> nn.Sequential:
    """Two convolutions for MNIST, C16(5x5)-P2-C16(5x5)-P2-F10 (padding 2), 14,682 parameters.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, at least 4.
        num_classes: outputs.

    Returns:
        The network; input [N, in_channels, image_size, image_size], output [N, num_classes].
    """
    stack = LayerStack(in_channels, image_size)
    return stack.conv(16, kernel=5, padding=2).pool().conv(16, kernel=5, padding=2).pool().output(num_classes)


def cnn_small_cifar(*, in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Sequential:
    """The CIFAR form of :func:`cnn_small`, C32-P2-C32-P2-C64-P2-F10 (3x3, padding 1), 38,890 parameters.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, at least 8.
        num_classes: outputs.

    Returns:
        The network; input [N, in_channels, image_size, image_size], output [N, num_classes].
    """
    stack = LayerStack(in_channels, image_size)
    return stack.conv(32).pool().conv(32).pool().conv(64).pool().output(num_classes)


def allcnn9(*, in_channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """Nine convolutions (3x3, padding 1), widths 8-8-16-16-16-32-32-32-10, 32,642 parameters.

    The third and the sixth have stride 2; the ninth gives the class scores, averaged over positions.

    Args:
        in_channels: channels of the images.
        num_classes: outputs.

    Returns:
        The network; input [N, in_channels, H, W], output [N, num_classes].
    """
    stack = LayerStack(in_channels, image_size=None)
    for width, stride in zip((8, 8, 16, 16, 16, 32, 32, 32), (1, 1, 2, 1, 1, 2, 1, 1), strict=True):
        stack.conv(width, stride=stride)
    return stack.score_map(num_classes)


def vgg11(*, width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """VGG-11 for 32 x 32 images, C64-P2-C128-P2-C256-C256-P2-C512-C512-P2-C512-C512-P2-F512-F10 in 3x3.

    9,488,266 parameters at full width. The convolutions and the initialisation are those of torchvision's
    ``vgg11`` (He et al. normal by fan-out, linear layers normal with standard deviation 0.01, biases zero);
    its classifier for 224 x 224 images is replaced by 512-512-10 without dropout.

    Args:
        width: factor on all hidden widths, in (0, 8]; state it beside a figure.
        num_classes: outputs.

    Returns:
        The network; input [N, 3, 32, 32], output [N, num_classes].

    Raises:
        ValueError: the factor is out of range.
    """
    if not 0.0 < width <= 8.0:
        raise ValueError(f"width={width}: must be in (0, 8]; 1 is the full network, 0.25 a quarter of each width.")
    stack = LayerStack(3, 32)
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for channels in stage:
            stack.conv(max(1, round(width * channels)))
        stack.pool()
    network = stack.linear(max(1, round(width * 512))).output(num_classes)
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
    return network


def mlp2(*, in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """Multilayer perceptron 784-256-256-10, 269,322 parameters.

    Args:
        in_features: numbers per sample.
        num_classes: outputs.

    Returns:
        The network; input [N, ...] is flattened to [N, in_features], output [N, num_classes].
    """
    return _mlp(in_features, (256, 256), num_classes)


def mlp_wide(*, in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """Multilayer perceptron 784-1000-1000-10, 1,796,010 parameters.

    Args:
        in_features: numbers per sample.
        num_classes: outputs.

    Returns:
        The network; input [N, ...] is flattened to [N, in_features], output [N, num_classes].
    """
    return _mlp(in_features, (1000, 1000), num_classes)


def mlp_deep(*, in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """Multilayer perceptron 784-(128)x9-10, 233,866 parameters, He et al. initialisation (normal, fan-in).

    Biases start at zero; the output layer is initialised as the others are.

    Args:
        in_features: numbers per sample.
        num_classes: outputs.

    Returns:
        The network; input [N, ...] is flattened to [N, in_features], output [N, num_classes].
    """
    network = _mlp(in_features, (128,) * 9, num_classes)
    for module in network:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


def mlp_thin(*, in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """Multilayer perceptron 784-64-10, 50,890 parameters.

    Args:
        in_features: numbers per sample.
        num_classes: outputs.

    Returns:
        The network; input [N, ...] is flattened to [N, in_features], output [N, num_classes].
    """
    return _mlp(in_features, (64,), num_classes)


def resnet18(*, num_classes: int = 10) -> nn.Module:
    """ResNet-18 for 32 x 32 images, 11,173,962 parameters; needs torchvision (extra ``vision``).

    torchvision's, with a first convolution of 3x3, stride 1, padding 1 and without the first pooling; batch
    norms as there.

    Args:
        num_classes: outputs.

    Returns:
        The network; input [N, 3, 32, 32], output [N, num_classes].
    """
    network = cast(nn.Module, optional_import("torchvision.models", "resnet18").resnet18(num_classes=num_classes))
    first = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # as torchvision initialises it
    network.conv1 = first
    network.maxpool = nn.Identity()
    return network


def resnet8(*, in_channels: int = 3, num_classes: int = 10) -> PlainResNet:
    """Residual network without normalisation, one block per stage, 77,706 parameters.

    Args:
        in_channels: channels of the images.
        num_classes: outputs.

    Returns:
        The network; input [N, in_channels, H, W], output [N, num_classes].
    """
    return PlainResNet(1, in_channels=in_channels, num_classes=num_classes)


def resnet20(*, in_channels: int = 3, num_classes: int = 10) -> PlainResNet:
    """Residual network without normalisation, three blocks per stage, 271,690 parameters.

    Args:
        in_channels: channels of the images.
        num_classes: outputs.

    Returns:
        The network; input [N, in_channels, H, W], output [N, num_classes].
    """
    return PlainResNet(3, in_channels=in_channels, num_classes=num_classes)


def char_gpt(*, vocabulary_size: int = 128, context: int = 48) -> CharGPT:
    """Character model: 2 pre-norm blocks, width 48, 4 heads, context 48, 71,360 parameters.

    Args:
        vocabulary_size: characters; 128 are those of ASCII.
        context: longest window.

    Returns:
        The network; input [N, T] of int64 with T <= context, output [N, T, vocabulary_size].
    """
    return CharGPT(vocabulary_size, context=context, width=48, num_heads=4, num_blocks=2)


def _mlp(in_features: int, hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    stack = LayerStack(in_features, image_size=None)
    for width in hidden:
        stack.linear(width)
    return stack.output(num_classes)


#: Every reference network by name: functions without compulsory arguments.
REFERENCE_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (
        lenet,
        vgg_small,
        cnn3,
        resnet18,
        resnet8,
        resnet20,
        mlp2,
        mlp_wide,
        mlp_deep,
        mlp_thin,
        cnn_small,
        cnn_small_cifar,
        char_gpt,
        allcnn9,
        vgg11,
    )
}


def reference_network(name: str, **options: object) -> nn.Module:
    """A reference network by its name.

    Args:
        name: a key of ``REFERENCE_NETWORKS``.
        options: keyword arguments of the function of that name.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: there is no network of that name.

    Example:
        >>> sum(p.numel() for p in reference_network("mlp_thin").parameters())
        50890
    """
    if name not in REFERENCE_NETWORKS:
        near = difflib.get_close_matches(str(name), REFERENCE_NETWORKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "'lenet' is a common start."
        raise ValueError(f"name={name!r}: must be one of {', '.join(REFERENCE_NETWORKS)}; {hint}")
    return REFERENCE_NETWORKS[name](**options)
