"""Optimizers that measure a step in the geometry of the network's own function."""

from torchgeom_optim.optimizers.batch_norm import FoldedBatchNorm, fold_batch_norm
from torchgeom_optim.optimizers.geodesic import GeodesicSparsifier
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient
from torchgeom_optim.optimizers.path_record import Path, PathPoint
from torchgeom_optim.optimizers.prune_masks import apply_prune_masks
from torchgeom_optim.optimizers.report import ParameterRule, RuleReport
from torchgeom_optim.optimizers.structured_targets import Heads, NofM, Units
from torchgeom_optim.optimizers.targets import Dense, Mask, OtherWeights, Sparsity, Target
from torchgeom_optim.optimizers.whitening import WhiteningSGD

__all__ = [
    "BlockNaturalGradient",
    "Dense",
    "FoldedBatchNorm",
    "GeodesicSparsifier",
    "Heads",
    "Mask",
    "NofM",
    "OtherWeights",
    "ParameterRule",
    "Path",
    "PathPoint",
    "RuleReport",
    "Sparsity",
    "Target",
    "Units",
    "WhiteningSGD",
    "apply_prune_masks",
    "fold_batch_norm",
]
