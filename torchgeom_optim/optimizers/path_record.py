"""What is kept of a path: where it went, how long it is, what the network was worth on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.mini_batches import MiniBatches
from torchgeom_optim.geometry.private_evaluation import private_evaluation
from torchgeom_optim.optimizers.targets import CutPlan, Destination, Target

__all__ = ["Evaluation", "KeptPoint", "Path", "PathPoint", "accuracies_of"]

Evaluation = Iterable[Any] | Mapping[str, Iterable[Any]] | Callable[[nn.Module], float]


class PathPoint(NamedTuple):
    """One point of a path.

    Attributes:
        step: number of steps since the path's beginning, over all targets.
        distance: Euclidean distance to the target; to the nearest network that fulfils it, where there are many.
        length: of the path so far, in the metric that its steps were taken in: the sum over steps of how far the
            function moved, root mean square over samples.
        drift: how far the function is from that of the beginning, root mean square over this step's samples.
        cut: share of the weights that may be cut, biases and norms aside as in ``Sparsity``, that are held at zero.
        accuracies: by name, where there is something to evaluate.
        seconds: that the steps took so far, evaluation left out.
    """

    step: int
    distance: float
    length: float
    drift: float
    cut: float
    accuracies: dict[str, float]
    seconds: float

    @property
    def accuracy(self) -> float:
        """The lowest of the accuracies; nan if there is none."""
        return min(self.accuracies.values(), default=math.nan)


class KeptPoint(NamedTuple):
    """What it takes to go back to a point."""

    place: int
    steps_done: int
    num_steps: int
    target: Target
    plan: CutPlan | Destination
    weights: Tensor
    cut: Tensor
    buffers: dict[str, Tensor]


class Path(list[PathPoint]):
    """The points of a path in order; prints as a table."""

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for point in self for name in point.accuracies))
        rows = [["step", "cut", "distance", "length", "drift", *names, "seconds"]]
        for p in self:
            numbers = [f"{p.cut:.4f}", f"{p.distance:.4g}", f"{p.length:.4g}", f"{p.drift:.4g}"]
            accuracies = [f"{p.accuracies.get(name, math.nan):.4f}" for name in names]
            rows.append([str(p.step), *numbers, *accuracies, f"{p.seconds:.1f}"])
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def accuracies_of(
    model: nn.Module, evaluate: Evaluation | None, select: Callable[[Any], Tensor], class_dim: int
) -> dict[str, float]:
    """Share of right answers on each of the loaders.

    Args:
        model: the network.
        evaluate: a loader of (inputs, labels), several by name, or a function of the model; None for nothing.
        select: picks the logits out of what the model returns.
        class_dim: their axis of classes.

    Returns:
        By name; "accuracy" where there is no name.
    """
    if evaluate is None:
        return {}
    if callable(evaluate):
        return {"accuracy": float(evaluate(model))}
    loaders = evaluate if isinstance(evaluate, Mapping) else {"accuracy": evaluate}
    found = {}
    for name, loader in loaders.items():
        right, total = 0, 0
        device = next(model.parameters()).device
        # A user's loader may shuffle: here it may, since only a count is taken.
        for batch in loader:
            for part in MiniBatches([batch], None, True, device, None).parts(1024):
                with private_evaluation(model), torch.no_grad():
                    answers = select(part.call(model)).argmax(class_dim)
                labels = part.targets
                assert labels is not None  # asked for above
                right += int((answers == labels).sum())
                total += labels.numel()
        found[name] = right / max(total, 1)
    return found
