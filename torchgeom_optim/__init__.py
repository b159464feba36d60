"""Information geometry for PyTorch training: whitening optimizers and per-sample gradient geometry."""

from torchgeom_optim.optimizers import WhiteningSGD, fold_batch_norm

__all__ = ["WhiteningSGD", "fold_batch_norm"]
