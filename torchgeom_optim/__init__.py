"""Information geometry for PyTorch training: whitening optimizers and per-sample gradient geometry."""

__all__: list[str] = []
