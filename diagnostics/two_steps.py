"""What has to be kept from one step to the next for the two-step condition number."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torchgeom_optim.diagnostics.conditioning import two_step_condition_number
from torchgeom_optim.diagnostics.masking import RandomMask
from torchgeom_optim.diagnostics.measurement import Layers, Options

__all__ = ["TwoSteps"]


class TwoSteps:
    """Weights and gradients as the optimizer gets them, at one step and the next.

    Args:
        layers: of the model.
        options: with ``mask_fraction``, only so many coordinates of the gradient are kept.
    """

    def __init__(self, layers: Layers, options: Options) -> None:
        self._layers = layers
        self._options = options
        self._previous: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    @cached_property
    def mask(self) -> RandomMask | None:
        """The coordinates that gradients are compared on; None for all."""
        if self._options.mask_fraction is None:
            return None
        parameters = self._layers.parameters
        return RandomMask(
            {name: p.shape for name, p in parameters.items()},
            self._options.mask_fraction,
            torch.Generator().manual_seed(self._options.seed),
            next(iter(parameters.values())).device,
        )

    def gradients(self) -> dict[str, Tensor]:
        """``p.grad`` of every trainable parameter, zeros where there is none."""
        own = self._layers.parameters.items()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in own}

    def keep(self) -> None:
        """Copy weights and gradients, for the next step."""
        gradients = self.gradients()
        weights = {name: p.detach().clone() for name, p in self._layers.parameters.items()}
        kept = {name: g.clone() for name, g in gradients.items()} if self.mask is None else self.mask(gradients)
        self._previous = weights, kept

    def forget(self) -> None:
        """Let go of the copies."""
        self._previous = None

    def condition_number(self) -> Tensor | None:
        """Of the step from the weights that were kept to the present ones, [G]; None if none were."""
        if self._previous is None:
            return None
        now = {name: p.detach() for name, p in self._layers.parameters.items()}
        return two_step_condition_number(*self._previous, now, self.gradients(), self._layers.members, self.mask)
