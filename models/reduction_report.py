"""What a reduced network is measured by: samples taken from whatever the data are, predictions, accuracy, a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.mini_batches import MiniBatch, map_tensors, tensors_of
from torchgeom_optim.geometry.private_evaluation import private_evaluation

__all__ = ["CurvePoint", "ReductionReport", "accuracy", "bhattacharyya", "outputs_of", "take_samples"]

_SAMPLES_AT_ONCE = 512
_SMALLEST_OVERLAP = 1e-30


@dataclass(frozen=True)
class CurvePoint:
    """What k directions are worth.

    Attributes:
        num_directions: k.
        share: k / P.
        norm_share: |w_k - center| / |w - center|, w the weights before: the kept share of their length. Coefficients
            that were trained since may have made it larger.
        bhattacharyya: mean over samples of -log sum_c sqrt(p_c q_c), p and q the predictions before and after; nan for
            the metric "outputs".
        num_clipped: samples whose overlap was below 1e-30 and raised to it.
        output_change: root mean square change of the outputs over their root mean square.
        accuracy: share of the given labels that are predicted; nan without labels.
    """

    num_directions: int
    share: float
    norm_share: float
    bhattacharyya: float
    num_clipped: int
    output_change: float
    accuracy: float


@dataclass(frozen=True)
class ReductionReport:
    """What was kept of a network, and what it costs.

    Attributes:
        basis: name of the basis.
        importance: what directions were ranked by.
        metric: what lam is of.
        num_weights: P, the weights that were reduced.
        at: what is left, on ``num_samples`` samples.
        accuracy_before: of the network as it was; nan without labels.
        num_samples: that predictions were compared on.
        calibration_samples: that basis and importance come from.
        bytes_dense: of the network's parameters and buffers.
        bytes_stored: that a file holds with all that is needed but the network's code: coefficients, their positions,
            directions, buffers and frozen parameters.
        bytes_regenerated: the same where the directions that the calibration's inputs determine are regenerated.
        notes: what was left as it was, and why.
    """

    basis: str
    importance: str
    metric: str
    num_weights: int
    at: CurvePoint
    accuracy_before: float
    num_samples: int
    calibration_samples: int
    bytes_dense: int
    bytes_stored: int
    bytes_regenerated: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        at = self.at
        lines = [
            f"{at.num_directions} of {self.num_weights} directions ({at.share:.2%}), basis {self.basis!r}, ranked by "
            f"{self.importance!r}, metric {self.metric!r}",
            f"kept share of |w|: {at.norm_share:.4f}",
            f"predictions on {self.num_samples} samples: Bhattacharyya {at.bhattacharyya:.4g}, outputs changed by "
            f"{at.output_change:.3g} of their size",
            "accuracy: not known, as no labels were given"
            if math.isnan(at.accuracy)
            else f"accuracy: {self.accuracy_before:.4f} before, {at.accuracy:.4f} after",
            f"bytes: {self.bytes_dense} before; {self.bytes_stored} stored, {self.bytes_regenerated} where inputs "
            "regenerate directions",
            *self.notes,
        ]
        return "\n".join(lines)


def take_samples(data: Any, targets: Tensor | None, num_samples: int | None, most: int | None) -> MiniBatch:
    """The first samples of data in any form; a loader may shuffle, for it is gone through once.

    Args:
        data: a tensor, a tuple (the model's arguments) or a mapping (its keyword arguments), or mini-batches, each an
            input or a pair (inputs, targets).
        targets: beside data that is a whole.
        num_samples: how many must be there; None for as many as there are.
        most: where ``num_samples`` is None, how many at most.

    Returns:
        The samples.

    Raises:
        ValueError: fewer than wanted, or none; inputs and targets of different length.
        TypeError: no data.
    """
    wanted = num_samples if num_samples is not None else (math.inf if most is None else most)
    if not wanted >= 1:
        raise ValueError(f"num_samples={num_samples}: must be at least 1; 300 to 1000 are common.")
    if isinstance(data, (Tensor, tuple, Mapping)):
        parts = [(data, targets)]
    elif isinstance(data, Iterable):
        if targets is not None:
            raise ValueError(
                "targets beside data in mini-batches: they must come with them. Give pairs (inputs, targets), or data "
                "as one tensor."
            )
        parts, count = [], 0
        for item in data:
            inputs, own = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
            inputs = inputs[0] if isinstance(inputs, list) and len(inputs) == 1 else inputs
            parts.append((inputs, own))
            count += _length(inputs, own)
            if count >= wanted:
                break
    else:
        raise TypeError(
            f"data is {type(data).__name__}: a tensor, a tuple or mapping of tensors, or mini-batches are needed. Try "
            "the DataLoader itself."
        )
    found = sum(_length(*part) for part in parts)
    if found == 0 or (num_samples is not None and found < num_samples):
        raise ValueError(
            f"the data ran dry after {found} samples: {num_samples or 'at least one'} must be there. Give more data, "
            "or ask for fewer samples."
        )
    size = int(min(wanted, found))
    trees = [map_tensors(lambda x: x.detach(), inputs) for inputs, _ in parts]
    columns = [_joined(same, size) for same in zip(*(tensors_of(tree) for tree in trees), strict=True)]
    remaining = iter(columns)
    labels = [own for _, own in parts if isinstance(own, Tensor)]
    joined = _joined(labels, size).detach() if len(labels) == len(parts) else None
    return MiniBatch(map_tensors(lambda _: next(remaining), trees[0]), joined, size)


def _joined(parts: Sequence[Tensor], size: int) -> Tensor:
    return parts[0][:size] if len(parts) == 1 else torch.cat(list(parts))[:size]


def _length(inputs: Any, targets: Tensor | None) -> int:
    lengths = {len(x) if x.dim() else -1 for x in (*tensors_of(inputs), *([targets] if targets is not None else []))}
    if len(lengths) != 1 or min(lengths) < 0:
        raise ValueError(
            f"first axes of inputs and targets: {sorted(lengths) or 'no tensor'}; they must all be the number of "
            "samples. If the model takes samples along another axis, wrap it in a module that transposes."
        )
    return lengths.pop()


def outputs_of(model: nn.Module, samples: MiniBatch, select: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The network's outputs in evaluation behaviour, with the network left as it was.

    Args:
        model: the network.
        samples: inputs.
        select: picks the tensor out of what the network returns.

    Returns:
        [N, ...].

    Raises:
        ValueError: the network refuses the samples, or gives something else than one output for each.
    """
    outputs = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with private_evaluation(model), torch.no_grad():
        for start in range(0, samples.size, _SAMPLES_AT_ONCE):
            part = samples.part(start, min(start + _SAMPLES_AT_ONCE, samples.size))
            part = MiniBatch(map_tensors(lambda x: x.to(device), part.inputs), None, part.size)
            try:
                returned = part.call(model)
            except (RuntimeError, IndexError, TypeError) as error:
                shapes = [list(x.shape) for x in tensors_of(part.inputs)]
                raise ValueError(
                    f"the model refused samples of shapes {shapes}: they must be what it takes, the sample along the "
                    f"first axis. It said: {error}"
                ) from error
            output = returned if select is None else select(returned)
            if not isinstance(output, Tensor) or output.dim() < 1 or len(output) != part.size:
                got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"the model gave {got} for {part.size} samples: one tensor with the sample along its first axis is "
                    "needed. Pick it with select=, or wrap the model in a module that transposes."
                )
            outputs.append(output)
    return torch.cat(outputs)


