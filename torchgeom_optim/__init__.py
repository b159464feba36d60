"""Information geometry for PyTorch training: whitening optimizers and per-sample gradient geometry."""

from torchgeom_optim.geometry import GramRecorder, Jacobian, per_sample_gram
from torchgeom_optim.optimizers import BlockNaturalGradient, WhiteningSGD, fold_batch_norm

__all__ = ["BlockNaturalGradient", "GramRecorder", "Jacobian", "WhiteningSGD", "fold_batch_norm", "per_sample_gram"]
