r"""Block metrics of one affine layer: which steps of its parameters count as long.

A layer y_j = b_j + \sum_i w_ji x_i (a convolution: i runs over the patch) has a weight [m, n, *kernel] and a bias [m].
A metric G on its parameters is positive definite and measures steps d and gradients g,

    |d|_G^2 = d^T G d,        |g|_{G^-1}^2 = g^T G^-1 g,

both of them sums over blocks of parameters that G does not couple. With u = G^-1 g the squared (dual) norm of a block
is the sum of g * u over it, see :func:`block_sums`.

    metric               d^T G d                                                      finest block
    IdentityMetric       \sum d^2                                                     weight
    DiagonalMetric       \sum q d^2                                                   weight
    QuasiDiagonalMetric  \sum_j c_j (d_0j + \sum_i mu_ji d_ji)^2 + \sum_ji q_ji d_ji^2  unit
    WhiteningMetric      the same, mu and q / beta_j^-2 shared by all units           unit
    KroneckerMetric      tr(B D A D^T), D = [d_W, d_b]                                layer; unit if B is diagonal
    ExactMetric          any symmetric matrix, per layer or per unit                  layer or unit

The two that hold matrices stand in :mod:`torchgeom_optim.geometry.matrix_metric`. Damping is part of a metric: whatever
is added is added where the metric is made, and apply, solve and the norms all use the damped one.

Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", §2 and §3; the quasi-diagonal one
is Ollivier 2013, "Riemannian metrics for neural networks I", §2.3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from torchgeom_optim.geometry.reparametrization import reparametrized_gradient

__all__ = [
    "BLOCKS",
    "Block",
    "BlockValues",
    "DiagonalMetric",
    "IdentityMetric",
    "LayerMetric",
    "LayerVector",
    "MetricSolution",
    "NotPositiveDefiniteError",
    "QuasiDiagonalMetric",
    "WhiteningMetric",
    "block_sums",
    "scale_blocks",
]

Block = Literal["weight", "unit", "layer"]
BLOCKS: tuple[Block, ...] = ("weight", "unit", "layer")  # from fine to coarse

BlockValues = tuple[Tensor, ...]  # "weight": shaped like the weight, and like the bias; "unit": [m]; "layer": a scalar


class LayerVector(NamedTuple):
    """A step or a gradient of one layer's parameters.

    Attributes:
        weight: shape [m, n, *kernel]; of a parameter without a layer, any shape of at least one axis.
        bias: shape [m], or None if the layer has none.
    """

    weight: Tensor
    bias: Tensor | None = None

    def units(self, which: slice) -> LayerVector:
        """The part that belongs to some of the units, as views; that of all is the vector itself."""
        if which == slice(None):
            return self
        return LayerVector(self.weight[which], None if self.bias is None else self.bias[which])


class NotPositiveDefiniteError(ArithmeticError):
    """A metric that should be positive definite is not.

    Attributes:
        smallest_pivot: the pivot of the elimination that was not positive and finite.
    """

    def __init__(self, smallest_pivot: float, what: str) -> None:
        super().__init__(
            f"got a {what} whose smallest pivot is {smallest_pivot:.3g}; need a positive definite one: "
            "try more damping, or more samples in its average."
        )
        self.smallest_pivot = smallest_pivot


class MetricSolution(NamedTuple):
    """Result of solving G u = g.

    Attributes:
        vector: u. Of no use where the solve failed (not finite, or not a direction of descent); never replaced.
        metric: the G that was solved with, which knows whether it is positive definite.
    """

    vector: LayerVector
    metric: LayerMetric

    @property
    def smallest_pivot(self) -> Tensor:
        """Smallest pivot of G, a scalar; not computed before it is asked for."""
        return self.metric.smallest_pivot()

    @property
    def succeeded(self) -> Tensor:
        """Whether G is positive definite and finite, a boolean scalar on the device of G."""
        pivot = self.smallest_pivot
        return (pivot > 0) & torch.isfinite(pivot)

    def checked(self) -> LayerVector:
        """The vector, if it is one; waits for the device.

        Returns:
            u.

        Raises:
            NotPositiveDefiniteError: the solve failed.
        """
        self.metric.require_positive_definite()
        return self.vector


class LayerMetric(ABC):
    """A positive definite G on one layer's parameters. Nothing here waits for the device unless it says so."""

    finest_block: Block = "weight"

    @abstractmethod
    def apply(self, vector: LayerVector) -> LayerVector:
        """G d."""

    @abstractmethod
    def solve(self, gradient: LayerVector) -> MetricSolution:
        """Find u with G u = g."""

    def solve_once(self, gradient: LayerVector) -> LayerVector:
        """U of :meth:`solve`. G, made for this alone, is of no use afterwards: its memory may have become that of u."""
        return self.solve(gradient).vector

    @abstractmethod
    def smallest_pivot(self) -> Tensor:
        """The smallest pivot of G (of its factors, if it is a product), a scalar."""

    def require_positive_definite(self) -> None:
        """Wait for the device, and raise unless the smallest pivot is positive and finite.

        Raises:
            NotPositiveDefiniteError: it is not.
        """
        pivot = float(self.smallest_pivot())
        if not 0.0 < pivot < float("inf"):
            raise NotPositiveDefiniteError(pivot, type(self).__name__)

    def norm_sq(self, vector: LayerVector, block: Block = "layer") -> BlockValues:
        """d^T G d of every block.

        Returns:
            As :func:`block_sums`.

        Raises:
            ValueError: G couples parameters of different blocks.
        """
        self.check_block(block)
        return block_sums(vector, self.apply(vector), block)

    def dual_norm_sq(self, gradient: LayerVector, block: Block = "layer") -> BlockValues:
        """g^T G^-1 g of every block.

        Returns:
            As :func:`block_sums`.

        Raises:
            ValueError: G couples parameters of different blocks.
        """
        self.check_block(block)
        return block_sums(gradient, self.solve(gradient).vector, block)

    def check_block(self, block: Block) -> None:
        """Refuse blocks that G couples: the sum of g * u over such a block is not a norm, it may be negative.

        Raises:
            ValueError: the block is unknown, or finer than G's own blocks.
        """
        if block not in BLOCKS:
            raise ValueError(f"block={block!r}: must be one of {', '.join(map(repr, BLOCKS))}.")
        if BLOCKS.index(block) < BLOCKS.index(self.finest_block):
            raise ValueError(
                f"block={block!r}: {type(self).__name__} couples the parameters of one {self.finest_block}; need "
                f"blocks that it does not couple: try block={self.finest_block!r}, or a diagonal metric."
            )


