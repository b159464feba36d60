r"""How the gradients of a batch agree: functions of their Gram matrix, which is computed once for all of them.

K[i, j] = <h_i, h_j> for the gradients h_1 ... h_b of the b samples' own losses, as
:func:`~torchgeom_optim.geometry.gram.per_sample_gram` gives it (not divided by b), and h = 1/b sum_i h_i their mean.
Leading axes of K are kept: one matrix per layer gives one number per layer. All but the noise scale's parts are
dimensionless and do not change when the loss or the weights are rescaled, nor when samples are permuted.

Source: "Gradient conditioning" thesis, sections 3.5 to 3.8. Where gradients vanish or are not finite the numbers are
nan (or inf, where only a denominator vanishes).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NoiseScale",
    "effective_rank",
    "gaussian_effective_rank",
    "gradient_coherence",
    "gradient_confusion",
    "gradient_diversity",
    "gradient_noise_scale",
    "group_means",
    "relative_gradient_rank",
    "sampled_gaussian_effective_rank",
]

# Mean of the Tracy-Widom law of real symmetric matrices (Bornemann 2010, Table 9).
_TRACY_WIDOM_MEAN = -1.2065335745820


def group_means(gram: Tensor, num_groups: int) -> Tensor:
    """Inner products of the mean gradients of groups: batches within the batch.

    Args:
        gram: K, [..., b, b].
        num_groups: G, in [2, b]; consecutive samples make a group, whose sizes differ by one at most.

    Returns:
        [..., G, G].

    Raises:
        ValueError: the matrix is not square, or cannot be cut into that many groups.

    Example:
        >>> group_means(torch.diag(torch.tensor([1.0, 3.0, 2.0, 2.0])), 2)
        tensor([[1., 0.],
                [0., 1.]])
    """
    b = _checked(gram)
    if not 2 <= num_groups <= b:
        raise ValueError(f"num_groups={num_groups}: must be in [2, {b}], the samples there are; 4 is a common start.")
    group = torch.arange(b, device=gram.device) * num_groups // b
    members = torch.nn.functional.one_hot(group, num_groups).to(gram.dtype).T
    weights = members / members.sum(1, keepdim=True)
    return weights @ gram @ weights.T


def gradient_confusion(gram: Tensor, num_groups: int | None = None) -> Tensor:
    r"""Worst disagreement of two gradients, in [0, 1]: 0 where no two point apart.

        -min(0, min_{i != j} <h_i, h_j> / (|h_i| |h_j|))          Def. 3.11, Eq. (3.24)

    The thesis takes mean gradients of n random pairs of batches; we take all pairs, of samples or of groups' means.
    A minimum over more pairs, or over smaller groups, is larger: compare at equal b and G. A gradient that vanishes has
    cosine 0 with every other.

    Args:
        gram: K, [..., b, b].
        num_groups: take the means of so many groups of samples; by default the samples themselves.

    Returns:
        [...].

    Raises:
        ValueError: b < 2, or no such groups.

    Example:
        >>> gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        >>> gradient_confusion(gradients @ gradients.T)
        tensor(1.)
    """
    _checked(gram)
    if num_groups is not None:
        gram = group_means(gram, num_groups)
    norms_sq = gram.diagonal(dim1=-2, dim2=-1)
    # 0 / 0 where a gradient vanishes; an entry that is not finite stays so, and makes the minimum nan.
    lengths = norms_sq.sqrt()
    scale = torch.where(lengths == 0, 1.0, lengths)
    cosines = gram / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return -cosines.amin((-2, -1)).clamp(-1.0, 0.0)


def gradient_diversity(gram: Tensor) -> Tensor:
    r"""How far the gradients are from adding up, in [1/b, inf): 1/b if all are equal, 1 if orthogonal.

        sum_i |h_i|^2 / |sum_i h_i|^2          Def. 3.12, Eq. (3.25)

    Over samples, or, as in the thesis, over means of batches: give it the matrix of these (:func:`group_means`). It
    is 1 / (b coherence).

    Args:
        gram: K, [..., b, b].

    Returns:
        [...]; inf where the gradients cancel.

    Raises:
        ValueError: the matrix is not square.
    """
    _checked(gram, least=1)
    return _trace(gram) / gram.sum((-2, -1)).clamp(min=0.0)


def gradient_coherence(gram: Tensor) -> Tensor:
    r"""What a small step gains, as a share of what all samples would gain if each had its own: in [0, 1].

        sum_i <h, h_i> / sum_i |h_i|^2          Def. 3.13, Eq. (3.26)

    1 if all gradients are equal, 1/b if they are orthogonal. Times b it is about the number of samples that the step
    for one of them helps, itself included (Chatterjee and Zielinski 2020).

    Args:
        gram: K, [..., b, b].

    Returns:
        [...].

    Raises:
        ValueError: the matrix is not square.
    """
    b = _checked(gram, least=1)
    return gram.sum((-2, -1)).clamp(min=0.0) / (b * _trace(gram))


def effective_rank(gram: Tensor) -> Tensor:
    r"""Stable rank of the matrix A whose columns are the gradients, in [1, rank A].

        R(A) = |A|_F^2 / |A|_2^2 = tr K / lambda_max(K)          Def. 3.6, Eq. (3.18)

    Args:
        gram: K = A'A, [..., b, b].

    Returns:
        [...].

    Raises:
        ValueError: the matrix is not square.
    """
    _checked(gram, least=1)
    # LAPACK refuses what is not finite, and one entry that is not shows in the sum.
    finite = gram.sum((-2, -1)).isfinite()
    largest = torch.linalg.eigvalsh(torch.where(finite[..., None, None], gram, 0.0))[..., -1]
    return torch.where(finite, _trace(gram) / largest, math.nan)


def gaussian_effective_rank(num_gradients: int, dimension: int) -> float:
    r"""R(Y) of a Gaussian matrix Y of that shape: its mean, to within a percent or so, without drawing one.

        R(Y) ~ b P / E lambda_max,   E lambda_max ~ mu - 1.2065 sigma,   mu = (sqrt(b - 1/2) + sqrt(P - 1/2))^2,
        sigma = sqrt(mu) (1 / sqrt(b - 1/2) + 1 / sqrt(P - 1/2))^(1/3)

    Source: Johnstone (2001), Theorem 1, with the halves of Ma (2012). To first order it is bP/(sqrt b + sqrt P)^2. The
    thesis (below Eq. 3.21) draws a few Y of each shape instead, as :func:`sampled_gaussian_effective_rank` does, which
    is also what this takes where b or P is below 8 and the formula fails.

    Args:
        num_gradients: b.
        dimension: P, entries of a gradient.

    Returns:
        R(Y), in [1, min(b, P)].

    Raises:
        ValueError: a number below 1.

    Example:
        >>> round(gaussian_effective_rank(64, 10_000), 1)
        55.2
    """
    _check_shape(num_gradients, dimension)
    if min(num_gradients, dimension) < 8:
        return _rank_of_small(num_gradients, dimension)
    b, p = num_gradients - 0.5, dimension - 0.5
    mu = (math.sqrt(b) + math.sqrt(p)) ** 2
    sigma = math.sqrt(mu) * (1 / math.sqrt(b) + 1 / math.sqrt(p)) ** (1 / 3)
    return float(num_gradients * dimension / (mu + _TRACY_WIDOM_MEAN * sigma))


def sampled_gaussian_effective_rank(
    num_gradients: int, dimension: int, num_draws: int = 16, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Mean of R(Y) over draws of a Gaussian matrix Y of that shape, as in the thesis; the cost does not grow with P.

    What is drawn is the triangular factor of Y'Y (Bartlett's decomposition), min(b, P) on each side, and not Y.

    Args:
        num_gradients: b.
        dimension: P.
        num_draws: how many.
        generator: on the CPU; by default one of its own, seeded with 0.

    Returns:
        The mean, and its standard error (nan from one draw).

    Raises:
        ValueError: a number below 1.
    """
    _check_shape(num_gradients, dimension)
    if num_draws < 1:
        raise ValueError(f"num_draws={num_draws}: must be at least 1; 16 is the default.")
    generator = generator or torch.Generator().manual_seed(0)
    small, large = sorted((num_gradients, dimension))
    factor = torch.randn(num_draws, small, small, generator=generator, dtype=torch.float64).tril(-1)
    degrees = torch.arange(large, large - small, -1, dtype=torch.float64).expand(num_draws, small)
    # No public function of gammas takes a generator.
    squares = 2 * torch._standard_gamma(degrees / 2, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    factor = factor + torch.diag_embed(squares.sqrt())
    ranks = effective_rank(factor.mT @ factor)
    error = float(ranks.std()) / math.sqrt(num_draws) if num_draws > 1 else math.nan
    return float(ranks.mean()), error


def relative_gradient_rank(gram: Tensor, dimension: int | Tensor) -> Tensor:
    r"""How much the gradients look like noise: near 1 if they have no structure, near 1/R(Y) if all are parallel.

        R(A) / R(Y),  Y Gaussian of A's shape          Def. 3.7, Eq. (3.20)

    Of gradients with respect to the weights, or to the inputs (Balduzzi et al. 2017): give it the matrix of these.
    R(Y) is :func:`gaussian_effective_rank`.

    Args:
        gram: K, [..., b, b].
        dimension: P, entries of a gradient; an integer tensor [...] where it differs between the matrices.

    Returns:
        [...].

    Raises:
        ValueError: the matrix is not square.
    """
    b = _checked(gram, least=1)
    if isinstance(dimension, Tensor):
        ranks = [gaussian_effective_rank(b, int(p)) for p in dimension.reshape(-1).tolist()]
        scale = torch.tensor(ranks, dtype=gram.dtype, device=gram.device).reshape(dimension.shape)
        return effective_rank(gram) / scale
    return effective_rank(gram) / gaussian_effective_rank(b, dimension)


class NoiseScale(NamedTuple):
    """The gradient noise scale and what it is made of, [...] each.

    Attributes:
        value: trace / norm_sq, in samples; negative where ``norm_sq`` is, and then it says only "more than b".
        trace: unbiased estimate of the trace of the samples' gradient covariance, units (loss / parameter)^2.
        norm_sq: unbiased estimate of the true gradient's squared norm, the same units; may be negative.
    """

    value: Tensor
    trace: Tensor
    norm_sq: Tensor


def gradient_noise_scale(gram: Tensor) -> NoiseScale:
    r"""The batch size at which noise and signal of the batch gradient are equal: "simple noise scale".

        B = tr S / |G|^2,   tr S = (sum_i |h_i|^2 - b |h|^2) / (b - 1),   |G|^2 = |h|^2 - tr S / b

    Source: McCandlish et al. (2018), Eq. (2.9), with the unbiased estimates from one batch. The ratio of the two is
    not unbiased; average numerator and denominator over steps before dividing.

    Args:
        gram: K, [..., b, b], b > 1.

    Returns:
        The three numbers.

    Raises:
        ValueError: b < 2.
    """
    b = _checked(gram)
    mean_sq = gram.sum((-2, -1)) / b**2
    trace = (_trace(gram) - b * mean_sq) / (b - 1)
    norm_sq = mean_sq - trace / b
    return NoiseScale(trace / norm_sq, trace, norm_sq)


@lru_cache(maxsize=1024)
def _rank_of_small(num_gradients: int, dimension: int) -> float:
    return sampled_gaussian_effective_rank(num_gradients, dimension, 1000)[0]


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _check_shape(num_gradients: int, dimension: int) -> None:
    if num_gradients < 1 or dimension < 1:
        raise ValueError(f"num_gradients={num_gradients}, dimension={dimension}: both must be at least 1.")


def _checked(gram: Tensor, least: int = 2) -> int:
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] < least:
        raise ValueError(
            f"gram of shape {list(gram.shape)}: [..., b, b] with b >= {least} is needed, as per_sample_gram gives it; "
            f"take a larger batch if it has too few samples."
        )
    return gram.shape[-1]
