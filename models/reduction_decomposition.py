"""A network's weights in a basis, ranked by importance: every number of directions is a cut of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchgeom_optim.geometry.mini_batches import MiniBatch
from torchgeom_optim.models.reduced_model import ReducedModel
from torchgeom_optim.models.reduction_basis import Directions
from torchgeom_optim.models.reduction_compensation import compensate as compensated
from torchgeom_optim.models.reduction_files import stored_bytes
from torchgeom_optim.models.reduction_report import (
    CurvePoint,
    ReductionReport,
    accuracy,
    bhattacharyya,
    outputs_of,
    take_samples,
)

__all__ = ["Decomposition", "importances", "number_of"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A network's weights in a basis, ranked; every k is a cut of it.

    Attributes:
        model: the network, which must stay as it is as long as cuts are taken.
        directions: the basis.
        coordinates: c, [R].
        diagonal: lam, [R], float64.
        ranked: positions by descending importance, [R].
        importance: what they are ranked by.
        metric: what lam is of.
        center: name to tensor; None for the origin.
        samples: those of the calibration.
        select: picks the outputs out of what the network returns.
        class_dim: axis of the classes.
    """

    model: nn.Module
    directions: Directions
    coordinates: Tensor
    diagonal: Tensor
    ranked: Tensor
    importance: str
    metric: str
    center: Mapping[str, Tensor] | None
    samples: MiniBatch
    select: Callable[[Any], Tensor] | None
    class_dim: int

    def ranked_by(self, importance: str) -> Decomposition:
        """The same decomposition with another ranking.

        Args:
            importance: "loss", lam c^2 / 2; "eigenvalue", lam; "magnitude", c^2.

        Returns:
            One that shares everything else with this.

        Raises:
            ValueError: an unknown name.
        """
        ranking = importances(importance, self.coordinates, self.diagonal)
        return replace(self, importance=importance, ranked=ranking.argsort(descending=True, stable=True))

    def reduced(
        self,
        num_directions: int | float,
        data: Any = None,
        targets: Tensor | None = None,
        *,
        compensate: int | None = None,
        measure: bool = True,
        **jacobian_options: Any,
    ) -> ReducedModel:
        """The network with its k most important directions.

        Args:
            num_directions: k, or a share of P in (0, 1].
            data: what the report compares predictions on; by default the samples of the calibration.
            targets: labels beside it.
            compensate: Gauss-Newton steps, at most, in which the kept coefficients make up for the others, on the
                samples of the calibration: see :func:`~torchgeom_optim.models.reduction_compensation.compensate`. By
                default 3 where a complete basis is ranked by "loss"; 0 with the rules of others, and with the basis
                "exact", where the reduction is a projection.
            measure: whether to take a report at all.
            **jacobian_options: ``batch_size`` and ``memory_limit``, for ``compensate``.

        Returns:
            The reduced network, with its ``report``.

        Raises:
            ValueError: k is out of range.
        """
        k = number_of(num_directions, self.directions, self.samples.size)
        positions = self.ranked[:k].sort().values
        reduced = ReducedModel(self.model, self.directions, positions, self.coordinates[positions], self.center)
        rounds = self._rounds(compensate)
        if rounds and k < self.directions.num_weights:  # with all there is nothing to make up for
            compensated(
                reduced, self.model, self.samples, rounds=rounds,
                metric=self.metric, select=self.select, class_dim=self.class_dim, **jacobian_options,
            )  # fmt: skip
        return self.measured(reduced, data, targets) if measure else reduced

    def measured(self, reduced: ReducedModel, data: Any = None, targets: Tensor | None = None) -> ReducedModel:
        """Give a reduced form of this network, trained or not, its ``report``.

        Args:
            reduced: the reduced network.
            data: as for :meth:`reduced`.
            targets: labels beside it.

        Returns:
            ``reduced`` itself.
        """
        samples = self.samples if data is None else take_samples(data, targets, None, None)
        before = outputs_of(self.model, samples, self.select)
        reduced.report = self._report(reduced, samples, before, self._point(reduced, samples, before))
        return reduced

    def curve(
        self,
        numbers: Iterable[int | float],
        data: Any = None,
        targets: Tensor | None = None,
        *,
        compensate: int | None = None,
    ) -> list[CurvePoint]:
        """What several k are worth, from this one decomposition.

        Args:
            numbers: of directions, or shares of P.
            data: as for :meth:`reduced`.
            targets: labels beside it.
            compensate: as for :meth:`reduced`; 0 is quicker.

        Returns:
            One point for each.
        """
        samples = self.samples if data is None else take_samples(data, targets, None, None)
        before = outputs_of(self.model, samples, self.select)
        points = []
        for number in numbers:
            k = number_of(number, self.directions, self.samples.size)
            points.append(self._point(self.reduced(k, measure=False, compensate=compensate), samples, before))
        return points

    def smallest(
        self,
        wanted_accuracy: float,
        data: Any = None,
        targets: Tensor | None = None,
        *,
        compensate: int | None = None,
    ) -> int:
        """The smallest k that keeps a wanted accuracy, by bisection: with k - 1 directions it was lower.

        Accuracy is not exactly monotone in k: a smaller k may keep it too.

        Args:
            wanted_accuracy: share of the labels, in [0, 1].
            data: with labels; by default the samples of the calibration.
            targets: labels beside it.
            compensate: as for :meth:`reduced`; 0 is quicker.

        Returns:
            k.

        Raises:
            ValueError: out of range; no labels; not even all directions keep it.
        """
        if not 0.0 <= wanted_accuracy <= 1.0:
            raise ValueError(f"wanted_accuracy={wanted_accuracy}: must be in [0, 1], a share of the labels.")
        samples = self.samples if data is None else take_samples(data, targets, None, None)
        if samples.targets is None:
            raise ValueError("no labels: an accuracy needs them. Give targets=..., or mini-batches (inputs, labels).")

        def reached(k: int) -> float:
            reduced = self.reduced(k, measure=False, compensate=compensate)
            outputs = outputs_of(reduced, samples, self.select)
            return accuracy(outputs, samples.targets, self.class_dim)

        low, high = 0, self.directions.num_directions
        if (best := reached(high)) < wanted_accuracy:
            raise ValueError(
                f"wanted_accuracy={wanted_accuracy}: all {high} directions give {best:.4f}, the most there is to keep. "
                "Ask for less, or take a complete basis such as 'kronecker'."
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) >= wanted_accuracy else (middle, high)
        return high

    def _rounds(self, compensate: int | None) -> int:
        if compensate is None:
            return 3 if self.importance == "loss" and self.directions.kind != "exact" else 0
        if not compensate >= 0:
            raise ValueError(f"compensate={compensate}: must be at least 0, or None for the default.")
        return compensate

    def _point(self, reduced: ReducedModel, samples: MiniBatch, before: Tensor) -> CurvePoint:
        after = outputs_of(reduced, samples, self.select)
        distance, clipped = math.nan, 0
        if self.metric == "fisher":
            distance, clipped = bhattacharyya(before, after, self.class_dim)
        names = list(reduced.weights())
        whole = {name: p.detach() for name, p in self.model.named_parameters() if name in names}
        if self.center is not None:
            whole = {name: p - self.center[name] for name, p in whole.items()}
        length = math.sqrt(sum(float(p.double().square().sum()) for p in whole.values()))
        kept = float(reduced.coefficients.detach().double().norm())
        return CurvePoint(
            num_directions=reduced.num_directions,
            share=reduced.num_directions / self.directions.num_weights,
            norm_share=kept / length if length else 1.0,
            bhattacharyya=distance,
            num_clipped=clipped,
            output_change=float((after - before).double().norm() / before.double().norm().clamp(min=1e-300)),
            accuracy=accuracy(after, samples.targets, self.class_dim),
        )

    def _report(self, reduced: ReducedModel, samples: MiniBatch, before: Tensor, at: CurvePoint) -> ReductionReport:
        with_directions, regenerated = stored_bytes(reduced, self.samples.inputs)
        tensors = {id(x): x for x in (*self.model.parameters(), *self.model.buffers())}
        return ReductionReport(
            basis=self.directions.kind,
            importance=self.importance,
            metric=self.metric,
            num_weights=self.directions.num_weights,
            at=at,
            accuracy_before=accuracy(before, samples.targets, self.class_dim),
            num_samples=samples.size,
            calibration_samples=self.samples.size,
            bytes_dense=sum(x.numel() * x.element_size() for x in tensors.values()),
            bytes_stored=with_directions,
            bytes_regenerated=regenerated,
            notes=_notes(self.model, set(reduced.weights())),
        )


