"""Reference networks, and modules built around trained ones."""

if __name__ != "torchgeom_optim.models":
    raise ImportError(f"{__name__!r} is not importable by this name; import torchgeom_optim.models instead.")

from torchgeom_optim.models.compaction import Compaction, CompactionError, CompactionReport, ModelCost, compact
from torchgeom_optim.models.fewer_heads import FewerHeadsAttention
from torchgeom_optim.models.gated import GatedNetwork
from torchgeom_optim.models.gradient_graph import GradientGraph, draw_graphs, gradient_graph, gradient_graphs_by_class
from torchgeom_optim.models.gradient_kernel import GradientKernel
from torchgeom_optim.models.gradnet import GradNet
from torchgeom_optim.models.gradnet_cache import RecordCache
from torchgeom_optim.models.gradnet_fit import NonFiniteLossError
from torchgeom_optim.models.gradnet_paper import CandidateNetwork
from torchgeom_optim.models.gradnet_steps import UnsupportedBaseError
from torchgeom_optim.models.rbm import BernoulliRBM, RBMGradientFeatures
from torchgeom_optim.models.reduced_model import ReducedModel
from torchgeom_optim.models.reduction import decompose, reduce_model
from torchgeom_optim.models.reduction_decomposition import Decomposition
from torchgeom_optim.models.reduction_gradual import distil, reduce_gradually
from torchgeom_optim.models.reduction_report import CurvePoint, ReductionReport
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
from torchgeom_optim.models.tangent import LinearisedNetwork
from torchgeom_optim.models.thesis_networks import THESIS_NETWORKS, thesis_network

__all__ = [
    "REFERENCE_NETWORKS",
    "THESIS_NETWORKS",
    "BernoulliRBM",
    "CandidateNetwork",
    "CharGPT",
    "Compaction",
    "CompactionError",
    "CompactionReport",
    "CurvePoint",
    "Decomposition",
    "FewerHeadsAttention",
    "GatedNetwork",
    "GradNet",
    "GradientGraph",
    "GradientKernel",
    "LinearisedNetwork",
    "ModelCost",
    "NonFiniteLossError",
    "PlainResNet",
    "RBMGradientFeatures",
    "RecordCache",
    "ReducedModel",
    "ReductionReport",
    "UnsupportedBaseError",
    "allcnn9",
    "char_gpt",
    "cnn3",
    "cnn_small",
    "cnn_small_cifar",
    "compact",
    "decompose",
    "distil",
    "draw_graphs",
    "gradient_graph",
    "gradient_graphs_by_class",
    "lenet",
    "mlp2",
    "mlp_deep",
    "mlp_thin",
    "mlp_wide",
    "reduce_gradually",
    "reduce_model",
    "reference_network",
    "resnet8",
    "resnet18",
    "resnet20",
    "thesis_network",
    "vgg11",
    "vgg_small",
]
