"""The trust region per unit, on a model's parameters: what is measured of each kind, how they are scaled together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.moments import Moments, at_least_float32
from torchgeom_optim.geometry.segments import Segments, constants
from torchgeom_optim.geometry.unit_trust import (
    SLOPE_SHARE,
    expected_slope,
    spread_floor,
    turned_back,
    unit_scale,
)
from torchgeom_optim.optimizers.distributed import is_sharded, local_part, part_along, whole, with_local
from torchgeom_optim.optimizers.layers import AffineLayer

__all__ = [
    "BARE_FLOOR",
    "TrustedBlock",
    "bare_block",
    "find_norms",
    "layer_block",
    "norm_block",
    "past_slope",
    "scale_blocks",
]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# What the factor of a norm and a bare parameter are taken to be if they start at zero: a tenth, and a hundredth.
_NORM_FLOOR, BARE_FLOOR = 1e-2, 1e-4
# All units behind a norm feel each of its channels: moving by as much as units do, they stalled char_gpt at 2.6 nat
# where a tenth reaches 2.3 in as many steps.
_NORM_SHARE = 0.1
# From one step to the next a unit's spread may grow to 16 times what it was; a single sample could make it grow at
# will. Of resnet20 without norms it grew to 11 times, of mlp_deep to 6, of lenet and char_gpt to 3.
_MOST_GROWTH = 256.0
_Directions = MutableMapping[int, Tensor]


@dataclass
class TrustedBlock:
    """Directions that are scaled together, unit by unit.

    Attributes:
        owner: the parameter in whose state the block's numbers are kept.
        parts: each parameter, and the axis of its direction along which the units lie; None scales it as a whole.
        change_sq: r_j^2 of the directions, [m]; of a layer that sits this step out, the slopes that are known.
        spread_sq: sigma_j^2.
        input_sq: mean square of what the units look at, for the floor of sigma_j^2; 0 where there is no such thing.
        num_samples: that r_j was measured on in this process, maybe none; None for what is known without measuring.
        is_remembered: whether there are slopes in ``change_sq``.
        factors: how many factors there are where outputs of the layer are multiplied, which share the radius.
        change_mean: E[d_j . x] where units are turned; None where they are not.
        output_mean: E[y_j], about which they are.
        bias: the parameter that keeps it, if one does.
    """

    owner: Tensor
    parts: list[tuple[Tensor, int | None]]
    change_sq: Tensor
    spread_sq: Tensor
    input_sq: Tensor
    num_samples: int | None = None
    is_remembered: bool = False
    factors: int = 1
    change_mean: Tensor | None = None
    output_mean: Tensor | None = None
    bias: Tensor | None = None


def layer_block(
    layer: AffineLayer, directions: Mapping[int, Tensor], input_sq: Tensor, state: MutableMapping[str, Any]
) -> TrustedBlock | None:
    """A layer's units; None if nothing is stepped, or if the layer sits this step out and was never heard before.

    Args:
        layer: with the calls of this step, or none: then what is known of the last one.
        directions: by the id of a parameter.
        input_sq: mean square of the layer's inputs about their mean, a scalar.
        state: of the layer's weight.

    Returns:
        The block.
    """
    parts: list[tuple[Tensor, int | None]] = []
    if id(layer.weight) in directions:
        parts.append((layer.weight, 1 if layer.is_embedding else 0))
    parts += [(b, 0) for b in layer.parameters[1:] if id(b) in directions]
    if not parts:
        return None
    complete = {id(p): whole(directions[id(p)]) for p, _ in parts}
    if (spread := layer.output_spread_sq()) is not None:
        state["spread_sq"] = spread
    change, outputs = layer.measured_change(complete), layer.output_moments()
    if change is None and layer.is_called_elsewhere:  # what this process has counts for nothing
        change = Moments(0, *(torch.zeros_like(state["spread_sq"]) for _ in range(2)))
    change_sq: Tensor | None
    is_remembered = False
    if change is not None:
        change_sq = torch.addcmul(change.variance, change.mean, change.mean)
    elif (change_sq := state.get("slope_sq")) is not None:
        is_remembered = True
    else:
        change_sq = state.get("change_sq")  # of the rule before this one: r_j^2
    if change_sq is None or "spread_sq" not in state:
        return None
    return TrustedBlock(
        layer.weight,
        parts,
        change_sq,
        state["spread_sq"],
        input_sq,
        num_samples=None if change is None else change.count,
        is_remembered=is_remembered,
        factors=state.get("factors", 1),
        # Rows of an embedding stay as they are while their token is not seen.
        change_mean=None if change is None or outputs is None or layer.is_embedding else change.mean,
        output_mean=None if outputs is None else outputs.mean.nan_to_num(0.0, 0.0, 0.0),
        bias=layer.bias if layer.bias is not None and id(layer.bias) in directions else None,
    )


def find_norms(model: nn.Module | None) -> dict[Tensor, Tensor | None]:
    """Weights of the normalisation layers of a model, each with its bias."""
    norms = (m for m in (model.modules() if model is not None else ()) if isinstance(m, _NORMS))
    weights = ((m._parameters.get("weight"), m._parameters.get("bias")) for m in norms)
    return {weight: bias for weight, bias in weights if weight is not None}


def norm_block(weight: Tensor, bias: Tensor | None, directions: Mapping[int, Tensor]) -> TrustedBlock | None:
    """The channels of a normalisation y_j = w_j x_j + b_j: x_j has mean 0 and variance 1, so nothing is measured.

    r_j^2 = dw_j^2 + db_j^2 and, as every unit behind it feels a channel, a tenth of its own spread:
    sigma_j^2 = 0.1^2 (w_j^2 + 0.01). (Of layer norm it is mean and variance over the channels that are 0 and 1.)

    Args:
        weight: w, any shape.
        bias: b, of the same shape, or None.
        directions: by the id of a parameter.

    Returns:
        The block, or None if neither is stepped.
    """
    stepped = [p for p in (weight, bias) if p is not None and id(p) in directions]
    if not stepped:
        return None
    squares = [at_least_float32(whole(directions[id(p)])).square() for p in stepped]
    change_sq = (squares[0] if len(squares) == 1 else squares[0] + squares[1]).reshape(-1)
    spread_sq = at_least_float32(whole(weight).detach()).square().reshape(-1).add_(_NORM_FLOOR).mul_(_NORM_SHARE**2)
    return TrustedBlock(weight, [(p, 0) for p in stepped], change_sq, spread_sq, spread_sq.new_zeros(()))


def bare_block(parameter: Tensor, directions: Mapping[int, Tensor]) -> TrustedBlock:
    """A parameter of which nothing else is known moves, as a whole, by a share of its own root mean square.

    r^2 = mean(d^2), sigma^2 = mean(p^2) + 1e-4.

    Args:
        parameter: any real one.
        directions: by the id of a parameter.

    Returns:
        The block.
    """
    change, own = (at_least_float32(whole(p.detach())) for p in (directions[id(parameter)], parameter))
    change_sq, own_sq = change.square().mean().reshape(1), own.square().mean().reshape(1)
    return TrustedBlock(parameter, [(parameter, None)], change_sq, own_sq.add_(BARE_FLOOR), own_sq.new_zeros(()))


def scale_blocks(
    blocks: Sequence[TrustedBlock],
    directions: _Directions,
    state_of: Callable[[Tensor], MutableMapping[str, Any]],
    bound: Callable[[Tensor], Tensor],
    *,
    lr: float | Tensor,
    decay: float,
    maximize: bool,
    mean_over_ranks: Callable[[Sequence[Tensor], Sequence[float]], list[Tensor]],
) -> None:
    """Scale the directions of all blocks to the trust region, turn them back, in place, and keep E[t_j^2].

    Args:
        blocks: alike in everything that the other arguments depend on.
        directions: by the id of a parameter.
        state_of: the state of a parameter.
        bound: from c_j to the factor that a direction is multiplied by.
        lr: by which the result will be multiplied.
        decay: of the running average of t_j^2.
        maximize: whether it will be added.
        mean_over_ranks: of what every process has measured, and on how many samples.
    """
    alike: dict[tuple[torch.dtype, torch.device], list[TrustedBlock]] = defaultdict(list)
    for block in blocks:
        alike[block.change_sq.dtype, block.change_sq.device].append(block)
    for rows in alike.values():
        _average(rows, mean_over_ranks)
        # The vectors of all blocks are joined, so that the number of operations hardly grows with that of the layers.
        sizes = tuple(row.change_sq.numel() for row in rows)
        layers = Segments(sizes, rows[0].change_sq)
        is_on_host = rows[0].change_sq.device.type == "cpu"
        spread_sq, slope_sq = _spreads_and_slopes(rows, layers, may_overflow=not is_on_host)
        if is_on_host and not math.isfinite(slope_sq.sum().item()):  # nobody has to wait for it there
            spread_sq, slope_sq = _spreads_and_slopes(rows, layers, may_overflow=True)
            for row, slopes in zip(rows, layers.split(slope_sq), strict=True):
                if not row.is_remembered and _has_finite_gradients(row):
                    _forget(row, slopes.isinf(), directions, state_of)
        if any(row.is_remembered for row in rows):
            parts = zip(rows, layers.split(slope_sq), strict=True)
            slope_sq = torch.cat([row.change_sq if row.is_remembered else part for row, part in parts])
        split = zip(rows, layers.split(slope_sq), layers.split(spread_sq), strict=True)
        past = [past_slope(state_of(row.owner), own, spread) for row, own, spread in split]
        expected = expected_slope(torch.cat(past), slope_sq, decay)
        if (bounds := _spread_bounds(rows, state_of)) is not None:
            spread_sq = torch.minimum(spread_sq, bounds)
        slope_sq = torch.maximum(slope_sq, expected)
        scale = unit_scale(spread_sq, slope_sq, layers.spread(layers.means(slope_sq).mul_(SLOPE_SHARE)))
        if any(row.factors > 1 for row in rows):
            scale /= layers.spread(constants(tuple(row.factors for row in rows), scale.dtype, scale.device))
        scale = bound(scale)
        back = turned_back(spread_sq, _change_variance(rows), scale, lr)
        found = (layers.split(numbers) for numbers in (expected, spread_sq, scale, back))
        for row, own, spread, factor, turn in zip(rows, *found, strict=True):
            state_of(row.owner).update(slope_sq=own, trusted_sq=spread)
            if row.output_mean is not None and row.bias is None:  # then the mean turns, too, and counts as spread
                turn = turn * spread / (spread + row.output_mean.square()).clamp_(min=torch.finfo(spread.dtype).tiny)
            for parameter, axis in row.parts:
                direction = directions[id(parameter)]
                scaled = local_part(direction).mul_(_along(factor, direction, axis))
                if row.change_mean is not None and row.output_mean is not None:
                    weights = local_part(parameter)
                    if parameter is row.bias:
                        weights = weights - _along(row.output_mean, direction, axis)
                    scaled.addcmul_(weights, _along(turn, direction, axis), value=-1 if maximize else 1)
                directions[id(parameter)] = with_local(scaled, direction)


def _average(
    rows: Sequence[TrustedBlock], mean_over_ranks: Callable[[Sequence[Tensor], Sequence[float]], list[Tensor]]
) -> None:
    """Put what all processes have measured in the place of what this one has."""
    measured = [row for row in rows if row.num_samples is not None]
    turned = [row for row in measured if row.change_mean is not None]
    tensors = [row.change_sq for row in measured] + [row.change_mean for row in turned if row.change_mean is not None]
    means = iter(mean_over_ranks(tensors, [row.num_samples or 0 for row in (*measured, *turned)]))
    for row in measured:
        row.change_sq = next(means)
    for row in turned:
        row.change_mean = next(means)


def _change_variance(rows: Sequence[TrustedBlock]) -> Tensor:
    """var[d_j . x] of all rows; of those that are not turned it means nothing."""
    change_sq = torch.cat([row.change_sq for row in rows])
    mean = torch.cat([row.change_sq if row.change_mean is None else row.change_mean for row in rows])
    return change_sq.addcmul_(mean, mean, value=-1).clamp_(min=0.0)


def _spreads_and_slopes(rows: Sequence[TrustedBlock], layers: Segments, *, may_overflow: bool) -> tuple[Tensor, Tensor]:
    """sigma_j^2 with its floor, and t_j^2, of all rows; where numbers overflow that is finite, and this not NaN."""
    change_sq = torch.cat([row.change_sq for row in rows])
    spread_sq, input_sq = torch.cat([row.spread_sq for row in rows]), torch.stack([row.input_sq for row in rows])
    if not may_overflow:
        spread_sq = spread_sq + layers.spread(spread_floor(layers.means(spread_sq), input_sq))
        return spread_sq, change_sq.mul_(spread_sq)
    # Of outputs that overflow the variance says nothing: if they have a slope their whole layer's is infinite, so that
    # this batch is passed over; if not, their unit has no spread but its layer's floor.
    is_unknown = ~spread_sq.isfinite()
    floors = spread_floor(layers.means(spread_sq.masked_fill_(is_unknown, 0.0)), input_sq)
    spread_sq = spread_sq + layers.spread(floors.nan_to_num_(nan=0.0, posinf=0.0))
    spread_sq.clamp_(max=torch.finfo(spread_sq.dtype).max / 16)
    slope_sq = change_sq * spread_sq.masked_fill(is_unknown, torch.inf)
    slope_sq.masked_fill_(change_sq == 0, 0.0).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    means = layers.spread(layers.means(slope_sq))
    return spread_sq, torch.where(means.isinf(), means, slope_sq)


def _spread_bounds(rows: Sequence[TrustedBlock], state_of: Callable[[Tensor], Mapping[str, Any]]) -> Tensor | None:
    """How large sigma_j^2 may be, after what it was in the step before; None in a first step."""
    past = [state_of(row.owner).get("trusted_sq") for row in rows]
    if all(own is None for own in past):
        return None
    known = [
        torch.full_like(row.change_sq, torch.inf) if own is None or own.shape != row.change_sq.shape else own
        for row, own in zip(rows, past, strict=True)
    ]
    bounds = torch.cat([own.to(row.change_sq.dtype) for row, own in zip(rows, known, strict=True)]).mul_(_MOST_GROWTH)
    return bounds.masked_fill_(bounds == 0, torch.inf)  # what had none, as of inputs that were all 0, may have any


def past_slope(state: MutableMapping[str, Any], slope_sq: Tensor, spread_sq: Tensor) -> Tensor:
    """E[t_j^2] so far; a checkpoint of the rule before this one has E[r_j^2] in its place.

    Args:
        state: of the block's owner; what is of the other rule is taken out.
        slope_sq: t_j^2 now, for a block without a past.
        spread_sq: sigma_j^2 now.

    Returns:
        Shape and dtype of ``slope_sq``.
    """
    past: Tensor | None = state.get("slope_sq")
    if (change_sq := state.pop("change_sq", None)) is not None and change_sq.shape == spread_sq.shape:
        past = change_sq * spread_sq
    if past is None or past.shape != slope_sq.shape:  # of another rule, or of a layer that was not heard then
        return slope_sq
    return past.to(slope_sq.dtype)


def _has_finite_gradients(row: TrustedBlock) -> bool:
    """Else whoever has not asked for an error gets what torch.optim gives."""
    grads = [local_part(p.grad) for p, _ in row.parts if p.grad is not None]
    return all(bool(grad.isfinite().all()) for grad in grads)


def _forget(
    row: TrustedBlock, units: Tensor, directions: _Directions, state_of: Callable[[Tensor], Mapping[str, Any]]
) -> None:
    """Put directions of units to 0, which may be infinite or NaN, and with them what is kept as momentum."""
    for parameter, axis in row.parts:
        direction = directions[id(parameter)]
        for tensor in (direction, state_of(parameter).get("momentum_buffer")):
            if tensor is not None:
                local_part(tensor).masked_fill_(_along(units, direction, axis), 0.0)


def _along(units: Tensor, direction: Tensor, axis: int | None) -> Tensor:
    """A number for each unit, to broadcast against what this process has of a direction."""
    if axis is None:
        return units.view(())
    if axis == 0 and units.numel() == direction.numel():
        units = units.view(direction.shape)
    else:
        units = units.view([-1 if k == axis else 1 for k in range(direction.dim())])
    return part_along(units, direction) if is_sharded(direction) else units
