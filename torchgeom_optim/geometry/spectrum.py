"""Eigenvalues and eigenvectors of J'J, whose size is the number of weights, through J J', whose size is the data's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from torchgeom_optim.geometry.all_eigenvalues import Eigenvalues, all_eigenvalues, product_in_float64
from torchgeom_optim.geometry.deprecations import without_own_deprecations
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.jacobian_gram import carried_to_outputs, coordinates_of_outputs
from torchgeom_optim.geometry.lanczos import Estimate, SpectralDensity, random_signs, spectral_density, top_eigenpairs
from torchgeom_optim.geometry.sloppiness import Sloppiness, sloppiness, trace_share

__all__ = ["Normalisation", "Spectrum", "jacobian_density", "jacobian_spectrum"]

Normalisation = Literal["mean", "sum"]
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest eigenvalues of a positive semi-definite matrix, with what is known about their errors.

    Attributes:
        eigenvalues: [R], descending, float64. If ``complete``, all but zeros: R is the smaller of the numbers of
            rows and columns of J (N (C - 1) rows for the exact Fisher matrix, whose rows are dependent). Those below
            ``roundoff`` are noise and may be negative.
        residuals: [R]; an eigenvalue of the matrix lies within it of each value. From the products themselves where
            they were iterated on; for a complete spectrum an estimate of ||G' - G||_F, where G' is the matrix that was
            decomposed and G is J J' as J's products have it (from two random vectors; the rounding of these products
            is included), and what the eigenvalues of G' themselves are off by
            (:func:`~torchgeom_optim.geometry.all_eigenvalues.all_eigenvalues`).
        roundoff: eigenvalues at or below it are not told from zero: the largest residual, or R eps of the largest
            value if that is more.
        trace: of the whole matrix, with its standard error: 0 where it was summed up.
        matrix: what the eigenvalues are of, in words, the Fisher matrix's variant included.
        normalisation: in words.
        variant: "exact", "drawn", "empirical", "outputs", "loss", "log_probabilities" or "data".
        num_samples: N.
        size: rows of the matrix: P weights, or features of the data. It has ``size`` eigenvalues, zeros included.
        complete: whether no nonzero eigenvalue is missing.
        converged: whether the residuals kept within the tolerance asked for; True if complete.
        num_products: columns that the matrix was multiplied with; 0 if complete.
        dtype: of J's products.
        eigenvalue_dtype: what eigenvalues were computed in from these: float64; or, for a complete spectrum of products
            in float32, float32 for those that do not stand out, where that error is below a tenth of the smallest of
            them (and 1e-5 of the largest).
    """

    eigenvalues: Tensor
    residuals: Tensor
    roundoff: float
    trace: Estimate
    matrix: str
    normalisation: str
    variant: str
    num_samples: int
    size: int
    complete: bool
    converged: bool
    num_products: int
    dtype: torch.dtype
    _vectors: Callable[[int], Tensor] = field(repr=False)
    eigenvalue_dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        values, which = self.eigenvalues, "all" if self.complete else "the largest"
        accuracy = "" if self.converged else "; not converged, see residuals"
        return (
            f"{self.matrix}\n{which} {len(values)} eigenvalues, {float(values[0]):.4g} to {float(values[-1]):.4g}, "
            f"{self.rank} above round-off ({self.roundoff:.2g}){accuracy}\n"
            f"trace {self.trace.value:.4g} +- {self.trace.standard_error:.2g}; {self.normalisation}"
        )

    @property
    def rank(self) -> int:
        """Eigenvalues above round-off: the matrix's numerical rank if ``complete``, else at most R."""
        return int((self.eigenvalues > self.roundoff).sum())

    def eigenvectors(self, num: int | None = None) -> Tensor:
        """Unit eigenvectors of the largest eigenvalues, V = J' U S^-1/2 (U, S of J J'), computed when asked for.

        J is asked for products, so the weights and the data must be what they were; a complete spectrum keeps J J' for
        this. V'V differs from I by up to roundoff / sqrt(lam_i lam_j), and vectors whose eigenvalues differ by less
        than ``roundoff`` are determined only together: where exact orthogonality matters, take a QR decomposition.

        Args:
            num: k, at most ``rank``; by default that.

        Returns:
            [size, k]. ``jacobian.vectors.named`` turns them into named tensors.

        Raises:
            ValueError: more than ``rank``.
            RuntimeError: the weights are not those of the eigenvalues any more.
            JacobianMemoryError: see the Jacobian's ``memory_limit``.
        """
        num = self.rank if num is None else num
        if not 1 <= num <= self.rank:
            advice = "Take more samples" if self.complete else "Compute more eigenvalues, or take more samples"
            raise ValueError(
                f"num={num}: must be in [1, {self.rank}], the eigenvalues above round-off ({self.roundoff:.3g}) out of "
                f"the {len(self.eigenvalues)} known, from {self.num_samples} samples. {advice}, or compute in float64."
            )
        return self._vectors(num)

    def sloppiness(self, *, stiff_threshold: float = 1e-2, damping: float = 1e-3, misfit: float = 0.1) -> Sloppiness:
        """Decades, slope, stiff fraction and more; see :class:`~torchgeom_optim.geometry.sloppiness.Sloppiness`.

        Args:
            stiff_threshold: relative to the largest eigenvalue.
            damping: relative to the largest eigenvalue.
            misfit: of the linear range, in decades.

        Returns:
            The numbers, with :attr:`roundoff` as the threshold of what counts as zero.

        Raises:
            ValueError: the spectrum is not complete, or nothing in it is above round-off.
        """
        if not self.complete:
            raise ValueError(
                f"the {len(self.eigenvalues)} largest eigenvalues: all are needed to say how sloppy a spectrum is. "
                "Leave num_eigenvalues=None, on fewer samples if need be, or look at trace_share and jacobian_density."
            )
        return sloppiness(
            self.eigenvalues,
            roundoff=self.roundoff,
            stiff_threshold=stiff_threshold,
            damping=damping,
            misfit=misfit,
        )

    def trace_share(self, num: int) -> float:
        """What the ``num`` largest eigenvalues make up of the trace."""
        return trace_share(self.eigenvalues, num, self.trace.value)


