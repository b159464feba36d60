r"""How far a unit may move: a trust region for each output of a layer, measured in what the layer computes.

A step s_j d_j of unit j's weights (and bias), its inputs held fixed, moves its output y_j by s_j (d_j . x). With

    r_j^2 = E[(d_j . x)^2]     measured by applying the layer with d in place of its weights to a few samples
    sigma_j^2 = var[y_j]       over the batch

the share s_j r_j / sigma_j is a number without units that no rescaling of units or inputs affects, but for floors.

Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", leave open what to do where the
running statistics are wrong by orders of magnitude (§4.4). The bound is ours; taken over a running average of r_j^2 it
is Eq. (11) of that paper for a block per unit, with E[y_j^2] / sigma_j^2 as metric: their expectation is what makes the
steps of a unit shrink as its gradients do.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLAT_SHARE", "expected_change", "relative_change", "spread_floor", "unit_scale"]

# A unit with less than a tenth of its layer's spread (standard deviation), or change, is treated as one with a tenth.
FLAT_SHARE = 0.01
# And a layer without any, of weights that start at zero, as one that has a hundredth of its inputs' size.
_STILL_SHARE = 0.01


def spread_floor(mean_spread_sq: Tensor, input_sq: Tensor, share: float = FLAT_SHARE) -> Tensor:
    """What is added to sigma_j^2, so that a unit that computes a constant can move.

    Args:
        mean_spread_sq: mean_j sigma_j^2 over a layer.
        input_sq: mean of its inputs' variances, or of E[x_i^2] where they are not centred.
        share: of both, in [0, inf).

    Returns:
        share (mean_j sigma_j^2 + 0.01 input_sq). Elementwise: numbers of several layers may be joined.
    """
    return (mean_spread_sq * share).add_(input_sq, alpha=share * _STILL_SHARE)


def expected_change(past: Tensor, change_sq: Tensor, decay: float) -> Tensor:
    """E[r_j^2], a running average that no batch can fill with infinity.

    Where r_j^2 itself overflows (float32: gradients of 1e20) the step is 0 and the average stays what it was. If there
    is none yet it is put at its bound, a sixteenth of the largest number, with which means over a layer are finite; an
    average at the bound has seen nothing to go by and begins with the next batch, as if that were the first.

    Args:
        past: the average so far; before the first batch, its r_j^2.
        change_sq: r_j^2 of the present direction, [m].
        decay: weight of the past, in [0, 1).

    Returns:
        The new average, [m], finite. Elementwise: vectors of several layers may be joined.

    Example:
        >>> expected_change(torch.tensor([4.0, 1e38]), torch.tensor([8.0, 8.0]), decay=0.75)
        tensor([5., 8.])
    """
    largest = torch.finfo(change_sq.dtype).max / 16
    now = change_sq.clamp(max=largest)
    average = torch.lerp(torch.where(past < largest, past, now), now, 1 - decay)
    return torch.where(change_sq.isinf(), past.clamp(max=largest), average)


def relative_change(change_sq: Tensor, expected_change_sq: Tensor, spread_sq: Tensor) -> Tensor:
    r"""q_j = max(r_j^2, E[r_j^2]) / sigma_j^2: how far a direction moves a unit, in units of its own spread, squared.

    Args:
        change_sq: r_j^2 of the present direction, [m].
        expected_change_sq: its running average, the present one included; 0 for a bound without memory.
        spread_sq: sigma_j^2, not negative.

    Returns:
        q, [m], 0 where nothing moves. Elementwise: vectors of several layers may be joined.
    """
    return torch.maximum(change_sq, expected_change_sq).div_(spread_sq.clamp(min=torch.finfo(spread_sq.dtype).tiny))


def unit_scale(relative: Tensor, floor: Tensor) -> Tensor:
    r"""c_j = 1 / sqrt(q_j + floor): how many times d_j a unit may go to move by its own spread.

    A step rho c_j d_j moves y_j by less than rho sigma_j on the samples that r_j was measured on, by less where the
    present direction is shorter than usual, and by less where a unit's gradients are far smaller than its layer's: such
    a unit may have been silent on these samples alone.

    Args:
        relative: q_j, [m], not negative.
        floor: 0.01 mean_j q_j over the layer, a scalar, or one number for each q.

    Returns:
        c, [m], finite. Elementwise: vectors of several layers may be joined.

    Example:
        >>> unit_scale(torch.tensor([4.0, 1.0]), torch.tensor(0.0))
        tensor([0.5000, 1.0000])
    """
    return (relative + floor).clamp_(min=torch.finfo(relative.dtype).tiny).rsqrt_()
