"""The step of Eq. (11): every block moves by -lr u / sqrt(eps + E), u = G^-1 g, in as few passes as it allows.

Where E is known for a few units at a time, so is their step: direction, average and the move of the weights then follow
each other while the numbers are in the cache. Of a diagonal metric with blocks of single weights a step reads g, and
reads and writes s (the averages that make G), E and w; blocks of units the same without E.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from torchgeom_optim.geometry.metric import Block, LayerVector
from torchgeom_optim.geometry.trust_region import inverse_lengths
from torchgeom_optim.optimizers.block_metrics import Piece
from torchgeom_optim.optimizers.step_lengths import Norms

__all__ = ["move", "shrink"]

Rate = float | Tensor


def move(
    parameters: LayerVector,
    pieces: Iterable[Piece],
    norms: Norms,
    block: Block,
    eps: float,
    rates: Sequence[Rate],
    decays: Sequence[Rate],
) -> None:
    """Take the step in place: w -= decay w + lr u / sqrt(eps + E).

    Args:
        parameters: w.
        pieces: with u.
        norms: E of a piece.
        block: which parameters share a value.
        eps: in the units of E.
        rates: lr of the weight, and of the bias if there is one.
        decays: by which share of them they shrink before; likewise.
    """
    for p, decay in zip(parameters, decays, strict=False):
        if p is not None:
            shrink(p, decay)
    for piece in pieces:
        factors = inverse_lengths(norms(piece), eps)
        moved, for_weight = parameters.units(piece.units), factors[0]
        if block == "unit":
            for_weight = for_weight.view(-1, *[1] * (moved.weight.dim() - 1))
        _subtract(moved.weight, for_weight, piece.direction.weight, rates[0])
        if moved.bias is not None and piece.direction.bias is not None:
            _subtract(moved.bias, factors[-1], piece.direction.bias, rates[1])


def shrink(p: Tensor, share: Rate) -> None:
    """Decoupled weight decay: p -= share p."""
    if isinstance(share, Tensor):
        p.addcmul_(p, share, value=-1)  # 1 - share may be coarser than p
    elif share != 0:
        p.mul_(1 - share)


def _subtract(p: Tensor, factor: Tensor, direction: Tensor, rate: Rate) -> None:
    if isinstance(rate, Tensor):
        p.addcmul_(factor * rate, direction, value=-1)
    else:
        p.addcmul_(factor, direction, value=-rate)
