r"""Steps that are as long as they are allowed to be: of given metric length, and inside a Euclidean ball.

Two problems stand here. :func:`block_step` moves every block of parameters by a given length in its own metric,
Eqs. (9) to (11) of Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks". :func:`geodesic_step`
minimises a quadratic model in a ball whose metric is g = J^T J, Eq. (5) of the geodesic sparsification paper, through
the small matrix K = J J^T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchgeom_optim.geometry.metric import Block, BlockValues, LayerVector, scale_blocks

__all__ = [
    "BlockStep",
    "Eigenpairs",
    "GeodesicStep",
    "block_step",
    "eigenpairs",
    "geodesic_step",
    "inverse_lengths",
    "network_sum",
]

_MOST_ITERATIONS = 100


class BlockStep(NamedTuple):
    """Result of :func:`block_step`.

    Attributes:
        step: delta w of every layer; to be added.
        scale: of every layer, eta / sqrt(eps + E) of every block; 0 where there is no gradient and no past.
    """

    step: list[LayerVector]
    scale: list[BlockValues]


def network_sum(norms_sq: Sequence[BlockValues]) -> BlockValues:
    """The squared norm of the whole network, from those of its layers.

    Args:
        norms_sq: of every layer, in blocks of any kind.

    Returns:
        One scalar.
    """
    return (torch.stack([part.sum() for values in norms_sq for part in values]).sum(),)


def block_step(
    directions: Sequence[LayerVector],
    norms_sq: Sequence[BlockValues],
    length: float | Tensor,
    block: Block | Literal["network"],
    *,
    eps: float = 0.0,
) -> BlockStep:
    r"""Move every block b by the length eta in its metric.

        delta w_b = -eta G_b^-1 g_b / sqrt(eps + E_b)

    With E_b = g_b^T G_b^-1 g_b of this batch and eps = 0, the step's metric length is exactly eta: Eq. (10), and for
    one block that is the whole network Eq. (9). With a running average of it in the place of E_b: Eq. (11).
    Source: Lafond, Vasilache and Bottou 2017, §3.2-3.3. Changed: steps are signed as they are added (the paper
    drops the sign); its mu is called eps; 0 / 0, a block that never had a gradient, is a step of 0.

    Args:
        directions: u = G^-1 g of every layer.
        norms_sq: E_b of every layer in the form of :func:`~torchgeom_optim.geometry.metric.block_sums`; for
            ``"network"`` any such form, which is summed up.
        length: eta, in the units of the metric's length, in [0, inf).
        block: which parameters share a norm.
        eps: in the units of E_b, in [0, inf).

    Returns:
        The step, and by what each block was scaled.

    Raises:
        ValueError: different numbers of directions and norms, or a value out of its range.

    Example:
        >>> g = LayerVector(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> block_step([g], [(torch.tensor([25.0, 4.0]),)], 0.1, "unit").step[0].weight
        tensor([[-0.0600, -0.0800],
                [-0.0000, -0.1000]])
    """
    if len(directions) != len(norms_sq):
        raise ValueError(
            f"got {len(directions)} directions and {len(norms_sq)} norms; need one of each per layer: "
            "take the norms of all layers with block_sums."
        )
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps={eps}: must be in [0, inf); 0 gives steps of exactly the wanted length.")
    if not isinstance(length, Tensor) and not 0.0 <= length < math.inf:
        raise ValueError(f"length={length}: must be in [0, inf); 0.1 is a common start.")
    kind: Block = "layer" if block == "network" else block
    if block == "network" and norms_sq:
        norms_sq = [network_sum(norms_sq)] * len(directions)
    scales = [tuple(factor * length for factor in inverse_lengths(values, eps)) for values in norms_sq]
    steps = [
        scale_blocks(u, tuple(-factor for factor in scale), kind) for u, scale in zip(directions, scales, strict=True)
    ]
    return BlockStep(steps, scales)


def inverse_lengths(norms_sq: BlockValues, eps: float) -> BlockValues:
    """1 / sqrt(eps + E_b) of every block, and 0 in the place of 1 / 0; NaN stays NaN.

    Args:
        norms_sq: E_b.
        eps: as in :func:`block_step`.

    Returns:
        One number per block.
    """
    if eps > 0:
        return tuple((norm_sq + eps).rsqrt_() for norm_sq in norms_sq)
    return tuple(norm_sq.rsqrt().nan_to_num_(math.nan, 0.0, 0.0) for norm_sq in norms_sq)


class Eigenpairs(NamedTuple):
    """Of K = J J^T, without those that rounding cannot tell from 0.

    Attributes:
        values: sigma > 0, shape [R], ascending.
        vectors: u, shape [Q, R].
        mean_diagonal: trace(K) / Q, a scalar; in its units lambda is readable.
    """

    values: Tensor
    vectors: Tensor
    mean_diagonal: Tensor


def eigenpairs(gram: Tensor) -> Eigenpairs:
    """Decompose K = J J^T once, for any number of :func:`geodesic_step` on it.

    Eigenvalues up to Q eps(dtype) times the largest are taken for zeros: their directions, in which the metric cannot
    be told from nothing, count as free. K has the squared condition number of J: prefer float64.

    Args:
        gram: K, symmetric positive semidefinite, shape [Q, Q].

    Returns:
        The eigenpairs that remain; none if J = 0.

    Raises:
        ValueError: not a square matrix of finite numbers.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram: got shape {tuple(gram.shape)}; need [Q, Q], for instance Jacobian(...).gram().")
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("gram: got NaN or inf entries; need finite ones: check the weights and inputs of J.")
    values, vectors = torch.linalg.eigh(gram)
    keep = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1].clamp(min=0)
    return Eigenpairs(values[keep], vectors[:, keep], torch.diagonal(gram).mean())