def bhattacharyya(before: Tensor, after: Tensor, class_dim: int = -1) -> tuple[float, int]:
    """Mean of -log sum_c sqrt(p_c q_c) over samples and positions.

    Args:
        before: logits, [N, ..., C, ...].
        after: logits of the same shape.
        class_dim: the axis of the classes.

    Returns:
        The distance, >= 0; how many overlaps were below 1e-30 and raised to it.

    Example:
        >>> bhattacharyya(torch.zeros(2, 3), torch.zeros(2, 3))
        (0.0, 0)
    """
    log_p, log_q = (torch.log_softmax(x.double(), class_dim) for x in (before, after))
    log_overlap = torch.logsumexp((log_p + log_q) / 2, class_dim)
    smallest = math.log(_SMALLEST_OVERLAP)
    clipped = ~(log_overlap >= smallest)  # nan too
    distance = -log_overlap.clamp(min=smallest, max=0.0).nan_to_num(smallest).mean()
    return abs(float(distance)), int(clipped.sum())


def accuracy(outputs: Tensor, labels: Tensor | None, class_dim: int = -1) -> float:
    """Share of labels that have the largest output; nan where there are none, or none that are classes.

    Args:
        outputs: logits, [N, ..., C, ...].
        labels: classes, the shape of ``outputs`` without the axis of the classes.
        class_dim: that axis.

    Returns:
        In [0, 1].

    Raises:
        ValueError: the shapes do not fit.
    """
    if labels is None or labels.is_floating_point():
        return math.nan
    found = outputs.argmax(class_dim)
    if found.shape != labels.shape:
        raise ValueError(
            f"labels of shape {list(labels.shape)}: outputs {list(outputs.shape)} need {list(found.shape)}. Give one "
            "class per sample (and position)."
        )
    return float((found == labels.to(found.device)).double().mean())
