"""Which passes over a batch the chosen metrics need, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from torchgeom_optim.diagnostics.batch_gradient import BatchGradient
from torchgeom_optim.diagnostics.loop import CriterionCall
from torchgeom_optim.diagnostics.masking import RandomMask
from torchgeom_optim.diagnostics.measurement import Layers, Measurement, Options
from torchgeom_optim.diagnostics.metrics import METRICS
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_accumulator import GramResult
from torchgeom_optim.geometry.per_sample import Batch

__all__ = ["BatchMetrics"]


@dataclass(frozen=True, kw_only=True)
class BatchMetrics:
    """The chosen metrics of a model, for whichever batch.

    Args:
        model: the module.
        metrics: names of them.
        layers: of the model.
        options: how to measure.
        reduction: how a scalar loss comes from the samples' losses.
        freeze_statistics: let batch normalization use its running statistics.
        mask: tells the coordinates that moved gradients are compared on; None for all.
    """

    model: nn.Module
    metrics: Sequence[str]
    layers: Layers
    options: Options
    reduction: Literal["mean", "sum"]
    freeze_statistics: bool
    mask: Callable[[], RandomMask | None]

    @property
    def need_gram(self) -> bool:
        """Whether there is a metric that only the Gram matrix tells."""
        return any(METRICS[name] == "gram" and name != "gradient_norm" for name in self.metrics)

    @property
    def need_gradient(self) -> bool:
        """Whether the batch gradient has to be had without the Gram matrix."""
        return "gradient_norm" in self.metrics and not self.need_gram

    @property
    def need_step(self) -> bool:
        """Whether there is a metric of two steps in a row."""
        return "weight_condition_number_two_step" in self.metrics

    def need_passes(self, gradient_is_known: bool) -> list[str]:
        """The metrics that the weights and the optimizer's steps do not tell.

        Args:
            gradient_is_known: whether the optimizer will tell the batch gradient.

        Returns:
            Their names.
        """
        names = [name for name in self.metrics if METRICS[name] not in ("weights", "step")]
        return [] if gradient_is_known and names == ["gradient_norm"] else names

    def new(self, step: int, strict: bool = False) -> Measurement:
        """A measurement without numbers; see :class:`Measurement`."""
        return Measurement(self.metrics, self.layers, self.options, step, strict)

    def gradient(self, batch: Batch, loss_fn: Callable[..., Tensor], freeze: bool = False) -> BatchGradient:
        """The batch gradient as a function of the weights."""
        freeze = freeze or self.freeze_statistics
        return BatchGradient(self.model, loss_fn, batch, reduction=self.reduction, freeze_statistics=freeze)

    def measure(
        self,
        measurement: Measurement,
        batch: Batch,
        loss_fn: Callable[..., Tensor] | None,
        *,
        gram: Callable[[], GramResult] | None = None,
        gradient_is_known: bool = False,
    ) -> None:
        """Take in all that the batch tells.

        Args:
            measurement: grows.
            batch: in passes of its own.
            loss_fn: of the outputs and the batch's targets; None if the loss cannot be computed anew.
            gram: gives the Gram matrix from a pass that has been made, or raises a RuntimeError.
            gradient_is_known: whether somebody else puts in the batch gradient.
        """
        with measurement.attempt("weights"):
            measurement.from_weights()
        if self.need_gram:
            with measurement.attempt("gram"):
                measurement.from_gram(self._gram(measurement, batch, loss_fn, gram))
        if loss_fn is None:
            wanted = [name for name in self.metrics if METRICS[name] not in ("gram", "weights", "step")]
            if wanted:
                measurement.note(f"{', '.join(wanted)}: not measured, the loss cannot be computed anew")
            return
        if measurement.wants("moves"):
            with measurement.attempt("moves"):
                measurement.from_moves(self.gradient(batch, loss_fn), self.mask())
        elif self.need_gradient and not gradient_is_known:
            with measurement.attempt("gram"):
                measurement.from_gradient(self.gradient(batch, loss_fn)())
        if measurement.wants("inputs"):
            with measurement.attempt("inputs"):
                measurement.from_inputs(self.gradient(batch, loss_fn))
        if measurement.wants("input_moves"):
            with measurement.attempt("input_moves"):
                measurement.from_input_moves(self.gradient(batch, loss_fn, freeze=True))
        if measurement.wants("hessian"):
            with measurement.attempt("hessian"):
                measurement.from_hessian(self.gradient(batch, loss_fn))
        if measurement.wants("spectrum"):
            with measurement.attempt("spectrum"):
                # Models that return their loss have their outputs all over; criteria say which one they take.
                select = loss_fn.select if isinstance(loss_fn, CriterionCall) and loss_fn.has_criterion else None
                measurement.from_spectrum(self.model, batch.inputs, select)

    def _gram(
        self,
        measurement: Measurement,
        batch: Batch,
        loss_fn: Callable[..., Tensor] | None,
        gram: Callable[[], GramResult] | None,
    ) -> GramResult:
        if gram is not None:
            try:
                return gram()
            except RuntimeError as error:
                if loss_fn is None:
                    raise
                measurement.note(f"Gram matrix from a pass of its own: {error}")
        if loss_fn is None:
            raise RuntimeError("the loss cannot be computed anew")
        return per_sample_gram(
            self.model,
            loss_fn,
            batch.inputs,
            batch.targets,
            reduction=self.reduction,
            per_layer=bool(self.layers.names),
            freeze_statistics=self.freeze_statistics,
        )