class GeodesicStep(NamedTuple):
    """Result of :func:`geodesic_step`; shapes [] in place of [S] for a single v.

    Attributes:
        step: theta, shape of v.
        multiplier: lambda of the constraint, [S]; 0 where the ball is not reached.
        relative_multiplier: the same, in units of the mean of diag K; NaN or inf if J = 0.
        pull: beta, [S].
        ball_is_active: whether ||theta|| = r, [S].
        kkt_residual: ||2 g theta - beta v + 2 lambda theta|| / (beta ||v||), [S], measured with J; 0 for v = 0. None if
            not asked for.
        iterations: of the scalar root, the most that a v took.
        converged: whether the root was found to rounding, [S].
    """

    step: Tensor
    multiplier: Tensor
    relative_multiplier: Tensor
    pull: Tensor
    ball_is_active: Tensor
    kkt_residual: Tensor | None
    iterations: int
    converged: Tensor


def geodesic_step(
    product: Callable[[Tensor], Tensor],
    transposed_product: Callable[[Tensor], Tensor],
    pairs: Eigenpairs,
    targets: Tensor,
    radius: float,
    *,
    pull: float | None = None,
    relative_multiplier: float | None = None,
    measure_residual: bool = True,
) -> GeodesicStep:
    r"""Minimise theta^T g theta - beta theta^T v subject to ||theta||^2 <= r^2, with g = J^T J.

    With K = J J^T = \sum_i sigma_i u_i u_i^T, a_i = u_i^T J v, and v_0 the part of v that J does not see,

        theta = (beta / 2) (g + lambda)^-1 v
              = (beta / 2) [ J^T \sum_i u_i a_i / (sigma_i (sigma_i + lambda)) + v_0 / lambda ]
        ||theta||^2 = (beta^2 / 4) [ \sum_i (a_i^2 / sigma_i) / (sigma_i + lambda)^2 + ||v_0||^2 / lambda^2 ] = r^2

    which falls in lambda, so that a safeguarded Newton iteration on 1 / ||theta|| (concave: no overshoot from the left)
    finds lambda. If v_0 = 0 the ball may not be reached: then lambda = 0 and theta = (beta / 2) g^+ v.
    Source: Eq. (5) of "Geodesic sparsification"; the paper calls a solver of quadratic programs, the closed form
    and the knob are ours: as the ball is always reached when v_0 is not 0, beta and r only choose lambda together.
    Give either ``pull`` (beta, as the paper) or ``relative_multiplier`` (lambda / mean(diag K)); the latter always goes
    to the sphere, ||theta|| = r, and beta follows.

    Cost: one product by J and one by J^T; where v_0 is small beside v, or lambda beside sigma, one more by J and two
    more by J^T, to find v_0 without cancellation; one of each to measure the residual.

    Args:
        product: J v for v of shape [P, S], shape [Q, S].
        transposed_product: J^T u for u of shape [Q, S], shape [P, S].
        pairs: :func:`eigenpairs` of J J^T.
        targets: v, shape [P], or S of them, [P, S].
        radius: r, in (0, inf), units of the parameters.
        pull: beta, in (0, inf), units of diag(K).
        relative_multiplier: lambda in units of mean(diag K), in (0, inf).
        measure_residual: whether to pay for the residual.

    Returns:
        theta with lambda, beta and how well the conditions of optimality hold.

    Raises:
        ValueError: a value out of its range, both or none of pull and relative_multiplier, or a relative_multiplier
            for J = 0.

    Example:
        >>> J, v = torch.tensor([[2.0, 0.0]]), torch.tensor([1.0, 1.0])
        >>> result = geodesic_step(lambda x: J @ x, lambda u: J.T @ u, eigenpairs(J @ J.T), v, 0.5, pull=1.0)
        >>> bool(result.step[1] > 4 * result.step[0]), bool(result.ball_is_active)
        (True, True)
    """
    _check(targets, radius, pull, relative_multiplier, pairs)
    v = targets[:, None] if targets.dim() == 1 else targets
    dtype = torch.promote_types(v.dtype, pairs.values.dtype)
    size_sq = v.to(dtype).square().sum(0)
    sigma = pairs.values[:, None]
    seen = pairs.vectors.T @ product(v).to(dtype)  # a, [R, S]

    def multiplier(free_sq: Tensor) -> tuple[Tensor, int, Tensor]:
        if relative_multiplier is None:
            return _multiplier(weight, pairs.values, free_sq, beta, radius)
        lam = torch.where(size_sq > 0, pairs.mean_diagonal * relative_multiplier, 0.0).to(dtype)
        return lam, 0, torch.ones_like(size_sq, dtype=torch.bool)

    beta = torch.full_like(size_sq, 1.0 if pull is None else pull)
    weight = seen.square() / sigma  # the sum is the squared length of what J sees of v
    free_sq, free = (size_sq - weight.sum(0)).clamp(min=0), None
    lam, iterations, converged = multiplier(free_sq)
    close = free_sq < 0.1 * size_sq  # the difference has lost digits, as v - J^T ... would below, divided by lambda
    if len(sigma) and bool((close | (lam < torch.finfo(v.dtype).eps ** (1 / 3) * sigma[-1])).any()):
        free, free_sq = _unseen(product, transposed_product, pairs, v, seen)
        lam, iterations, converged = multiplier(free_sq)
    inverse = torch.where(lam > 0, 1 / lam, 0.0)  # lambda = 0 only where there is no free part
    if free is None:  # v / lambda - J^T (K + lambda)^-1 J v / lambda is the same
        free, coefficients = v.to(dtype), -seen / (sigma + lam) * inverse
    else:
        coefficients = seen / (sigma * (sigma + lam))
    moved = transposed_product((pairs.vectors @ coefficients).to(v.dtype)).to(dtype)
    theta = (moved + free * inverse) * (beta / 2)
    length = torch.linalg.vector_norm(theta, dim=0)
    if relative_multiplier is not None:
        factor = torch.where(length > 0, radius / length, 0.0)
        theta, beta, length = theta * factor, beta * factor, length * factor
    residual = _kkt_residual(product, transposed_product, v, theta, lam, beta) if measure_residual else None
    step, relative, active = theta.to(v.dtype), lam / pairs.mean_diagonal, lam > 0
    result = GeodesicStep(step, lam, relative, beta, active, residual, iterations, converged)
    if targets.dim() == 2:
        return result
    first = {name: part[..., 0] for name, part in result._asdict().items() if isinstance(part, Tensor)}
    return GeodesicStep(**{**result._asdict(), **first})


