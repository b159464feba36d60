r"""How far a unit may move: a trust region for each output of a layer, measured in what the layer computes.

A step s_j d_j of unit j's weights (and bias), its inputs held fixed, moves its output y_j by s_j (d_j . x). With

    sigma_j^2 = var[y_j]       over the batch
    r_j^2 = E[(d_j . x)^2]     measured by applying the layer with d in place of its weights to a few samples
    t_j = sigma_j r_j          the loss's slope along y_j / sigma_j: of a whitened gradient d_j, r_j is that along y_j

the share s_j r_j / sigma_j and the slope t_j are numbers that no rescaling of units or inputs affects. The scale

    c_j = sigma_j^2 / sqrt(max(t_j^2, E[t_j^2]) + floor)

moves y_j by its own spread at most, and by less as the slope becomes less than usual. Moves by noise make spreads
grow all the same, step by step; part of that is taken back (:func:`turned_back`).

Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", leave open what to do where the
running statistics are wrong by orders of magnitude (§4.4). The bound is ours; it is Eq. (11) of that paper for a block
per unit, with E[y_j^2] / sigma_j^2 as metric and a number without units under their expectation.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SLOPE_SHARE", "expected_slope", "spread_floor", "turned_back", "unit_scale"]

# A unit along which the loss has less than a tenth of its layer's slope is treated as one with a tenth.
SLOPE_SHARE = 0.01
# One with less than a thirtieth of its layer's spread (standard deviation) as one with a thirtieth.
_SPREAD_SHARE = 0.001
# And a layer without any, of weights that start at zero, as one that has a tenth of its inputs' size.
_STILL_SHARE = 0.01
# How much of the spread that steps of noise add is taken back. Final losses with none, half and all of it, and the
# largest loss of a batch on the way: lenet .007, .05, .17; char_gpt 1.94, 1.64, 1.62; resnet20 .07, .22, .50 (1.6, 1.05
# and 1.04 times the first); mlp_deep, at twice the radius, .005, .003, .005 (32, 1.6 and 1.0 times).
_TAKEN_BACK = 0.5


def spread_floor(mean_spread_sq: Tensor, input_sq: Tensor, share: float = _SPREAD_SHARE) -> Tensor:
    """What is added to sigma_j^2, so that a unit that computes a constant can move.

    Args:
        mean_spread_sq: mean_j sigma_j^2 over a layer.
        input_sq: mean of its inputs' variances, or of E[x_i^2] where they are not centred.
        share: of both, in [0, inf).

    Returns:
        share (mean_j sigma_j^2 + 0.01 input_sq). Elementwise: numbers of several layers may be joined.
    """
    return (mean_spread_sq * share).add_(input_sq, alpha=share * _STILL_SHARE)


def expected_slope(past: Tensor, slope_sq: Tensor, decay: float) -> Tensor:
    """E[t_j^2], a running average that no batch can fill with infinity.

    Where t_j^2 itself is infinite (float32: slopes of 1e20) the step is 0 and the average stays what it was. If there
    is none yet it is put at its bound, a sixteenth of the largest number, with which means over a layer are finite; an
    average at the bound has seen nothing to go by and begins with the next batch, as if that were the first.

    Args:
        past: the average so far; before the first batch, its t_j^2.
        slope_sq: t_j^2 of the present direction, [m].
        decay: weight of the past, in [0, 1).

    Returns:
        The new average, [m], finite. Elementwise: vectors of several layers may be joined.

    Example:
        >>> expected_slope(torch.tensor([4.0, 1e38]), torch.tensor([8.0, 8.0]), decay=0.75)
        tensor([5., 8.])
    """
    largest = torch.finfo(slope_sq.dtype).max / 16
    now = slope_sq.clamp(max=largest)
    average = torch.lerp(torch.where(past < largest, past, now), now, 1 - decay)
    return torch.where(slope_sq.isinf(), past.clamp(max=largest), average)


def unit_scale(spread_sq: Tensor, slope_sq: Tensor, floor: Tensor) -> Tensor:
    r"""c_j = sigma_j^2 / sqrt(t_j^2 + floor): how many times d_j a unit may go to move by its own spread.

    A step rho c_j d_j moves y_j by less than rho sigma_j on the samples that r_j was measured on, by less where its
    slope is less than usual, and by less where it is far less than its layer's: such a unit may have been silent on
    these samples alone.

    Args:
        spread_sq: sigma_j^2, [m], not negative.
        slope_sq: max(t_j^2, E[t_j^2]), [m].
        floor: 0.01 mean_j of the same over the layer, a scalar, or one number for each unit.

    Returns:
        c, [m], finite; 0 where the slope's square is infinite. Elementwise: vectors of several layers may be joined.

    Example:
        >>> unit_scale(torch.tensor([4.0, 1.0]), torch.tensor([16.0, 4.0]), torch.tensor(0.0))
        tensor([1.0000, 0.5000])
    """
    numbers = torch.finfo(slope_sq.dtype)
    slope_sq = slope_sq + floor
    slope_sq.masked_fill_(slope_sq == 0, torch.inf)
    return slope_sq.clamp_(min=numbers.tiny).rsqrt_().mul_(spread_sq).clamp_(max=numbers.max)


def turned_back(spread_sq: Tensor, change_variance: Tensor, scale: Tensor, lr: float | Tensor) -> Tensor:
    r"""b_j: how much of unit j's weights w_j joins its direction, so that its outputs turn more than they grow.

    A move of y_j by theta_j of its spread, at right angles to it as noise is, adds theta_j^2 to its variance, which no
    gradient asked for; along a chain of layers such growth multiplies. The step -lr (s_j d_j + b_j w_j) has

        1 - lr b_j = 1 / sqrt(1 + theta_j^2 / 2),     theta_j^2 = lr^2 s_j^2 var[d_j . x] / sigma_j^2

    and takes half of it back, about the mean of y_j: a bias joins its direction with b_j (bias - E[y_j]). Where none is
    stepped, E[y_j]^2 counts as spread, so that the mean hardly moves. (All of it is what a turn by the angle theta_j
    would do. Kept growth is what the last drops of training loss come from, as it lets the outputs become large.) As
    theta_j it is unaffected by rescaling.

    Args:
        spread_sq: sigma_j^2, [m], not negative.
        change_variance: var[d_j . x] over the samples that r_j was measured on, [m].
        scale: s_j, by which the direction is multiplied, [m].
        lr: learning rate, in [0, inf).

    Returns:
        b, [m], not negative, finite; 0 where sigma_j is. Elementwise: vectors of several layers may be joined.

    Example:
        >>> b = turned_back(torch.tensor([4.0]), torch.tensor([2.0]), torch.tensor([1.0]), lr=2.0)
        >>> torch.testing.assert_close(1 - 2.0 * b, 1 / torch.tensor([1.0 + 2.0**2 * 2.0 / 4.0 / 2]).sqrt())
    """
    grown = (scale.square() * change_variance * (_TAKEN_BACK * lr) / spread_sq).nan_to_num_(nan=0.0, posinf=0.0)
    root = (grown * lr + 1).sqrt_()
    return grown / (root * (root + 1))
