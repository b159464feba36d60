r"""Walking through the space of networks along paths on which the function hardly changes.

Source: "Geodesic sparsification", Eqs. (3) and (5). A step of the paper's method is Eq. (5); the compensated path is
ours, and the default:

1. *Choose* what goes next: the weights or units whose loss, compensated by all others, costs least in the layers'
   Kronecker metric (Hassibi and Stork 1993): of weights a constant factor of those left, of units equal numbers.
2. *Predict*: take them away, and let the others of the layers compensate in that metric, whose factors remember the
   samples of all steps.
3. *Correct*: a few iterations of damped Gauss-Newton in the exact metric of this step's samples, towards the values
   that the function had at the beginning of the path. This undoes what earlier steps have left, and needs no label.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.function_metric import FunctionMetric
from torchgeom_optim.geometry.geodesic_path import chord_length
from torchgeom_optim.geometry.heads import HeadName
from torchgeom_optim.geometry.kronecker import kronecker_factors
from torchgeom_optim.geometry.kronecker_root import FactorMemory, KroneckerRoot, averaged_factors
from torchgeom_optim.optimizers.batch_norm_statistics import reestimate_batch_norm
from torchgeom_optim.optimizers.geodesic_steps import StepSettings, correction, geodesic_direction, prediction
from torchgeom_optim.optimizers.hyperparameters import check_choice, check_flags, check_range
from torchgeom_optim.optimizers.network_path import NetworkPath
from torchgeom_optim.optimizers.path_record import Evaluation, PathPoint, accuracies_of
from torchgeom_optim.optimizers.targets import Destination, Target

__all__ = ["GeodesicSparsifier"]

_HEADS: dict[str, HeadName] = {"fisher": "sqrt_probabilities", "outputs": "outputs", "mean_squared_output": "outputs"}
_FACTOR_MEMORY = 0.9  # what a step's samples count for in the layers' factors, one step later


class GeodesicSparsifier(NetworkPath):
    r"""Walks a trained network to a target, step by step, so that what it computes stays; no labels are needed.

        sparsifier = GeodesicSparsifier(model, target=Sparsity(0.7))
        while not sparsifier.arrived:
            sparsifier.step(x)          # x: a batch of inputs, best a fresh one each time

    Every step moves the model's parameters to the next point of the path. At arrival what is cut is exactly zero. A
    step that fails or is interrupted leaves the network at the point before. Gradients are neither used nor touched.
    For training steps in between, take any optimizer, and call :meth:`hold` after it; or see :meth:`run`.

    Args:
        params: a model, or parameters or groups of them; then ``model`` is needed. Options of a group:
            ``may_cut`` (True): whether entries may be set to zero;
            ``may_move`` (True): whether they may move to compensate.
            Parameters outside of the groups stay as they are.
        target: where to: :class:`Sparsity`, :class:`Units`, :class:`Heads`, :class:`NofM`, :class:`Mask`,
            :class:`OtherWeights`, :class:`Dense`. Set :attr:`target`, or call
            :meth:`walk_to`, to go on to another one at any time.
        model: the network that owns the parameters.
        method: "compensated" (see this module), or "paper": Eq. (5), to the nearest point that fulfils the target,
            which is chosen by magnitude and anew in every step.
        metric: "fisher" (softmax of the outputs over ``temperature``), "outputs" (sum over outputs, mean over
            samples), or the paper's "mean_squared_output" (the mean over both; the same but for lengths and ``pull``).
        temperature: of the Fisher metric. A trained network is so sure of most samples that at 1 few of them count.
        steps: how many a target takes.
        damping: lambda in units of the mean of diag(J J'). More of it trusts the samples of one step less.
        factor_damping: the same for the layers' Kronecker factors.
        corrections: iterations of a step's correction, each a product by J and one by J'; 0 for none.
        undo_drift: whether corrections lead back to the function of the path's beginning; otherwise, as it is right
            where labels are trained on in between, to that before the step.
        pull: beta of Eq. (5) for ``method="paper"``, in place of ``damping``.
        evaluate: what tells the accuracies of the path's points: a loader of (inputs, labels), a mapping from names to
            loaders, or a function of the model.
        least_accuracy: stop before the first point that has less.
        keep: how many points can be gone back to beside the first; each keeps a copy of the weights.
        batch_norm: "keep" the running statistics, or "reestimate" them on each step's samples.
        select: picks the logits out of the model's output.
        class_dim: their axis of classes.
        batch_size: samples in one pass; None for what the memory allows.
        memory_limit: bytes, see :class:`~torchgeom_optim.Jacobian`.

    Attributes:
        path: the points so far, the first one included.
        arrived: whether the target is reached.
        stopped: whether ``least_accuracy`` ended the path before.

    Raises:
        ValueError: a value out of its range, parameters that the model does not own, or a target that the network or
            its groups do not allow.
        TypeError: no model.

    Example:
        >>> from torchgeom_optim.optimizers import Sparsity
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> sparsifier = GeodesicSparsifier(model, target=Sparsity(0.5), steps=3)
        >>> while not sparsifier.arrived:
        ...     point = sparsifier.step(torch.randn(64, 8))
        >>> int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        88
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        target: Target,
        *,
        model: nn.Module | None = None,
        method: Literal["compensated", "paper"] = "compensated",
        metric: Literal["fisher", "outputs", "mean_squared_output"] = "fisher",
        temperature: float = 4.0,
        steps: int = 10,
        damping: float = 0.03,
        factor_damping: float = 1e-3,
        corrections: int = 6,
        undo_drift: bool = True,
        pull: float | None = None,
        evaluate: Evaluation | None = None,
        least_accuracy: float | None = None,
        keep: int = 1,
        batch_norm: Literal["keep", "reestimate"] = "keep",
        select: Callable[[Any], Tensor] | None = None,
        class_dim: int = -1,
        batch_size: int | None = None,
        memory_limit: float = 2**32,
    ) -> None:
        self._options: dict[str, Any] = {
            "method": method, "metric": metric, "temperature": temperature, "steps": steps, "damping": damping,
            "factor_damping": factor_damping, "corrections": corrections, "undo_drift": undo_drift, "pull": pull,
            "least_accuracy": least_accuracy, "keep": keep, "batch_norm": batch_norm,
        }  # fmt: skip
        _check_options(self._options, evaluate)
        super().__init__(params, target, model, steps, keep)
        self._evaluate = evaluate
        self._select = select or _as_it_is
        self._class_dim = class_dim
        self._passes: dict[str, Any] = {"batch_size": batch_size, "memory_limit": memory_limit}
        self._factors: FactorMemory = {}
        accuracies = accuracies_of(self._model, evaluate, self._select, class_dim)
        self.path.append(PathPoint(0, self._distance(self._start), 0.0, 0.0, 0.0, accuracies, 0.0))
        self._keep_point()

    # -- the step ------------------------------------------------------------------------------------------------

    def step(self, data: Any) -> PathPoint:  # type: ignore[override]
        """Go on to the next point of the path.

        Args:
            data: inputs whose outputs are to stay, no labels: a tensor, a tuple of the model's arguments, or
                mini-batches; see :class:`~torchgeom_optim.Jacobian`.

        Returns:
            The new point. If ``least_accuracy`` was not kept, the network is back at the point before, and
            ``stopped`` is set.

        Raises:
            RuntimeError: the path is at its end.
            ValueError: weights or data are not finite, the metric vanishes on the data, or the data do not fit the
                model; the network is as it was.
        """
        if self.arrived or self.stopped:
            state = "arrived" if self.arrived else "stopped"
            raise RuntimeError(f"the path has {state}: there is no next step. Set target= to go on to another one.")
        begin = time.perf_counter()
        weights = self._weights()
        if not bool(torch.isfinite(weights).all()):
            raise ValueError("the network has weights that are not finite; all must be. Go back with undo().")
        buffers = {name: b.detach().clone() for name, b in self._model.named_buffers()}
        try:
            metric = self._metric(data)
            new, cut, factors, length, drift = self._next(metric, weights)
            self._write(new)
            if self._options["batch_norm"] == "reestimate":
                reestimate_batch_norm(metric)
            seconds = self.path[-1].seconds + time.perf_counter() - begin
            accuracies = accuracies_of(self._model, self._evaluate, self._select, self._class_dim)
            countable = self._space(new).single
            share = float(cut[countable].float().mean()) if bool(countable.any()) else 0.0
            before = self.path[-1]
            distance = self._distance(new)
            point = PathPoint(before.step + 1, distance, before.length + length, drift, share, accuracies, seconds)
        except BaseException:  # an interruption too: the network is that of the last point
            self._restore(weights, buffers)
            raise
        least = self._options["least_accuracy"]
        if least is not None and not point.accuracy >= least:
            self._restore(weights, buffers)
            self.stopped = True
            return point
        self._cut, self._factors = cut, factors
        self._steps_done += 1
        self.arrived = self._remaining == 0
        self.path.append(point)
        self._keep_point()
        return point

    # -- one step, inside ----------------------------------------------------------------------------------------

    def _next(self, metric: FunctionMetric, weights: Tensor) -> tuple[Tensor, Tensor, FactorMemory, float, float]:
        settings = StepSettings(*(self._options[name] for name in StepSettings._fields))
        reference, before = metric.values(self._start), metric.values()
        diagonal = metric.estimated_diagonal(2)
        if not bool(diagonal.sum() > 0):
            raise ValueError(
                "the metric vanishes on these inputs: no weight changes what the network computes on them. Need "
                "others, a higher temperature, or metric='outputs'."
            )
        factors, cut = self._factors, self._cut
        may_move = self._allowed("may_move")
        if self._options["method"] == "paper":
            new, cut = self._paper_step(metric, diagonal, weights, may_move, settings)
        else:
            averages, factors = averaged_factors(factors, kronecker_factors(metric), _FACTOR_MEMORY)
            root = KroneckerRoot(metric.vectors, averages, diagonal / metric.num_samples, settings.factor_damping)
            move, cut, held = self._move(weights, root)
            free = may_move & ~held
            new = weights + prediction(root, move, free, settings)
            new = self._exact(new, cut)
            if settings.corrections:
                self._write(new)
                known = root.diagonal() * metric.num_samples
                wanted = reference if self._options["undo_drift"] else before
                step = correction(metric, torch.where(known > 0, known, diagonal), wanted, free, settings)
                new = self._exact(new + step, cut)
        if not bool(torch.isfinite(new).all()):
            raise ValueError("the step is not finite: the metric is too singular for it. Need more damping or samples.")
        scale = math.sqrt(metric.num_outputs) if self._options["metric"] == "mean_squared_output" else 1.0
        length = float(chord_length(metric.values, weights, new, metric.num_samples)) / scale
        drift = float((metric.values(new) - reference).norm()) / math.sqrt(metric.num_samples) / scale
        return new, cut, factors, length, drift

    def _move(self, weights: Tensor, root: KroneckerRoot) -> tuple[Tensor, Tensor, Tensor]:
        """The prescribed move, what is cut after it, and which entries do not compensate."""
        plan = self._plan
        if isinstance(plan, Destination):
            move = torch.where(plan.fixed | plan.drawn, (plan.weights - weights) / self._remaining, 0.0)
            cut = self._cut & ~(plan.fixed | plan.drawn)
            return move, cut, plan.fixed | cut
        cost = plan.per_piece(root.cost_of_units(weights) if plan.whole_units else root.cost_of_weights(weights))
        gone = plan.gone(self._cut)
        chosen = plan.chosen(cost, gone)
        count = _next_count(len(chosen), int(gone.sum()), int(chosen.sum()), self._remaining, plan.whole_units)
        order = torch.argsort(torch.where(gone, -math.inf, torch.where(chosen, cost, math.inf)), stable=True)
        now = torch.zeros_like(chosen)
        now[order[:count]] = True
        cut = self._cut | plan.entries(now)
        return torch.where(cut, -weights, 0.0), cut, cut

    def _paper_step(
        self, metric: FunctionMetric, diagonal: Tensor, weights: Tensor, may_move: Tensor, settings: StepSettings
    ) -> tuple[Tensor, Tensor]:
        chosen = self._nearest(weights)
        towards = chosen - weights
        distance = float(torch.linalg.vector_norm(towards))
        new = weights
        if distance > 0:
            moving = (may_move & ~self._cut) | (towards != 0)
            radius = distance / self._remaining
            new = weights + geodesic_direction(metric, diagonal, towards, moving, radius, settings)
        if isinstance(self._plan, Destination):
            return self._exact(new, cut := self._cut & ~(self._plan.fixed | self._plan.drawn)), cut
        if self._remaining > 1:
            return new, self._cut
        cut = self._plan.entries(self._plan.chosen(self._plan.per_piece(new.square()), self._plan.gone(self._cut)))
        cut = cut | self._cut
        return new.masked_fill(cut, 0.0), cut

    def _exact(self, weights: Tensor, cut: Tensor) -> Tensor:
        """Zero what is cut, and at the last step put what has a destination there."""
        plan = self._plan
        weights = weights.masked_fill(cut, 0.0)
        if isinstance(plan, Destination) and self._remaining == 1:
            weights = torch.where(plan.fixed | plan.drawn, plan.weights, weights)
        return weights

    def _nearest(self, weights: Tensor) -> Tensor:
        """The nearest weights that fulfil the target."""
        plan = self._plan
        if isinstance(plan, Destination):
            return torch.where(plan.fixed | plan.drawn, plan.weights, weights)
        chosen = plan.chosen(plan.per_piece(weights.square()), plan.gone(self._cut))
        return weights.masked_fill(plan.entries(chosen) | self._cut, 0.0)

    def _distance(self, weights: Tensor) -> float:
        return float(torch.linalg.vector_norm(self._nearest(weights) - weights))

    def _metric(self, data: Any) -> FunctionMetric:
        softened = self._options["temperature"] if self._options["metric"] == "fisher" else 1.0
        return FunctionMetric(
            self._model,
            data,
            of=_HEADS[self._options["metric"]],
            parameters=list(self._vectors.shapes),
            select=lambda output: self._select(output) / softened,
            class_dim=self._class_dim,
            **self._passes,
        )

    # -- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of every path, with what the layers' factors remember.

        Returns:
            What :meth:`load_state_dict` takes.
        """
        return {**super().state_dict(), "factors": dict(self._factors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a path was saved: build with the same target, load the model's weights, then this.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: it does not fit; nothing was changed.
        """
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "factors"})
        self._factors = dict(state_dict["factors"])


