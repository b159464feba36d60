"""Moving the weights that stay so that the function stays while the others are taken away."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CompensatedStep", "compensated_step"]


class CompensatedStep(NamedTuple):
    """Result of :func:`compensated_step`.

    Attributes:
        step: v + theta, [P]; to be added to the weights.
        wanted: ||c - J v||, the change that is asked of the free weights; a scalar.
        left: ||c - J (v + theta)||, what they could not give.
        gradient_ratio: ||D (J_f' r - lambda theta)|| over the same at theta = 0, with r = c - J (v + theta): 0 at the
            minimum.
        iterations: of conjugate gradients.
        converged: whether gradient_ratio <= tolerance. Stopping early is a regularisation of its own.
    """

    step: Tensor
    wanted: Tensor
    left: Tensor
    gradient_ratio: float
    iterations: int
    converged: bool


def compensated_step(
    product: Callable[[Tensor], Tensor],
    transposed_product: Callable[[Tensor], Tensor],
    move: Tensor,
    free: Tensor,
    damping: float,
    *,
    change: Tensor | None = None,
    scale: Tensor | None = None,
    most_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> CompensatedStep:
    r"""Minimise ||J (v + theta) - c||^2 + lambda ||theta||^2 over the theta that live on the free weights.

    v is the prescribed move of the weights that go; c the change of the function that is wanted: 0 keeps it as it is,
    f(w_0) - f(w) also undoes what earlier steps have changed. The minimum is

        theta = J_f' (J_f J_f' + lambda)^-1 (c - J v) = (J_f' J_f + lambda)^-1 J_f' (c - J v)

    with J_f the columns of the free weights. With every weight free and c = 0, v + theta = lambda (g + lambda)^-1 v for
    g = J'J: the direction of Eq. (5) of "Geodesic sparsification", of which this is the form that keeps weights at the
    values they are given. In a metric that does not change, and for lambda -> 0, it is the geodesic to the plane of
    the prescribed weights.

    Solved by conjugate gradients for least squares (Hestenes and Stiefel 1952, damped), which never form J'J and whose
    objective falls in every iteration: one product by J and one by J' each. ``scale`` changes variables to
    theta = D psi with D = diag(scale) for a better condition, and lambda then counts the same ||theta||.

    Args:
        product: J v for v of shape [P], shape [Q].
        transposed_product: J'u for u of shape [Q], shape [P].
        move: v, shape [P].
        free: which weights may move beside v, bool, shape [P].
        damping: lambda, in the units of diag(J J'), in [0, inf). With 0, and more free weights than rows, the
            shortest theta is found.
        change: c, shape [Q]; None for 0.
        scale: D, positive, shape [P]; 1 / sqrt(diag(J'J) + lambda) is common. None for 1.
        most_iterations: of conjugate gradients, at least 0.
        tolerance: of the gradient's length, relative to that at theta = 0, in [0, 1).

    Returns:
        The step, and how far it got.

    Raises:
        ValueError: a value out of its range, or shapes that do not fit.

    Example:
        >>> J, v = torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 0.0])
        >>> free = torch.tensor([False, True])
        >>> compensated_step(lambda x: J @ x, lambda u: J.T @ u, v, free, 0.0).step
        tensor([ 1.0000, -0.5000])
    """
    _check(move, free, damping, most_iterations, tolerance)
    inner = free.to(move.dtype) if scale is None else free * scale.square()  # D D', 0 where nothing is free
    target = product(move).neg()
    r = target if change is None else change.to(target.dtype) + target
    wanted = torch.linalg.vector_norm(r)
    theta = torch.zeros_like(move)
    s = transposed_product(r)
    p = z = inner * s
    gamma = torch.dot(s, z)
    start, ratio, iteration = float(gamma), 0.0 if float(gamma) == 0 else 1.0, 0
    while iteration < most_iterations and ratio > tolerance:
        iteration += 1
        q = product(p)
        alpha = gamma / (torch.dot(q, q) + damping * torch.dot(p, p))
        theta = theta + alpha * p
        r = r - alpha * q
        s = transposed_product(r) - damping * theta
        z = inner * s
        gamma, last = torch.dot(s, z), gamma
        p = z + (gamma / last) * p
        ratio = math.sqrt(max(float(gamma), 0.0) / start)
    left = torch.linalg.vector_norm(r)
    return CompensatedStep(move + theta, wanted, left, ratio, iteration, ratio <= tolerance)


def _check(move: Tensor, free: Tensor, damping: float, most_iterations: int, tolerance: float) -> None:
    if move.dim() != 1 or free.shape != move.shape or free.dtype != torch.bool:
        raise ValueError(
            f"move of shape {list(move.shape)}, free of shape {list(free.shape)} and type {free.dtype}: both must be "
            "[P], and free of type bool. Flatten the parameters."
        )
    if not 0.0 <= damping < math.inf:
        raise ValueError(f"damping={damping}: must be in [0, inf); 1e-3 of the mean of diag(J J') is a start.")
    if not most_iterations >= 0:
        raise ValueError(f"most_iterations={most_iterations}: must be at least 0; 30 is a start.")
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance={tolerance}: must be in [0, 1); 1e-6 is a start.")
