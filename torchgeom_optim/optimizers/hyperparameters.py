"""Checks of the hyper-parameters that optimizers share, defaults and per group alike."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["check_choice", "check_flags", "check_interval", "check_range", "check_sgd_settings"]


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
    if isinstance(value, nn.Module):
        raise TypeError(f"{name} ({where}): got a {type(value).__name__}; need a number. Give a model as model=.")
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


def check_sgd_settings(group: Mapping[str, Any], where: str) -> None:
    """Check what steps that end in SGD have in common, all but the learning rate.

    Args:
        group: hyper-parameters by name.
        where: how the message calls the group.

    Raises:
        ValueError: a value out of its range, or Nesterov's momentum without a momentum or with dampening.
    """
    check_range(group, "momentum", where, hint="0.9 is common, 0 switches it off.")
    check_range(group, "dampening", where, low=-math.inf, hint="0 is the default.")
    check_range(group, "weight_decay", where, hint="0 switches it off.")
    check_flags(group, ("nesterov", "maximize"), where)
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True with momentum={group['momentum']}, dampening={group['dampening']} ({where}): "
            "needs a momentum and zero dampening. Try momentum=0.9, dampening=0."
        )


def check_interval(value: object, name: str) -> None:
    """Check an interval between steps: a whole number of them, or a function that returns one.

    Args:
        value: the interval.
        name: of the argument.

    Raises:
        TypeError: neither.
        ValueError: less than 1.
    """
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: need a whole number of steps, or a function of the step.")
    if value < 1:
        raise ValueError(f"{name}={value}: must be in [1, inf). 1 is every step.")
