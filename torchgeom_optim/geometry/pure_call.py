"""A call of the user's model that leaves no trace: weights, buffers, modes and RNG stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchgeom_optim.geometry.capture import Capture, private_pass

__all__ = ["pure_call", "without_trace"]


def pure_call(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    buffers: Mapping[str, Tensor] | None = None,
) -> Any:
    """Evaluate ``model(*args)`` at the given parameters, with its other parameters detached.

    Whatever the call writes to buffers (running statistics) goes to copies and is lost.

    Args:
        model: the module, in the training or evaluation mode that it is in.
        parameters: name to value, as in ``model.named_parameters()``; names left out are constants.
        args: positional arguments of the model.
        buffers: values used in place of the model's own buffers; copies of them by default.

    Returns:
        What the model returns.
    """
    if buffers is None:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    constants = {name: p.detach() for name, p in model.named_parameters() if name not in parameters}
    return functional_call(model, {**constants, **parameters, **buffers}, args)


@contextmanager
def without_trace(model: nn.Module, *captures: Capture) -> Iterator[None]:
    """Inside, calls of the model are seen by these captures alone, and random draws do not advance the user's RNG."""
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    accelerators = sorted({d.index or 0 for d in devices if d.type not in ("cpu", "meta")})
    device_type = next((d.type for d in devices if d.type not in ("cpu", "meta")), "cuda")
    with torch.random.fork_rng(accelerators, device_type=device_type), private_pass(*captures):
        yield