def block_sums(left: LayerVector, right: LayerVector, block: Block) -> BlockValues:
    """Sums over every block of the products of two vectors' entries.

    Args:
        left: for instance a gradient.
        right: of the same shapes, for instance the direction that was solved for.
        block: "weight": each parameter is a block; "unit": a row of the weight and its bias; "layer": everything.

    Returns:
        "weight": the products in the shape of the weight, and in that of the bias if there is one; "unit": one tensor
        [m]; "layer": one scalar.

    Example:
        >>> g = LayerVector(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0]))
        >>> block_sums(g, g, "unit")
        (tensor([ 6., 26.]),)
    """
    if block == "weight":
        weight = left.weight * right.weight
        return (weight,) if left.bias is None or right.bias is None else (weight, left.bias * right.bias)
    if block == "unit":
        m = len(left.weight)
        total = torch.linalg.vecdot(left.weight.reshape(m, -1), right.weight.reshape(m, -1))
        return (total if left.bias is None or right.bias is None else torch.addcmul(total, left.bias, right.bias),)
    total = torch.dot(left.weight.reshape(-1), right.weight.reshape(-1))
    return (total if left.bias is None or right.bias is None else total + torch.dot(left.bias, right.bias),)


def scale_blocks(vector: LayerVector, factors: BlockValues, block: Block, *, in_place: bool = False) -> LayerVector:
    """Multiply every block of a vector by a number of its own.

    Args:
        vector: a step or a gradient.
        factors: in the form in which :func:`block_sums` returns them.
        block: as there.
        in_place: whether the vector itself is to become the result.

    Returns:
        The scaled vector.
    """
    for_weight, for_bias = factors[0], factors[-1]
    if block == "unit":
        for_weight = for_weight.view(-1, *[1] * (vector.weight.dim() - 1))
    if in_place:
        return LayerVector(vector.weight.mul_(for_weight), None if vector.bias is None else vector.bias.mul_(for_bias))
    return LayerVector(vector.weight * for_weight, None if vector.bias is None else vector.bias * for_bias)


