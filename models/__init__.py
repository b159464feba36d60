"""Reference networks, and modules built around trained ones."""

if __name__ != "torchgeom_optim.models":
    raise ImportError(f"{__name__!r} is not importable by this name; import torchgeom_optim.models instead.")

from torchgeom_optim.models.reference import (
    REFERENCE_NETWORKS,
    allcnn9,
    char_gpt,
    cnn3,
    cnn_small,
    cnn_small_cifar,
    lenet,
    mlp2,
    mlp_deep,
    mlp_thin,
    mlp_wide,
    reference_network,
    resnet8,
    resnet18,
    resnet20,
    vgg11,
    vgg_small,
)
from torchgeom_optim.models.reference_modules import CharGPT, PlainResNet

__all__ = [
    "REFERENCE_NETWORKS",
    "CharGPT",
    "PlainResNet",
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