def _next_count(pieces: int, done: int, goal: int, remaining: int, whole_units: bool) -> int:
    """How many pieces are gone after the next step: units go in equal numbers, of weights a constant factor stays."""
    # The last steps cost most: with a constant factor they take the fewest away.
    if remaining == 1:
        return goal
    if whole_units or goal == pieces:
        return done + round((goal - done) / remaining)
    ratio: float = ((pieces - goal) / (pieces - done)) ** (1 / remaining)
    return done + round((pieces - done) * (1 - ratio))


def _as_it_is(output: Any) -> Any:
    return output


def _check_options(options: dict[str, Any], evaluate: Evaluation | None) -> None:
    where = "GeodesicSparsifier"
    check_choice(options, "method", ("compensated", "paper"), where)
    check_choice(options, "metric", ("fisher", "outputs", "mean_squared_output"), where)
    check_choice(options, "batch_norm", ("keep", "reestimate"), where)
    check_flags(options, ("undo_drift",), where)
    tiny = 1e-30
    check_range(options, "temperature", where, low=tiny, hint="4 is the default, 1 the model's own probabilities.")
    check_range(options, "damping", where, low=tiny, hint="0.03 is the default.")
    check_range(options, "factor_damping", where, low=tiny, hint="1e-3 is the default.")
    for name, low, default in (("steps", 1, 10), ("corrections", 0, 6), ("keep", 0, 1)):
        check_range(options, name, where, low=low, hint=f"{default} is the default.")
        if options[name] != int(options[name]):
            raise ValueError(f"{name}={options[name]} ({where}): must be a whole number; {default} is the default.")
    if options["pull"] is not None:
        check_range(options, "pull", where, low=tiny, hint="None goes by damping.")
        if options["method"] != "paper":
            raise ValueError(f"pull={options['pull']}: beta belongs to method='paper'. Give damping in its place.")
    if options["least_accuracy"] is not None:
        check_range(options, "least_accuracy", where, high=1.0 + tiny, hint="None goes to the end.")
        if evaluate is None:
            raise ValueError("least_accuracy without evaluate: there is no accuracy. Give evaluate= a loader.")
