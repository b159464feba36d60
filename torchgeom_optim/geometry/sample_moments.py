r"""Second moments of the samples' gradients of one layer, and the mean over samples of their lengths in a metric.

With g_n the gradient of sample n, the mean of the squared dual norms E_n[g_n^T G^-1 g_n] that bounds the one of the
mean gradient (Lafond, Vasilache and Bottou 2017, the line before Eq. (11)) needs only those entries of E_n[g_n g_n^T]
that G^-1 couples: the diagonal, and for metrics that centre the inputs the products with the unit's bias gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchgeom_optim.geometry.factors import Factor, TokenFactor, pieces
from torchgeom_optim.geometry.metric import (
    Block,
    BlockValues,
    DiagonalMetric,
    IdentityMetric,
    LayerMetric,
    LayerVector,
    QuasiDiagonalMetric,
    WhiteningMetric,
)

__all__ = ["SampleMoments", "mean_dual_norm_sq", "sample_moments"]


class SampleMoments(NamedTuple):
    """Means over samples, of products of the entries of one sample's gradient; units of gradients squared.

    Attributes:
        weight: E[g_ji^2], shape of the weight (or [units, entries of a unit]).
        bias_row: E[g_ji g_j0], the same shape; None if not asked for, or without a bias.
        bias: E[g_j0^2], shape [m]; None without a bias.
    """

    weight: Tensor
    bias_row: Tensor | None = None
    bias: Tensor | None = None


def sample_moments(weight: Factor, bias_grads: Tensor | None = None, *, with_row: bool = False) -> SampleMoments:
    r"""Take the moments without forming the samples' gradients where these are single outer products.

        E[(g_j a_i)^2] = (1/N) \sum_n g_nj^2 a_ni^2,    E[g_j a_i g_j] = (1/N) \sum_n g_nj^2 a_ni

    Otherwise (more positions than one) a few units' gradients are formed at a time. The diagonal of the empirical
    Fisher matrix, if the gradients are those of the samples' own losses.

    Args:
        weight: of N samples, one gradient each.
        bias_grads: shape [N, m], or None.
        with_row: whether the products with the bias gradients are wanted.

    Returns:
        The moments, divided by N; the weight's in the shape [units, entries of a unit].

    Raises:
        ValueError: several gradients per sample.

    Example:
        >>> from torchgeom_optim.geometry.factors import OuterFactor
        >>> a, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> sample_moments(OuterFactor(a[:, None, None], g[:, None, None, None])).weight
        tensor([[ 9., 36.]])
    """
    if weight.num_grads != 1:
        raise ValueError(f"got {weight.num_grads} gradients per sample; need one: take those of a loss.")
    num_samples = max(weight.num_samples, 1)
    bias_sq = None if bias_grads is None else bias_grads.square().sum(0).div_(num_samples)
    with_row = with_row and bias_grads is not None
    outer = weight.as_outer()
    if isinstance(weight, TokenFactor) and weight.tokens.shape[1] == 1:  # one-hot: each sample has one row
        squares = weight.output_grads[:, 0, 0].square()
        total = squares.new_zeros(weight.num_embeddings, squares.shape[1]).index_add_(0, weight.tokens[:, 0], squares)
        return SampleMoments(total.div_(num_samples), None, bias_sq)
    if outer is not None and outer.inputs.shape[2] == 1 and not outer.transposed:
        a, g_sq = outer.inputs[:, :, 0].transpose(0, 1), outer.output_grads[:, 0, :, 0].square().permute(1, 2, 0)
        row = torch.bmm(g_sq, a).flatten(0, 1).div_(num_samples) if with_row else None
        return SampleMoments(torch.bmm(g_sq, a.square()).flatten(0, 1).div_(num_samples), row, bias_sq)
    source: Factor = weight if outer is None else outer
    unit_squares, bias_rows = list[Tensor](), list[Tensor]()
    for start, stop in pieces(source.num_units, num_samples * source.unit_numel * 8, source.unit_step):
        grads = source.rows(start, stop).view(num_samples, stop - start, -1)
        if with_row and bias_grads is not None:
            bias_rows.append(torch.einsum("nui,nu->ui", grads, bias_grads[:, start:stop]).div_(num_samples))
        unit_squares.append(grads.square_().sum(0).div_(num_samples))
    return SampleMoments(torch.cat(unit_squares), torch.cat(bias_rows) if with_row else None, bias_sq)


def mean_dual_norm_sq(metric: LayerMetric, moments: SampleMoments, block: Block = "layer") -> BlockValues:
    r"""Mean over samples of g_n^T G^-1 g_n in every block, from moments of the g_n.

    Where G centres, the part of entry (j, i) is E[(g_ji - mu_ji g_j0)^2] / q_ji.

    Args:
        metric: identity, diagonal, quasi-diagonal or whitening.
        moments: with the row if the metric centres inputs; E may run over as many batches as one likes.
        block: which parameters form a block; not finer than those of the metric.

    Returns:
        As :func:`~torchgeom_optim.geometry.metric.block_sums`.

    Raises:
        ValueError: a finer block, or the row is missing.
        TypeError: a metric that couples other entries.

    Example:
        >>> moments = SampleMoments(torch.tensor([[1.0, 4.0]]), None, torch.tensor([9.0]))
        >>> mean_dual_norm_sq(IdentityMetric(), moments, "unit")
        (tensor([14.]),)
    """
    metric.check_block(block)
    parts = _parts(metric, moments)
    if block == "weight":
        return (parts.weight,) if parts.bias is None else (parts.weight, parts.bias)
    units = parts.weight.flatten(1).sum(1)
    units = units if parts.bias is None else units + parts.bias
    return (units if block == "unit" else units.sum(),)


def _parts(metric: LayerMetric, moments: SampleMoments) -> LayerVector:
    """What every entry contributes."""
    weight, _, bias = moments
    if isinstance(metric, IdentityMetric):
        return LayerVector(weight, bias)
    if isinstance(metric, DiagonalMetric):
        return metric.solve(LayerVector(weight, bias)).vector
    if isinstance(metric, QuasiDiagonalMetric):
        return LayerVector(
            _centred(moments, metric.mean) / metric.spread, None if bias is None else bias / metric.corner
        )
    if isinstance(metric, WhiteningMetric):
        if bias is None or metric.input_mean is None:
            centred = LayerVector(weight, bias)
        else:
            centred = LayerVector(_centred(moments, metric.of_inputs(metric.input_mean, weight)), bias)
        alone = WhiteningMetric(None, metric.input_scale, metric.output_scale, metric.groups)  # is diagonal
        return alone.solve(centred).vector
    raise TypeError(
        f"got {type(metric).__name__}, which couples entries that the moments do not hold; need a diagonal, "
        "quasi-diagonal or whitening metric: try the effective dimension of a matrix."
    )


def _centred(moments: SampleMoments, mean: Tensor) -> Tensor:
    """E[(g_ji - mu_ji g_j0)^2]."""
    weight, row, bias = moments
    if row is None or bias is None:
        raise ValueError("got moments without the row; need E[g_ji g_j0] and E[g_j0^2]: take them with with_row=True.")
    beside = bias.view(-1, *[1] * (weight.dim() - 1))
    return weight - 2 * mean * row + mean.square() * beside
