"""What stands under the root of Eq. (11): the average of g^T G^-1 g in every block, in one of its three readings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from torchgeom_optim.geometry.metric import Block, BlockValues, block_sums
from torchgeom_optim.optimizers.block_metrics import Piece
from torchgeom_optim.optimizers.parts import Part

__all__ = ["Expectation", "Norms", "average_of_steps", "bound_by_samples", "unit_sizes"]

Expectation = Literal["average", "per_sample", "fan_in"]
Norms = Callable[[Piece], BlockValues]  # E of the blocks of a piece, in the form of block_sums; once for each piece


def average_of_steps(part: Part, block: Block, *, from_zero: bool) -> Norms:
    """Running average of the mini-batch gradient's own g^T G^-1 g, kept in the parts' states; or this step's alone.

    Args:
        part: its ``new`` state is added to.
        block: which parameters share a value; layers come in one piece.
        from_zero: whether the average starts at zero, as RMSProp's, or with its first value.

    Returns:
        The values of a piece; averages in the state change in place.
    """
    decay = part.group["norm_decay"]
    if decay == 0:
        return lambda piece: block_sums(piece.gradient, piece.direction, block)
    start = 1 - decay if from_zero else 1.0
    if block == "weight":
        kept = [part.kept(k, "norm_sq", like.shape) for k, like in enumerate(part.gradient) if like is not None]

        def of_weights(piece: Piece) -> BlockValues:
            values = list[Tensor]()
            both = [
                (x, y) for x, y in zip(piece.gradient, piece.direction, strict=True) if x is not None and y is not None
            ]
            for (average, is_new), (x, y) in zip(kept, both, strict=True):
                average = average[piece.units]
                if is_new:
                    torch.mul(x, y, out=average).mul_(start)
                else:
                    average.mul_(decay).addcmul_(x, y, value=1 - decay)
                values.append(average)
            return tuple(values)

        return of_weights
    average, is_new = part.kept(0, "norm_sq", part.gradient.weight.shape[:1] if block == "unit" else ())

    def of_blocks(piece: Piece) -> BlockValues:
        (now,) = block_sums(piece.gradient, piece.direction, block)
        values = average[piece.units] if block == "unit" else average
        return (torch.mul(now, start, out=values) if is_new else values.lerp_(now, 1 - decay),)

    return of_blocks


def bound_by_samples(sample_norms: Callable[[Block], BlockValues], block: Block) -> Norms:
    """The average over samples of g_n^T G^-1 g_n, which is the paper's; never less than the mini-batch gradient's own.

    A mean over samples cannot be less than that of their mean gradient, by which the paper bounds it. The average runs
    over many steps and lags behind: where gradients grow, taking the greater of the two keeps the step within lr.

    Args:
        sample_norms: of a layer whose units come in one piece.
        block: which parameters share a value.

    Returns:
        The values of a piece.
    """

    def values(piece: Piece) -> BlockValues:
        both = zip(sample_norms(block), block_sums(piece.gradient, piece.direction, block), strict=True)
        return tuple(torch.maximum(of_samples, of_batch) for of_samples, of_batch in both)

    return values


def unit_sizes(part: Part) -> Norms:
    """E = n s of every unit, as inputs and output gradients of unit size make it (§3.5); 1 without a layer."""
    units = part.gradient.weight.new_ones(len(part.gradient.weight))
    if part.layer is not None:
        sharing = part.layer.sharing() if part.layer.calls else part.past[0]["sharing"]
        part.new[0]["sharing"] = sharing
        units = units / part.layer.fan_in_scale(sharing) ** 2
    return lambda piece: (units[piece.units],)
