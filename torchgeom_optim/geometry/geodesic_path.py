r"""How long a path through the space of networks is, measured by what it does to the function.

    L = \int sqrt(theta' g theta) dt,    theta = dw / dt, g = J'J / N

Source: Eq. (3) of "Geodesic sparsification"; changed: the integrand is the length of the tangent, not its square, and g
is the mean over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["chord_length", "segment_length"]


def chord_length(
    values: Callable[[Tensor], Tensor], start: Tensor, stop: Tensor, num_samples: int, pieces: int = 4
) -> Tensor:
    r"""Length of the straight way from one network to another, by chords of what the function does on it.

        \sum_k ||f(w_k) - f(w_{k-1})|| / sqrt(N),   w_k = start + (k / pieces) (stop - start)

    It needs no derivative, is never above the length and falls short of it by O(1 / pieces^2).

    Args:
        values: w [P] to f, all samples' values in one vector, [N C].
        start: [P].
        stop: [P].
        num_samples: N.
        pieces: number of chords, at least 1.

    Returns:
        A scalar in units of f.

    Raises:
        ValueError: less than one piece or sample.

    Example:
        >>> float(chord_length(lambda w: w, torch.zeros(2), torch.tensor([3.0, 4.0]), 1))
        5.0
    """
    if not (pieces >= 1 and num_samples >= 1):
        raise ValueError(f"pieces={pieces}, num_samples={num_samples}: must be at least 1; 4 pieces are a start.")
    before, total = values(start), start.new_zeros(())
    for k in range(1, pieces + 1):
        here = values(torch.lerp(start, stop, k / pieces))
        total = total + torch.linalg.vector_norm(here - before)
        before = here
    return total / math.sqrt(num_samples)


def segment_length(
    product: Callable[[Tensor, Tensor], Tensor], start: Tensor, stop: Tensor, num_samples: int
) -> Tensor:
    r"""The same integral by Gauss's rule with three points: exact where ||J theta|| is a polynomial of degree 5.

    Args:
        product: (w, theta) to J(w) theta, [N C].
        start: [P].
        stop: [P].
        num_samples: N.

    Returns:
        A scalar in units of f.

    Raises:
        ValueError: less than one sample.

    Example:
        >>> float(segment_length(lambda w, theta: 2 * theta, torch.zeros(2), torch.tensor([3.0, 4.0]), 4))
        5.0
    """
    if not num_samples >= 1:
        raise ValueError(f"num_samples={num_samples}: must be at least 1, those that J has rows of.")
    theta = stop - start
    total = start.new_zeros(())
    for node, weight in ((-math.sqrt(0.6), 5 / 18), (0.0, 8 / 18), (math.sqrt(0.6), 5 / 18)):
        here = torch.lerp(start, stop, (1 + node) / 2)
        total = total + weight * torch.linalg.vector_norm(product(here, theta))
    return total / math.sqrt(num_samples)
