"""A learning rate and a batch size from what diagnostics measure: the thesis's open question, section 4.2.2.

A step changes the gradient by the share lr |Hh| / |h| of itself (Def. 2.1, step-consistency), and moves along the true
gradient by no more than the share s of its own that is signal (batch-dissonance). :class:`ConsistencyLR` keeps the
first at a chosen value, and, if asked to, lower where there is little signal; :func:`advise_batch_size` says which
batch has how much of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.trends import noise_scale, top_curvature

__all__ = ["BatchAdvice", "ConsistencyLR", "advise_batch_size"]

_LEAST_SIGNAL = 1e-3


class _HasHistory(Protocol):
    @property
    def history(self) -> History: ...


class ConsistencyLR(LRScheduler):
    r"""Chooses the learning rate by how far a step lets the gradient stay what it is, and by how much of it is signal.

        lr = change * |h| / |H h| * s ** signal_power

    h is the batch gradient and H the batch's Hessian; the records have |Hh| / |h| from ``weight_condition_number``,
    ``gradient_norm`` and ``weight_norm`` (the change of the gradient along itself, Def. 2.7, two passes), or else
    ``top_curvature``, which is never less. s = |G|^2 / |h|^2 is the share of the batch gradient that is common to all
    batches, 1 / (1 + noise scale / batch size), from ``gradient_coherence``. With momentum m all is multiplied by
    1 - m, the sum of its steps.

    A step of change 1 is the best one along h on a quadratic loss without noise, 2 the largest that does not make it
    grow. With noise the best single step has ``signal_power`` 1, but to follow it lets the rate fall too soon: what is
    best for one step is not for many. The default leaves noise out; what the powers 0.5 and 1 cost is measured in
    ``benchmarks/does_the_controller_beat_a_constant_rate.py``.

    Before the first record the rate is the optimizer's own. The groups' rates keep their ratios. Use it as any
    scheduler that is stepped after each ``optimizer.step()``; without a new record a step changes nothing.

    Args:
        optimizer: for plain SGD, with momentum or without; other optimizers take steps that these numbers do not
            measure.
        source: a :class:`~torchgeom_optim.diagnostics.hook.Diagnostics` whose metrics include those above, or its
            history. Measure every 10 to 100 steps.
        change: share of its length by which a step without noise may change the gradient, in (0, inf).
        signal_power: in [0, 1].
        smoothing: weight of the past, for each new record, in running averages of log |Hh|/|h|, and of the two parts
            of s, in [0, 1).
        max_factor: the rate changes by this factor at most for each record, in (1, inf].
        max_lr: the rate never exceeds it, in (0, inf].
        last_epoch: as in every scheduler of torch.

    Raises:
        ValueError: a value out of range.
        TypeError: ``source`` is no history and has none.

    Example:
        >>> import torch
        >>> history = History()
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> scheduler = ConsistencyLR(optimizer, history, change=1.0, signal_power=0.0, max_factor=math.inf)
        >>> history.append(Record(step=0, time_s=0.0, loss=1.0, batch_size=8, values={"top_curvature": 2.0}))
        >>> optimizer.step(); scheduler.step(); scheduler.get_last_lr()
        [0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        source: History | _HasHistory,
        *,
        change: float = 1.0,
        signal_power: float = 0.0,
        smoothing: float = 0.8,
        max_factor: float = 2.0,
        max_lr: float = math.inf,
        last_epoch: int = -1,
    ) -> None:
        history = source if isinstance(source, History) else getattr(source, "history", None)
        if not isinstance(history, History):
            raise TypeError(f"source={source!r}: must be a History, or have one, as a Diagnostics does.")
        _check(0.0 < change < math.inf, f"change={change}: must be in (0, inf); 1.0 is a common start.")
        _check(
            0.0 <= signal_power <= 1.0,
            f"signal_power={signal_power}: must be in [0, 1]; 0.0, the default, leaves noise out.",
        )
        _check(0.0 <= smoothing < 1.0, f"smoothing={smoothing}: must be in [0, 1); 0.8 is the default.")
        _check(1.0 < max_factor, f"max_factor={max_factor}: must be above 1, inf for any change; 2.0 is the default.")
        _check(0.0 < max_lr, f"max_lr={max_lr}: must be above 0, inf for no bound; ten times SGD's rate is safe.")
        self._history = history
        self.change, self.signal_power, self.smoothing = change, signal_power, smoothing
        self.max_factor, self.max_lr = max_factor, max_lr
        self._seen = len(history)
        self._factor = 1.0  # of the groups' initial rates
        self._log_curvature = _RunningMean()
        self._signal, self._total = _RunningMean(), _RunningMean()
        super().__init__(optimizer, last_epoch)

    @property
    def signal(self) -> float:
        """Running estimate of s, in [0.001, 1]; 1 where no coherence was recorded."""
        if not self._total.weight:
            return 1.0
        return min(1.0, max(_LEAST_SIGNAL, self._signal.mean / self._total.mean))

    @property
    def curvature(self) -> float:
        """Running estimate of |Hh| / |h|, units loss / parameter^2; nan before the first record."""
        return math.exp(self._log_curvature.mean) if self._log_curvature.weight else math.nan

    def get_lr(self) -> list[float | Any]:
        """The groups' rates from here on; takes in the records that have come since the last call."""
        for record in self._history[self._seen :]:
            self._take_in(record)
        self._seen = len(self._history)
        return [self._factor * rate for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the history."""
        state = super().state_dict()
        for name in ("_history", "_seen"):
            state.pop(name, None)
        for name in ("_log_curvature", "_signal", "_total"):
            state[name] = (state[name].mean, state[name].weight)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; records that are in the history already count as seen.

        Args:
            state_dict: what :meth:`state_dict` returned; it is not changed.
        """
        state = dict(state_dict)
        for name in ("_log_curvature", "_signal", "_total"):
            state[name] = _RunningMean(*state[name])
        super().load_state_dict(state)
        self._seen = len(self._history)

    def _take_in(self, record: Record) -> None:
        curvature = _curvature_along_gradient(record)
        if not 0.0 < curvature < math.inf:
            return  # nothing to go by; a loss that is no number ends up here too
        self._log_curvature.add(math.log(curvature), self.smoothing)
        c, b = record.values.get("gradient_coherence", math.nan), record.batch_size
        if math.isfinite(c) and b > 1:
            # |G|^2 and |h|^2 without bias, both over the samples' mean squared gradient.
            self._signal.add((b * c - 1.0) / (b - 1.0), self.smoothing)
            self._total.add(c, self.smoothing)
        group, base = self.optimizer.param_groups[0], float(self.base_lrs[0])
        momentum = group.get("momentum", 0.0)
        rate = self.change / self.curvature * self.signal**self.signal_power * (1.0 - momentum)
        wanted = min(rate, self.max_lr) / base
        self._factor = min(max(wanted, self._factor / self.max_factor), self._factor * self.max_factor)


@dataclass(frozen=True)
class BatchAdvice:
    """What a batch size is worth.

    Args:
        size: the advised one, samples.
        noise_scale: tr(S) / |G|^2, samples.
        progress_per_step: of the advised batch, as a share of what an endless batch makes, in (0, 1].
        progress_per_sample: of the advised batch, as a share of what a batch of one makes, in (0, 1].
    """

    size: int
    noise_scale: float
    progress_per_step: float
    progress_per_sample: float


def advise_batch_size(history: History, *, progress_per_step: float = 0.5, most: int | None = None) -> BatchAdvice:
    r"""The batch size at which a step makes a given share of the progress that it can make at all.

        progress per step   1 / (1 + B_noise / B),     per sample   1 / (1 + B / B_noise)

    Source: McCandlish et al. (2018), Eq. (2.7), at each batch size's own best rate. At B = B_noise both are a half.
    The noise scale B_noise is pooled over the last records, from coherence if it was recorded.

    Args:
        history: records with ``gradient_coherence`` or ``gradient_noise_scale``.
        progress_per_step: the share that is wanted, in (0, 1).
        most: the largest batch that is possible; needed if the gradient is lost in noise.

    Returns:
        The advice.

    Raises:
        ValueError: a value out of range, or no record has what is needed.

    Example:
        >>> history = History()
        >>> history.append(Record(step=0, time_s=0.0, loss=1.0, batch_size=8, values={"gradient_noise_scale": 90.0}))
        >>> advise_batch_size(history).size
        90
    """
    _check(
        0.0 < progress_per_step < 1.0,
        f"progress_per_step={progress_per_step}: must be in (0, 1); 0.5 wastes neither steps nor samples.",
    )
    _check(most is None or most >= 1, f"most={most}: must be at least 1, or None.")
    noise = noise_scale(history)
    _check(
        not math.isnan(noise),
        "no record has gradient_coherence or gradient_noise_scale: one of them is needed; both are among the default "
        "metrics of Diagnostics.",
    )
    size = noise * progress_per_step / (1.0 - progress_per_step)
    _check(
        math.isfinite(size) or most is not None,
        "noise scale inf: the mean gradient is lost in the noise of the recorded batches, so that the advice would be "
        "an endless batch; give the largest that is possible as most=, or measure larger ones.",
    )
    chosen = max(1, round(min(size, math.inf if most is None else most)))
    return BatchAdvice(
        size=chosen,
        noise_scale=noise,
        progress_per_step=1.0 / (1.0 + noise / chosen),
        progress_per_sample=1.0 / (1.0 + chosen / noise) if noise > 0.0 else 0.0,
    )


class _RunningMean:
    """An exponential average that its first value starts without bias."""

    def __init__(self, mean: float = 0.0, weight: float = 0.0) -> None:
        self.mean, self.weight = mean, weight

    def add(self, value: float, smoothing: float) -> None:
        total = smoothing * self.weight + 1.0
        self.mean += (value - self.mean) / total
        self.weight = total


def _curvature_along_gradient(record: Record) -> float:
    """|Hh| / |h| from the condition number along the gradient (Def. 2.5 with 2.7), or the top curvature."""
    values = record.values
    along = (values.get("weight_condition_number", math.nan) * values.get("gradient_norm", math.nan)) / (
        values.get("weight_norm", 0.0) or math.nan
    )
    return top_curvature(record) if math.isnan(along) else along


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
