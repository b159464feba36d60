"""The step of Eq. (11): every block moves by -lr u / sqrt(eps + E), u = G^-1 g, in as few passes as it allows.

Where E is known for a few units at a time, so is their step: direction, average and the move of the weights then follow
each other while the numbers are in the cache. With blocks of single weights a diagonal metric at least reads g, and
reads and writes s (the averages that make G), E and w, 7 numbers per weight; RMSProp 5; blocks of units the same
without E; metrics of inputs 3; the quasi-diagonal one 7, as it averages a second product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchgeom_optim.geometry.metric import Block, LayerVector, scale_blocks
from torchgeom_optim.geometry.trust_region import inverse_lengths
from torchgeom_optim.optimizers.block_metrics import Solved
from torchgeom_optim.optimizers.parts import Part
from torchgeom_optim.optimizers.step_lengths import Norms

__all__ = ["note_direction", "shrink", "step_in_place"]


def step_in_place(
    part: Part, solution: Solved, norms: Norms, block: Block, eps: float, groups: Sequence[Mapping[str, Any]]
) -> bool:
    """Take the step: w -= lr weight_decay w, then w -= lr u / sqrt(eps + E).

    Args:
        part: whose parameters move.
        solution: with u.
        norms: E of a piece.
        block: which parameters share a value.
        eps: in the units of E.
        groups: hyper-parameters of the weight, and of the bias if there is one.

    Returns:
        Whether it was taken; not if there is momentum to be kept, or a parameter that can only be had as a copy.
    """
    if any(group["momentum"] for group in groups) or (parameters := part.in_place) is None:
        return False
    for p, group in zip(parameters, groups, strict=False):
        if p is not None:
            shrink(p, group)
    rates = [-group["lr"] if group["maximize"] else group["lr"] for group in groups]
    for piece in solution.pieces(may_split=block != "layer" and solution.sample_norms is None):
        factors = inverse_lengths(norms(piece), eps)
        moved, for_weight = parameters.units(piece.units), factors[0]
        if block == "unit":
            for_weight = for_weight.view(-1, *[1] * (moved.weight.dim() - 1))
        _subtract(moved.weight, for_weight, piece.direction.weight, rates[0])
        if moved.bias is not None and piece.direction.bias is not None:
            _subtract(moved.bias, factors[-1], piece.direction.bias, rates[1])
    return True


def note_direction(
    part: Part,
    solution: Solved,
    norms: Norms,
    block: Block,
    eps: float,
    directions: dict[int, Tensor],
    momentum: LayerVector | None,
) -> dict[int, Tensor]:
    """Write down u / sqrt(eps + E), for torch's SGD to take a step along.

    Args:
        part: whose parameters move.
        solution: with u.
        norms: E of a piece.
        block: which parameters share a value.
        eps: in the units of E.
        directions: by the id of a parameter; added to.
        momentum: of gradients, of a run with torch.optim.SGD.

    Returns:
        The momentum in our coordinates, by the id of a parameter; nothing where there is none.
    """
    (piece,) = solution.pieces(may_split=False)
    factors = inverse_lengths(norms(piece), eps)
    is_new = piece.direction is not piece.gradient
    part.write(scale_blocks(piece.direction, factors, block, in_place=is_new), directions)
    buffers: dict[int, Tensor] = {}
    if momentum is not None:
        part.write(scale_blocks(solution.solve(momentum), factors, block), buffers)
    return buffers


def shrink(p: Tensor, group: Mapping[str, Any]) -> None:
    """Decoupled weight decay: p -= lr weight_decay p."""
    share = group["lr"] * group["weight_decay"]
    if isinstance(share, Tensor):
        p.addcmul_(p, share, value=-1)  # 1 - share may be coarser than p
    elif share != 0:
        p.mul_(1 - share)


def _subtract(p: Tensor, factor: Tensor, direction: Tensor, rate: float | Tensor) -> None:
    if isinstance(rate, Tensor):
        p.addcmul_(factor * rate, direction, value=-1)
    else:
        p.addcmul_(factor, direction, value=-rate)
