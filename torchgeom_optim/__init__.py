"""Information geometry for PyTorch training: whitening optimizers and per-sample gradient geometry."""

from torchgeom_optim.geometry import GramRecorder, Jacobian, per_sample_gram
from torchgeom_optim.optimizers import WhiteningSGD, fold_batch_norm

__all__ = ["GramRecorder", "Jacobian", "WhiteningSGD", "fold_batch_norm", "per_sample_gram"]