def _kkt_residual(
    product: Callable[[Tensor], Tensor],
    transposed_product: Callable[[Tensor], Tensor],
    v: Tensor,
    theta: Tensor,
    lam: Tensor,
    beta: Tensor,
) -> Tensor:
    g_theta = transposed_product(product(theta.to(v.dtype))).to(theta.dtype)
    left = torch.linalg.vector_norm(2 * (g_theta + lam * theta) - beta * v, dim=0)
    right = beta * torch.linalg.vector_norm(v.to(theta.dtype), dim=0)
    return torch.where(right > 0, left / right, 0.0)


def _check(
    targets: Tensor, radius: float, pull: float | None, relative_multiplier: float | None, pairs: Eigenpairs
) -> None:
    if targets.dim() not in (1, 2):
        raise ValueError(f"targets: got shape {tuple(targets.shape)}; need [P] or [P, S]: flatten the parameters.")
    if not bool(torch.isfinite(targets).all()):
        raise ValueError("targets: got NaN or inf entries; need finite ones: check the weights and the target.")
    if not 0.0 < radius < math.inf:
        raise ValueError(f"radius={radius}: must be in (0, inf); a tenth of the distance to the target is a start.")
    if (pull is None) == (relative_multiplier is None):
        raise ValueError(
            f"pull={pull}, relative_multiplier={relative_multiplier}: need exactly one of them; "
            "relative_multiplier=1e-3 is a start."
        )
    if pull is not None and not 0.0 < pull < math.inf:
        raise ValueError(f"pull={pull}: must be in (0, inf). Try relative_multiplier=1e-3 in its place.")
    if relative_multiplier is None:
        return
    if not 0.0 < relative_multiplier < math.inf:
        raise ValueError(f"relative_multiplier={relative_multiplier}: must be in (0, inf); 1e-3 is a start.")
    if not len(pairs.values):
        raise ValueError("got J = 0, in whose units lambda has no value; need another metric, or give pull.")


