"""What a reduction is to keep: the predictions (metric "fisher") or the outputs ("outputs")."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgeom_optim.geometry.heads import HeadName, flat_outputs, sqrt_probabilities
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.mini_batches import MiniBatch
from torchgeom_optim.models.reduction_report import outputs_of

__all__ = ["MetricName", "divergence", "head_of", "probed_jacobian"]

MetricName = Literal["fisher", "outputs"]
_HEADS: dict[str, HeadName] = {"fisher": "sqrt_probabilities", "outputs": "outputs"}


def head_of(metric: str) -> HeadName:
    """What the metric J'J has the Jacobian of: 2 sqrt(p), or the outputs.

    Args:
        metric: "fisher" or "outputs".

    Returns:
        The head of a :class:`~torchgeom_optim.geometry.jacobian.Jacobian`.

    Raises:
        ValueError: it is neither.
    """
    if metric not in _HEADS:
        raise ValueError(f"metric={metric!r}: must be one of {', '.join(map(repr, get_args(MetricName)))}.")
    return _HEADS[metric]


def divergence(wanted: Tensor, found: Tensor, metric: str, class_dim: int) -> Tensor:
    """What half the metric's square is near by: mean over samples of KL(p_wanted || p), or of half |found - wanted|^2.

    Args:
        wanted: outputs, [N, ...].
        found: likewise; differentiable.
        metric: "fisher" or "outputs".
        class_dim: axis of the classes.

    Returns:
        The mean over N; summed over positions.
    """
    if head_of(metric) == "outputs":
        return 0.5 * (found - wanted).square().sum() / len(found)
    log_p, log_q = wanted.log_softmax(class_dim), found.log_softmax(class_dim)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(found)


def probed_jacobian(
    model: nn.Module, samples: MiniBatch, metric: str, generator: torch.Generator, **options: Any
) -> Jacobian:
    r"""A Jacobian with one row per sample in place of C: row i is s_i'J_i, s_i random signs and J_i sample i's rows.

    E diag(sum_i J_i's_i s_i'J_i) = diag(J'J), for the signs' cross terms vanish in the mean: an estimate of the
    diagonal, unbiased, for one backward pass in place of C. The relative variance that the signs add to an entry is at
    most 2 / N_eff, N_eff the samples that carry it. (Labels drawn from p would be unbiased too, but of a network that
    is sure of its predictions nearly the whole Fisher matrix is in labels that are hardly ever drawn.)

    Args:
        model: as for :class:`~torchgeom_optim.geometry.jacobian.Jacobian`.
        samples: the inputs.
        metric: "fisher" or "outputs".
        generator: of the signs, on the CPU.
        **options: of the Jacobian: ``class_dim``, ``select``, ``parameters``, ...

    Returns:
        J with N rows.
    """
    class_dim = options.get("class_dim", -1)
    flat = flat_outputs if head_of(metric) == "outputs" else lambda outputs: sqrt_probabilities(outputs, class_dim)
    one = outputs_of(model, samples.part(0, 1), options.get("select"))
    signs = torch.randint(0, 2, (samples.size, one.numel()), generator=generator).mul_(2).sub_(1)
    return Jacobian(
        model, samples.inputs, signs, of="loss", loss_fn=lambda output, s: (flat(output) * s).sum(), **options
    )
