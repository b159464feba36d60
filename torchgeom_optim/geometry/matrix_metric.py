r"""Block metrics that hold matrices: Kronecker products, and exact ones.

Both take a layer's parameters as the rows of D = [d_W, d_b], shape [m, q]: the weight flattened, and the bias in the
last column if there is one, as if it were the weight of an input that is always 1. See
:mod:`torchgeom_optim.geometry.metric` for what all metrics have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchgeom_optim.geometry.metric import Block, LayerMetric, LayerVector, MetricSolution

__all__ = ["ExactMetric", "KroneckerMetric", "cholesky_product", "kronecker_product", "pi_split", "relative_split"]


def pi_split(input_factor: Tensor, output_factor: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    r"""How damping of a Kronecker product is shared between its factors: factored Tikhonov.

        (A + pi sqrt(lam) I) (x) (B + sqrt(lam) / pi I),    pi^2 = mean(diag A) / mean(diag B)

    which exceeds A (x) B + lam I by pi sqrt(lam) I (x) B + A (x) sqrt(lam) / pi I, the least in trace norm over pi.
    Source: Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", §6.3.

    Args:
        input_factor: A of every group, shape [groups, q, q], or its diagonal, [groups, q].
        output_factor: B, shape [groups, m / groups, m / groups], or its diagonal.
        damping: lam, in the units of A (x) B, in [0, inf).

    Returns:
        What is to be added to the diagonals of A and of B, [groups] each. Of a zero factor the other gets nothing.
    """
    a, b = _mean_diagonal(input_factor), _mean_diagonal(output_factor)
    pi = (a / b).sqrt()
    root = damping.sqrt() if isinstance(damping, Tensor) else math.sqrt(damping)
    return torch.nan_to_num(pi * root, nan=0.0), torch.nan_to_num(root / pi, nan=0.0)


def relative_split(input_factor: Tensor, output_factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""The pi-split of lam = damping * mean(diag A) mean(diag B), a share of the mean eigenvalue of A (x) B.

    It comes to sqrt(damping) * mean(diag A) and sqrt(damping) * mean(diag B): rescaling a layer's inputs or output
    gradients as a whole rescales the damping with them.

    Args:
        input_factor: A as in :func:`pi_split`.
        output_factor: B.
        damping: in [0, inf).

    Returns:
        As :func:`pi_split`.
    """
    root = math.sqrt(damping)
    return _mean_diagonal(input_factor) * root, _mean_diagonal(output_factor) * root