def _unseen(
    product: Callable[[Tensor], Tensor],
    transposed_product: Callable[[Tensor], Tensor],
    pairs: Eigenpairs,
    v: Tensor,
    seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """The part v_0 of v that J does not see, and its squared length."""
    dtype, sigma = seen.dtype, pairs.values[:, None]
    free, a = v.to(dtype), seen
    for again in (True, False):  # what the first round leaves of the range of J^T may exceed v_0 itself
        free = free - transposed_product((pairs.vectors @ (a / sigma)).to(v.dtype)).to(dtype)
        if again:
            a = pairs.vectors.T @ product(free.to(v.dtype)).to(dtype)
    free_sq = free.square().sum(0)
    # Below this, v_0 is rounding: v lies in the range of J^T, and v_0 / lambda would let noise fill the ball.
    noise = torch.finfo(v.dtype).eps * (10 * math.sqrt(max(v.shape[0], pairs.vectors.shape[0])))
    is_noise = free_sq <= v.to(dtype).square().sum(0) * noise**2
    return free.masked_fill(is_noise, 0.0), free_sq.masked_fill(is_noise, 0.0)


def _multiplier(
    weight: Tensor, sigma: Tensor, free_sq: Tensor, beta: Tensor, radius: float
) -> tuple[Tensor, int, Tensor]:
    """Solve ||theta(lambda)|| = r for every v; 0 where theta(0) lies in the ball."""
    total = weight.sum(0) + free_sq
    # In units of lambda_max = beta ||v|| / 2r, the root for J = 0 and an upper bound; then it lies in [0, 1].
    unit = beta * total.sqrt() / (2 * radius)
    is_zero = unit == 0
    unit = unit.masked_fill(is_zero, 1.0)
    total = total.masked_fill(is_zero, 1.0)
    w, p, s = weight / total, free_sq / total, sigma[:, None] / unit
    low = torch.maximum(p.sqrt(), 1 - s[-1] if len(s) else torch.ones_like(p)).clamp(0, 1)  # ||theta|| >= r there
    high = torch.ones_like(low)
    at_zero = (w / s.square()).sum(0)
    inside = is_zero | ((p == 0) & (at_zero <= 1))
    x, converged, iteration = low.masked_fill(inside, 1.0), inside.clone(), 0
    tolerance = 4 * torch.finfo(x.dtype).eps
    while iteration < _MOST_ITERATIONS:
        iteration += 1
        inverse = torch.where(p > 0, 1 / x, 0.0)
        square = (w / (s + x).square()).sum(0) + p * inverse.square()
        cube = (w / (s + x).pow(3)).sum(0) + p * inverse.pow(3)
        size = square.sqrt()  # ||theta|| / r
        low, high = torch.where(size >= 1, x, low), torch.where(size <= 1, x, high)
        converged |= ((size - 1).abs() <= tolerance * (1 + len(w))) | (high - low <= tolerance * high)
        if bool(converged.all()):
            break
        newton = x + (size - 1) * square / cube  # on 1 / ||theta||
        outside = ~((newton >= low) & (newton <= high))
        x = torch.where(converged, x, torch.where(outside, (low + high) / 2, newton))
    return torch.where(inside, 0.0, x * unit), iteration, converged
