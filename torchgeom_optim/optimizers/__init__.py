"""Optimizers that measure a step in the geometry of the network's own function."""

from torchgeom_optim.optimizers.batch_norm import FoldedBatchNorm, fold_batch_norm
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient
from torchgeom_optim.optimizers.report import ParameterRule, RuleReport
from torchgeom_optim.optimizers.whitening import WhiteningSGD

__all__ = ["BlockNaturalGradient", "FoldedBatchNorm", "ParameterRule", "RuleReport", "WhiteningSGD", "fold_batch_norm"]
