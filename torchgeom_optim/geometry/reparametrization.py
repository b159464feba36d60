r"""The reparametrization y_j = beta_j (v_0j + sum_i alpha_i (x_i - mu_i) v_ij), applied without storing v.

Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", §2-4 and App. B. Letters
as there: a layer has n inputs x_i (a convolution: channels, within their group), m outputs y_j, and applies
each weight at s positions; alpha_i, mu_i belong to input i, beta_j to output j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchgeom_optim.geometry.moments import Moments, at_least_float32

__all__ = ["fan_in_scale", "guarded_second_moment", "precision", "reparametrized_gradient"]


def fan_in_scale(fan_in: int, sharing: float) -> float:
    """beta^2 = 1 / sqrt(n s), Eq. (12).

    The text of §3.5 writes sqrt(n) x s, its Fig. 2 and Eq. (12) sqrt(n x s); the latter follows from the derivation.

    Args:
        fan_in: n, weights per output unit (a convolution: channels of a group times kernel positions).
        sharing: s, how often a weight is applied per sample, 1 for a linear layer.

    Returns:
        A positive number.
    """
    return 1.0 / math.sqrt(fan_in * sharing)


def guarded_second_moment(running: Moments, batch: Moments) -> Tensor:
    r"""q_i = max(E[(x_i - mu_i)^2], E_batch[(x_i - mu_i)^2]) with the running mean mu: the drift guard.

    Eq. (5) has var[x_i] of the running average alone, and diverges when the inputs outgrow it (§4.4). The guard
    keeps E_batch[alpha_i^2 (x_i - mu_i)^2] <= 1, the condition that the derivation assumes.

    To q_i comes eps mu_i^2, the rounding of x_i - mu_i: without it, constant inputs (all of them, in a batch of one)
    would make alpha^2 so large that the rounding errors of W - mu b become the step.

    Args:
        running: running averages, this batch included; for inputs that are not centred, of mean 0.
        batch: moments of this batch; likewise.

    Returns:
        q, shape [n], units input^2; infinite where squares overflow, and so alpha^2 is 0 there. Elementwise: vectors of
        several layers may be joined.
    """
    drift = batch.mean - running.mean
    q = torch.maximum(running.variance, torch.addcmul(batch.variance, drift, drift))
    q.addcmul_(running.mean, running.mean, value=torch.finfo(q.dtype).eps)
    return q.nan_to_num_(nan=math.inf, posinf=math.inf)


def precision(second_moment: Tensor, floor: Tensor) -> Tensor:
    r"""alpha_i^2 = 1 / (q_i + floor), Eq. (5).

    The paper keeps its constants "in a suitable range" (§2.3) and does not say in which. Our floor is a share of the
    layer's mean of q, so that rescaling the inputs of a layer as a whole changes nothing.

    Args:
        second_moment: q, shape [n], not negative.
        floor: damping * mean(q), a scalar, or one number for each q. Vectors of several layers may be joined.

    Returns:
        Positive and finite numbers, shape [n], units 1 / q, also where q and floor are 0.
    """
    return (second_moment + floor).add_(torch.finfo(second_moment.dtype).tiny).reciprocal_()


def reparametrized_gradient(
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    input_mean: Tensor | None,
    scale: Tensor | float,
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
        scale: alpha^2 beta^2, shape [n] or a number; alpha^2 alone if beta^2 differs between units.
        output_scale: beta^2, a number, or shape [m] if it differs between units.
        groups: how many independent groups of units and inputs the layer has.

    Returns:
        dW and db (None without a bias gradient) in the dtype of the gradients; computed in float32 or better.
    """
    gradient = at_least_float32(weight_grad)
    b = None if bias_grad is None else at_least_float32(bias_grad)
    m, has_kernel = len(gradient), gradient.dim() > 2
    if has_kernel:
        gradient = gradient.reshape(m, gradient.shape[1], -1)
    if isinstance(output_scale, Tensor):  # Eq. (3) is linear in what a unit receives
        gradient = gradient * output_scale.view(m, *[1] * (gradient.dim() - 1))
        b = None if b is None else b * output_scale
        output_scale = 1.0
    factor = _per_unit(scale, m, groups, has_kernel) if isinstance(scale, Tensor) else scale
    if b is None or input_mean is None:
        delta = gradient * factor
        bias_step = None if b is None else b * output_scale
    elif has_kernel:
        mu = _per_unit(input_mean, m, groups, has_kernel)
        delta = torch.addcmul(gradient, b.view(m, 1, 1), mu, value=-1).mul_(factor)
        summed = delta.sum(-1)
        if groups == 1:
            bias_step = torch.addmv(b, summed, input_mean, beta=output_scale, alpha=-1)
        else:
            bias_step = b * output_scale - torch.linalg.vecdot(summed, mu.squeeze(-1))
    else:
        delta = torch.addr(gradient, b, input_mean, alpha=-1).mul_(factor)
        bias_step = torch.addmv(b, delta, input_mean, beta=output_scale, alpha=-1)
    if has_kernel:
        delta = delta.view(weight_grad.shape)
    # Weight and bias are in one precision, as a layer cannot be called otherwise.
    return delta.to(weight_grad.dtype), None if bias_step is None else bias_step.to(weight_grad.dtype)


def _per_unit(values: Tensor, m: int, groups: int, has_kernel: bool) -> Tensor:
    """What the units see of values [n] of all inputs, to broadcast against their weights."""
    if groups > 1:
        values = values.view(groups, -1).repeat_interleave(m // groups, 0)
    return values.unsqueeze(-1) if has_kernel else values
