"""What torch warns of in its own code, and no user can change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_own_deprecations"]


@contextmanager
def without_own_deprecations() -> Iterator[None]:
    """Forward mode and the counting of operations compile some of torch by ``torch.jit.script``, when first used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        yield
