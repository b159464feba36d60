r"""What carries units: how large weights and gradients are, and how curved the loss is.

All of the others divide these out. ``weight_norm`` has the units of a weight, ``gradient_norm`` loss / weight,
``fisher_trace`` (loss / weight)^2, ``top_curvature`` loss / weight^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ExtremeEigenvalues", "empirical_fisher_trace", "extreme_eigenvalues", "gradient_norm", "squared_norms"]


def squared_norms(tensors: Mapping[str, Tensor]) -> Tensor:
    """Squared Euclidean norm of each tensor, in at least float32.

    Args:
        tensors: n of them, name -> tensor.

    Returns:
        [n].
    """
    # Of all in one call, as torch.nn.utils.clip_grad_norm_ takes them.
    values = [x.detach() for x in tensors.values()]
    wide = torch.float32
    for x in values:
        wide = torch.promote_types(wide, x.dtype)
    norms = torch._foreach_norm(values, 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.to(values[0].device) for norm in norms]).square()


def gradient_norm(gram: Tensor) -> Tensor:
    """|h|, h the mean of the b gradients, from their Gram matrix [..., b, b]: the root of its mean entry."""
    return gram.mean((-2, -1)).clamp(min=0.0).sqrt()


def empirical_fisher_trace(gram: Tensor) -> Tensor:
    r"""1/b sum_i |h_i|^2, the trace of the gradients' second moment ("empirical Fisher matrix").

    It is the trace of the Fisher matrix only where the labels are draws from the model; it vanishes with the loss.

    Args:
        gram: [..., b, b].

    Returns:
        [...].
    """
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)


class ExtremeEigenvalues(NamedTuple):
    """Both ends of a symmetric matrix's spectrum, as far as the iteration has got.

    Attributes:
        largest: the largest Ritz value, at most the largest eigenvalue.
        smallest: the smallest Ritz value, at least the smallest eigenvalue.
        residual: |A u - theta u| of the one with the larger magnitude: an eigenvalue lies within it.
        converged: whether the residual is within the tolerance.
        num_products: with the matrix.
    """

    largest: float
    smallest: float
    residual: float
    converged: bool
    num_products: int

    @property
    def norm(self) -> float:
        """Spectral norm, from below."""
        return max(abs(self.largest), abs(self.smallest))


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float = 1e-3, max_products: int = 40
) -> ExtremeEigenvalues:
    r"""Lanczos iteration for a matrix of either sign, with three vectors of memory whatever the number of products.

    Source: Golub & Van Loan, Matrix Computations, 10.1; nothing is made orthogonal again, since the copies of
    eigenvalues that this brings do not move the ends, and the residual beta_k |s_k| holds in spite of it (Paige 1980).
    It stops when the end of the larger magnitude has converged; the other end may not have.

    Args:
        product: A on a vector [n].
        start: [n], where to start; random, or the gradient.
        tolerance: residual relative to the eigenvalue, in (0, inf).
        max_products: at least 1.

    Returns:
        The ends, and what is known about their error. All nan if a product is not finite.

    Raises:
        ValueError: a setting out of range; the start is zero or not finite.

    Example:
        >>> ends = extreme_eigenvalues(lambda v: torch.arange(-9.0, 6) * v, torch.ones(15))
        >>> round(ends.smallest, 2), round(ends.norm, 2)
        (-9.0, 9.0)
    """
    if not 0.0 < tolerance < math.inf or max_products < 1:
        raise ValueError(
            f"tolerance={tolerance}, max_products={max_products}: must be in (0, inf), and at least 1; 1e-3 and 40 "
            f"are common."
        )
    length = float(torch.linalg.vector_norm(start))
    if not 0.0 < length < math.inf:
        raise ValueError(f"start of length {length}: a vector that is neither zero nor infinite is needed.")
    v, previous = start / length, torch.zeros_like(start)
    alphas: list[float] = []
    betas: list[float] = []
    beta = 0.0
    while True:
        w = product(v)
        alpha = float(torch.dot(w, v))
        w = w - alpha * v - beta * previous
        beta = float(torch.linalg.vector_norm(w))
        alphas.append(alpha)
        if not math.isfinite(alpha) or not math.isfinite(beta):
            return ExtremeEigenvalues(math.nan, math.nan, math.nan, False, len(alphas))
        T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        off = torch.tensor(betas, dtype=torch.float64)
        theta, S = torch.linalg.eigh(T + torch.diag(off, 1) + torch.diag(off, -1))
        end = -1 if abs(float(theta[-1])) >= abs(float(theta[0])) else 0
        residual = beta * abs(float(S[-1, end]))
        converged = residual <= tolerance * abs(float(theta[end]))
        if converged or beta == 0.0 or len(alphas) >= min(max_products, len(start)):
            return ExtremeEigenvalues(float(theta[-1]), float(theta[0]), residual, converged, len(alphas))
        previous, v = v, w / beta
        betas.append(beta)
