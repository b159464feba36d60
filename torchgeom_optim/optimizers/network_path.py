"""A network on its way: which of its weights move, the points that it has passed, how to go back, save and resume."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry.parameter_vectors import ParameterVectors
from torchgeom_optim.optimizers.hyperparameters import check_flags
from torchgeom_optim.optimizers.path_record import KeptPoint, Path, PathPoint
from torchgeom_optim.optimizers.targets import CutPlan, Destination, Target, TargetSpace

__all__ = ["NetworkPath"]

_KINDS: dict[str, Callable[..., CutPlan | Destination]] = {kind.__name__: kind for kind in (CutPlan, Destination)}


class NetworkPath(Optimizer):
    """An optimizer that moves a network from point to point towards a target, each step anew or not at all.

    A subclass takes the steps (:meth:`step`), and tells how many a target takes.

    Args:
        params: a model, or parameters or groups of them; then ``model`` is needed.
        target: where to.
        model: the network that owns the parameters.
        steps: how many a target takes.
        keep: how many points can be gone back to beside the first.

    Attributes:
        path: the points so far, the first one included.
        arrived: whether the target is reached.
        stopped: whether the path was ended before.

    Raises:
        ValueError: parameters that the model does not own, or a target that the network or its groups do not allow.
        TypeError: no model.
    """

    def __init__(
        self, params: nn.Module | Iterable[Any], target: Target, model: nn.Module | None, steps: int, keep: int
    ) -> None:
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError("got two models; need one: give it once, as the first argument or as model=.")
            model, params = params, [p for p in params.parameters() if p.requires_grad]
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, need the torch.nn.Module whose function is to stay.")
        super().__init__(params, {"may_cut": True, "may_move": True})
        self._model = model
        self._num_steps, self._num_kept = steps, keep
        self._vectors = self._parameter_vectors()
        self._start = self._weights()
        self._cut = torch.zeros_like(self._start, dtype=torch.bool)
        self._kept: list[KeptPoint] = []
        self.walk_to(target)
        self.path = Path()

    @abstractmethod
    def step(self, data: Any) -> PathPoint:  # type: ignore[override]
        """Go on to the next point of the path."""

    # -- where to ------------------------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        """Where the path leads; set it to go on to another target from where the network is."""
        return self._target

    @target.setter
    def target(self, target: Target) -> None:
        self.walk_to(target)

    def walk_to(self, target: Target, steps: int | None = None) -> None:
        """Go on to another target from where the network is; what is cut stays so until a target brings it back.

        Args:
            target: where to.
            steps: how many it takes; None for as many as before.

        Raises:
            TypeError: no target.
            ValueError: the network or its groups do not allow it, or no step; the path is as it was.
        """
        if not isinstance(target, Target):
            raise TypeError(f"target: got {type(target).__name__}, need a Target such as Sparsity(0.9).")
        if steps is not None and not steps >= 1:
            raise ValueError(f"steps={steps}: must be at least 1; 10 is a start.")
        weights = self._weights()
        plan = target.plan(self._space(weights))
        if isinstance(plan, Destination):
            moved = (plan.fixed | plan.drawn) & (plan.weights != weights) & ~self._cut
            if bool((moved & ~self._allowed("may_move")).any()):
                raise ValueError(
                    f"{type(target).__name__} moves entries that their groups hold: need may_move=True in these "
                    "groups, or a target that leaves them where they are."
                )
        self._plan: CutPlan | Destination = plan
        self._target = target
        self._num_steps = self._num_steps if steps is None else steps
        self._steps_done = 0
        self.arrived = self.stopped = False

    @property
    def masks(self) -> dict[str, Tensor]:
        """By parameter, True where a weight is not cut; parameters without a cut are left out.

        :func:`~torchgeom_optim.optimizers.apply_prune_masks` puts them on a model.
        """
        return {name: ~cut for name, cut in self._vectors.named(self._cut).items() if bool(cut.any())}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, while the optimizer is built.

        Args:
            param_group: parameters, and may_cut and may_move where they differ from the defaults.

        Raises:
            RuntimeError: the path has begun.
        """
        if hasattr(self, "path"):
            raise RuntimeError("got a group on the way: the path's space is fixed. Build another GeodesicSparsifier.")
        if isinstance(param_group, dict):
            check_flags({**self.defaults, **param_group}, ("may_cut", "may_move"), f"group {len(self.param_groups)}")
        super().add_param_group(param_group)

    def run(
        self, batches: Iterable[Any], *, between: Callable[[], object] | None = None, progress: bool = False
    ) -> Path:
        """Take steps until the path arrives or stops.

        Args:
            batches: one for each step; gone through again from the beginning if there are fewer. Of a pair whose second
                part is one whole number for each sample, as a DataLoader gives it, the labels are left out.
            between: called after every step but the last, to train with labels; then the cut entries are put back
                to zero.
            progress: show a progress bar (extra ``demo``, which brings tqdm).

        Returns:
            The path.

        Raises:
            ValueError: there are no more batches, and they cannot be gone through again.
        """
        bar = optional_import("tqdm", "progress=True").tqdm(total=self._remaining, disable=None) if progress else None
        source = iter(batches)
        try:
            while not (self.arrived or self.stopped):
                batch = next(source, None)
                if batch is None:
                    source = iter(batches)
                    batch = next(source, None)
                if batch is None:
                    raise ValueError(f"batches ran dry {self._remaining} steps early; need a list or a loader.")
                point = self.step(_without_labels(batch))
                if bar is not None:
                    bar.update(1)
                    bar.set_postfix(cut=f"{point.cut:.3f}", drift=f"{point.drift:.3g}", **point.accuracies)
                if between is not None and not (self.arrived or self.stopped):
                    between()
                    self.hold()
        finally:
            if bar is not None:
                bar.close()
        return self.path

    @torch.no_grad()
    def hold(self) -> None:
        """Put the cut entries back to zero, after something else has moved the weights."""
        for name, keep in self.masks.items():
            self._model.get_parameter(name).mul_(keep)

    def undo(self, points: int = 1) -> PathPoint:
        """Go back along the path.

        Args:
            points: how many; as many as are kept at most, or all the way to the first.

        Returns:
            The point that the network is at now.

        Raises:
            ValueError: that point was not kept.
        """
        index = len(self.path) - 1 - points
        kept = next((k for k in self._kept if k.place == index), None)
        if points < 0 or kept is None:
            possible = [len(self.path) - 1 - k.place for k in self._kept]
            raise ValueError(f"points={points}: must be one of {possible}, which are kept; a larger keep= keeps more.")
        return self._go_to(kept)

    def best(self) -> int:
        """By how many points to :meth:`undo` for the highest accuracy, of several accuracies the lowest one.

        Among the points that are kept; for a network that serves two tasks best, keep all.

        Returns:
            A number of points.

        Raises:
            ValueError: nothing was evaluated.
        """
        known = [k for k in self._kept if not math.isnan(self.path[k.place].accuracy)]
        if not known:
            raise ValueError("no point has an accuracy: give evaluate= a loader with labels.")
        return len(self.path) - 1 - max(known, key=lambda k: self.path[k.place].accuracy).place

    # -- the network ---------------------------------------------------------------------------------------------

    def _parameter_vectors(self) -> ParameterVectors:
        names = {id(p): name for name, p in self._model.named_parameters()}
        owned = [p for group in self.param_groups for p in group["params"]]
        if foreign := [tuple(p.shape) for p in owned if id(p) not in names]:
            raise ValueError(
                f"got {len(foreign)} parameters that the model does not own (shapes {foreign[:4]}); need the model "
                "that contains them all."
            )
        return ParameterVectors(self._model, [names[id(p)] for p in owned])

    def _allowed(self, option: str) -> Tensor:
        allowed = {id(p): group[option] for group in self.param_groups for p in group["params"]}
        named = {
            name: torch.full(shape, bool(allowed[id(self._model.get_parameter(name))]))
            for name, shape in self._vectors.shapes.items()
        }
        return self._vectors.flat(named).to(self._vectors.device)

    def _weights(self) -> Tensor:
        return self._vectors.flat(self._vectors.values()).clone()

    @torch.no_grad()
    def _write(self, weights: Tensor) -> None:
        for name, value in self._vectors.named(weights).items():
            self._model.get_parameter(name).copy_(value)

    @torch.no_grad()
    def _restore(self, weights: Tensor, buffers: dict[str, Tensor]) -> None:
        self._write(weights)
        for name, value in buffers.items():
            self._model.get_buffer(name).copy_(value)

    def _keep_point(self) -> None:
        buffers = {name: b.detach().clone() for name, b in self._model.named_buffers()}
        index = len(self.path) - 1
        self._kept.append(
            KeptPoint(
                index, self._steps_done, self._num_steps, self._target, self._plan, self._weights(), self._cut, buffers
            )
        )
        while len(self._kept) > 1 + max(1, self._num_kept):
            del self._kept[1]  # the first point stays

    def _go_to(self, kept: KeptPoint) -> PathPoint:
        self._restore(kept.weights, kept.buffers)
        self._cut, self._steps_done, self._num_steps = kept.cut, kept.steps_done, kept.num_steps
        self._target, self._plan = kept.target, kept.plan
        self.arrived, self.stopped = self._remaining == 0, False
        del self.path[kept.place + 1 :]
        self._kept = [k for k in self._kept if k.place <= kept.place]
        return self.path[-1]

    def _space(self, weights: Tensor) -> TargetSpace:
        return TargetSpace(self._model, self._vectors, weights, self._start, self._allowed("may_cut"), self._cut)

    @property
    def _remaining(self) -> int:
        return self._num_steps - self._steps_done

    # -- saving and copying --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the path is, beside what every optimizer saves; the weights themselves are the model's to save.

        Returns:
            What :meth:`load_state_dict` takes. Points to go back to are not in it.
        """
        place = {
            "start": self._start.clone(),
            "cut": self._cut.clone(),
            "steps_done": self._steps_done,
            "steps": self._num_steps,
            "arrived": self.arrived,
            "stopped": self.stopped,
            "path": [point._asdict() for point in self.path],
            "plan": {"kind": type(self._plan).__name__, **vars(self._plan)},
        }
        return {**super().state_dict(), "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a path was saved: build with the same target, load the model's weights, then this.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of another optimizer or network, or of a path with another number of steps; nothing was
                changed.
        """
        place = state_dict.get("place")
        if place is None or place["start"].shape != self._start.shape:
            got = "no place on a path" if place is None else f"{len(place['start'])} entries"
            raise ValueError(f"got a checkpoint with {got}; need one of a path with {len(self._start)} entries.")
        if place["steps"] != self._num_steps:
            raise ValueError(
                f"got a checkpoint of a path of {place['steps']} steps; need steps={self._num_steps} as it was built: "
                "build with the same number."
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "place"})
        self._start = place["start"].to(self._start, copy=True)
        self._cut = place["cut"].to(self._cut.device, copy=True)
        self._steps_done, self.arrived, self.stopped = place["steps_done"], place["arrived"], place["stopped"]
        self._plan = _KINDS[place["plan"]["kind"]](**{k: v for k, v in place["plan"].items() if k != "kind"})
        self.path = Path(PathPoint(**point) for point in place["path"])
        self._kept = []
        self._keep_point()

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy or a pickle needs but hooks; the model goes with it."""
        own = {key: value for key, value in vars(self).items() if not key.startswith("_optimizer_")}
        return {**own, **super().__getstate__()}


def _without_labels(batch: Any) -> Any:
    """The inputs of a classifier's mini-batch (inputs, labels); anything else as it is."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return batch
    is_label = batch[1].dim() == 1 and not batch[1].is_floating_point() and not batch[1].is_complex()
    return batch[0] if is_label else batch