def importances(importance: str, coordinates: Tensor, diagonal: Tensor) -> Tensor:
    """What directions are ranked by: lam c^2 / 2 ("loss"), lam ("eigenvalue") or c^2 ("magnitude").

    Args:
        importance: its name.
        coordinates: c, [R].
        diagonal: lam, [R].

    Returns:
        [R], float64.

    Raises:
        ValueError: an unknown name.
    """
    squares = coordinates.detach().double().square()
    known = {"loss": 0.5 * diagonal * squares, "eigenvalue": diagonal, "magnitude": squares}
    if importance not in known:
        raise ValueError(
            f"importance={importance!r}: must be one of {', '.join(map(repr, known))}; 'loss' is the default."
        )
    return known[importance]


def number_of(num_directions: int | float, directions: Directions, num_samples: int) -> int:
    """K from a number or a share of the P weights.

    Args:
        num_directions: k, or a share in (0, 1] if it is no integer.
        directions: those that there are.
        num_samples: they come from, for the message.

    Returns:
        At least 1.

    Raises:
        ValueError: out of range.
    """
    rank, weights = directions.num_directions, directions.num_weights
    if isinstance(num_directions, int) and not isinstance(num_directions, bool):
        k = num_directions
    elif 0.0 < num_directions <= 1.0:
        k = max(1, round(num_directions * weights))
    else:
        raise ValueError(
            f"num_directions={num_directions}: must be an integer, or a share of the {weights} weights in (0, 1]; 0.05 "
            "is a common start."
        )
    if not 1 <= k <= rank:
        raise ValueError(f"num_directions={k}: must be in [1, {rank}]." + _more_samples(k, directions, num_samples))
    return k


def _more_samples(k: int, directions: Directions, num_samples: int) -> str:
    if directions.kind != "exact" or k < 1:
        return f" The network has {directions.num_weights} weights."
    per_sample = directions.num_directions / num_samples
    return (
        f" That is the rank of the matrix from {num_samples} samples; k = {k} would take at least "
        f"{math.ceil(k / per_sample)}. Give more data with num_samples=..., or take basis='kronecker', which has all."
    )


def _notes(model: nn.Module, reduced: set[str]) -> tuple[str, ...]:
    notes = []
    names = dict(model.named_parameters())
    if others := [name for name in names if name not in reduced]:
        notes.append(f"not reduced, kept as they are (frozen or not chosen): {', '.join(others)}")
    every = list(model.named_parameters(remove_duplicate=False))
    if tied := [name for name, _ in every if name not in names]:
        notes.append(f"tied, reduced once under another name: {', '.join(tied)}")
    if norms := sum(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules()):
        notes.append(f"running statistics of {norms} batch norms kept as they are, and used in evaluation mode")
    return tuple(notes)
