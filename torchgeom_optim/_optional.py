"""The one place where optional libraries are imported, so that a missing one is named with its extra."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["optional_import"]

# Importable name of a library -> the extra of this package that brings it.
_EXTRAS = {
    "torchvision": "vision",
    "matplotlib": "plots",
    "PIL": "demo",
    "sklearn": "demo",
    "tqdm": "demo",
    "safetensors": "files",
    "pandas": "records",
    "tensorboard": "records",
    "lightning": "lightning",
    "transformers": "transformers",
    "clarabel": "peers",
    "scipy": "peers",
}


def optional_import(name: str, purpose: str) -> ModuleType:
    """Import a library that the package does not depend on.

    Call it where the library is used, never at the top of a module: importing this package must stay quick
    and must work without any extra.

    Args:
        name: the module to import, dotted names included (``"matplotlib.pyplot"``).
        purpose: what needs it, as the subject of a sentence (``"resnet18"``).

    Returns:
        The module.

    Raises:
        ImportError: the library is not installed.
        ModuleNotFoundError: it is, and lacks a module of its own.

    Example:
        >>> optional_import("json", "this example").dumps([1])
        '[1]'
    """
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise  # it is there, and lacks a dependency of its own
        extra = _EXTRAS.get(library)
        remedy = f"pip install 'torchgeom-optim[{extra}]'" if extra else f"pip install {library}"
        raise ImportError(
            f"no module named {library!r}: {purpose} needs it; {remedy} brings it.", name=error.name
        ) from error
