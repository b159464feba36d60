"""From what a step sees of some parameters to G^-1 on them: running averages, and the metrics made of these.

Nothing here changes a state: what is to be remembered is put aside, so that a step can be refused as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from torchgeom_optim.geometry.matrix_metric import (
    ExactMetric,
    KroneckerMetric,
    cholesky_product,
    kronecker_product,
    relative_split,
)
from torchgeom_optim.geometry.metric import Block, DiagonalMetric, LayerVector, QuasiDiagonalMetric, WhiteningMetric
from torchgeom_optim.geometry.moments import Moments, at_least_float32, running_moments
from torchgeom_optim.geometry.reparametrization import guarded_second_moment, precision
from torchgeom_optim.optimizers.layers import AffineLayer

__all__ = ["FINEST_BLOCK", "FROM_GRADIENTS", "WITH_FACTORS", "Metric", "Part", "Solve", "solver"]

Metric = Literal["identity", "diagonal", "quasi_diagonal", "whitening", "kronecker", "kronecker_diagonal", "exact"]
Solve = Callable[[LayerVector], LayerVector]

FINEST_BLOCK: dict[str, Block] = {
    "identity": "weight",
    "diagonal": "weight",
    "quasi_diagonal": "unit",
    "whitening": "unit",
    "kronecker": "layer",
    "kronecker_diagonal": "unit",
    "exact": "layer",
}
FROM_GRADIENTS = ("identity", "diagonal", "quasi_diagonal")  # need nothing but p.grad
WITH_FACTORS = ("kronecker", "kronecker_diagonal", "exact")


@dataclass(eq=False)
class Part:
    """Parameters that are stepped together: a layer's weight and bias, or one parameter without a layer.

    Attributes:
        weight: or the one parameter; has a gradient.
        bias: has a gradient, or None.
        layer: None for a parameter without one.
        group: the hyper-parameters.
        past: state of the weight and of the bias; not modified.
        new: what is to be written into these.
    """

    weight: Tensor
    bias: Tensor | None
    layer: AffineLayer | None
    group: dict[str, Any]
    past: tuple[dict[str, Any], dict[str, Any]]
    new: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))

    def __post_init__(self) -> None:
        assert self.weight.grad is not None
        self.gradient = self.vector(self.weight.grad, None if self.bias is None else self.bias.grad)

    @property
    def parameters(self) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Weight, and bias if there is one, each with its past and its new state."""
        both = zip((self.weight, self.bias), self.past, self.new, strict=True)
        return [(p, past, new) for p, past, new in both if p is not None]

    @property
    def is_transposed(self) -> bool:
        """Whether units are the columns of the weight."""
        return self.layer is not None and self.layer.is_embedding

    def vector(self, weight: Tensor, bias: Tensor | None) -> LayerVector:
        """Tensors shaped like the parameters, in the form that the metrics take."""
        weight = torch.view_as_real(weight) if weight.is_complex() else weight
        weight = at_least_float32(weight.t() if self.is_transposed else weight)
        weight = weight.reshape(1) if weight.dim() == 0 else weight
        return LayerVector(weight, None if bias is None else at_least_float32(bias))

    def write(self, vector: LayerVector, into: dict[int, Tensor]) -> None:
        """The reverse, by the ids of the parameters."""
        weight = vector.weight.t() if self.is_transposed else vector.weight
        if self.weight.is_complex():
            weight = torch.view_as_complex(weight.contiguous())
        into[id(self.weight)] = weight.reshape(self.weight.shape).to(self.weight.dtype)
        if self.bias is not None and vector.bias is not None:
            into[id(self.bias)] = vector.bias.to(self.bias.dtype)

    def average(self, which: int, key: str, now: Tensor) -> Tensor:
        """Take a value into a running average in the state of the weight (0) or the bias (1)."""
        past = self.past[which].get(key)
        if past is not None:
            now = torch.lerp(past.to(now.dtype), now, 1 - self.group["decay"])
        self.new[which][key] = now
        return now


def solver(part: Part, metric: Metric, factors: tuple[Tensor, ...], *, invert: bool) -> Solve:
    """The map g -> G^-1 g, with this step's batch in G.

    Args:
        part: its ``new`` state is added to.
        metric: of the optimizer; a part without a layer may get a simpler one.
        factors: of this step's calls, from :func:`~torchgeom_optim.optimizers.layer_factors.pooled_factors`; empty if
            nothing was looked at.
        invert: whether factors are to be inverted anew, even if an inverse is known.

    Returns:
        The map; linear.

    Raises:
        RuntimeError: the layer's inputs are not known.
        NotPositiveDefiniteError: from a matrix that could not be inverted.
    """
    if metric == "identity" or (part.layer is None and metric not in ("diagonal", "quasi_diagonal")):
        return _identity
    if metric in ("diagonal", "quasi_diagonal"):
        return _diagonal(part, metric)
    assert part.layer is not None
    if metric == "whitening":
        return _whitening(part, part.layer)
    return _exact(part, factors, invert) if metric == "exact" else _kronecker(part, factors, invert)


