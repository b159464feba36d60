"""How well conditioned are the gradients of a network; a room that later versions furnish."""

if __name__ != "torchgeom_optim.diagnostics":
    raise ImportError(f"{__name__!r} is not importable by this name; import torchgeom_optim.diagnostics instead.")

__all__: list[str] = []
