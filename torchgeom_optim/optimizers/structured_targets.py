"""Targets in which whole units, heads, or weights in a fixed pattern are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgeom_optim.optimizers.targets import (
    CutPlan,
    Target,
    TargetSpace,
    check_counts,
    number_of,
    single_weights,
    unit_owner,
)

__all__ = ["Heads", "NofM", "Units"]


@dataclass(frozen=True)
class Units(Target):
    """Whole units of some layers are gone: filters of convolutions, rows of linear layers, with their biases.

    Args:
        layers: how many units go of which layer, a number or a share below 1, by the module's name. A tuple of names
            stands for modules whose units are the same, and go together: ``("conv1", "bn1")``. Without its norm's
            scale and shift, a unit that is normalised after it is cut goes on giving a constant.
    """

    layers: Mapping[str | tuple[str, ...], float]

    def plan(self, space: TargetSpace) -> CutPlan:  # noqa: D102
        pieces = []
        for key, amount in self.layers.items():
            names = (key,) if isinstance(key, str) else key
            owner = unit_owner(space, names)
            pieces.append((owner, number_of(amount, int(owner.max()) + 1, ", ".join(names)), ", ".join(names)))
        return _joined(pieces, space, "Units")


@dataclass(frozen=True)
class Heads(Target):
    """Whole attention heads are gone: their queries, keys and values, and what the output layer makes of them.

    Args:
        layers: how many heads go of which attention, a number or a share below 1: by the name of an
            ``nn.MultiheadAttention``, or by a pair of names (packed query-key-value layer, output layer), the heads
            of which lie one after the other in each third of the first one's rows.
        num_heads: for such pairs.
    """

    layers: Mapping[str | tuple[str, str], float]
    num_heads: int | None = None

    def plan(self, space: TargetSpace) -> CutPlan:  # noqa: D102
        pieces = []
        for key, amount in self.layers.items():
            owner, count = self._owner(space, key)
            pieces.append((owner, number_of(amount, count, f"the heads of {key}"), str(key)))
        return _joined(pieces, space, "Heads")

    def _owner(self, space: TargetSpace, key: str | tuple[str, str]) -> tuple[Tensor, int]:
        shapes = space.vectors.shapes
        if isinstance(key, str):
            module = dict(space.model.named_modules()).get(key)
            if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None:
                raise ValueError(
                    f"{key!r} is {type(module).__name__}: must be an nn.MultiheadAttention with packed projections; "
                    "for others give a pair (query-key-value layer, output layer) and num_heads."
                )
            heads, prefix = module.num_heads, f"{key}." if key else ""
            packed, output = [f"{prefix}in_proj_weight", f"{prefix}in_proj_bias"], f"{prefix}out_proj.weight"
        else:
            if self.num_heads is None:
                raise ValueError(f"num_heads=None: must be given for {key}, whose layers do not tell it.")
            heads = self.num_heads
            packed, output = [f"{key[0]}.weight", f"{key[0]}.bias"], f"{key[1]}.weight"
        packed = [name for name in packed if name in shapes]
        if not packed or output not in shapes:
            raise ValueError(f"{key}: its parameters must be in the groups, {output!r} and the packed projection.")
        width = shapes[output][1]
        if any(shapes[name][0] != 3 * width for name in packed) or not (heads >= 1 and width % heads == 0):
            raise ValueError(
                f"{key}: {heads} heads, packed rows {[shapes[name][0] for name in packed]}, output layer of {width} "
                "inputs; need three times as many rows, and heads that divide the inputs."
            )
        head = torch.arange(width) // (width // heads)
        indices = {name: torch.full(shape, -1) for name, shape in shapes.items()}
        for name in packed:
            indices[name] = head.repeat(3).view(-1, *[1] * (len(shapes[name]) - 1)).expand(shapes[name])
        indices[output] = head.expand(shapes[output])
        return space.vectors.flat(indices).to(space.weights.device), heads


@dataclass(frozen=True)
class NofM(Target):
    """Of every m inputs of a unit in a row, n weights are left, as sparse tensor cores take them (2 of 4).

    Inputs are counted along the flattened axes 1, 2, … of a weight.

    Args:
        n: weights that stay, in [1, m).
        m: weights of a block.

    Raises:
        ValueError: a value out of its range.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"n={self.n}, m={self.m}: n must be in [1, m); 2 of 4 is common.")

    def plan(self, space: TargetSpace) -> CutPlan:  # noqa: D102
        blocks: dict[str, Tensor] = {}
        total = 0
        for name, shape in space.vectors.shapes.items():
            may = space.vectors.named(space.single)[name]
            if not bool(may.any()):
                blocks[name] = torch.zeros(shape, dtype=torch.long)
                continue
            fan_in = shape[1:].numel()
            if fan_in % self.m:
                raise ValueError(
                    f"{name} of shape {list(shape)}: the inputs of a unit must be a multiple of m={self.m}. Put it "
                    "into a group with may_cut=False."
                )
            blocks[name] = (torch.arange(shape.numel()) // self.m).view(shape) + total
            total += shape.numel() // self.m
        owner, _ = single_weights(space)
        scope = space.vectors.flat(blocks).to(owner.device)[space.single]
        counts = torch.full((total,), self.m - self.n, device=owner.device)
        plan = CutPlan(owner, scope, counts, whole_units=False)
        check_counts(plan, space, f"NofM({self.n}, {self.m})")
        return plan


def _joined(pieces: list[tuple[Tensor, int, str]], space: TargetSpace, what: str) -> CutPlan:
    """One plan from the pieces of several layers, each a scope."""
    if not pieces:
        raise ValueError(f"{what}: no layer is named; need one at least, as in model.named_modules().")
    total, scopes, counts = 0, [], []
    joined = torch.full_like(pieces[0][0], -1)
    for number, (owner, count, name) in enumerate(pieces):
        members = owner >= 0
        if bool((members & (joined >= 0)).any()):
            raise ValueError(f"{what}: {name} shares parameters with a layer named before; name each once.")
        if bool((members & ~space.may_cut & ~space.cut).any()):
            raise ValueError(
                f"{what}: entries of {name} may not be cut; need its parameters, biases too, in groups "
                "with may_cut=True."
            )
        joined = torch.where(members, owner + total, joined)
        size = int(owner.max()) + 1
        scopes.append(torch.full((size,), number, device=owner.device))
        counts.append(count)
        total += size
    plan = CutPlan(joined, torch.cat(scopes), torch.tensor(counts, device=joined.device), whole_units=True)
    check_counts(plan, space, what)
    return plan
