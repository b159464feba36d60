"""The default rule of WhiteningSGD: what of a model is bounded together, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.optimizers.chain_length import ChainLength
from torchgeom_optim.optimizers.distributed import Ranks
from torchgeom_optim.optimizers.layers import AffineLayer
from torchgeom_optim.optimizers.unit_trust import (
    TrustedBlock,
    bare_block,
    find_norms,
    layer_block,
    norm_block,
    scale_blocks,
)

__all__ = ["TrustRegionRule", "can_be_scaled"]

_SHORT_CHAIN = 4  # where fewer layers share the radius, it is the noise that bounds a step


class TrustRegionRule:
    """Layers, normalisations and bare parameters of a model, bounded unit by unit; formulas in :class:`WhiteningSGD`.

    Args:
        model: looked through once for normalisations.

    Attributes:
        chain: to be shown the calls of the first step.
        norms: weights of normalisations, with their biases.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.chain = ChainLength()
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
            if group["chain_length"] is None:
                device = group["params"][0].device
                group["chain_length"] = int(ranks.largest(self.chain.length, device))
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
            scale_blocks(
                blocks[id(group)],
                directions,
                state.__getitem__,
                partial(_bounded, group),
                decay=group["decay"],
                mean_over_ranks=ranks.means,
            )


def _accumulate(
    group: Mapping[str, Any],
    stepped: list[Tensor],
    directions: dict[int, Tensor],
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Momentum as in SGD, before the trust region; directions become tensors of their own."""
    momentum = group["momentum"]
    if not momentum or not stepped:
        return
    now = [directions[id(p)] for p in stepped]
    new = [k for k, p in enumerate(stepped) if state[p].get("momentum_buffer") is None]
    for k in new:
        state[stepped[k]]["momentum_buffer"] = now[k].clone()
    old = [k for k in range(len(stepped)) if k not in set(new)]
    buffers = [state[stepped[k]]["momentum_buffer"] for k in old]
    if buffers:
        torch._foreach_mul_(buffers, momentum)  # pyright: ignore[reportPrivateImportUsage]
        new_parts = [now[k] for k in old]
        torch._foreach_add_(buffers, new_parts, alpha=1 - group["dampening"])  # pyright: ignore[reportPrivateImportUsage]
    for p, direction in zip(stepped, now, strict=True):
        buffer = state[p]["momentum_buffer"]
        directions[id(p)] = direction.add(buffer, alpha=momentum) if group["nesterov"] else buffer.clone()


def can_be_scaled(parameter: Tensor) -> bool:
    """Whether a parameter has a gradient now that the bound can be put on; else SGD takes its step."""
    grad = parameter.grad
    return grad is not None and not grad.is_sparse and not grad.is_complex()


def _bounded(group: dict[str, Any], scale: Tensor) -> Tensor:
    """From c_j to the factor of a direction: min(1, kappa c_j) with kappa = rho / lr_0, or c_j where lr is rho."""
    radius, reference_lr = 1.0 / max(group["chain_length"], _SHORT_CHAIN), group["reference_lr"]
    if reference_lr is None:
        return scale.mul_(radius)
    if not isinstance(reference_lr, Tensor) and reference_lr == 0.0:  # built with 0, and raised by hand since
        group["reference_lr"] = reference_lr = float(group["lr"])
        if reference_lr == 0.0:
            return scale.fill_(1.0)
    bounded: Tensor = (scale * (radius * group["trust_radius"] / reference_lr)).clamp_(max=1.0)
    return bounded