@dataclass(frozen=True)
class IdentityMetric(LayerMetric):
    """G = I: the length of a step is its Euclidean length."""

    def apply(self, vector: LayerVector) -> LayerVector:  # noqa: D102
        return vector

    def solve(self, gradient: LayerVector) -> MetricSolution:  # noqa: D102
        return MetricSolution(gradient, self)

    def smallest_pivot(self) -> Tensor:  # noqa: D102
        return torch.ones(())


@dataclass(frozen=True, eq=False)
class DiagonalMetric(LayerMetric):
    """G = diag(q), q > 0; :meth:`damped` makes it of second moments.

    Args:
        diagonal: q, in the shapes of the parameters.
    """

    diagonal: LayerVector

    @classmethod
    def damped(cls, second_moments: LayerVector, damping: float, zero: float = 0.0) -> DiagonalMetric:
        """Take q = s + damping * mean(s), the mean over weight and bias of the layer.

        Source: our choice of a floor; being a share of the layer's own mean, it does not depend on units.

        Args:
            second_moments: s >= 0, for instance running averages of squared gradients, [m, n, *kernel] and [m].
            damping: in [0, inf).
            zero: what takes the place of q = 0; with inf there is no step where there never was a gradient.

        Returns:
            The damped metric; positive definite unless zero is 0, and s is 0 throughout, or somewhere and damping is 0.
        """
        return cls.raised(second_moments, cls.floor(second_moments, damping, zero), zero)

    @staticmethod
    def floor(second_moments: LayerVector, damping: float, zero: float = 0.0) -> Tensor | None:
        """What :meth:`damped` adds, a scalar; None for nothing."""
        if damping == 0:
            return None
        weight, bias = second_moments
        total = weight.sum() if bias is None else weight.sum() + bias.sum()
        return _or(total * (damping / (weight.numel() + (0 if bias is None else bias.numel()))), zero)

    @classmethod
    def raised(cls, second_moments: LayerVector, floor: Tensor | None, zero: float = 0.0) -> DiagonalMetric:
        """The same for some of the units, with the floor of all of them."""
        weight, bias = second_moments
        if floor is None:
            return cls(LayerVector(_or(weight, zero), None if bias is None else _or(bias, zero)))
        return cls(LayerVector(weight + floor, None if bias is None else bias + floor))

    def apply(self, vector: LayerVector) -> LayerVector:  # noqa: D102
        q_weight, q_bias = self.diagonal
        bias = None if vector.bias is None or q_bias is None else vector.bias * q_bias
        return LayerVector(vector.weight * q_weight, bias)

    def solve(self, gradient: LayerVector) -> MetricSolution:  # noqa: D102
        q_weight, q_bias = self.diagonal
        bias = None if gradient.bias is None or q_bias is None else gradient.bias / q_bias
        return MetricSolution(LayerVector(gradient.weight / q_weight, bias), self)

    def solve_once(self, gradient: LayerVector) -> LayerVector:  # noqa: D102
        q_weight, q_bias = self.diagonal
        bias = None if gradient.bias is None or q_bias is None else gradient.bias / q_bias
        return LayerVector(torch.div(gradient.weight, q_weight, out=q_weight), bias)

    def smallest_pivot(self) -> Tensor:  # noqa: D102
        return _smallest(*self.diagonal)


