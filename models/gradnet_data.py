"""What GradNet takes in: mini-batches with labels, and the checks of the base's outputs and of a user's loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.heads import LossFunction, sample_losses
from torchgeom_optim.geometry.per_sample import Batch, tensors_of
from torchgeom_optim.geometry.private_evaluation import private_evaluation

__all__ = [
    "base_outputs",
    "check_loss",
    "check_outputs",
    "first_samples",
    "joined",
    "length_of",
    "moved",
    "pair",
]


def pair(item: Any) -> tuple[Any, Tensor]:
    """A mini-batch as inputs and labels.

    Args:
        item: what the data gave.

    Returns:
        Both.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[1], Tensor):
        got = type(item).__name__
        raise TypeError(
            f"data gave {got}: pairs (inputs, labels) are needed. Several inputs go in a tuple of their own."
        )
    return item[0], item[1]


def moved(inputs: Any, device: torch.device) -> Any:
    """Inputs on a device."""
    return Batch(inputs).map(lambda x: x.to(device)).inputs


def first_samples(inputs: Any, count: int) -> Any:
    """The first of the samples."""
    return Batch(inputs).map(lambda x: x[:count]).inputs


def joined(parts: list[Any]) -> Any:
    """Inputs of several mini-batches as one."""
    leaves = [tensors_of(part) for part in parts]
    columns = iter([torch.cat(list(column)) for column in zip(*leaves, strict=True)])
    return Batch(parts[0]).map(lambda _: next(columns)).inputs


def length_of(data: Iterable[Any]) -> int | None:
    """How many mini-batches, where the data tell."""
    return len(cast(Any, data)) if hasattr(data, "__len__") else None


def base_outputs(model: nn.Module, inputs: Any) -> Tensor:
    """What the base returns, in evaluation mode and without a trace.

    Args:
        model: the base.
        inputs: on its device.

    Returns:
        Its outputs.

    Raises:
        ValueError: they are no tensor.
    """
    with private_evaluation(model), torch.no_grad():
        outputs = Batch(inputs).outputs(model)
    if not isinstance(outputs, Tensor):
        raise ValueError(f"the base returns {type(outputs).__name__}: logits [N, C] are needed. Wrap it in a module.")
    return outputs


def check_outputs(outputs: Tensor, num_classes: int) -> None:
    """Refuse what are no finite logits.

    Args:
        outputs: of the base.
        num_classes: C.

    Raises:
        ValueError: another shape than [N, C], or a number that is not finite.
    """
    if outputs.dim() != 2 or outputs.shape[1] != num_classes:
        raise ValueError(
            f"the base's outputs have shape {list(outputs.shape)}: [N, {num_classes}] are needed, one logit per class. "
            "Correct num_classes, or wrap the base in a module that returns them."
        )
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError(
            "the base's outputs are not finite, and so its features: weights and inputs must give finite numbers. "
            "Look for nan or huge numbers in both."
        )


def check_loss(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> None:
    """Refuse a loss that couples the samples: of a batch it must be their own losses, the mean of these or the sum.

    Args:
        loss_fn: the loss.
        outputs: of some samples.
        targets: their labels.

    Raises:
        ValueError: it is neither.
    """
    outputs, targets = outputs[:8], targets[:8]
    together, alone = loss_fn(outputs, targets), sample_losses(outputs, targets, loss_fn)[:, 0]
    own = [alone] if together.numel() == len(alone) > 1 else [alone.mean(), alone.sum()]
    if not any(torch.allclose(together.reshape(one.shape), one, rtol=1e-3, atol=1e-5) for one in own):
        raise ValueError(
            "loss_fn of a batch is neither the mean nor the sum of the samples' own losses: it couples the samples, "
            "and there is no gradient of one. Use one that adds up; class weights need reduction='sum'."
        )
