r"""The reparametrization y_j = beta_j (v_0j + sum_i alpha_i (x_i - mu_i) v_ij), applied without storing v.

Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", §2-4 and App. B. Letters
as there: a layer has n inputs x_i (a convolution: channels, within their group), m outputs y_j, and applies
each weight at s positions; alpha_i, mu_i belong to input i, beta_j to output j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchgeom_optim.geometry.moments import Moments

__all__ = ["fan_in_scale", "guarded_second_moment", "precision", "reparametrized_gradient"]


def fan_in_scale(fan_in: int, sharing: float) -> float:
    """beta^2 = 1 / sqrt(n s), Eq. (12).

    The text of §3.5 writes sqrt(n) x s, its Fig. 2 and Eq. (12) sqrt(n x s); the latter follows from the derivation.

    Args:
        fan_in: n, weights per output unit (a convolution: channels of a group times kernel positions).
        sharing: s, how often a weight is applied per sample, 1 for a linear layer.
    """
    return 1.0 / math.sqrt(fan_in * sharing)


def guarded_second_moment(running: Moments, batch: Moments) -> Tensor:
    r"""q_i = max(E[(x_i - mu_i)^2], E_batch[(x_i - mu_i)^2]) with the running mean mu: the drift guard.

    Eq. (5) has var[x_i] of the running average alone, and diverges when the inputs outgrow it (§4.4). The guard
    keeps E_batch[alpha_i^2 (x_i - mu_i)^2] <= 1, the condition that the derivation assumes.

    Args:
        running: running averages, this batch included; for inputs that are not centred, of mean 0.
        batch: moments of this batch; likewise.

    Returns:
        q, shape [n], units input^2. Elementwise: vectors of several layers may be joined.
    """
    drift = batch.mean - running.mean
    return torch.maximum(running.variance, torch.addcmul(batch.variance, drift, drift))


def precision(second_moment: Tensor, damping: float) -> Tensor:
    r"""1 / (q_i + damping mean(q)): alpha^2 of the inputs of a layer, Eq. (5).

    The floor is relative to the layer, so that rescaling its inputs as a whole changes nothing, and keeps
    constant inputs finite. The paper keeps its constants "in a suitable range" (§2.3) and does not say in which.

    Args:
        second_moment: q, shape [n], not negative.
        damping: the floor as a share of the layer's mean, dimensionless, in [0, inf).

    Returns:
        Positive and finite numbers, shape [n], units 1 / q.
    """
    tiny = torch.finfo(second_moment.dtype).tiny  # for a layer whose inputs are all zero
    return torch.add(second_moment + tiny, second_moment.mean(), alpha=damping).reciprocal_()


def reparametrized_gradient(
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    input_mean: Tensor | None,
    input_scale: Tensor | None,
    output_scale: Tensor | float,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    r"""The gradient in v, pulled back to the weights: Eq. (3) as a gradient (steps subtract it).

        dW[j,i] = beta_j^2 alpha_i^2 (W[j,i] - mu_i b[j]),    db[j] = beta_j^2 b[j] - sum_i mu_i dW[j,i]

    with W, b the ordinary gradients of weight and bias. For a convolution (App. B) dW keeps its kernel axes and the
    sum in db runs over input channels and kernel positions; with groups, i counts within the group of unit j.

    Args:
        weight_grad: W, shape [m, n / groups, *kernel].
        bias_grad: b, shape [m], or None; then nothing is centred.
        input_mean: mu, shape [n], or None for mu = 0.
        input_scale: alpha^2, shape [n], or None for 1.
        output_scale: beta^2, shape [m] or a number.
        groups: how many independent groups of units and inputs the layer has.

    Returns:
        dW and db (None without a bias gradient) in the dtype of the gradients; computed in float32 or better.
    """
    dtype = torch.promote_types(weight_grad.dtype, torch.float32)
    m, n = weight_grad.shape[:2]
    gradient = weight_grad.to(dtype).reshape(m, n, -1)  # kernel positions last
    beta_sq = output_scale[:, None, None] if isinstance(output_scale, Tensor) else output_scale
    scale = beta_sq if input_scale is None else _per_unit(input_scale, m, groups)[..., None] * beta_sq
    if bias_grad is None or input_mean is None:
        bias_step = None if bias_grad is None else (bias_grad.to(dtype) * output_scale).to(bias_grad.dtype)
        return (gradient * scale).view_as(weight_grad).to(weight_grad.dtype), bias_step
    b, mu = bias_grad.to(dtype), _per_unit(input_mean, m, groups)
    delta = torch.addcmul(gradient, b[:, None, None], mu[..., None], value=-1).mul_(scale)
    summed = delta.sum(-1) if delta.shape[-1] > 1 else delta.squeeze(-1)
    moved = summed.mv(mu) if groups == 1 else torch.linalg.vecdot(summed, mu)
    db = (b * output_scale).sub_(moved)
    return delta.view_as(weight_grad).to(weight_grad.dtype), db.to(bias_grad.dtype)


def _per_unit(values: Tensor, m: int, groups: int) -> Tensor:
    """What unit j sees of values [n] of all inputs: themselves, or its group's, as [m, n / groups]."""
    return values if groups == 1 else values.view(groups, -1).repeat_interleave(m // groups, 0)
