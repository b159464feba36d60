r"""Moving the kept coefficients so that predictions stay, when directions are dropped: least squares, no training.

Dropping directions changes the function from f(w) to f(w_k). The kept coefficients can undo part of this:

    minimise over theta  ||f(w) - f(w_k) - J E theta||^2 + lambda ||theta||^2,     c <- c + theta

with J the Jacobian at w_k and E the k kept directions, by a few conjugate gradients; a round is one such Gauss-Newton
step. No label is needed. It is what optimal brain surgery does for weights (Hassibi & Stork 1993), in the exact metric
and in any basis, and for all that is dropped at once.
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


@torch.no_grad()
def compensate(
    reduced: ReducedModel,
    teacher: nn.Module,
    samples: MiniBatch,
    *,
    rounds: int = 2,
    iterations: int = 10,
    damping: float = 0.03,
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
        rounds: Gauss-Newton steps.
        iterations: conjugate gradients in each, a product by J and one by J' each. Few of them are a regularisation.
        damping: lambda, in units of the mean of diag(J E E'J').
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
            raise ValueError(f"{name}={value}: must be at least 1; 2 rounds of 10 iterations are the default.")
    if not 0.0 < damping < math.inf:
        raise ValueError(f"damping={damping}: must be in (0, inf); 0.03 is the default.")
    names = tuple(reduced.weights())
    options = {"of": head_of(metric), "select": select, "class_dim": class_dim, "parameters": names, **jacobian_options}
    wanted = FunctionMetric(teacher, samples.inputs, **options).values()
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
            reduced.coefficients.add_(step)
    except Exception:
        reduced.coefficients.copy_(before)
        raise
    reduced.report = None
    return reduced


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
