"""What a reduction is to keep: the predictions (metric "fisher") or the outputs ("outputs")."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from torchgeom_optim.geometry.heads import HeadName

__all__ = ["MetricName", "divergence", "head_of"]

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
