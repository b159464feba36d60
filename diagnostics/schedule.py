"""When to measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["EverySteps", "LogSpaced", "Schedule", "as_schedule"]

#: Called with the number of a training step, from 0; whether to measure there.
Schedule: TypeAlias = Callable[[int], bool]


@dataclass(frozen=True)
class EverySteps:
    """Every k-th step: 0, k, 2k, ...

    Args:
        interval: k.

    Raises:
        ValueError: k is not a number of at least 1.

    Example:
        >>> [step for step in range(10) if EverySteps(4)(step)]
        [0, 4, 8]
    """

    interval: int

    def __post_init__(self) -> None:
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"every={self.interval!r}: must be a whole number of steps, 1 or more; 100 is common.")

    def __call__(self, step: int) -> bool:
        """Whether to measure at that step."""
        return step % self.interval == 0


@dataclass(frozen=True)
class LogSpaced:
    """Steps that are even on a logarithmic axis: dense at the start, where everything changes, and sparse later.

    Args:
        per_decade: measurements per factor of ten; all steps are taken where there are no more than that.

    Raises:
        ValueError: it is not in (0, inf).

    Example:
        >>> [step for step in range(200) if LogSpaced(3)(step)]
        [0, 1, 2, 5, 10, 22, 46, 100]
    """

    per_decade: float = 10

    def __post_init__(self) -> None:
        if not 0 < self.per_decade < math.inf:
            raise ValueError(f"per_decade={self.per_decade}: must be in (0, inf); 10 is the default.")

    def __call__(self, step: int) -> bool:
        """Whether to measure at that step."""
        if step < 1:
            return step == 0
        # 10^(k / per_decade) is the last point whose rounding can be this step.
        k = math.floor(self.per_decade * math.log10(step + 0.5))
        return any(_nearest(10 ** (max(i, 0) / self.per_decade)) == step for i in (k - 1, k, k + 1))


def as_schedule(every: int | Schedule) -> Schedule:
    """A number of steps as a schedule; a schedule as it is.

    Args:
        every: k for every k-th step, or a callable from the step's number to whether it is due.

    Returns:
        The schedule.

    Raises:
        ValueError: a number that is not whole, or below 1.
        TypeError: neither a number nor callable.
    """
    if isinstance(every, int | float):  # a float is refused there
        return EverySteps(every)  # pyright: ignore[reportArgumentType]
    if not callable(every):
        raise TypeError(
            f"every={every!r}: must be a number of steps, LogSpaced(...), or a callable from step to bool; try 100."
        )
    return every


def _nearest(x: float) -> int:
    return math.floor(x + 0.5)