@dataclass(frozen=True, eq=False)
class QuasiDiagonalMetric(LayerMetric):
    r"""The diagonal and the bias row of each unit's block; what is left free is completed through the bias.

    Given the entries A_00, A_0i, A_ii of unit j's block, G_j is the matrix with these entries and A_0i A_0k / A_00 at
    (i, k), so that eliminating the bias leaves a diagonal. With c = A_00, mu_i = A_0i / A_00 and
    q_i = A_ii - A_0i^2 / A_00,

        d^T G_j d = c (d_0 + \sum_i mu_i d_i)^2 + \sum_i q_i d_i^2
        u_i = (g_i - mu_i g_0) / q_i,    u_0 = g_0 / c - \sum_i mu_i u_i

    Source: Ollivier 2013, "Riemannian metrics for neural networks I", §2.3 (his Eq. for the quasi-diagonal update).
    It is invariant under affine changes x_i -> a_i x_i + t_i of single inputs, which the diagonal alone is not.

    Args:
        corner: c, shape [m].
        mean: mu, shape [m, n, *kernel].
        spread: q, the same shape.
    """

    corner: Tensor
    mean: Tensor
    spread: Tensor
    finest_block: ClassVar[Block] = "unit"  # type: ignore[misc]

    @classmethod
    def damped(
        cls, weight_diagonal: Tensor, bias_row: Tensor, bias_diagonal: Tensor, damping: float, zero: float = 0.0
    ) -> QuasiDiagonalMetric:
        """A_ii + damping * mean(A_ii) and A_00 + damping * mean(A_00), means over the layer, then the bias eliminated.

        Source: Ollivier adds a constant to the diagonal; ours is a share of the layer's mean, and by the
        Cauchy-Schwarz inequality leaves q_i >= damping * mean(A_ii) for averages of products. (A share of the unit's
        own mean lets a unit that is all but silent step many times as far as others: training diverged.)

        Args:
            weight_diagonal: A_ii of every unit, shape [m, n, *kernel].
            bias_row: A_0i, the same shape.
            bias_diagonal: A_00, shape [m].
            damping: in [0, inf).
            zero: as for :meth:`DiagonalMetric.damped`.

        Returns:
            The damped metric.
        """
        floors = cls.floors(weight_diagonal, bias_diagonal, damping, zero)
        return cls.raised(weight_diagonal, bias_row, bias_diagonal, floors, zero)

    @staticmethod
    def floors(
        weight_diagonal: Tensor, bias_diagonal: Tensor, damping: float, zero: float = 0.0
    ) -> tuple[Tensor, Tensor] | None:
        """What :meth:`damped` adds to A_ii and to A_00, scalars; None for nothing."""
        if damping == 0:
            return None
        return _or(weight_diagonal.mean() * damping, zero), bias_diagonal.mean() * damping

    @classmethod
    def raised(
        cls,
        weight_diagonal: Tensor,
        bias_row: Tensor,
        bias_diagonal: Tensor,
        floors: tuple[Tensor, Tensor] | None,
        zero: float = 0.0,
    ) -> QuasiDiagonalMetric:
        """The same for some of the units, with the floors of all of them."""
        corner = _or(bias_diagonal if floors is None else bias_diagonal + floors[1], zero)
        mean = bias_row / _beside(corner, bias_row)
        if floors is None:
            return cls(corner, mean, _or(torch.addcmul(weight_diagonal, mean, bias_row, value=-1), zero))
        return cls(corner, mean, (weight_diagonal + floors[0]).addcmul_(mean, bias_row, value=-1))

    def apply(self, vector: LayerVector) -> LayerVector:  # noqa: D102
        weight, bias = vector.weight, _bias_of(vector, self)
        in_bias = self.corner * (bias + _row_sums(self.mean * weight))
        return LayerVector(self.spread * weight + self.mean * _beside(in_bias, weight), in_bias)

    def solve(self, gradient: LayerVector) -> MetricSolution:  # noqa: D102
        weight, bias = gradient.weight, _bias_of(gradient, self)
        step = torch.addcmul(weight, self.mean, _beside(bias, weight), value=-1).div_(self.spread)
        return MetricSolution(LayerVector(step, bias / self.corner - _row_sums(self.mean * step)), self)

    def solve_once(self, gradient: LayerVector) -> LayerVector:  # noqa: D102
        weight, bias = gradient.weight, _bias_of(gradient, self)
        step = torch.addcmul(weight, self.mean, _beside(bias, weight), value=-1).div_(self.spread)
        return LayerVector(step, bias / self.corner - _row_sums(self.mean.mul_(step)))

    def smallest_pivot(self) -> Tensor:  # noqa: D102
        return _smallest(self.spread, self.corner)


