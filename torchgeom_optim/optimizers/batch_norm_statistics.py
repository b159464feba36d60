"""Running statistics of batch norms, estimated again after the weights have moved."""

from __future__ import annotations

import torch
from torch import nn

from torchgeom_optim.geometry.function_metric import FunctionMetric

__all__ = ["batch_norms", "reestimate_batch_norm"]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules with running statistics of their inputs."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]


def reestimate_batch_norm(metric: FunctionMetric) -> None:
    """Set the running mean and variance of every batch norm to the averages over the metric's mini-batches.

    Each mini-batch counts alike, so that one that is much smaller than the others counts too much. Modes are left as
    they were; every other module computes as in evaluation mode.

    Args:
        metric: of the model and the samples to take.
    """
    norms = batch_norms(metric.model)
    if not norms:
        return
    kept = [(norm, norm.training, norm.momentum) for norm in norms]
    modes = [(module, module.training) for module in metric.model.modules()]
    try:
        metric.model.eval()
        for norm in norms:
            norm.reset_running_stats()  # type: ignore[operator]
            norm.momentum, norm.training = None, True  # type: ignore[assignment]
        with torch.no_grad():
            for inputs in metric.mini_batches():
                inputs.call(metric.model)
    finally:
        for norm, _, momentum in kept:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
