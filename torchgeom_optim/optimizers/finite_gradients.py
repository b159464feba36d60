"""Gradients that are not finite: found before a step has changed anything."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchgeom_optim.optimizers.distributed import Ranks, is_sharded, local_part

__all__ = ["require_finite_gradients"]


def require_finite_gradients(
    parameters: Sequence[Tensor], names: Callable[[], Mapping[Tensor, str]], ranks: Ranks, *, always: bool
) -> None:
    """Raise if a gradient is NaN or infinite.

    Args:
        parameters: with gradients.
        names: of parameters, as far as they have one; looked up only for a message.
        ranks: of sharded gradients each process looks at its part, and all of them raise.
        always: whether to look even where the host has to wait for the device.

    Raises:
        FloatingPointError: there are such gradients.
    """
    grads = [local_part(p.grad) for p in parameters if p.grad is not None]
    if not always and any(grad.device.type != "cpu" for grad in grads):
        return
    values = [grad._values() if grad.is_sparse else grad for grad in grads]
    is_bad = not _have_finite_sums(values)
    bad = [p for p, value in zip(parameters, values, strict=True) if is_bad and not bool(value.isfinite().all())]
    is_bad = bool(bad)
    if any(is_sharded(p) for p in parameters):
        is_bad = ranks.largest([float(is_bad)], grads[0].device)[0] > 0
    if is_bad:
        known = names()
        raise FloatingPointError(
            f"got gradients that are NaN or infinite, of {len(bad)} of {len(values)} parameters "
            f"({', '.join(known.get(p, '?') for p in bad[:3])}); need finite ones: leave this batch out (zero_grad), "
            "lower lr, or step through a torch.amp.GradScaler in low precision. Nothing was changed."
        )


def _have_finite_sums(values: Sequence[Tensor]) -> bool:
    """Then all values are finite, which takes a fraction of the time of looking at each. Else a sum may overflow."""
    sums = [value.sum() for value in values]
    if all(total.device.type == "cpu" for total in sums):  # fewer kinds of operations, each of which costs at first
        return all(cmath.isfinite(total.item()) for total in sums)
    return bool(torch.stack([total.isfinite().to(sums[0].device) for total in sums]).all())
