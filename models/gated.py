r"""A network's own gates around a free copy of its weights.

    logits(x) = companion(x; w') + W2 relu(W1 h(x) + b1)

The companion has weights w' of its own, which start as the network's, but its ReLUs are open and its max poolings
choose where the network's do at x: it is multilinear in w', layer by layer, equal to the network at w' = w, and its
derivative there is exactly J(x) dw. h(x) is what the companion's last layer is given; the second term, a shallow ReLU
block on it, starts as zero.

Source: tangent space of Daroczy et al., "GradNet"; frozen gates as in Fiat, Malach and Shalev-Shwartz (2019),
"Decoupling gating from linearity", there with random gates, here with a trained network's and from its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgeom_optim.geometry.per_sample import Batch
from torchgeom_optim.models.gradnet_gates import GateProgram
from torchgeom_optim.models.gradnet_steps import Layer, Record, applied

__all__ = ["GatedNetwork"]


class GatedNetwork(nn.Module):
    """Free weights in the gates of a network, and a shallow block on its last features.

    Args:
        model: a piecewise linear network (see :class:`GateProgram`), evaluated as in evaluation mode.
        num_classes: C, of its logits.
        block: hidden ReLU units on the gated last features; 0 for none.
        generator: of the block's first weights.

    Raises:
        ValueError: a count is out of range.
        UnsupportedBaseError: the network has a part that is not piecewise linear; the message names it.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> gated, x = GatedNetwork(net, 2, block=8), torch.randn(5, 3)
        >>> torch.testing.assert_close(gated(x), net(x))
    """

    def __init__(
        self, model: nn.Module, num_classes: int, *, block: int = 256, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not 0 <= block < math.inf:
            raise ValueError(f"block={block}: must be at least 0; 256 is the default, 0 leaves the block out.")
        self._program = GateProgram(model)
        self._names: dict[str, int] = {}
        self.weights = nn.ParameterList()
        named = dict(model.named_parameters())
        for layer in self._program.layers:
            for name in (layer.weight, layer.bias):
                if name is not None and name not in self._names:
                    self._names[name] = len(self.weights)
                    self.weights.append(nn.Parameter(named[name].detach().clone()))
        if not self._names:
            raise ValueError(
                f"{type(model).__name__} has no parameters: there is nothing to train. Give the trained network."
            )
        self.block = block
        if block:
            like, features = self.weights[0], self._program.last_features()
            bound = math.sqrt(6.0 / features)  # He et al. (2015), uniform, fan-in
            first = torch.empty(block, features).uniform_(-bound, bound, generator=generator)
            self.block_in = nn.Parameter(first.to(like))
            self.block_bias = nn.Parameter(like.new_zeros(block))
            self.block_out = nn.Parameter(like.new_zeros(num_classes, block))

    def companion_weights(self) -> dict[str, Tensor]:
        """W' by the names of the network's parameters."""
        return {name: self.weights[place] for name, place in self._names.items()}

    def record(self, inputs: Any) -> Record:
        """The network's gates at these inputs; the same for every w'.

        Args:
            inputs: of N samples.

        Returns:
            Tensors with the samples along axis 0.
        """
        return self._program.record(Batch(inputs).args)

    def logits(self, record: Mapping[str, Tensor]) -> Tensor:
        """Logits [N, C] from a record, differentiable with respect to all that is trained."""
        own = self.companion_weights()
        last, features = self._program.layers[-1], None

        def affine(layer: Layer, a: Tensor | None, b: Tensor | None) -> Tensor:
            nonlocal features
            assert b is not None
            features = b if layer is last else None
            return applied(layer.module, b, own.get(layer.weight or ""), own.get(layer.bias or ""))

        logits = self._program.carry(record, affine, tangent=False)
        if not self.block:
            return logits
        assert features is not None
        h: Tensor = features
        if not isinstance(last.module, nn.Linear) and h.dim() > 2:
            h = h.flatten(2).mean(2)  # positions of a convolution
        hidden = F.relu(F.linear(h, self.block_in, self.block_bias))
        return logits + F.linear(hidden, self.block_out)

    def forward(self, inputs: Any) -> Tensor:
        """Logits [N, C]."""
        return self.logits(self.record(inputs))
