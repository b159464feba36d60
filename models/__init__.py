"""Reference networks, and modules built around trained ones."""

if __name__ != "torchgeom_optim.models":
    raise ImportError(f"{__name__!r} is not importable by this name; import torchgeom_optim.models instead.")

__all__: list[str] = []
