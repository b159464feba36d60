r"""Moving the kept coefficients so that predictions stay, when directions are dropped: least squares, no training.

Dropping directions changes the function from f(w) to f(w_k). The kept coefficients can undo part of this:

    minimise over theta  ||f(w) - f(w_k) - J E theta||^2 + lambda ||theta||^2,     c <- c + theta

with J the Jacobian at w_k and E the k kept directions, by a few conjugate gradients; a round is one such Gauss-Newton
step. Predictions that are sure weigh little in it, so few samples may decide, and k coefficients can follow them too
closely: part of the samples is held out, and of each step as much is taken as brings the function nearest on these,
nothing if none does. No label is needed. It is what optimal brain surgery does for weights (Hassibi & Stork 1993), in
the exact metric and in any basis, and for all that is dropped at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.compensation import compensated_step
from torchgeom_optim.geometry.function_metric import FunctionMetric
from torchgeom_optim.geometry.mini_batches import MiniBatch
from torchgeom_optim.models.reduced_model import ReducedModel
from torchgeom_optim.models.reduction_metric import head_of

__all__ = ["compensate"]

_PARTS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def compensate(
    reduced: ReducedModel,
    teacher: nn.Module,
    samples: MiniBatch,
    *,
    rounds: int = 3,
    iterations: int = 10,
    damping: float = 1.0,
    held_out: float = 0.2,
    metric: str = "fisher",
    select: Callable[[Any], Tensor] | None = None,
    class_dim: int = -1,
    **jacobian_options: Any,
) -> ReducedModel:
    """Let a reduced network's coefficients make up for the directions that it lacks.

    Args:
        reduced: changed in place.
        teacher: the network that it is to compute like.
        samples: whose predictions are to stay.
        rounds: Gauss-Newton steps, at most; they end where one brings nothing.
        iterations: conjugate gradients in each, a product by J and one by J' each. Few of them are a regularisation.
        damping: lambda, in units of the mean of diag(J E E'J').
        held_out: share of the samples, the last ones, by which the length of the step is chosen, in [0, 1); with 0 it
            is chosen by those that it was computed from.
        metric: "fisher", f = 2 sqrt(p); "outputs", f = the outputs.
        select: picks the outputs out of what the networks return.
        class_dim: axis of the classes.
        **jacobian_options: ``batch_size``, ``memory_limit``.

    Returns:
        ``reduced`` itself; its report is gone, for it holds no more.

    Raises:
        ValueError: an argument out of range; the coefficients would not be finite, and are as they were.
    """
    for name, value in (("rounds", rounds), ("iterations", iterations)):
        if not value >= 1:
            raise ValueError(f"{name}={value}: must be at least 1; 3 rounds of 10 iterations are the default.")
    if not 0.0 < damping < math.inf:
        raise ValueError(f"damping={damping}: must be in (0, inf); 1.0 is the default.")
    if not 0.0 <= held_out < 1.0:
        raise ValueError(f"held_out={held_out}: must be in [0, 1), a share of the samples; 0.2 is the default.")
    names = tuple(reduced.weights())
    options = {"of": head_of(metric), "select": select, "class_dim": class_dim, "parameters": names, **jacobian_options}
    fitted = max(1, samples.size - round(held_out * samples.size))
    others = samples.part(fitted, samples.size) if fitted < samples.size else samples
    samples = samples.part(0, fitted)
    wanted, wanted_of_others = (FunctionMetric(teacher, part.inputs, **options).values() for part in (samples, others))
    function = FunctionMetric(reduced.merge(), others.inputs, **options)
    before = reduced.coefficients.detach().clone()
    try:
        for _ in range(rounds):
            jacobian = FunctionMetric(reduced.merge(), samples.inputs, **options)
            step = _gauss_newton(reduced, jacobian, wanted, iterations, damping)
            if not bool(torch.isfinite(step).all()):
                raise ValueError(
                    "the step is not finite: the metric is too singular for it. Take more damping, or samples that "
                    "differ."
                )
            if not _advance(reduced, step, function, wanted_of_others):
                break
    except BaseException:
        reduced.coefficients.copy_(before)
        raise
    reduced.report = None
    return reduced


def _advance(reduced: ReducedModel, step: Tensor, function: FunctionMetric, wanted: Tensor) -> bool:
    """Add that part of the step after which the function is nearest to what is wanted; whether any of it is."""
    start = reduced.coefficients.detach().clone()
    distances = {}
    for part in _PARTS:
        reduced.coefficients.copy_(start + part * step)
        values = function.values(function.vectors.flat(reduced.weights()))
        distances[part] = float((wanted - values).double().norm())
    best = min(distances, key=lambda part: distances[part])
    reduced.coefficients.copy_(start + best * step)
    return best > 0


def _gauss_newton(
    reduced: ReducedModel, jacobian: FunctionMetric, wanted: Tensor, iterations: int, damping: float
) -> Tensor:
    """theta, [k]."""
    directions, positions, vectors = reduced.directions, reduced.positions, jacobian.vectors

    def product(theta: Tensor) -> Tensor:
        return jacobian.product(vectors.flat(directions(reduced._spread(theta))))

    def transposed_product(u: Tensor) -> Tensor:
        return directions.coordinates(vectors.named(jacobian.transposed_product(u)))[positions]

    diagonal = directions.diagonal(jacobian)[positions].to(reduced.coefficients) * jacobian.num_samples
    lam = damping * float(diagonal.sum()) / jacobian.shape[0]
    return compensated_step(
        product,
        transposed_product,
        torch.zeros_like(diagonal),
        torch.ones_like(diagonal, dtype=torch.bool),
        lam,
        change=wanted - jacobian.values(),
        scale=(diagonal + lam).rsqrt() if lam > 0 else None,  # nothing that is kept matters: theta stays 0
        most_iterations=iterations,
        tolerance=1e-4,
    ).step
