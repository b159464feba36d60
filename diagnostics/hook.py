"""Diagnostics: how well conditioned the gradient is while a network trains, seen from the loop's own passes."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchgeom_optim.diagnostics.batch_metrics import BatchMetrics
from torchgeom_optim.diagnostics.cost import Cost, predicted_cost
from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.loop import CriterionCall, LoopWatch, ObservedPass, innermost, reduction_of
from torchgeom_optim.diagnostics.measurement import Layers, Measurement, Options
from torchgeom_optim.diagnostics.metrics import MetricsChoice, chosen_metrics
from torchgeom_optim.diagnostics.processes import Processes, wrapped_by
from torchgeom_optim.diagnostics.schedule import Schedule, as_schedule
from torchgeom_optim.diagnostics.two_steps import TwoSteps
from torchgeom_optim.geometry.gram_accumulator import GramResult
from torchgeom_optim.geometry.gram_recorder import GramRecorder
from torchgeom_optim.geometry.per_sample import Batch

__all__ = ["Diagnostics"]


class Diagnostics:
    """Measures how gradients agree and how they change, on a schedule, while a training loop runs as it is.

    Attached, it takes the Gram matrix of the samples' gradients from the loop's own backward pass, for the products
    alone; metrics that need further passes (:data:`~torchgeom_optim.diagnostics.metrics.METRICS` says which) make
    them right after that pass, on the same batch and weights. Nothing that training computes is changed, random
    numbers and running statistics included. What goes wrong while a loop runs is written into the record's notes, and
    the metrics concerned are nan; :meth:`measure` raises instead.

    - *A step* is a call of the optimizer's, and is measured once: where a GradScaler skips one, the record is of the
      batch that overflowed; of a closure, its first call.
    - *The loss* is the criterion's, or, without a criterion, the one that the model returns. It must be a scalar, and
      the backward pass must go through it; what it is multiplied by on the way (loss scales, 1 / accumulation steps) is
      undone. Under gradient accumulation the first micro-batch of a step is measured.
    - *The model* is seen in the mode that it is in. Where batch normalization couples the samples, a gradient is the
      sample's contribution to the batch gradient, and a note says so; ``freeze_statistics`` measures with running
      statistics instead, in a pass of its own. Dropout's masks are those of the pass; further passes share one mask.
      Where a parameter has no layer rule (a bare one, packed attention), the Gram matrix under dropout is of such a
      pass, with a backward pass for each sample; a loss of the model's own is then told apart by the logits that it
      returns beside it. Under autocast further passes are in full precision.
    - *Compiled models* (``torch.compile(model)``) are measured in an uncompiled pass of their own.
    - *Under DistributedDataParallel* numbers are of the batches of all processes together, and equal in each: when a
      step is measured, every process gets the others' samples and makes passes of its own over all of them, so that
      the cost grows with their number; the preset "free" needs none of it. Every process attaches, with the same
      schedule; let one of them write files. :meth:`measure` is of the batch that it is given.

    Args:
        model: the module that the loop calls.
        criterion: the module that the loop computes its loss with; any callable where only :meth:`measure` is used;
            None if the model returns its loss.
        every: a number of steps, :class:`~torchgeom_optim.diagnostics.schedule.LogSpaced`, or a callable that is asked
            once for each step, one step ahead.
        metrics: "free" (norms, and the two-step condition number), "default" (all from the Gram matrix), "cheap" (and
            about four passes), "full" (all), "spectrum"; or a list of such and of single metrics.
        per_layer: also for each layer.
        reduction: how the loss comes from the samples' losses; the criterion's own by default, or else the mean.
        freeze_statistics: let batch normalization use its running statistics while measuring.
        history: where to put the records; a new one by default.
        options: how to measure, in detail.

    Raises:
        ValueError: nothing to train in the model, an unknown metric, a schedule of zero, a criterion without reduction,
            parameters that are sharded over processes.
        TypeError: the model is no module; the schedule or the criterion cannot be called.

    Example:
        >>> model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Diagnostics(model, criterion, every=2).attach(optimizer) as diagnostics:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         criterion(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
        ...         optimizer.step()
        >>> [record.step for record in diagnostics.history]
        [0, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor] | None = None,
        every: int | Schedule = 100,
        metrics: MetricsChoice = "default",
        *,
        per_layer: bool = True,
        reduction: Literal["mean", "sum"] | None = None,
        freeze_statistics: bool = False,
        history: History | None = None,
        options: Options | None = None,
    ) -> None:
        self._called, self._model = model, innermost(model)
        self._processes = Processes.of(model)
        if criterion is not None and not callable(criterion):
            raise TypeError(f"criterion={criterion!r}: must be a module or a function; nn.CrossEntropyLoss() is one.")
        self.criterion = criterion
        self.schedule = as_schedule(every)
        self.metrics = chosen_metrics(metrics)
        self.history = History() if history is None else history
        self.options = options or Options()
        self.step = 0
        self._layers = Layers(self._model, per_layer)
        self._steps = steps = TwoSteps(self._layers, self.options)
        self._of_batch = BatchMetrics(
            model=self._model,
            metrics=self.metrics,
            layers=self._layers,
            options=self.options,
            reduction=reduction_of(criterion, reduction),
            freeze_statistics=freeze_statistics,
            mask=lambda: steps.mask,
        )
        self._optimizer: torch.optim.Optimizer | None = None
        self._watch: LoopWatch | None = None
        self._recorder: GramRecorder | None = None
        self._handles: list[RemovableHandle] = []
        self._due = self._next_due = False
        self._waiting: Measurement | None = None  # for the gradients that the optimizer gets
        self._warned: set[str] = set()
        self._missed = "attach(optimizer) and train, or call measure(x, y)"  # why there is no record

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> Diagnostics:
        """Watch the loop from now on.

        Args:
            optimizer: counts the steps, and tells the learning rate and, for the two-step condition number, the moves
                and gradients (as it gets them: accumulated, and clipped if they are). Without one every backward pass
                is a step, and there is no such number.

        Returns:
            Itself.

        Raises:
            RuntimeError: it is attached already, or hooks would not be called.
            TypeError: the criterion is not a module, so that nothing tells the loss; no optimizer.
            ValueError: the optimizer has none of the model's parameters.
        """
        if self._watch is not None:
            raise RuntimeError("attached already: close() it first, or make another Diagnostics for another loop.")
        if self.criterion is not None and not isinstance(self.criterion, nn.Module):
            raise TypeError(
                f"criterion={self.criterion!r}: a function cannot be watched, the loop's criterion must be a module; "
                f"take nn.CrossEntropyLoss() for F.cross_entropy, or call measure(x, y)."
            )
        if getattr(self._called, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                "model.compile() has compiled the model in place, and hooks set now are not called; use "
                "torch.compile(model) and give what it returns, attach first, or call measure(x, y)."
            )
        if optimizer is not None:
            self._follow(optimizer)
        self._missed = "no step that the schedule names was taken"
        watched = next(m for m in wrapped_by(self._called) if not isinstance(m, nn.parallel.DistributedDataParallel))
        compiled = hasattr(watched, "_orig_mod")  # hooks within are not called
        self._watch = LoopWatch(watched, self.criterion, self._after_backward)
        self._watch.counting = optimizer is None
        metrics = self._of_batch
        if metrics.need_gram and not (compiled or metrics.freeze_statistics or self._processes):
            per_layer = bool(self._layers.names)
            self._recorder = GramRecorder(self._model, reduction=metrics.reduction, per_layer=per_layer)
        self._next_due = bool(self.schedule(self.step))
        self._advance(0)
        return self

    def close(self) -> None:
        """Remove every hook and let go of every tensor; the history stays. Calling it twice is fine."""
        if self._waiting is not None:
            self._append(self._waiting)
        for handle in self._handles:
            handle.remove()
        for owner in (self._watch, self._recorder):
            if owner is not None:
                owner.close()
        self._handles = []
        self._steps.forget()
        self._watch = self._recorder = self._optimizer = None
        self._due = self._next_due = False

    def __enter__(self) -> Diagnostics:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def is_attached(self) -> bool:
        """Whether it watches a loop."""
        return self._watch is not None

    def measure(self, x: Any, y: Any = None) -> Record:
        """Measure a batch here and now, attached or not, in passes of its own; the record joins the history.

        Args:
            x: the model's input, a tuple of its arguments or a dict of its keyword arguments; samples along axis 0.
            y: what the criterion takes besides the outputs, if anything.

        Returns:
            The record. ``weight_condition_number_two_step`` is nan.

        Raises:
            Exception: whatever goes wrong, such as a ValueError for a batch of one sample; nothing is recorded then.
        """
        loss_fn = CriterionCall(None) if self.criterion is None else self.criterion
        batch = Batch(x, y)
        measurement = self._of_batch.new(self.step, strict=True)
        measurement.batch_size = batch.num_samples
        start = time.perf_counter()
        self._of_batch.measure(measurement, batch, loss_fn)
        measurement.loss = float(self._of_batch.gradient(batch, loss_fn).mean_loss())
        measurement.seconds = time.perf_counter() - start
        return self._append(measurement)

    def predict_cost(self, x: Any, y: Any = None) -> Cost:
        """What a measurement on such a batch will take, told before the first: see :class:`Cost`.

        Args:
            x: as for :meth:`measure`.
            y: likewise.

        Returns:
            Seconds and bytes beyond the loop's own.
        """
        loss_fn = CriterionCall(None) if self.criterion is None else self.criterion
        rides = not (self._of_batch.freeze_statistics or self._processes)
        gradient = self._of_batch.gradient(Batch(x, y), loss_fn)
        return predicted_cost(gradient, self.metrics, self._layers, self.options, rides=rides)

    def summary(self) -> str:
        """What a person would make of the history, in words."""
        if not len(self.history):
            return f"No records yet: {self._missed}."
        from torchgeom_optim.diagnostics import reading

        return str(reading.summary(self.history))

    def plot(self, **options: Any) -> Any:
        """A dashboard of the history; needs matplotlib."""
        from torchgeom_optim.diagnostics import plots

        return plots.dashboard(self.history, **options)

    def __repr__(self) -> str:
        state = f"{'' if self.is_attached else 'not '}attached, {len(self.history)} records"
        return f"Diagnostics({type(self._model).__name__}, {state}, metrics={self.metrics})"

    # The loop

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}: a torch.optim.Optimizer is needed, or None.")
        own = {id(p) for p in self._layers.parameters.values()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer has none of the model's parameters: give the one that trains this model.")
        self._optimizer = optimizer
        this = weakref.ref(self)

        def before(optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if (owner := this()) is None:
                return None
            # A closure's gradients are there once it has been called, first at the weights before the step.
            if callable(closure := kwargs.get("closure")):
                return args, {**kwargs, "closure": _Closure(closure, this)}
            if len(args) > 1 and callable(args[1]):
                return (args[0], _Closure(args[1], this), *args[2:]), kwargs
            owner._before_step()
            return None

        def after(*args: object) -> None:
            if (owner := this()) is not None:
                owner._note_missed_step()
                owner._advance(1)

        self._handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        weakref.finalize(self, _remove, self._handles).atexit = False

    def _note_missed_step(self) -> None:
        if not self._due or self._watch is None:
            return
        self._missed = f"step {self.step} was to be measured, but {self._watch.why_nothing_was_seen()}"
        if not len(self.history) and not self._warned:  # later ones may be steps of another kind
            self._warned.add(self._missed)
            warnings.warn(f"diagnostics: {self._missed}.", RuntimeWarning, stacklevel=4)

    def _advance(self, steps: int) -> None:
        self.step += steps
        self._due, self._next_due = self._next_due, bool(self.schedule(self.step + 1))
        self._arm()

    def _arm(self) -> None:
        if self._watch is not None:
            self._watch.wanted = self._due
        if self._recorder is not None:
            self._recorder.enabled = self._due

    def _after_backward(self, observed: ObservedPass) -> None:
        if self._due:
            self._due = False  # once a step
            self._arm()
            start = time.perf_counter()
            measurement = self._measured(observed)
            if self._recorder is not None:
                self._recorder.reset()
            measurement.seconds = time.perf_counter() - start
            if self._optimizer is not None and (self._of_batch.need_step or self._of_batch.need_gradient):
                self._waiting = measurement
            else:
                self._append(measurement)
        if self._optimizer is None:
            self._advance(1)

    def _measured(self, observed: ObservedPass) -> Measurement:
        metrics, measurement = self._of_batch, self._of_batch.new(self.step)
        if observed.loss is not None:
            measurement.loss = float(observed.loss)
        batch = Batch(())
        try:
            batch = observed.batch()
            measurement.batch_size = batch.num_samples
            if metrics.reduction == "sum":
                measurement.loss /= measurement.batch_size
        except (TypeError, ValueError) as error:
            measurement.note(f"the batch: {error}")
            observed.loss_fn = None
        if self._processes is not None:
            self._measure_together(self._processes, measurement, batch, observed)
            return measurement
        if observed.num_losses != 1:
            measurement.note(f"the criterion was called {observed.num_losses} times on one pass: not measured")
            return measurement
        if observed.loss_fn is None:
            measurement.note(
                "the criterion's input is not what the model returned, or the batch is not all tensors: only what the "
                "backward pass shows is measured; put what lies between into the model or the criterion"
            )
        scale = math.nan if observed.scale is None else float(observed.scale)
        if observed.left_out and observed.loss_fn is not None:
            self._loss_without(measurement, batch, observed)
            metrics.measure(measurement, batch, observed.loss_fn, gradient_is_known=self._optimizer is not None)
            self._note_missing_optimizer(measurement)
            return measurement

        def gram(recorder: GramRecorder) -> GramResult:
            if not 0.0 < abs(scale) < math.inf:
                raise RuntimeError(f"the backward pass began with {scale} at the loss")
            # The sign cancels in products of gradients.
            return recorder.result(loss_scale=abs(scale), loss_fn=observed.loss_fn, targets=observed.targets)

        from_pass = None if self._recorder is None else partial(gram, self._recorder)
        metrics.measure(measurement, batch, observed.loss_fn, gram=from_pass, gradient_is_known=True)
        if metrics.need_gradient and self._optimizer is None and math.isfinite(scale) and scale:
            measurement.from_gradient({name: g / scale for name, g in self._steps.gradients().items()})
        self._note_missing_optimizer(measurement)
        return measurement

    def _measure_together(
        self, processes: Processes, measurement: Measurement, batch: Batch, observed: ObservedPass
    ) -> None:
        """The batch of all processes. Whatever happens, each of them goes through the same collective operations."""
        has_optimizer = self._optimizer is not None  # which gets the mean gradient of the processes
        in_passes = self._of_batch.need_passes(gradient_is_known=has_optimizer)
        loss_fn = observed.loss_fn if observed.num_losses == 1 else None
        problem = "; ".join(measurement.notes) or "the criterion's input is not what the model returned"
        if observed.num_losses != 1:
            problem = f"{observed.num_losses} losses on one pass"
        together = processes.gather(
            None if loss_fn is None else batch, measurement.loss, problem, tensors=bool(in_passes)
        )
        measurement.loss, measurement.batch_size = together.loss, together.num_samples
        if not together.is_even:
            measurement.note("processes have unequal batches: here all samples weigh alike, in training all processes")
        if together.batch is not None:
            if observed.left_out:
                self._loss_without(measurement, together.batch, observed)
            self._of_batch.measure(measurement, together.batch, loss_fn, gradient_is_known=has_optimizer)
        else:
            measurement.from_weights()
            if in_passes:
                measurement.note(f"{', '.join(in_passes)}: not measured over all processes, since {together.problem}")
        self._note_missing_optimizer(measurement)
        measurement.load_state(processes.agree(measurement.state()))

    def _loss_without(self, measurement: Measurement, batch: Batch, observed: ObservedPass) -> None:
        """The loss that the model itself gives where it is not told of several batches."""
        measurement.note(f"{', '.join(observed.left_out)} left out: the loss is the mean over this batch alone")
        with measurement.attempt("gram"):
            if observed.loss_fn is not None:
                measurement.loss = float(self._of_batch.gradient(batch, observed.loss_fn).mean_loss())

    def _note_missing_optimizer(self, measurement: Measurement) -> None:
        if self._of_batch.need_step and self._optimizer is None:
            measurement.note("weight_condition_number_two_step needs attach(optimizer)")

    def _before_step(self) -> None:
        measurement, self._waiting = self._waiting, None
        if measurement is not None:
            start = time.perf_counter()
            with measurement.attempt("step"):
                if self._of_batch.need_gradient:
                    measurement.from_gradient(self._steps.gradients())
                numbers = self._steps.condition_number() if self._of_batch.need_step else None
                if numbers is not None:
                    measurement.put("weight_condition_number_two_step", numbers)
                elif self._of_batch.need_step:
                    measurement.note("weight_condition_number_two_step: no step before this one was seen")
            measurement.seconds += time.perf_counter() - start
            self._append(measurement)
        self._steps.forget()
        if self._next_due and self._of_batch.need_step:
            self._steps.keep()

    def _append(self, measurement: Measurement) -> Record:
        if measurement is self._waiting:
            self._waiting = None
        values, layers = measurement.numbers()
        lr = None if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"])
        record = Record(
            step=measurement.step,
            time_s=measurement.seconds,
            loss=measurement.loss,
            batch_size=measurement.batch_size,
            values=values,
            layers=layers,
            notes=tuple(measurement.notes),
            learning_rate=lr,
            spectrum=measurement.spectrum,
            vector_layers=self._layers.vectors,
        )
        try:
            self.history.append(record)
        except OSError as error:  # it is in memory; a full disk must not end the training
            warnings.warn(f"the record of step {record.step} was not written: {error}", RuntimeWarning, stacklevel=2)
        for note in record.notes:
            if "not measured" in note and note not in self._warned:
                self._warned.add(note)
                warnings.warn(f"diagnostics, step {record.step}: {note}", RuntimeWarning, stacklevel=2)
        return record


class _Closure:
    """What an optimizer is given in place of a closure: the same, and diagnostics are told when it is over."""

    def __init__(self, closure: Callable[[], Any], owner: Callable[[], Diagnostics | None]) -> None:
        self._closure, self._owner = closure, owner
        self._is_first = True

    def __call__(self) -> Any:
        result = self._closure()
        owner = self._owner()
        if self._is_first and owner is not None and owner.is_attached:
            owner._before_step()
        self._is_first = False
        return result


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