@dataclass(frozen=True, eq=False)
class KroneckerMetric(LayerMetric):
    r"""G = A (x) B per group: d^T G d = tr(B D A D^T), and u = B^-1 [g_W, g_b] A^-1.

    With A = E[x x^T] over inputs (a 1 appended) and B = E[g g^T] over output gradients this is K-FAC's approximation of
    a layer's Fisher matrix. Source: Martens and Grosse 2015, §3; Grosse and Martens 2016 for convolutions, whose A
    is over patches. :meth:`factorise` damps and inverts, once for many solves.

    Args:
        input_factor: the damped A of every group, shape [groups, q, q], or its diagonal, [groups, q].
        output_factor: the damped B, shape [groups, m / groups, m / groups], or its diagonal.
        input_inverse: A^-1, in the form of A; filled with NaN where A is not positive definite.
        output_inverse: B^-1, likewise.
    """

    input_factor: Tensor
    output_factor: Tensor
    input_inverse: Tensor
    output_inverse: Tensor

    @classmethod
    def factorise(
        cls,
        input_factor: Tensor,
        output_factor: Tensor,
        input_damping: float | Tensor = 0.0,
        output_damping: float | Tensor = 0.0,
    ) -> KroneckerMetric:
        """Damp the factors and invert them through Cholesky factorisations.

        Args:
            input_factor: A, symmetric, in one of its two forms.
            output_factor: B, likewise.
            input_damping: added to the diagonal of A, a number or [groups]; see :func:`pi_split`.
            output_damping: added to the diagonal of B.

        Returns:
            The metric; whether it is positive definite is asked of it.
        """
        a, b = _damped(input_factor, input_damping), _damped(output_factor, output_damping)
        return cls(a, b, _inverse(a), _inverse(b))

    @property
    def finest_block(self) -> Block:  # type: ignore[override]
        """Units are not coupled if B is diagonal, weights not if A is diagonal too."""
        if self.output_factor.dim() > 2:
            return "layer"
        return "unit" if self.input_factor.dim() > 2 else "weight"

    def apply(self, vector: LayerVector) -> LayerVector:  # noqa: D102
        return kronecker_product(self.output_factor, vector, self.input_factor)

    def solve(self, gradient: LayerVector) -> MetricSolution:  # noqa: D102
        return MetricSolution(kronecker_product(self.output_inverse, gradient, self.input_inverse), self)

    def effective_dimension(self, input_factor: Tensor, output_factor: Tensor) -> Tensor:
        r"""Mean of g^T G^-1 g over gradients g whose second moments are A (x) B: tr(G^-1 (A (x) B)).

        Args:
            input_factor: A before it was damped, in the form of the metric's.
            output_factor: B, likewise.

        Returns:
            A scalar; if B is diagonal, one number per unit, [m], whose sum it is.
        """
        inputs = (self.input_inverse * input_factor).flatten(1).sum(1)
        outputs = self.output_inverse * output_factor
        if outputs.dim() == 2:
            return (inputs[:, None] * outputs).reshape(-1)
        return torch.dot(inputs, outputs.flatten(1).sum(1))

    def smallest_pivot(self) -> Tensor:
        """The smallest of A's and B's; waits for the device if a factor is not positive definite."""
        return torch.minimum(_smallest_pivot(self.input_factor), _smallest_pivot(self.output_factor))

    def require_positive_definite(self) -> None:
        """As for every metric; factorises anew only where an inverse says that something is wrong.

        Raises:
            NotPositiveDefiniteError: a factor is not positive definite.
        """
        inputs, outputs = _diagonal(self.input_inverse), _diagonal(self.output_inverse)
        if not bool(_are_positive(inputs) & _are_positive(outputs)):
            super().require_positive_definite()


@dataclass(frozen=True, eq=False)
class ExactMetric(LayerMetric):
    r"""Any symmetric positive definite G: one matrix of the whole layer, or one per unit. For small layers.

    Args:
        matrix: the damped G, shape [1, m q, m q] in the order of the rows D (a unit's weights, then its bias), or
            [m, q, q].
        cholesky: lower triangular L with G = L L^T, the same shape; NaN where there is none.
    """

    matrix: Tensor
    cholesky: Tensor

    @classmethod
    def factorise(cls, matrix: Tensor, damping: float | Tensor = 0.0) -> ExactMetric:
        """Add damping to the diagonal, and factorise.

        Args:
            matrix: G, shape [1, m q, m q] or [m, q, q].
            damping: a number in the units of G, or one per matrix.

        Returns:
            The metric; whether it is positive definite is asked of it.
        """
        matrix = _damped(matrix, damping)
        return cls(matrix, _cholesky(matrix))

    @property
    def finest_block(self) -> Block:  # type: ignore[override]
        """A unit if there is a matrix per unit."""
        return "layer" if len(self.matrix) == 1 else "unit"

    def apply(self, vector: LayerVector) -> LayerVector:  # noqa: D102
        rows = _rows(vector)
        blocks = rows.reshape(len(self.matrix), -1, 1).to(self.matrix.dtype)
        return _from_rows((self.matrix @ blocks).view(rows.shape), vector)

    def solve(self, gradient: LayerVector) -> MetricSolution:  # noqa: D102
        return MetricSolution(cholesky_product(self.cholesky, gradient), self)

    def effective_dimension(self, matrix: Tensor) -> Tensor:
        """Mean of g^T G^-1 g over gradients g of given second moments F: tr(G^-1 F).

        Args:
            matrix: F, in the form of G; for instance G before it was damped.

        Returns:
            A scalar; if there is a matrix per unit, one number per unit, [m].
        """
        traces = torch.diagonal(torch.cholesky_solve(matrix, self.cholesky), dim1=-2, dim2=-1).sum(-1)
        return traces.sum() if len(traces) == 1 else traces

    def smallest_pivot(self) -> Tensor:
        """The smallest of all matrices; waits for the device if one of them is not positive definite."""
        return _smallest_pivot(self.matrix)

    def require_positive_definite(self) -> None:
        """As for every metric; factorises anew only where the factor says that something is wrong.

        Raises:
            NotPositiveDefiniteError: a matrix is not positive definite.
        """
        if not bool(_are_positive(_diagonal(self.cholesky).square())):
            super().require_positive_definite()


