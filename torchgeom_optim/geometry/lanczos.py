"""Eigenvalues of a symmetric matrix that is known by its products alone: the largest, the trace, the density.

Every basis is kept and made orthogonal again in full at each step, so there are no ghost copies of eigenvalues. Bases
are float64 whatever the products are computed in. The matrix is taken to be positive semi-definite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Estimate", "SpectralDensity", "TopEigenpairs", "random_signs", "spectral_density", "top_eigenpairs"]

# [n, b] -> [n, b]
Product: TypeAlias = Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """A mean over random probes, with its standard error (nan from one probe, 0 where nothing was left to chance)."""

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class TopEigenpairs:
    """The largest eigenvalues of a matrix, with what is known about their errors.

    Attributes:
        values: [k], descending.
        vectors: [n, k], orthonormal.
        residuals: [k], ||K u - value u|| from the products themselves: an eigenvalue lies within it of the value.
        converged: whether all residuals are within the tolerance.
        num_products: columns that were multiplied, the trace's probes included.
        trace: of the whole matrix.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    num_products: int
    trace: Estimate


def top_eigenpairs(
    product: Product,
    size: int,
    num: int,
    *,
    tolerance: float = 1e-6,
    block_size: int = 2,
    max_products: int | None = None,
    num_probes: int = 8,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> TopEigenpairs:
    r"""Block Lanczos: the best approximations in span(Z, K Z, K^2 Z, ...), Z random with ``block_size`` columns.

        T = Q'KQ,  T s = theta s,  u = Q s,  residual = ||K Q s - theta Q s||

    Source: Golub & Van Loan, Matrix Computations, 10.3 (block Lanczos); Musco & Musco (2015), Algorithm 2 (why the
    whole Krylov space beats subspace iteration at equal products). We reorthogonalise in full, twice; we keep K Q, so
    that residuals are computed and not inferred from a recurrence; and a block that has run out of directions goes on
    with new random ones, so that the iteration ends with the exact eigenvalues when the space is exhausted. With
    ``block_size=1`` it is Lanczos, which finds the further copies of a multiple eigenvalue only late; a block finds up
    to ``block_size`` copies at once.

    The trace is tr T plus Hutchinson's estimate on what is orthogonal to Q (Hutch++; Meyer et al. 2021, Algorithm 1,
    with the Krylov space in the place of the sketch).

    Args:
        product: K on the columns of a matrix.
        size: n.
        num: k, in [1, n].
        tolerance: residual allowed, relative to the largest eigenvalue.
        block_size: columns per product.
        max_products: columns to multiply at most, the trace's probes aside; by default n.
        num_probes: random vectors for the trace; 0 for none (the trace is then nan unless the space was exhausted).
        generator: for the start and the probes; by default one of its own, seeded with 0.
        device: where the bases live.

    Returns:
        The eigenpairs; ``converged`` says whether the tolerance was reached.

    Raises:
        ValueError: an argument out of range; K's products are not finite.

    Example:
        >>> K = torch.diag(torch.arange(1.0, 101, dtype=torch.float64))
        >>> top_eigenpairs(lambda z: K @ z, 100, 3).values.round().tolist()
        [100.0, 99.0, 98.0]
    """
    _check_counts(size=size, num=num, block_size=block_size)
    if not 1 <= num <= size:
        raise ValueError(f"num={num}: must be in [1, {size}], the size of the matrix; 10 is a common start.")
    if not 0.0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: must be in (0, inf); 1e-6 is a common start.")
    if num_probes < 0:
        raise ValueError(f"num_probes={num_probes}: must be at least 0; 8 is the default.")
    generator = generator or torch.Generator().manual_seed(0)
    most = min(size, max(num, size if max_products is None else max_products))
    Q = torch.empty(size, 0, dtype=torch.float64, device=device)
    KQ, T = Q.clone(), Q.new_empty(0, 0)
    block = _orthonormal(_normal(size, min(block_size, most), generator, device), Q, generator)
    while True:
        product_of_block = _finite(product(block)).to(Q)
        T = _bordered(T, Q, block, product_of_block)
        Q, KQ = torch.cat([Q, block], 1), torch.cat([KQ, product_of_block], 1)
        theta, S = torch.linalg.eigh(T)
        theta, S = theta.flip(0)[:num], S.flip(1)[:, :num]
        residuals = (KQ @ S - (Q @ S) * theta).norm(dim=0)
        converged = len(theta) == num and bool((residuals <= tolerance * theta[0].abs()).all())
        width = min(block_size, most - Q.shape[1])
        if converged or width == 0:
            break
        block = _orthonormal(product_of_block[:, :width], Q, generator)
    rest, num_rest = Estimate(0.0, 0.0), 0
    if Q.shape[1] < size:
        num_rest = num_probes
        rest = _trace_beyond(product, Q, num_probes, generator)
    trace = Estimate(float(T.trace()) + rest.value, rest.standard_error)
    return TopEigenpairs(theta, Q @ S, residuals, converged, Q.shape[1] + num_rest, trace)


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""Stochastic Lanczos quadrature: tr f(K) ~ n / m sum_p sum_j weights[p, j] f(nodes[p, j]) over m probes.

    Attributes:
        nodes: [m, s], where each probe sees eigenvalues.
        weights: [m, s], each row of sum 1.
        size: n, the number of eigenvalues that the density is of.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The sum over all n eigenvalues of a function of them.

        Args:
            function: elementwise on a tensor of eigenvalues.

        Returns:
            The estimate. Its standard error covers the probes, not the quadrature, which is exact for polynomials of
            degree 2s - 1.
        """
        return _estimate(self.size * (self.weights * function(self.nodes)).sum(1))

    @property
    def trace(self) -> Estimate:
        """The sum of all eigenvalues."""
        return self.trace_of(lambda x: x)

    def num_above(self, threshold: float) -> Estimate:
        """How many eigenvalues are larger than that; the jump makes this the least accurate of the estimates."""
        return self.trace_of(lambda x: (x > threshold).to(x))

    def density(self, log10_values: Tensor, width: float = 0.1) -> tuple[Tensor, Tensor]:
        """Eigenvalues per decade, smoothed by a Gaussian on the logarithmic axis.

        Args:
            log10_values: [points], where to evaluate it.
            width: standard deviation of the Gaussian in decades.

        Returns:
            Density and its standard error, [points] each. Its integral is the number of positive eigenvalues.

        Raises:
            ValueError: the width is not positive.
        """
        if not 0.0 < width < math.inf:
            raise ValueError(f"width={width}: must be in (0, inf), in decades; 0.1 is a common start.")
        at = self.nodes.clamp(min=torch.finfo(self.nodes.dtype).tiny).log10()
        distance = (log10_values.to(at)[:, None, None] - at) / width
        bumps = torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2 * math.pi))
        per_probe = self.size * (bumps * self.weights * (self.nodes > 0)).sum(2)
        error = per_probe.std(1) / math.sqrt(len(at))
        return per_probe.mean(1), error


def spectral_density(
    product: Product,
    size: int,
    *,
    num_probes: int = 10,
    num_steps: int = 60,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> SpectralDensity:
    r"""Stochastic Lanczos quadrature from random signs z / sqrt(n), all probes side by side.

    Lanczos from z gives T with eigenpairs (theta_j, s_j): z'f(K)z = sum_j s_j[0]^2 f(theta_j), n times whose mean over
    z is tr f(K). Source: Ubaru, Chen & Saad (2017), Algorithm 1; we reorthogonalise in full, twice.

    Args:
        product: K on the columns of a matrix.
        size: n.
        num_probes: m; two at least, or there is no standard error.
        num_steps: s; at most n are taken.
        generator: for the probes; by default one of its own, seeded with 0.
        device: where the bases live.

    Returns:
        The density.

    Raises:
        ValueError: a count below 1; K's products are not finite.

    Example:
        >>> K = torch.diag(torch.arange(1.0, 101, dtype=torch.float64))
        >>> density = spectral_density(lambda z: K @ z, 100)
        >>> round(density.trace.value)  # random signs are exact for a diagonal matrix
        5050
    """
    _check_counts(size=size, num_probes=num_probes, num_steps=num_steps)
    generator = generator or torch.Generator().manual_seed(0)
    steps = min(num_steps, size)
    q = random_signs(size, num_probes, generator, device).T / math.sqrt(size)  # [m, n]
    Q = q.new_zeros(steps, num_probes, size)
    alpha, beta = q.new_zeros(num_probes, steps), q.new_zeros(num_probes, steps)
    scale = q.new_zeros(num_probes)
    for j in range(steps):
        Q[j] = q
        w = _finite(product(q.T)).to(q).T
        alpha[:, j] = (w * q).sum(1)
        scale = torch.maximum(scale, w.norm(dim=1))
        for _ in range(2):
            inner = torch.einsum("jmn,mn->jm", Q[: j + 1], w)
            w = w - torch.einsum("jm,jmn->mn", inner, Q[: j + 1])
        length = w.norm(dim=1)
        # A probe whose Krylov space is exhausted goes on with zeros, which get no weight.
        length = torch.where(length > 100 * torch.finfo(q.dtype).eps * scale, length, 0.0)
        beta[:, j] = length
        q = torch.where(length[:, None] > 0, w / length.clamp(min=torch.finfo(q.dtype).tiny)[:, None], 0.0)
    T = torch.diag_embed(alpha) + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
    theta, S = torch.linalg.eigh(T)
    return SpectralDensity(theta, S[:, 0].square(), size)


def random_signs(size: int, num: int, generator: torch.Generator, device: torch.device | None) -> Tensor:
    """Columns of independent +-1: [size, num], float64."""
    signs = torch.randint(2, (size, num), generator=generator, device=generator.device, dtype=torch.float64)
    return (2 * signs - 1).to(device)


def _normal(size: int, num: int, generator: torch.Generator, device: torch.device | None) -> Tensor:
    return torch.randn(size, num, generator=generator, device=generator.device, dtype=torch.float64).to(device)


def _orthonormal(block: Tensor, Q: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns at right angles to Q that span the block's part there; random ones where it has none."""
    block = block.to(Q)
    floor = 100 * torch.finfo(Q.dtype).eps * block.norm(dim=0).max()
    together = block
    for _ in range(2):
        together = together - Q @ (Q.T @ together)
    together, lengths = torch.linalg.qr(together)
    if bool((lengths.diagonal().abs() > floor).all()):
        # What was lost to cancellation is made up for at unit length.
        basis: Tensor = torch.linalg.qr(together - Q @ (Q.T @ together))[0]
        return basis
    # Some columns have no part there: one by one.
    columns = Q.new_empty(len(Q), 0)
    for i in range(block.shape[1]):
        column = block[:, i : i + 1]
        while True:
            for _ in range(2):
                for known in (Q, columns):
                    column = column - known @ (known.T @ column)
            length = column.norm()
            if bool(length > floor):
                break
            column, floor = _normal(len(Q), 1, generator, Q.device), floor.new_zeros(())
        column = column / length
        for known in (Q, columns):
            column = column - known @ (known.T @ column)
        columns = torch.cat([columns, column / column.norm()], 1)
    return columns


def _bordered(T: Tensor, Q: Tensor, block: Tensor, product: Tensor) -> Tensor:
    """Q'KQ with the block's rows and columns added."""
    across, corner = Q.T @ product, block.T @ product
    return torch.cat([torch.cat([T, across], 1), torch.cat([across.T, (corner + corner.T) / 2], 1)])


def _trace_beyond(product: Product, Q: Tensor, num_probes: int, generator: torch.Generator) -> Estimate:
    if num_probes == 0:
        return Estimate(math.nan, math.nan)
    z = random_signs(len(Q), num_probes, generator, Q.device)
    z = z - Q @ (Q.T @ z)
    return _estimate((z * _finite(product(z)).to(z)).sum(0))


def _estimate(samples: Tensor) -> Estimate:
    error = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(float(samples.mean()), error)


def _finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            "a product with the matrix is not finite: every entry must be. Look for nan or overflow in the weights, or "
            "compute in torch.float64."
        )
    return x


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not count >= 1:
            raise ValueError(f"{name}={count}: must be at least 1. Is the matrix empty, or the option a typing slip?")
