"""What a network computes on each sample, as a function of its weights that can be evaluated again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.jacobian_routes import Function, Weights, saved_bytes
from torchgeom_optim.geometry.mini_batches import MiniBatch, MiniBatches
from torchgeom_optim.geometry.parameter_vectors import ParameterVectors
from torchgeom_optim.geometry.private_evaluation import private_evaluation, with_weights

__all__ = ["SampleFunction"]

R = TypeVar("R")


class SampleFunction:
    """f(x_i; w) [C] for every sample, mini-batch by mini-batch; refuses a model for which there is no such function.

    Args:
        model: the module.
        data: re-iterable mini-batches, given the context in which they are to be made.
        vectors: the weights that it is a function of; whatever else the model holds is constant.
        head: (outputs, targets) -> values [b, C].
        select: picks the outputs out of what the model returns.
        keep_modes: leave the modules in their modes instead of evaluation mode.

    Attributes:
        num_outputs: C.
        saved_per_sample: bytes that one sample's pass keeps for its backward pass.
        first_values: f of the first sample.

    Raises:
        ValueError: values not finite, random, or dependent on the other samples; shapes that do not fit.
        TypeError: the output is no tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Callable[[], MiniBatches],
        vectors: ParameterVectors,
        head: Callable[[Tensor, Tensor | None], Tensor],
        select: Callable[[Any], Tensor] | None,
        keep_modes: bool,
    ) -> None:
        self.model = model
        self.vectors = vectors
        self._head = head
        self._select = select
        self._keep_modes = keep_modes
        with self.private():
            self.data = data()
        self.num_outputs = -1  # not known yet
        self.saved_per_sample, self.first_values = self._probe()
        self.num_outputs = len(self.first_values)

    def private(self, *captures: Capture) -> AbstractContextManager[None]:
        """Where the model is evaluated; only these captures see it."""
        return private_evaluation(self.model, self._keep_modes, *captures)

    def parts(self, size: int) -> Iterator[MiniBatch]:
        """All samples in mini-batches of at most ``size``."""
        # The user's loader may draw random numbers whenever it is asked for the next batch, and only then.
        parts = self.data.parts(size)
        while True:
            with self.private():
                batch = next(parts, None)
            if batch is None:
                return
            yield batch

    def on(self, batch: MiniBatch) -> Function:
        """The function (weights, then) -> then(f of this mini-batch [b, C])."""
        return lambda weights, then: self._call(batch, weights, then)

    def _call(self, batch: MiniBatch, weights: Weights, then: Callable[[Tensor], R]) -> R:
        def work(model: nn.Module) -> R:
            values = self._head(self._tensor(batch.call(model), batch.size), batch.targets)
            if self.num_outputs >= 0 and values.shape[1] != self.num_outputs:
                raise ValueError(
                    f"{values.shape[1]} outputs per sample in this mini-batch: the first had {self.num_outputs}, and "
                    "every sample must have as many. Pad sequences to one length."
                )
            return then(values)

        constants, buffers = self.vectors.constants()
        return with_weights(self.model, {**constants, **self.vectors.values(), **weights}, buffers, work)

    def _tensor(self, returned: Any, size: int) -> Tensor:
        outputs: Tensor | Any = returned if self._select is None else self._select(returned)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model returned {type(outputs).__name__}: one tensor is needed. Pick it with select=, for example "
                "select=lambda output: output[0]."
            )
        if size == 1 and (outputs.dim() == 0 or outputs.shape[0] != 1):
            outputs = torch.unsqueeze(outputs, 0)  # squeezed away by the model
        if outputs.dim() == 0 or len(outputs) != size:
            raise ValueError(
                f"output of shape {list(outputs.shape)} for {size} samples: its first axis must be the sample. "
                "Wrap the model in a module that transposes."
            )
        result: Tensor = outputs
        return result

    def _probe(self) -> tuple[int, Tensor]:
        with self.private():
            batch = next(iter(self.data.parts(self.data.largest)))
            two, one = batch.part(0, min(2, batch.size)), batch.part(0, 1)
            values = self.vectors.values()
            saved, alone = saved_bytes(self.on(one), values)
            states = _generator_states(self.vectors.device)
            together = self._call(two, values, lambda f: f.detach())
            drew = any(
                not torch.equal(s, t) for s, t in zip(states, _generator_states(self.vectors.device), strict=True)
            )
        if drew:
            raise ValueError(
                "the model drew random numbers in its forward pass: two passes would have two different Jacobians. "
                "Leave keep_modes=False, which turns dropout off, or make the model deterministic."
            )
        if not bool(torch.isfinite(together).all()):
            raise ValueError(
                "f of the first samples is not finite: weights and data must give finite values. Look for nan or huge "
                "numbers in both."
            )
        tolerance = 100 * math.sqrt(torch.finfo(alone.dtype).eps)
        if not bool((alone[0] - together[0]).norm() <= tolerance * alone.norm()):
            raise ValueError(
                "the first sample's outputs depend on the other samples (batch norm with batch statistics?): its row "
                "would depend on the mini-batch. Leave keep_modes=False, and give norm layers running statistics."
            )
        return saved, alone[0]


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
