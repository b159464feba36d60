"""The default rule of WhiteningSGD: what of a model is bounded together, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.unit_trust import SLOPE_SHARE, expected_slope, unit_scale
from torchgeom_optim.optimizers.chain_length import ChainLength
from torchgeom_optim.optimizers.distributed import Ranks
from torchgeom_optim.optimizers.layers import AffineLayer
from torchgeom_optim.optimizers.unit_trust import (
    BARE_FLOOR,
    TrustedBlock,
    bare_block,
    find_norms,
    layer_block,
    norm_block,
    past_slope,
    scale_blocks,
)

__all__ = ["TrustRegionRule", "can_be_scaled"]

_SHORT_CHAIN = 4  # where fewer layers share the radius, it is the noise that bounds a step


class TrustRegionRule:
    """Layers, normalisations and bare parameters of a model, bounded unit by unit; formulas in :class:`WhiteningSGD`.

    Args:
        model: looked through once for normalisations.
        chain: to be shown the calls of the first step.

    Attributes:
        chain: see above.
        norms: weights of normalisations, with their biases.
    """

    def __init__(self, model: nn.Module | None, chain: ChainLength) -> None:
        self.chain = chain
        self.norms = find_norms(model)

    def scale(
        self,
        groups: Sequence[dict[str, Any]],
        layers: Sequence[AffineLayer],
        directions: dict[int, Tensor],
        input_sq: Mapping[AffineLayer, Tensor],
        state: Mapping[Tensor, dict[str, Any]],
        group_of: Mapping[Tensor, dict[str, Any]],
        ranks: Ranks,
    ) -> None:
        """Scale directions to the trust region, in place, momentum included.

        Args:
            groups: whose parameters are bounded.
            layers: with the calls of this step, of these groups.
            directions: by the id of a parameter; those of parameters without a layer are added.
            input_sq: mean square of each layer's inputs about their mean.
            state: of each parameter.
            group_of: each parameter.
            ranks: the processes that train the model.
        """
        for group in groups:
            if group["chain_length"] is None and group["params"]:
                self._take_from_chain(group, state, ranks)
            stepped = [p for p in group["params"] if can_be_scaled(p)]
            directions.update({id(p): p.grad.clone() for p in stepped if id(p) not in directions})
            _accumulate(group, stepped, directions, state)
        blocks: dict[int, list[TrustedBlock]] = {id(group): [] for group in groups}
        covered = set[Tensor]()

        def add(owner: Tensor, block: TrustedBlock | None) -> None:
            if block is not None:
                blocks[id(group_of[owner])].append(block)
                covered.update(parameter for parameter, _ in block.parts)

        for layer in layers:
            add(layer.weight, layer_block(layer, directions, input_sq[layer], state[layer.weight]))
        for weight, bias in self.norms.items():
            if id(group_of.get(weight)) in blocks:
                add(weight, norm_block(weight, bias, directions))
        for group in groups:
            for p in group["params"]:
                if p not in covered and can_be_scaled(p):
                    add(p, bare_block(p, directions))
                elif p.grad is not None and not can_be_scaled(p):
                    directions[id(p)] = _bounded_alone(p, group, state[p])
            scale_blocks(
                blocks[id(group)],
                directions,
                state.__getitem__,
                partial(_bounded, group),
                lr=group["lr"],
                decay=group["decay"],
                maximize=group["maximize"],
                mean_over_ranks=ranks.means,
            )

    def _take_from_chain(self, group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]], ranks: Ranks) -> None:
        """Length and factors, as any of the processes has seen them."""
        params = group["params"]
        seen = [self.chain.length, *(self.chain.factors.get(p, 1) for p in params)]
        length, *factors = ranks.largest(seen, params[0].device)
        group["chain_length"] = int(length) or None  # nothing was seen yet
        for p, number in zip(params, factors, strict=True):
            if number > 1:
                state[p]["factors"] = int(number)


def _accumulate(
    group: Mapping[str, Any],
    stepped: list[Tensor],
    directions: dict[int, Tensor],
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Momentum as in SGD, before the trust region; directions become tensors of their own, the past stays as it was."""
    momentum = group["momentum"]
    if not momentum or not stepped:
        return
    now = [directions[id(p)] for p in stepped]
    past = [state[p].get("momentum_buffer") for p in stepped]
    known = [(direction, buffer) for direction, buffer in zip(now, past, strict=True) if buffer is not None]
    buffers: Sequence[Tensor] = ()
    if known:
        new_parts, old_parts = zip(*known, strict=True)
        if group["dampening"]:
            torch._foreach_mul_(new_parts, 1 - group["dampening"])  # pyright: ignore[reportPrivateImportUsage]
        buffers = torch._foreach_add(new_parts, old_parts, alpha=momentum)  # pyright: ignore[reportPrivateImportUsage]
    averaged = iter(buffers)
    for p, direction, before in zip(stepped, now, past, strict=True):
        buffer = direction.clone() if before is None else next(averaged)
        state[p]["momentum_buffer"] = buffer
        directions[id(p)] = direction.add_(buffer, alpha=momentum) if group["nesterov"] else direction.copy_(buffer)


def can_be_scaled(parameter: Tensor) -> bool:
    """Whether a parameter has a gradient now that the bound joins with others: dense, and real."""
    grad = parameter.grad
    return grad is not None and not grad.is_sparse and not grad.is_complex()


def _bounded_alone(parameter: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
    """A sparse or complex gradient, scaled as a whole; 1 - momentum keeps SGD's momentum, which comes after, inside."""
    grad = parameter.grad
    assert grad is not None
    grad = grad.coalesce() if grad.is_sparse else grad
    values = grad.values() if grad.is_sparse else grad
    change_sq = (values.abs().square().sum() / parameter.numel()).reshape(1)
    own_sq = parameter.detach().abs().square().mean().reshape(1).add_(BARE_FLOOR)
    own_sq.clamp_(max=torch.finfo(own_sq.dtype).max / 16)
    slope_sq = change_sq * own_sq
    expected = expected_slope(past_slope(state, slope_sq, own_sq), slope_sq, group["decay"])
    state["slope_sq"] = expected
    slope_sq = torch.maximum(slope_sq, expected)
    factor = _bounded(group, unit_scale(own_sq, slope_sq, SLOPE_SHARE * slope_sq)) * (1 - group["momentum"])
    scaled: Tensor = values * factor
    if grad.is_sparse:
        scaled = torch.sparse_coo_tensor(grad.indices(), scaled, grad.shape, check_invariants=False, is_coalesced=True)
    return scaled


def _bounded(group: Mapping[str, Any], scale: Tensor) -> Tensor:
    """From c_j to the factor of a direction: min(1, kappa c_j) with kappa = rho / lr_0, or c_j where lr is rho."""
    # Steps of equal length that are correlated like m^k add up to a walk sqrt((1 + m) / (1 - m)) times as long.
    m = min(float(group["momentum"]), 1.0)
    radius = math.sqrt((1.0 - m) / (1.0 + m)) / max(group["chain_length"] or 1, _SHORT_CHAIN)
    if group["reference_lr"] is None:
        return scale.mul_(radius)
    bounded: Tensor = (scale * (radius * group["trust_radius"] / group["reference_lr"])).clamp_(max=1.0)
    return bounded