def kronecker_product(left: Tensor, vector: LayerVector, right: Tensor) -> LayerVector:
    """L D R, per group of rows of D = [d_W, d_b].

    Args:
        left: shape [groups, m / groups, m / groups], or a diagonal [groups, m / groups].
        vector: d.
        right: symmetric, shape [groups, q, q], or a diagonal [groups, q].

    Returns:
        The product in the form of d.
    """
    rows = _rows(vector).to(right.dtype)
    rows = rows.view(len(right), -1, rows.shape[-1])
    rows = rows * right[:, None] if right.dim() == 2 else rows @ right
    rows = rows * left[:, :, None] if left.dim() == 2 else left @ rows
    return _from_rows(rows.flatten(0, 1), vector)


def cholesky_product(cholesky: Tensor, vector: LayerVector) -> LayerVector:
    """(L L^T)^-1 d.

    Args:
        cholesky: L, lower triangular, shape [1, m q, m q] or [m, q, q].
        vector: d.

    Returns:
        The product in the form of d.
    """
    rows = _rows(vector)
    blocks = rows.reshape(len(cholesky), -1, 1).to(cholesky.dtype)
    return _from_rows(torch.cholesky_solve(blocks, cholesky).view(rows.shape), vector)


def _rows(vector: LayerVector) -> Tensor:
    rows = vector.weight.reshape(len(vector.weight), -1)
    return rows if vector.bias is None else torch.cat([rows, vector.bias[:, None].to(rows.dtype)], 1)


def _from_rows(rows: Tensor, like: LayerVector) -> LayerVector:
    rows = rows.to(like.weight.dtype)
    if like.bias is None:
        return LayerVector(rows.view(like.weight.shape))
    return LayerVector(rows[:, :-1].reshape(like.weight.shape), rows[:, -1].contiguous())


def _diagonal(factor: Tensor) -> Tensor:
    return torch.diagonal(factor, dim1=-2, dim2=-1) if factor.dim() > 2 else factor


def _are_positive(values: Tensor) -> Tensor:
    """Whether all of them are in (0, inf)."""
    return ((values > 0) & (values < math.inf)).all()


def _mean_diagonal(factor: Tensor) -> Tensor:
    return _diagonal(factor).mean(-1)


def _damped(factor: Tensor, damping: float | Tensor) -> Tensor:
    if isinstance(damping, Tensor):
        damping = damping.view(-1, 1)
    if factor.dim() == 2:
        return factor + damping
    factor = factor.clone()
    torch.diagonal(factor, dim1=-2, dim2=-1).add_(damping)
    return factor


def _cholesky(matrix: Tensor) -> Tensor:
    cholesky: Tensor
    cholesky, info = torch.linalg.cholesky_ex(matrix)
    return cholesky.mul_(torch.where(info != 0, math.nan, 1.0)[:, None, None])  # one pass; masked_fill takes several


def _inverse(factor: Tensor) -> Tensor:
    if factor.dim() == 2:
        return torch.where(factor > 0, factor, math.nan).reciprocal()
    return torch.cholesky_inverse(_cholesky(factor))


def _smallest_pivot(factor: Tensor) -> Tensor:
    """The least squared diagonal entry of the Cholesky factors, or the pivot at which a factorisation stopped."""
    if factor.dim() == 2:
        return factor.min()
    cholesky, info = torch.linalg.cholesky_ex(factor)
    pivots = torch.diagonal(cholesky, dim1=-2, dim2=-1).square().min(-1).values
    failed = [(k, int(row) - 1) for k, row in enumerate(info.tolist()) if row]
    for k, row in failed:  # what LAPACK leaves in its place is not documented: eliminate up to there
        leading, column = factor[k, :row, :row], factor[k, :row, row]
        eliminated = torch.cholesky_solve(column[:, None], torch.linalg.cholesky_ex(leading).L)[:, 0]
        pivots[k] = factor[k, row, row] - torch.dot(column, eliminated)
    return pivots.min()
