"""Which channels of a network can go without a change of its outputs."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchgeom_optim.models.channel_flow import ChannelFlow, Channels, Layer, weight_matrix

__all__ = ["Removal", "plan_removal"]

_Use = tuple[str, int]  # a layer by name, and a position among its inputs


@dataclass
class Removal:
    """Which channels go.

    Attributes:
        removed: bool [number of ids].
        merged: layer -> input position -> (input position that takes its part over, times which factor).
        kept: layer -> why units with constant outputs stay, one reason per unit; those that others were merged into,
            one for each convolution that needs one, are not counted.
    """

    removed: Tensor
    merged: dict[str, dict[int, tuple[int, float]]] = field(default_factory=lambda: defaultdict(dict))
    kept: dict[str, list[str]] = field(default_factory=dict)


def plan_removal(flow: ChannelFlow) -> Removal:
    """The channels that are constant, or multiplied by zero, wherever they are used.

    Args:
        flow: of the network.

    Returns:
        The removal. A layer keeps one unit where all could go.
    """
    return _Planner(flow).removal


class _Planner:
    def __init__(self, flow: ChannelFlow) -> None:
        self._layers = flow.layers
        self._consumers = [(layer, layer.inputs) for layer in flow.layers.values() if layer.mixes and layer.inputs]
        self._reads = {layer.name: (weight_matrix(layer.module) != 0).any(2) for layer, _ in self._consumers}
        self._roots = roots = flow.roots()
        self._reasons_of_root = {int(roots[i]): reason for i, reason in flow.blocked.items()}
        self._blocked = torch.zeros(len(roots), dtype=torch.bool)
        self._blocked[list(self._reasons_of_root)] = True
        self._carriers: set[int] = set()
        self.removal = Removal(torch.zeros(len(roots), dtype=torch.bool))
        self._settle()
        if self._merge():
            self._settle()
        for layer in flow.layers.values():
            if bool(self.removal.removed[layer.outputs.ids].all()):
                self.removal.removed[roots == roots[layer.outputs.ids[0]]] = False
        self.removal.kept = self._kept()

    def _settle(self) -> None:
        """Remove until nothing more can go: what fed only removed units is superfluous itself."""
        while True:
            needed = self._blocked.clone()
            for layer, inputs in self._consumers:
                needed[self._roots[inputs.ids[~self._can_lose(layer, inputs)]]] = True
            removed = ~needed[self._roots] | self.removal.removed
            if torch.equal(removed, self.removal.removed):
                return
            self.removal.removed = removed

    def _can_lose(self, layer: Layer, inputs: Channels) -> Tensor:
        """Input positions that the layer can do without: constant, and to be folded, or multiplied by zero."""
        foldable = inputs.constants == 0 if layer.pads else ~inputs.constants.isnan()
        reads = self._reads[layer.name][~self.removal.removed[layer.outputs.ids]]
        can = foldable | ~reads.any(0)
        can[[into for into, _ in self.removal.merged.get(layer.name, {}).values()]] = False
        return can

    def _merge(self) -> bool:
        """Let one constant channel stand for all that only a zero-padded convolution keeps.

        Such a convolution turns a constant into a map with another border, so the constant cannot go into its bias;
        but the maps of several constants differ by a factor alone, which goes into the weights.

        Returns:
            Whether there were any.
        """
        held: dict[int, list[_Use]] = defaultdict(list)
        useless = set()
        for layer, inputs in self._consumers:
            for position in torch.nonzero(~self._can_lose(layer, inputs)).flatten().tolist():
                root = int(self._roots[inputs.ids[position]])
                held[root].append((layer.name, position))
                if math.isnan(inputs.constants[position]) or bool(self._blocked[root]):
                    useless.add(root)
        alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for root, uses in held.items():
            names = tuple(sorted(name for name, _ in uses))
            if root not in useless and len(set(names)) == len(names):
                alike[names].append(root)
        for same in alike.values():
            carrier = max(same, key=lambda root: min(abs(self._constant(use)) for use in held[root]))
            self._carriers.add(carrier)
            into = dict(held[carrier])
            for root in same:
                if root != carrier:
                    self.removal.removed |= self._roots == root
                    for use in held[root]:
                        name, position = use
                        factor = self._constant(use) / self._constant((name, into[name]))
                        self.removal.merged[name][position] = (into[name], factor)
        return bool(self.removal.merged)

    def _constant(self, use: _Use) -> float:
        inputs = self._layers[use[0]].inputs
        assert inputs is not None
        return float(inputs.constants[use[1]])

    def _kept(self) -> dict[str, list[str]]:
        varying: dict[int, str] = {}
        padded: dict[int, str] = {}
        for layer, inputs in self._consumers:
            for position in torch.nonzero(~self._can_lose(layer, inputs)).flatten().tolist():
                root = int(self._roots[inputs.ids[position]])
                if math.isnan(inputs.constants[position]):
                    varying.setdefault(root, f"added to what varies (a skip connection) before {layer.name!r}")
                else:
                    padded[root] = f"{layer.name!r} pads it with zeros, so that it is not constant at the border"
        why = {**padded, **varying, **self._reasons_of_root}
        kept = {}
        for layer in self._layers.values():
            stays = ~layer.outputs.constants.isnan() & ~self.removal.removed[layer.outputs.ids]
            if layer.mixes and bool(stays.any()):
                roots = [root for root in self._roots[layer.outputs.ids[stays]].tolist() if root not in self._carriers]
                if roots:
                    kept[layer.name] = [why.get(root, "a layer keeps at least one unit") for root in roots]
        return kept