def jacobian_spectrum(
    jacobian: Jacobian,
    num_eigenvalues: int | None = None,
    *,
    variant: str | None = None,
    normalisation: Normalisation = "mean",
    tolerance: float | None = None,
    block_size: int = 2,
    max_products: int | None = None,
    num_probes: int = 8,
    generator: torch.Generator | None = None,
) -> Spectrum:
    r"""Eigenvalues of J'J / N, through J J' / N or J'J / N, whichever is smaller: they share the nonzero ones.

        J J' = U S U'   =>   J'J V = V S,   V = J' U S^-1/2

    With ``num_eigenvalues=None`` the smaller matrix is formed and decomposed: all nonzero eigenvalues and the exact
    trace. With a number, block Lanczos on products J (J'u) gives the largest ones with their residuals, and the trace
    with a standard error.

    Args:
        jacobian: J; its dtype is that of the products.
        num_eigenvalues: k, or None for all.
        variant: what the result says it is; by default what J is of.
        normalisation: "mean" divides J'J by N; "sum" does not. Sums over outputs (and positions) stay sums.
        tolerance: residual relative to the largest eigenvalue, for a number of them; by default 1e-6, or 50 eps of J's
            dtype if that is more.
        block_size: columns that share a product; 1 is Lanczos. More of them need more products in all, which are
            cheaper together, and find multiple eigenvalues sooner.
        max_products: columns to multiply at most; by default the size of the smaller matrix, after which the
            eigenvalues are exact.
        num_probes: random vectors for the trace, where it is estimated.
        generator: for the start and the probes; by default one seeded with 0.

    Returns:
        The spectrum.

    Raises:
        ValueError: an argument out of range, or J J' is not finite.
        JacobianMemoryError: J J' does not fit into J's ``memory_limit``; give a number of eigenvalues.
    """
    if normalisation not in get_args(Normalisation):
        raise ValueError(f"normalisation={normalisation!r}: must be 'mean' or 'sum' (over samples).")
    rows, weights = jacobian.shape
    scale = 1.0 / jacobian.num_samples if normalisation == "mean" else 1.0
    device = jacobian.vectors.device
    generator = generator or torch.Generator().manual_seed(0)
    if num_eigenvalues is None:
        found, trace, left = _decompose(jacobian, generator)
        values, residuals, eigenvalue_dtype = found
        complete, converged, num_products = True, True, 0
    else:
        tolerance = max(1e-6, 50 * torch.finfo(jacobian.dtype).eps) if tolerance is None else tolerance
        top = top_eigenpairs(
            _product(jacobian),
            min(rows, weights),
            num_eigenvalues,
            tolerance=tolerance,
            block_size=block_size,
            max_products=max_products,
            num_probes=num_probes,
            generator=generator,
            device=device,
        )
        values, residuals, trace, left = top.values, top.residuals, top.trace, lambda k: top.vectors[:, :k]
        complete, converged, num_products = len(values) == min(rows, weights), top.converged, top.num_products
        eigenvalue_dtype = torch.float64

    def vectors(num: int) -> Tensor:
        return left(num) if weights < rows else _carried_back(jacobian, left(num), values[:num])

    return Spectrum(
        eigenvalues=values * scale,
        residuals=residuals * scale,
        roundoff=scale * max(float(residuals.max()), len(values) * _EPS * float(values[0].abs())),
        trace=Estimate(trace.value * scale, trace.standard_error * scale),
        matrix=f"J'J, J of {jacobian.of}" + ("" if variant is None else f", variant {variant}"),
        normalisation=f"{normalisation} over N = {jacobian.num_samples} samples, sum over C = {jacobian.num_outputs} "
        "outputs",
        variant=variant or {"sqrt_probabilities": "exact"}.get(jacobian.of, jacobian.of),
        num_samples=jacobian.num_samples,
        size=weights,
        complete=complete,
        converged=converged,
        num_products=num_products,
        dtype=jacobian.dtype,
        _vectors=vectors,
        eigenvalue_dtype=eigenvalue_dtype,
    )


