"""Information geometry for PyTorch training: whitening optimizers and per-sample gradient geometry."""

from torchgeom_optim.geometry import GramRecorder, Jacobian, per_sample_gram
from torchgeom_optim.optimizers import BlockNaturalGradient, WhiteningSGD, fold_batch_norm

__all__ = ["BlockNaturalGradient", "GramRecorder", "Jacobian", "WhiteningSGD", "fold_batch_norm", "per_sample_gram"]


def __getattr__(name: str) -> object:
    """``__version__``, which stands in pyproject.toml alone, looked up when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("torchgeom-optim")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
