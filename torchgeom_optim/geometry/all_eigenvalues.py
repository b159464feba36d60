r"""All eigenvalues of a symmetric matrix known to float32: in float32 where that serves, else in float64.

In float32 LAPACK takes half the time, and its errors grow with the norm of the matrix. So the few eigenvalues that
stand out are split off first, by a similarity transformation H = 1 - Y T Y' (Householder) whose first k columns span
Ritz vectors of block Lanczos,

    H'KH = [ A  R' ]      A [k, k] and R [n - k, k] in float64, B [n - k, n - k] in float32
           [ R  B  ]

and the eigenvalues are those of A, in float64, and those of B, in float32. With the gap eta between the two groups they
are off by at most

    both:       2 |R|^2 / (eta + sqrt(eta^2 + 4 |R|^2))      Li & Li (2005), Linear Algebra and its Applications 395
    B besides:  sqrt(n) eps |B|_F + eps |K|_F                rounding in the eigenvalues of B, and in B itself

Here sqrt(n) eps |B|_F is no proven bound: in the place of the proven factor, n^2 times a constant, it has sqrt(n), as
rounding errors that are independent have it (Higham & Mary 2019, SIAM Journal on Scientific Computing 41). Of spectra
of a dozen kinds (flat, random, with up to eight decades, graded) and of two networks, n from 300 to 2304, all errors
together, the root of the sum of their squares, were at most .58 of it and single ones at most a third.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchgeom_optim.geometry.lanczos import TopEigenpairs, top_eigenpairs

__all__ = ["Eigenvalues", "all_eigenvalues", "product_in_float64"]

_EPS, _EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
_ROWS_AT_ONCE = 128
_FEWEST_ROWS = 512  # of smaller matrices eigenvalues in float64 take no time
_BLOCK, _COLUMNS = 16, 80  # of block Lanczos
_LEAST_NUMBER = 1e-15
_OF_LARGEST, _OF_SMALLEST = 1e-5, 0.1  # errors allowed in float32, relative to these eigenvalues


class Eigenvalues(NamedTuple):
    """Eigenvalues [n], descending, float64; their errors [n], at most, and what the most of them were computed in."""

    values: Tensor
    errors: Tensor
    dtype: torch.dtype


def all_eigenvalues(K: Tensor, *, generator: torch.Generator | None = None) -> Eigenvalues:
    """All eigenvalues of K with their errors.

    In float64, errors n eps times the largest; or, where K is float32 and the errors of that stay below 1e-5 of the
    largest eigenvalue and a tenth of the smallest one, in float32 as this module has it.

    Args:
        K: symmetric, positive semi-definite up to rounding, finite, [n, n], n >= 1.
        generator: for block Lanczos; by default one seeded with 0.

    Returns:
        The eigenvalues with their errors, as eigenvalues of the K that is given.

    Example:
        >>> all_eigenvalues(torch.diag(torch.arange(1.0, 4))).values
        tensor([3., 2., 1.], dtype=torch.float64)
    """
    if K.dtype != torch.float64 and len(K) >= _FEWEST_ROWS:
        found = _in_float32(K.float(), generator or torch.Generator().manual_seed(0))
        if found is not None:
            return found
    values = torch.linalg.eigvalsh(K.double()).flip(0)
    return Eigenvalues(values, torch.full_like(values, len(values) * _EPS * float(values[0].abs())), torch.float64)


def product_in_float64(K: Tensor, columns: Tensor) -> Tensor:
    """K times float64 columns; a K in float32 is widened a few rows at a time, which stay in the cache."""
    return torch.cat([rows.double() @ columns for rows in torch.split(K, _ROWS_AT_ONCE)])


def _in_float32(K: Tensor, generator: torch.Generator) -> Eigenvalues | None:
    """None where errors would be larger than allowed."""
    diagonal = K.diagonal()
    if not _LEAST_NUMBER < float(diagonal.max()) < 1 / _LEAST_NUMBER:  # squares would leave float32's range
        return None
    norm, least = float(torch.linalg.vector_norm(K)), float(diagonal.min())  # the smallest eigenvalue is not above it
    if _matters(_EPS32 * norm, norm, least):
        return None
    top = top_eigenpairs(
        lambda z: K @ z.to(K), len(K), _COLUMNS, tolerance=_EPS, block_size=_BLOCK, max_products=_COLUMNS,
        num_probes=0, generator=generator, device=K.device,
    )  # fmt: skip
    num, expected = _how_many(top, norm, len(K))
    if _matters(expected, float(top.values[0]), least):
        return None
    A, R, B = _split(K, top.vectors[:, :num])
    largest, others = torch.linalg.eigvalsh(A), torch.linalg.eigvalsh(B).to(A)
    rounding = math.sqrt(len(K)) * _EPS32 * float(torch.linalg.vector_norm(B)) + _EPS32 * norm
    coupling = float(_coupling(R.norm(), (largest[0] - others[-1] - rounding).clamp(min=0.0)))
    if _matters(rounding + coupling, float(largest[-1]), float(others[0])):
        return None
    errors = torch.cat([torch.full_like(largest, coupling), torch.full_like(others, coupling + rounding)])
    values, order = torch.cat([largest, others]).sort(descending=True)
    return Eigenvalues(values, errors[order] + len(K) * _EPS * float(values[0]), torch.float32)


def _matters(error: float, largest: float, smallest: float) -> bool:
    return not error <= min(_OF_LARGEST * largest, _OF_SMALLEST * smallest)


def _how_many(top: TopEigenpairs, norm: float, size: int) -> tuple[int, float]:
    """How many Ritz pairs to split off so that the errors are least, and these errors."""
    values, off = top.values, top.residuals.square().cumsum(0).sqrt()
    rest = (norm**2 - values.square().cumsum(0)).clamp(min=0.0).sqrt()
    rounding = math.sqrt(size) * _EPS32 * rest + _EPS32 * norm
    errors = rounding[:-1] + _coupling(off[:-1], values[:-1] - values[1:])
    least = errors.argmin()
    return int(least) + 1, float(errors[least])


def _coupling(norm: Tensor, gap: Tensor) -> Tensor:
    bound: Tensor = 2 * norm.square() / (gap + (gap.square() + 4 * norm.square()).sqrt())
    return bound.nan_to_num(0.0)  # 0 / 0: no coupling, no gap


def _split(K: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, R and B for orthonormal vectors [n, k]."""
    k = vectors.shape[1]
    packed, tau = torch.geqrf(vectors)
    Y = packed.tril(-1)
    Y.diagonal().fill_(1.0)
    T = torch.diag(tau)
    inner = Y.T @ Y
    for j in range(1, k):  # LAPACK's larft
        T[:j, j] = -tau[j] * (T[:j, :j] @ inner[:j, j])
    KY = product_in_float64(K, Y @ T)
    Z = KY - 0.5 * Y @ (T.T @ (Y.T @ KY))
    left, right = torch.cat([Y, Z], 1), torch.cat([Z, Y], 1)  # H'KH = K - Y Z' - Z Y'
    first = K[:, :k].double() - left @ right[:k].T
    B = torch.addmm(K[k:, k:], left[k:].to(K), right[k:].T.to(K), alpha=-1.0)
    return first[:k], first[k:], B
