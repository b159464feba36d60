"""One step of a path: from the weights, what is to go and the metric to the next weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchgeom_optim.geometry.compensation import compensated_step
from torchgeom_optim.geometry.function_metric import FunctionMetric
from torchgeom_optim.geometry.kronecker_root import KroneckerRoot
from torchgeom_optim.geometry.trust_region import eigenpairs, geodesic_step

__all__ = ["StepSettings", "correction", "geodesic_direction", "prediction"]

_LARGEST_GRAM = 4096


class StepSettings(NamedTuple):
    """How steps are damped.

    Attributes:
        damping: lambda, as a share of the mean of diag(J J').
        factor_damping: the same for the layers' Kronecker factors, as a share of their mean diagonal.
        corrections: iterations of conjugate gradients that a correction takes.
        pull: beta of Eq. (5); None to go by ``damping``.
    """

    damping: float
    factor_damping: float
    corrections: int
    pull: float | None


def prediction(root: KroneckerRoot, move: Tensor, free: Tensor, settings: StepSettings, iterations: int = 50) -> Tensor:
    """The compensated step in the layers' Kronecker metric, which knows all samples that were ever seen.

    Args:
        root: R.
        move: v, [P].
        free: entries that may compensate, [P].
        settings: see there.
        iterations: of conjugate gradients; they cost a few products of the layers' matrices, and no pass.

    Returns:
        v + theta, [P].
    """
    diagonal = root.diagonal()
    known = diagonal > 0
    if not bool(known.any()) or not bool(move.any()):
        return move
    damping = settings.factor_damping * float(diagonal[known].mean())
    scale = (diagonal + damping).rsqrt()
    return compensated_step(
        root.product,
        root.transposed_product,
        move,
        free & known,
        damping,
        scale=scale,
        most_iterations=iterations,
        tolerance=1e-3,
    ).step


def correction(
    metric: FunctionMetric, diagonal: Tensor, wanted: Tensor, free: Tensor, settings: StepSettings
) -> Tensor:
    """A damped Gauss-Newton step of the free weights towards the wanted values of the function.

    Args:
        metric: J and f at the present weights.
        diagonal: diag(J'J), roughly, [P].
        wanted: the values that f is to have, [N C].
        free: entries that may move, [P].
        settings: see there.

    Returns:
        The step, [P].
    """
    damping = settings.damping * float(diagonal.sum()) / metric.shape[0]
    return compensated_step(
        metric.product,
        metric.transposed_product,
        torch.zeros_like(diagonal),
        free,
        damping,
        change=wanted - metric.values(),
        scale=(diagonal + damping).rsqrt(),
        most_iterations=settings.corrections,
        tolerance=1e-4,
    ).step


def geodesic_direction(
    metric: FunctionMetric, diagonal: Tensor, towards: Tensor, free: Tensor, radius: float, settings: StepSettings
) -> Tensor:
    """The step of Eq. (5), by J J' where that matrix is small and every entry is free, else matrix-free.

    Args:
        metric: J at the present weights.
        diagonal: diag(J'J), roughly, [P].
        towards: v, [P].
        free: entries that may move, [P].
        radius: length of the step.
        settings: see there.

    Returns:
        theta, [P].

    Raises:
        ValueError: a pull (beta) is given, and J J' is too large or some entries are not free.
    """
    if bool(free.all()) and metric.shape[0] <= _LARGEST_GRAM:
        pairs = eigenpairs(metric.gram().double())
        relative = settings.damping if settings.pull is None else None
        return geodesic_step(
            metric.product,
            metric.transposed_product,
            pairs,
            towards,
            radius,
            pull=settings.pull,
            relative_multiplier=relative,
            measure_residual=False,
        ).step
    if settings.pull is not None:
        raise ValueError(
            f"pull={settings.pull} with {metric.shape[0]} rows of J and {int((~free).sum())} entries that may not "
            f"move: beta needs at most {_LARGEST_GRAM} rows and all entries free. Give damping in its place, or fewer "
            "samples."
        )
    # v + theta = lambda (g + lambda)^-1 v has the direction of Eq. (5) for this lambda; then to the sphere.
    damping = settings.damping * float(diagonal.sum()) / metric.shape[0]
    step = compensated_step(
        metric.product,
        metric.transposed_product,
        towards * free,
        free,
        damping,
        scale=(diagonal + damping).rsqrt(),
        most_iterations=10 * max(1, settings.corrections),
        tolerance=1e-4,
    ).step
    length = torch.linalg.vector_norm(step)
    return step * torch.where(length > 0, radius / length, 0.0)
