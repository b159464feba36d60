"""What stands under the root of Eq. (11): the average of g^T G^-1 g in every block, in one of its three readings."""

from __future__ import annotations

from typing import Literal

import torch

from torchgeom_optim.geometry.metric import Block, BlockValues, block_sums
from torchgeom_optim.optimizers.block_metrics import Solved
from torchgeom_optim.optimizers.parts import Part

__all__ = ["Expectation", "average_of_steps", "bound_by_samples", "unit_sizes"]

Expectation = Literal["average", "per_sample", "fan_in"]


def average_of_steps(part: Part, solution: Solved, block: Block, *, from_zero: bool) -> BlockValues:
    """Running average of the mini-batch gradient's own g^T G^-1 g, kept in the parts' states; or this step's alone.

    Args:
        part: its ``new`` state is added to.
        solution: of this step.
        block: which parameters share a value.
        from_zero: whether the average starts at zero, as RMSProp's, or with its first value.

    Returns:
        One value per block.
    """
    g, u, decay = part.gradient, solution.direction, part.group["norm_decay"]
    start = 1 - decay if from_zero else 1.0
    if block == "weight" and decay > 0:
        weight = part.average_product(0, "norm_sq", g.weight, u.weight, decay, start)
        if g.bias is None or u.bias is None:
            return (weight,)
        return weight, part.average_product(1, "norm_sq", g.bias, u.bias, decay, start)
    values = block_sums(g, u, block)
    if decay == 0:
        return values
    averages = []
    for (_, past, new), now in zip(part.parameters, values, strict=False):
        before = past.get("norm_sq")
        now = now * start if before is None else torch.lerp(before.to(now.dtype), now, 1 - decay)
        new["norm_sq"] = now
        averages.append(now)
    return tuple(averages)


def bound_by_samples(part: Part, solution: Solved, block: Block) -> BlockValues:
    """The average over samples of g_n^T G^-1 g_n, which is the paper's; never less than the mini-batch gradient's own.

    A mean over samples cannot be less than that of their mean gradient, by which the paper bounds it. The average runs
    over many steps and lags behind: where gradients grow, taking the greater of the two keeps the step within lr.

    Args:
        part: what is stepped together.
        solution: of this step, with the samples' norms.
        block: which parameters share a value.

    Returns:
        One value per block.
    """
    assert solution.sample_norms is not None
    both = zip(solution.sample_norms(block), block_sums(part.gradient, solution.direction, block), strict=True)
    return tuple(torch.maximum(of_samples, of_batch) for of_samples, of_batch in both)


def unit_sizes(part: Part) -> BlockValues:
    """E = n s of every unit, as inputs and output gradients of unit size make it (§3.5); 1 without a layer."""
    units = part.gradient.weight.new_ones(len(part.gradient.weight))
    if part.layer is None:
        return (units,)
    sharing = part.layer.sharing() if part.layer.calls else part.past[0]["sharing"]
    part.new[0]["sharing"] = sharing
    return (units / part.layer.fan_in_scale(sharing) ** 2,)