@dataclass(frozen=True, eq=False)
class WhiteningMetric(LayerMetric):
    r"""The metric whose gradient step is the whitening reparametrization: G^-1 g is Eq. (3).

        d^T G d = \sum_j beta_j^-2 [ (d_0j + \sum_i mu_i d_ji)^2 + \sum_i d_ji^2 / alpha_i^2 ]

    the Fisher matrix of uncorrelated inputs with mean mu_i and variance 1 / alpha_i^2, times E[g_j^2] = beta_j^-2.
    Without a bias nothing is centred: mean must be None. For a convolution i is the channel; its kernel positions share
    mu_i and alpha_i. Source: Lafond, Vasilache and Bottou 2017, Eqs. (3), (5), App. A, B.

    Args:
        input_mean: mu, shape [n], of all groups; None for 0.
        input_scale: alpha^2, shape [n].
        output_scale: beta^2, shape [m], or a number that all units share.
        groups: of a convolution.
    """

    input_mean: Tensor | None
    input_scale: Tensor
    output_scale: Tensor | float = 1.0
    groups: int = 1
    finest_block: ClassVar[Block] = "unit"  # type: ignore[misc]

    def apply(self, vector: LayerVector) -> LayerVector:  # noqa: D102
        weight, bias = vector
        beta = self.output_scale
        per_weight = _beside(beta, weight) if isinstance(beta, Tensor) else beta
        spread = weight / (self.of_inputs(self.input_scale, weight) * per_weight)
        if bias is None or self.input_mean is None:
            return LayerVector(spread, None if bias is None else bias / beta)
        mean = self.of_inputs(self.input_mean, weight)
        in_bias = (bias + _row_sums(mean * weight)) / beta
        return LayerVector(spread + mean * _beside(in_bias, weight), in_bias)

    def solve(self, gradient: LayerVector) -> MetricSolution:  # noqa: D102
        beta = self.output_scale
        scale = self.input_scale if isinstance(beta, Tensor) else self.input_scale * beta
        step = reparametrized_gradient(gradient.weight, gradient.bias, self.input_mean, scale, beta, self.groups)
        return MetricSolution(LayerVector(*step), self)

    def smallest_pivot(self) -> Tensor:  # noqa: D102
        # The bias eliminated first: beta_j^-2, and then the 1 / (alpha_i beta_j)^2.
        inputs, beta = _smallest(1 / self.input_scale), self.output_scale
        if self.input_mean is not None:
            inputs = inputs.clamp(max=1.0)
        outputs = _smallest(1 / (beta if isinstance(beta, Tensor) else inputs.new_tensor(beta)))
        return torch.where((inputs > 0) & (outputs > 0), inputs * outputs, torch.minimum(inputs, outputs))

    def of_units(self, which: slice) -> WhiteningMetric:
        """G of some of the units alone; of all of them, if there are several groups."""
        if which == slice(None):
            return self
        beta = self.output_scale
        return WhiteningMetric(self.input_mean, self.input_scale, beta[which] if isinstance(beta, Tensor) else beta)

    def of_inputs(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values [n] of all inputs, as the weights of the units see them."""
        if self.groups > 1:
            values = values.view(self.groups, -1).repeat_interleave(len(weight) // self.groups, 0)
        else:
            values = values[None]
        return values.view(*values.shape, *[1] * (weight.dim() - 2))


def _bias_of(vector: LayerVector, metric: LayerMetric) -> Tensor:
    if vector.bias is None:
        raise ValueError(f"got a layer without bias; {type(metric).__name__} needs one: try DiagonalMetric.")
    return vector.bias


def _row_sums(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).sum(1)


def _beside(values: Tensor, weight: Tensor) -> Tensor:
    """Values [m] of the units, to broadcast against their weights."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _or(values: Tensor, zero: float) -> Tensor:
    """The values, with another one in the place of 0."""
    return values.masked_fill(values == 0, zero) if zero else values


def _smallest(*parts: Tensor | None) -> Tensor:
    """The smallest entry; NaN wherever there is one."""
    return torch.stack([part.min() for part in parts if part is not None]).min()