def _identity(gradient: LayerVector) -> LayerVector:
    return gradient


def _diagonal(part: Part, metric: Metric) -> Solve:
    weight, bias = part.gradient
    weight_sq, damping = part.average(0, "grad_sq", weight.square()), part.group["damping"]
    bias_sq = None if bias is None else part.average(1, "grad_sq", bias.square())
    if metric == "diagonal" or bias is None or bias_sq is None:
        damped = DiagonalMetric.damped(LayerVector(weight_sq, bias_sq), damping).diagonal
        diagonal = DiagonalMetric(LayerVector(*(None if q is None else _or_inf(q) for q in damped)))  # type: ignore[arg-type]
        return lambda g: diagonal.solve(g).vector
    row = part.average(0, "bias_row", weight * bias.view(-1, *[1] * (weight.dim() - 1)))
    quasi = QuasiDiagonalMetric.damped(weight_sq, row, _or_inf(bias_sq), damping)
    quasi = QuasiDiagonalMetric(quasi.corner, quasi.mean, _or_inf(quasi.spread))
    return lambda g: quasi.solve(g).vector


def _or_inf(q: Tensor) -> Tensor:
    """Where a metric is zero to rounding, the gradient is too: no step, in the place of 0 / 0."""
    return q.masked_fill(q == 0, math.inf)


def _or_one(damping: Tensor, factor: Tensor) -> Tensor:
    """Damping; where a factor is zero throughout, 1 in the place of a share of nothing."""
    return torch.where((factor == 0).flatten(1).all(1), 1.0, damping)


def _whitening(part: Part, layer: AffineLayer) -> Solve:
    state, past = part.past[0], None
    if "input_mean" in state:
        past = Moments(0, state["input_mean"], state["input_variance"])
    batch = layer.batch_moments() if layer.calls else past
    if batch is None:
        raise _unknown_inputs()
    if past is not None and past.mean.dtype != batch.mean.dtype:  # the model was put into another precision
        past = Moments(0, past.mean.to(batch.mean.dtype), past.variance.to(batch.mean.dtype))
    running = running_moments(past or batch, batch, part.group["decay"])
    is_centred = part.bias is not None
    q = guarded_second_moment(*(m if is_centred else m.about_zero() for m in (running, batch)))
    scale = precision(q, q.mean() * part.group["damping"])
    part.new[0].update(input_mean=running.mean, input_variance=running.variance)
    metric = WhiteningMetric(running.mean if is_centred else None, scale, 1.0, layer.groups)
    return lambda g: metric.solve(g).vector


def _averages(part: Part, factors: tuple[Tensor, ...], keys: tuple[str, ...]) -> list[Tensor]:
    if factors:
        return [part.average(0, key, value) for key, value in zip(keys, factors, strict=True)]
    if keys[0] not in part.past[0]:
        raise _unknown_inputs()
    return [part.past[0][key] for key in keys]


def _kronecker(part: Part, factors: tuple[Tensor, ...], invert: bool) -> Solve:
    a, b = _averages(part, factors, ("input_factor", "output_factor"))
    if part.layer is not None and part.layer.bias is not None and part.bias is None:
        a = a[:, :-1, :-1]  # the bias is frozen for now: G's part for the weight alone
    left, right = part.past[0].get("output_inverse"), part.past[0].get("input_inverse")
    if invert or left is None or right is None or right.shape != a.shape:
        split = relative_split(a, b, part.group["damping"])
        metric = KroneckerMetric.factorise(a, b, _or_one(split[0], a), _or_one(split[1], b))
        metric.require_positive_definite()  # waits for the device, once per inversion
        left, right = metric.output_inverse, metric.input_inverse
        part.new[0].update(input_inverse=right, output_inverse=left)
    return lambda g: kronecker_product(left, g, right)


def _exact(part: Part, factors: tuple[Tensor, ...], invert: bool) -> Solve:
    (fisher,) = _averages(part, factors, ("fisher",))
    if part.layer is not None and part.layer.bias is not None and part.bias is None:
        num_weights = part.gradient.weight[0].numel()
        rows = torch.arange(fisher.shape[-1], device=fisher.device).view(-1, num_weights + 1)
        kept = rows[:, :-1].reshape(-1)
        fisher = fisher[:, kept][:, :, kept]
    cholesky: Tensor | None = part.past[0].get("fisher_cholesky")
    if invert or cholesky is None or cholesky.shape != fisher.shape:
        damping = torch.diagonal(fisher, dim1=-2, dim2=-1).mean(-1) * part.group["damping"]
        metric = ExactMetric.factorise(fisher, _or_one(damping, fisher))
        metric.require_positive_definite()
        part.new[0]["fisher_cholesky"] = cholesky = metric.cholesky
    known = cholesky
    return lambda g: cholesky_product(known, g)


def _unknown_inputs() -> RuntimeError:
    return RuntimeError(
        "a layer has a gradient, but what its inputs are like is not known; need a forward and a backward pass through "
        "it before its first step. If its weight is used without calling the layer, put it into a group with "
        "rule='sgd'. Nothing was changed."
    )