def jacobian_density(
    jacobian: Jacobian,
    *,
    normalisation: Normalisation = "mean",
    num_probes: int = 10,
    num_steps: int = 60,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The density of J'J / N's eigenvalues by stochastic Lanczos quadrature, for what is too large for all of them.

    Args:
        jacobian: J.
        normalisation: "mean" divides J'J by N; "sum" does not.
        num_probes: random vectors.
        num_steps: Lanczos steps of each.
        generator: for the probes; by default one seeded with 0.

    Returns:
        The density of the smaller of J J' and J'J: ``size`` counts its eigenvalues; the larger has more zeros.

    Raises:
        ValueError: an argument out of range.
    """
    if normalisation not in get_args(Normalisation):
        raise ValueError(f"normalisation={normalisation!r}: must be 'mean' or 'sum' (over samples).")
    product, scale = _product(jacobian), 1.0 / jacobian.num_samples if normalisation == "mean" else 1.0
    return spectral_density(
        lambda z: product(z) * scale,
        min(jacobian.shape),
        num_probes=num_probes,
        num_steps=num_steps,
        generator=generator,
        device=jacobian.vectors.device,
    )


def _product(jacobian: Jacobian) -> Callable[[Tensor], Tensor]:
    """The smaller of J J' and J'J on columns."""
    rows, weights = jacobian.shape
    if weights < rows:
        return lambda z: (jacobian.T @ (jacobian @ z)).double()
    return lambda z: (jacobian @ (jacobian.T @ z)).double()


def _decompose(jacobian: Jacobian, generator: torch.Generator) -> tuple[Eigenvalues, Estimate, Callable[[int], Tensor]]:
    """Eigenvalues of the smaller matrix, their errors, its trace, and what gives its eigenvectors."""
    rows, weights = jacobian.shape
    z = random_signs(min(rows, weights), 2, generator, jacobian.vectors.device)
    # Before the expensive part, in case there is no room for vectors of the size of the weights; one at a time, unless
    # that part will take more memory than both together.
    room = min(jacobian.predicted_bytes("gram"), jacobian._plan.limit)
    together = all(jacobian.predicted_bytes(way, 2) <= room for way in ("product", "transposed_product"))
    products = torch.cat([_product(jacobian)(columns) for columns in torch.split(z, 2 if together else 1, 1)], 1)
    R = None
    if weights < rows:
        K, seen = _weight_matrix(jacobian), z
    else:
        K, R = jacobian.gram_in_basis()
        if R.shape[2] < R.shape[1]:  # R K R' has K's eigenvalues if R is orthonormal: here to more than J's precision
            R = R.double() @ (1.5 * torch.eye(R.shape[2]).to(z) - 0.5 * R.mT.double() @ R.double())
        seen = coordinates_of_outputs(z, R)
    if not math.isfinite(float(K.sum())):
        raise ValueError(
            "J J' is not finite: every entry must be. Look for nan or overflow in the weights, or compute in float64."
        )
    decomposed = product_in_float64(K, seen)
    if R is not None:
        decomposed = carried_to_outputs(decomposed, R)
    residual = math.sqrt(float((decomposed - products).square().sum()) / 2)
    values, errors, dtype = all_eigenvalues(K)
    trace = Estimate(float(K.diagonal().sum(dtype=torch.float64)), 0.0)
    cache: list[Tensor] = []

    def left(num: int) -> Tensor:
        if not cache:  # eigenvectors cost several times what eigenvalues do
            cache.append(torch.linalg.eigh(K.double())[1].flip(1))
        U = cache[0][:, :num]
        return U if R is None else carried_to_outputs(U, R)

    return Eigenvalues(values, errors + residual, dtype), trace, left


def _carried_back(jacobian: Jacobian, left: Tensor, values: Tensor) -> Tensor:
    """V = J' U S^-1/2, eigenvalues unnormalised."""
    left = left.to(jacobian.dtype)
    V = (_through_rows(jacobian, left) if _rows_are_cheaper(jacobian, left.shape[1]) else jacobian.T @ left).double()
    lengths = V.norm(dim=0).square()
    # u'J J'u = s: nothing else tells that the weights have moved since.
    allowed = 10 * math.sqrt(torch.finfo(jacobian.dtype).eps) * values[0]
    if not bool(((lengths - values).abs() <= allowed).all()):
        raise RuntimeError(
            f"|J'u|^2 is off from its eigenvalue by {float((lengths - values).abs().max()):.3g}, of a largest "
            f"eigenvalue {float(values[0]):.3g}: the weights or data are not those of the spectrum any more. Take "
            "eigenvectors before the next training step."
        )
    return V.div_(lengths.sqrt())


def _rows_are_cheaper(jacobian: Jacobian, num: int) -> bool:
    """Whether J'u for so many u costs more by a backward pass each than from the rows, which C of them give."""
    weights, function = jacobian.shape[1], jacobian._f
    with without_own_deprecations():
        from torch.utils.flop_counter import FlopCounterMode  # here, for it imports much

        with FlopCounterMode(display=False) as counter, function.private(), torch.no_grad():
            function.on(next(iter(function.parts(1))))({}, torch.Tensor.detach)
    backward: int = counter.get_total_flops()  # in multiplications with additions, for inputs and weights
    outputs = jacobian.num_outputs
    return num * backward > outputs * backward + outputs * weights * num


def _through_rows(jacobian: Jacobian, left: Tensor) -> Tensor:
    V = left.new_zeros(jacobian.shape[1], left.shape[1])
    row = 0
    for block in jacobian.rows():
        V.addmm_(block.T, left[row : row + len(block)])
        row += len(block)
    return V


def _weight_matrix(jacobian: Jacobian) -> Tensor:
    size = jacobian.shape[1]
    A = torch.zeros(size, size, dtype=torch.float64, device=jacobian.vectors.device)
    for block in jacobian.rows():
        A += block.double().T @ block.double()
    return A
