"""Checks of the hyper-parameters that optimizers share, defaults and per group alike."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["check_choice", "check_flags", "check_range"]


def check_range(
    group: Mapping[str, Any], name: str, where: str, *, low: float = 0.0, high: float = math.inf, hint: str
) -> None:
    """Raise unless ``low <= group[name] < high``; NaN and infinities fail.

    Args:
        group: hyper-parameters by name.
        name: the one to check; a number, or a tensor with one element.
        where: how the message calls the group.
        low: least allowed value.
        high: bound that must not be reached.
        hint: what to try instead.

    Raises:
        TypeError: not a number.
        ValueError: outside of the range.
    """
    value = group[name]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} ({where}): got a tensor of shape {tuple(value.shape)}; need one element. {hint}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} ({where}): got {type(value).__name__}; need a number. {hint}")
    if not (low <= float(value) < high and math.isfinite(value)):
        bracket = "(" if low == -math.inf else "["
        raise ValueError(f"{name}={float(value)} ({where}): must be in {bracket}{low:g}, {high:g}). {hint}")


def check_flags(group: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raise unless each named value is True or False.

    Raises:
        TypeError: anything else.
    """
    for name in names:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name}={group[name]!r} ({where}): need True or False.")


def check_choice(group: Mapping[str, Any], name: str, choices: tuple[str, ...], where: str) -> None:
    """Raise unless the value is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if group[name] not in choices:
        raise ValueError(f"{name}={group[name]!r} ({where}): must be one of {', '.join(map(repr, choices))}.")
