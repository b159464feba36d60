"""What a network can walk to: fewer weights, fewer units, another network, or back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.parameter_vectors import ParameterVectors

__all__ = ["CutPlan", "Dense", "Destination", "Mask", "OtherWeights", "Sparsity", "Target", "TargetSpace"]


@dataclass(frozen=True, eq=False)
class TargetSpace:
    """What a target is stated in.

    Attributes:
        model: the network.
        vectors: its parameters that belong to the groups, as vectors [P].
        weights: the present ones.
        start: those that the path began with.
        may_cut: which entries the groups allow to be cut.
        cut: which are cut already.
    """

    model: nn.Module
    vectors: ParameterVectors
    weights: Tensor
    start: Tensor
    may_cut: Tensor
    cut: Tensor

    @property
    def single(self) -> Tensor:
        """Which entries may be cut one by one: those of parameters with two axes or more, biases and norms not."""
        shapes = self.vectors.shapes
        is_weight = self.vectors.flat({name: torch.full(shape, len(shape) > 1) for name, shape in shapes.items()})
        return self.may_cut & is_weight.to(self.may_cut.device)


@dataclass(frozen=True, eq=False)
class CutPlan:
    """Pieces of the network of which so many of each scope are to go.

    Attributes:
        owner: which piece an entry belongs to, -1 for none, [P].
        scope: which scope a piece belongs to, [pieces].
        counts: pieces of a scope that are cut at arrival, [scopes].
        whole_units: whether a piece is a slice of a layer, rather than a single weight.
    """

    owner: Tensor
    scope: Tensor
    counts: Tensor
    whole_units: bool

    def per_piece(self, entries: Tensor) -> Tensor:
        """Sums of a quantity [P] over the entries of each piece."""
        owned = self.owner >= 0
        sums = torch.zeros(len(self.scope), dtype=entries.dtype, device=entries.device)
        return sums.index_add_(0, self.owner[owned], entries[owned])

    def gone(self, cut: Tensor) -> Tensor:
        """Which pieces are cut, all entries of them."""
        return self.per_piece((~cut).to(torch.float32)) == 0

    def chosen(self, cost: Tensor, gone: Tensor) -> Tensor:
        """The pieces that go: of each scope the cheapest, those first that are gone already.

        Args:
            cost: of each piece.
            gone: which are gone.

        Returns:
            Bool, [pieces].
        """
        order = torch.argsort(torch.where(gone, -math.inf, cost.double()), stable=True)
        order = order[torch.argsort(self.scope[order], stable=True)]
        sizes = torch.bincount(self.scope, minlength=len(self.counts))
        first = sizes.cumsum(0) - sizes
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[self.scope[order]]
        return rank < self.counts[self.scope]

    def entries(self, pieces: Tensor) -> Tensor:
        """The entries [P] of chosen pieces."""
        return torch.where(
            self.owner >= 0, pieces[self.owner.clamp(min=0)], torch.zeros_like(self.owner, dtype=torch.bool)
        )


@dataclass(frozen=True, eq=False)
class Destination:
    """Weights that are to be reached.

    Attributes:
        weights: their values, [P].
        fixed: entries that move there in equal steps, while the others compensate, [P].
        drawn: entries that are drawn there, and give way to the metric until the last step, [P].
    """

    weights: Tensor
    fixed: Tensor
    drawn: Tensor


class Target(ABC):
    """Where a path leads."""

    @abstractmethod
    def plan(self, space: TargetSpace) -> CutPlan | Destination:
        """The target for this network.

        Args:
            space: the network and what may be done to it.

        Returns:
            What is to go, or where the weights are to go.

        Raises:
            ValueError: the network or its groups do not allow it.
        """


@dataclass(frozen=True)
class Sparsity(Target):
    """A share of the weights is zero.

    Args:
        share: of the weights that may be cut, in (0, 1). Biases and norms, parameters of one axis, do not count.
        scope: "global" compares all weights, "layer" takes the share of every parameter by itself.

    Raises:
        ValueError: a value out of its range.
    """

    share: float
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share={self.share}: must be in (0, 1); 0.9 leaves a tenth of the weights.")
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope={self.scope!r}: must be 'global' or 'layer'.")

    def plan(self, space: TargetSpace) -> CutPlan:  # noqa: D102
        owner, scope = single_weights(space)
        counts = (torch.bincount(scope).double() * self.share).round().long()
        if self.scope == "global":
            counts, scope = (torch.ones_like(scope).sum() * self.share).round().long()[None], torch.zeros_like(scope)
        plan = CutPlan(owner, scope, counts, whole_units=False)
        check_counts(plan, space, f"Sparsity({self.share}, {self.scope!r})")
        return plan


@dataclass(frozen=True, eq=False)
class Mask(Target):
    """Exactly these weights are zero.

    Args:
        keep: by the parameter's name, True (or 1) where a weight stays, as in ``torch.nn.utils.prune``; parameters
            that are not named stay whole.
    """

    keep: Mapping[str, Tensor]

    def plan(self, space: TargetSpace) -> CutPlan:  # noqa: D102
        shapes = space.vectors.shapes
        if unknown := [name for name in self.keep if name not in shapes]:
            raise ValueError(f"masks of {unknown}: must be of parameters in the groups, {sorted(shapes)[:4]}, ….")
        for name, keep in self.keep.items():
            if keep.shape != shapes[name] or not bool(((keep == 0) | (keep == 1)).all()):
                raise ValueError(
                    f"mask of {name}: got shape {list(keep.shape)} or values other than 0 and 1; need a mask of shape "
                    f"{list(shapes[name])}. Give a bool tensor, True where a weight stays."
                )
        device = space.weights.device
        outs = {name: torch.zeros(shape, dtype=torch.bool, device=device) for name, shape in shapes.items()}
        outs.update({name: ~keep.to(device, torch.bool) for name, keep in self.keep.items()})
        out = space.vectors.flat(outs)
        forbidden = [
            name for name, part in space.vectors.named(out & ~space.may_cut & ~space.cut).items() if part.any()
        ]
        if forbidden:
            raise ValueError(
                f"the mask cuts entries of {forbidden}, which their groups do not allow: need may_cut=True in their "
                "group, or a mask without them."
            )
        owner = torch.full_like(out, -1, dtype=torch.long)
        owner[out] = torch.arange(int(out.sum()), device=device)
        counts = out.sum()[None]
        return CutPlan(owner, torch.zeros(int(counts), dtype=torch.long, device=device), counts, whole_units=False)


@dataclass(frozen=True, eq=False)
class OtherWeights(Target):
    """The weights of another network of the same architecture.

    Args:
        network: a module, or its state dict or named parameters; names that the groups do not have are ignored.
    """

    network: nn.Module | Mapping[str, Tensor]

    def plan(self, space: TargetSpace) -> Destination:  # noqa: D102
        shapes = space.vectors.shapes
        if isinstance(self.network, nn.Module):
            others: dict[str, Tensor] = dict(self.network.named_parameters())
        else:
            others = dict(self.network)
        differing = [name for name, shape in shapes.items() if name not in others or others[name].shape != shape]
        if differing:
            raise ValueError(
                f"the other network has no {differing[:4]} of the same shape ({len(differing)} of {len(shapes)} "
                "parameters differ): need one of the same architecture. Build both by the same function."
            )
        like = space.weights
        there = space.vectors.flat({name: others[name].detach().to(like.device, like.dtype) for name in shapes})
        if not bool(torch.isfinite(there).all()):
            raise ValueError("the other network has weights that are not finite: all must be. Was its training stable?")
        everything = torch.ones_like(space.cut)
        return Destination(there, ~everything, everything)


@dataclass(frozen=True)
class Dense(Target):
    """Back to the weights that the path began with, in all entries; or only in those of some cut units.

    Args:
        units: how many of the cut units of which layers come back, a share of all the layer's units below 1 or a
            number, by the module's name; those first whose weights were largest. The other weights compensate. None
            for the whole network.
    """

    units: Mapping[str, float] | None = None

    def plan(self, space: TargetSpace) -> Destination:  # noqa: D102
        nothing = torch.zeros_like(space.cut)
        if self.units is None:
            return Destination(space.start, nothing, ~nothing)
        back = nothing.clone()
        for layer, amount in self.units.items():
            owner = unit_owner(space, (layer,))
            plan = CutPlan(owner, torch.zeros(int(owner.max()) + 1, dtype=torch.long, device=owner.device), owner, True)
            gone = plan.gone(space.cut)
            count = number_of(amount, len(gone), layer)
            if count > int(gone.sum()):
                raise ValueError(
                    f"{count} units of {layer} are to come back: only {int(gone.sum())} of its {len(gone)} are cut. "
                    "Ask for as many at most."
                )
            size = torch.where(gone, plan.per_piece(space.start.square()), -1.0)
            chosen = torch.zeros_like(gone)
            chosen[size.topk(count).indices] = True
            back |= plan.entries(chosen)
        return Destination(space.start, back, nothing)


def single_weights(space: TargetSpace) -> tuple[Tensor, Tensor]:
    """Every weight that may be cut as a piece of its own, and the number of its parameter as scope."""
    single = space.single
    owner = torch.full_like(single, -1, dtype=torch.long)
    owner[single] = torch.arange(int(single.sum()), device=owner.device)
    numbers = {name: torch.full(shape, k) for k, (name, shape) in enumerate(space.vectors.shapes.items())}
    parameter = space.vectors.flat(numbers).to(owner.device)[single]
    return owner, torch.unique(parameter, return_inverse=True)[1]


def unit_owner(space: TargetSpace, layers: tuple[str, ...]) -> Tensor:
    """The unit that each entry of these layers belongs to: slices along axis 0 of all their parameters together.

    Args:
        space: the network.
        layers: names of modules whose units are the same, such as a convolution and its batch norm.

    Returns:
        [P], -1 for entries of other layers.

    Raises:
        ValueError: no such module, none of its parameters in the groups, or different numbers of units.
    """
    modules = dict(space.model.named_modules())
    names = {id(p): name for name, p in space.model.named_parameters()}
    indices: dict[str, Tensor] = {}
    units: set[int] = set()
    for layer in layers:
        if layer not in modules:
            known = [name for name, module in modules.items() if module._parameters][:4]
            raise ValueError(
                f"layer {layer!r}: must be the name of a module, as in model.named_modules(), such as {known}."
            )
        own = [names[id(p)] for p in modules[layer].parameters(recurse=False)]
        own = [name for name in own if name in space.vectors.shapes]
        if not own:
            raise ValueError(f"layer {layer!r} has no parameter of its own in the groups: need one to cut its units.")
        for name in own:
            shape = space.vectors.shapes[name]
            units.add(shape[0] if len(shape) else 0)
            indices[name] = torch.arange(shape[0] if len(shape) else 1).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    if len(units) != 1:
        raise ValueError(
            f"layers {layers}: their parameters have {sorted(units)} slices; need the same number of each."
        )
    rest = {name: torch.full(shape, -1) for name, shape in space.vectors.shapes.items() if name not in indices}
    return space.vectors.flat({**indices, **rest}).to(space.weights.device)


def number_of(amount: float, available: int, what: str) -> int:
    """A number of units from a number or from a share below 1.

    Args:
        amount: int, or a float in (0, 1).
        available: how many there are.
        what: for the error.

    Returns:
        The number, in [1, available].

    Raises:
        ValueError: out of range.
    """
    count = round(amount * available) if isinstance(amount, float) and amount < 1 else amount
    if not (count == int(count) and 1 <= count <= available):
        raise ValueError(
            f"{amount} of {what}: must be a share in (0, 1) or a number of 1 to {available}; it has {available}."
        )
    return int(count)


def check_counts(plan: CutPlan, space: TargetSpace, what: str) -> None:
    """Refuse a plan that would have to bring back what is cut, or that asks for more than there is.

    Args:
        plan: the plan.
        space: the network.
        what: the target, for the error.

    Raises:
        ValueError: so many pieces are not to be had.
    """
    sizes = torch.bincount(plan.scope, minlength=len(plan.counts))
    if bool((plan.counts > sizes).any()) or int(plan.counts.sum()) == 0:
        raise ValueError(
            f"{what}: {int(plan.counts.sum())} pieces are to go, the groups allow {int(sizes.sum())} to be cut. "
            "Need at least one, and no more than allowed: see may_cut of the groups."
        )
    already = torch.zeros_like(plan.counts).index_add_(0, plan.scope, plan.gone(space.cut).long())
    if bool((already > plan.counts).any()):
        raise ValueError(
            f"{what}: {int(already.sum())} pieces are cut already, {int(plan.counts.sum())} are asked for. A target "
            "cannot bring weights back; walk to Dense() first."
        )
