r"""Per-sample gradients for candidate labels, as GradNet's features: sparsified by percentile, normalised.

For an input x and a candidate label c the features are, layer by layer, the gradients of the loss at (x, c) with
respect to the layer's weights (biases and other vectors left out). Candidate labels change nothing but the gradient at
the network's output, for cross-entropy p - e_c: they share one forward pass, and their backward passes are batched.

Source: Daroczy et al., "GradNet", section 2.1, Algorithm 1 and the appendix. A percentile is by nearest rank, and an
entry equal to it is not kept: at most the share 1 - q/100 is, and of gradients with many zeros only what is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.heads import LossFunction, sample_losses
from torchgeom_optim.geometry.jacobian_gram import Uses, layer_factors, layers_with_rule, sum_of_rows
from torchgeom_optim.geometry.jacobian_routes import Switches, batched_gradients
from torchgeom_optim.geometry.layers import factors_of_call, rule_for
from torchgeom_optim.geometry.per_sample import Batch, per_sample_gradients
from torchgeom_optim.geometry.private_evaluation import private_evaluation, with_weights
from torchgeom_optim.models.gradnet_gates import GateProgram
from torchgeom_optim.models.gradnet_steps import UnsupportedBaseError

__all__ = [
    "CandidateGradients",
    "Normalization",
    "Statistics",
    "above_percentile",
    "hidden_units",
    "important_coordinates",
    "normalize",
    "statistics_of",
]

Normalization = Literal["none", "scale", "power", "scale_power", "standard", "standard_unit"]
Statistics = Mapping[str, Tensor]
R = TypeVar("R")


class CandidateGradients:
    """Gradients of the loss with respect to each layer's weights, for samples and their candidate labels.

    Args:
        model: the network, evaluated as in evaluation mode and left as it was; its parameters may be frozen.
        loss_fn: loss of a batch of one, ``loss_fn(outputs, labels)``; cross-entropy by default.

    Attributes:
        names: the weights, in the order of the parameters: those with two axes or more.
        sizes: their numbers of entries.

    Raises:
        ValueError: the model has no such parameter.

    Example:
        >>> gradients = CandidateGradients(nn.Linear(3, 2))
        >>> [features], logits = gradients(torch.ones(4, 3), torch.tensor([[0, 1]] * 4))
        >>> features.shape, bool((features[:, 0] + features[:, 1]).abs().max() < 1)
        (torch.Size([4, 2, 6]), True)
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None = None) -> None:
        named = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.dim() >= 2}
        if not named:
            raise ValueError(
                f"{type(model).__name__} has no parameters of two axes or more: the features are gradients with "
                "respect to weights. Give a trained network."
            )
        self._model, self._loss_fn = model, loss_fn
        self.names = list(named)
        self.sizes = [p.numel() for p in named.values()]
        self._switches = Switches()
        try:
            self._program: GateProgram | None = GateProgram(model)
        except UnsupportedBaseError:
            self._program = None

    def __call__(self, inputs: Any, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        """The gradients.

        Args:
            inputs: of N samples.
            labels: K candidates of each sample, [N, K].

        Returns:
            One [N, K, P] for each layer, without any 1/N; the network's logits [N, C].
        """
        batch = Batch(inputs)
        try:
            uses, directions, logits = self._by_program(batch, labels)
        except UnsupportedBaseError:
            self._program = None
            uses, directions, logits = self._by_capture(batch, labels)
        rows = {
            name: sum_of_rows(factors).view(*labels.shape, -1)
            for name, factors in uses.items()
            if name in self.names and all(factor.num_samples == len(labels) for factor in factors)
        }
        if missing := [name for name in self.names if name not in rows]:
            rows |= self._one_by_one(batch, missing, directions)
        return [rows[name].to(logits.dtype) for name in self.names], logits

    def _by_program(self, batch: Batch, labels: Tensor) -> tuple[Uses, Tensor, Tensor]:
        """A piecewise linear network: factors, gradients at the output [N, K, C], logits."""
        if self._program is None:
            raise UnsupportedBaseError("no program: the network is not piecewise linear; hooks are needed.")
        logits, calls = self._program.differentiated(batch.args)
        directions = self._output_grads(logits.detach(), labels)
        outputs = [z for _, _, z in calls]
        grads = batched_gradients(logits, outputs, directions.transpose(0, 1).contiguous(), self._switches)
        uses: Uses = {}
        for (layer, a, _), grad in zip(calls, grads, strict=True):
            rule, name = rule_for(layer.module), layer.weight
            if rule is not None and grad is not None and name is not None and name in self.names:
                factors = factors_of_call(rule, layer.module, a, grad.transpose(0, 1), ["weight"])
                uses.setdefault(name, []).append(factors["weight"])
        return uses, directions, logits.detach()

    def _by_capture(self, batch: Batch, labels: Tensor) -> tuple[Uses, Tensor, Tensor]:
        """Any network, as :meth:`_by_program`."""
        model = self._model
        buffers = dict(model.named_buffers())
        seen: list[Tensor] = []

        def function(weights: Mapping[str, Tensor], then: Callable[[Tensor], R]) -> R:
            return with_weights(model, weights, buffers, lambda model: then(batch.outputs(model)))

        def output_grads(logits: Tensor) -> Tensor:
            seen[:] = [logits]
            return self._output_grads(logits, labels).transpose(1, 2)

        def private(capture: Capture) -> Any:
            return private_evaluation(model, False, capture)

        values = {name: p.detach() for name, p in model.named_parameters() if name in self.names}
        layers = layers_with_rule(model, self.names)
        uses, directions = layer_factors(function, values, layers, private, output_grads, len(labels), self._switches)
        return uses, directions.transpose(1, 2), seen[0]

    def _one_by_one(self, batch: Batch, names: list[str], output_grads: Tensor) -> dict[str, Tensor]:
        """For parameters that no layer rule knows."""
        columns: list[dict[str, Tensor]] = []
        with private_evaluation(self._model):
            for grad in output_grads.unbind(1):
                one = Batch(batch.inputs, grad)
                columns.append(per_sample_gradients(self._model, names, _inner_product, one)[0])
        return {name: torch.stack([column[name].flatten(1) for column in columns], 1) for name in names}

    def _output_grads(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Gradients at the output, [N, K, C]."""
        if logits.dim() != 2:
            raise ValueError(f"outputs of shape {list(logits.shape)}: logits [N, C] are needed. Wrap the network.")
        if self._loss_fn is None:
            p = torch.softmax(logits, 1)
            return p[:, None] - F.one_hot(labels, logits.shape[1]).to(p.dtype)
        loss_fn, (num_samples, num_labels) = self._loss_fn, labels.shape
        with torch.enable_grad():
            z = logits.detach().repeat_interleave(num_labels, 0).requires_grad_()
            (grad,) = torch.autograd.grad(sample_losses(z, labels.reshape(-1), loss_fn).sum(), z)
        return grad.view(num_samples, num_labels, -1)


def above_percentile(gradients: Tensor, percentile: float) -> Tensor:
    """Which entries lie above the percentile of the absolute values, vector by vector.

    Args:
        gradients: [..., P].
        percentile: q in [0, 100); 0 keeps everything.

    Returns:
        Booleans [..., P], true for at most floor((1 - q/100) P) entries of each vector.

    Raises:
        ValueError: the percentile is out of range.

    Example:
        >>> above_percentile(torch.tensor([0.0, -3.0, 1.0, 1.0]), 50).tolist()
        [False, True, False, False]
    """
    if not 0.0 <= percentile < 100.0:
        raise ValueError(f"percentile={percentile}: must be in [0, 100); 85 is the paper's best.")
    size = gradients.abs()
    rank = math.ceil(percentile / 100 * size.shape[-1] - 1e-9)
    if rank == 0:
        return torch.ones_like(gradients, dtype=torch.bool)
    if size.device.type == "cpu":  # numpy's selection is some ten times as fast as torch's
        wide = size.detach().to(torch.promote_types(size.dtype, torch.float32))
        ranked = np.partition(wide.numpy(), rank - 1, -1)[..., rank - 1 : rank]
        return size > torch.from_numpy(ranked)
    return size > size.kthvalue(rank, -1, keepdim=True).values


def normalize(
    gradients: Tensor, kept: Tensor, statistics: Statistics, normalization: Normalization, power: float = 0.5
) -> Tensor:
    """Kept entries normalised, the others zero.

        none           g
        scale          (g - min_j) / (max_j - min_j)         over a calibration set; a zero range counts as 1
        power          sign(g) |g|^power
        scale_power    the second of the first
        standard       (g - mean_j) / std_j                  over a calibration set; a zero deviation counts as 1
        standard_unit  the same, then divided by the length of the vector, if that is not 0

    Where statistics come in, g counts as the nearer end of [min_j, max_j] if it lies outside, which the paper does not
    say. Among a few hundred samples some coordinates hardly move: what comes later can be millions of their ranges
    away, and one such entry makes training diverge.

    Args:
        gradients: g, [..., P].
        kept: [..., P].
        statistics: "minimum", "maximum", "mean" and "deviation" [P] (see :func:`statistics_of`), as far as needed.
        normalization: one of these names.
        power: the exponent, in (0, inf).

    Returns:
        [..., P].

    Raises:
        ValueError: unknown name, or an exponent out of range.
    """
    if normalization not in get_args(Normalization):
        names = ", ".join(map(repr, get_args(Normalization)))
        raise ValueError(f"normalization={normalization!r}: must be one of {names}; 'scale_power' is the paper's best.")
    if not 0.0 < power < math.inf:
        raise ValueError(f"power={power}: must be in (0, inf); 0.5 is the paper's best.")
    x = gradients
    if normalization not in ("none", "power"):
        x = x.clamp(statistics["minimum"], statistics["maximum"])
    if normalization in ("scale", "scale_power"):
        spread = statistics["maximum"] - statistics["minimum"]
        x = x.sub_(statistics["minimum"]).div_(torch.where(spread > 0, spread, 1.0))
    if normalization in ("standard", "standard_unit"):
        deviation = statistics["deviation"]
        x = x.sub_(statistics["mean"]).div_(torch.where(deviation > 0, deviation, 1.0))
    if normalization in ("power", "scale_power"):
        size = x.abs()
        x = (size.sqrt_() if power == 0.5 else size.pow_(power)).copysign_(x)
    x = x * kept.view(torch.uint8).to(x.dtype)  # as bytes they become numbers six times as fast
    if normalization == "standard_unit":
        length = x.norm(dim=-1, keepdim=True)
        x = x / torch.where(length > 0, length, 1.0)
    return x


def statistics_of(gradients: Tensor) -> dict[str, Tensor]:
    """What :func:`normalize` needs, over a calibration set.

    Args:
        gradients: [M, P].

    Returns:
        "minimum", "maximum", "mean" and "deviation" (dividing by M), each [P].
    """
    return {
        "minimum": gradients.amin(0),
        "maximum": gradients.amax(0),
        "mean": gradients.mean(0),
        "deviation": gradients.std(0, correction=0),
    }


def important_coordinates(gradients: Tensor, labels: Tensor, num_classes: int, share: float) -> Tensor:
    """The coordinates of the largest mean absolute value for each candidate label.

    Args:
        gradients: [M, P].
        labels: the candidate label of each, [M].
        num_classes: C.
        share: of the P coordinates, in (0, 1].

    Returns:
        Booleans [C, P]; all are true for a label that does not occur.

    Raises:
        ValueError: the share is out of range.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share={share}: must be in (0, 1]; 0.1 is the paper's.")
    count = max(1, round(share * gradients.shape[1]))
    chosen = torch.ones(num_classes, gradients.shape[1], dtype=torch.bool, device=gradients.device)
    for label in range(num_classes):
        of_label = gradients[labels == label]
        if len(of_label):
            chosen[label] = False
            chosen[label, of_label.abs().mean(0).topk(count).indices] = True
    return chosen


def hidden_units(sizes: Sequence[int], budget: int) -> list[int]:
    """Units of each layer's block: in proportion to the square root of its number of weights, one at least.

    Args:
        sizes: weights of each layer.
        budget: units altogether, at least one per layer.

    Returns:
        Units by layer; they sum to the budget.

    Raises:
        ValueError: the budget is too small.

    Example:
        >>> hidden_units([400, 6400, 7840], 130)
        [14, 55, 61]
    """
    if not budget >= len(sizes):
        raise ValueError(f"hidden={budget}: must be at least {len(sizes)}, a unit for each layer; 130 is the paper's.")
    roots = [math.sqrt(size) for size in sizes]
    shares = [1 + (budget - len(sizes)) * root / sum(roots) for root in roots]
    units = [math.floor(share) for share in shares]
    for i in sorted(range(len(sizes)), key=lambda i: units[i] - shares[i])[: budget - sum(units)]:
        units[i] += 1
    return units


def _inner_product(logits: Tensor, output_grads: Tensor) -> Tensor:
    return (logits * output_grads).sum()
