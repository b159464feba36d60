"""Numbers that are read off a whole history: medians of late records, how the loss goes, the noise scale pooled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from statistics import median

from torchgeom_optim.diagnostics.history import History, Record

__all__ = [
    "RECENT",
    "alike_layers",
    "curvature_ratio",
    "loss_fall",
    "noise_scale",
    "recent_median",
    "relative_gradients",
    "stopped_falling",
    "top_curvature",
]

RECENT = 5  # one batch is noisy: what is said about now is a median over so many of the last records
ENOUGH_TO_JUDGE = 6  # records before anything is said about whether the loss falls
STALLED_FALL = 0.02  # a loss that falls by a smaller share from one third of the records to the last does not fall


def recent_median(history: History, of: Callable[[Record], float]) -> float:
    """Median of a number's last ``RECENT`` finite values.

    Args:
        history: records of one run.
        of: the number of a record, nan where it has none.

    Returns:
        The median, nan without any.
    """
    finite = [value for value in map(of, history) if math.isfinite(value)]
    return median(finite[-RECENT:]) if finite else math.nan


def loss_fall(history: History, since: int = 0) -> tuple[float, float]:
    """By how much the loss fell, as a share: median of the last third of the records against that of an earlier one.

    Args:
        history: records of one run.
        since: 0 for the first third, 1 for the middle one.

    Returns:
        The share, and its standard error as the spread within the thirds has it; nan with too few records to say.
    """
    then, now = _thirds(history, since)
    if not then:
        return math.nan, math.nan
    start = median(then)
    if not start:
        return 0.0, 0.0
    # From a median absolute deviation of each third, 1.48 of which is a standard deviation, 1.25 that of a median.
    deviations = [median(abs(loss - median(part)) for loss in part) for part in (then, now)]
    error = 1.48 * 1.25 * math.hypot(*deviations) / math.sqrt(len(now))
    return (start - median(now)) / abs(start), error / abs(start)


def stopped_falling(history: History, since: int = 1) -> bool:
    """Whether the loss has not fallen since a third of the records, by more than a little and more than by chance.

    Args:
        history: records of one run.
        since: 1 asks whether it falls any more, 0 whether it fell at all.

    Returns:
        False with too few records to say.
    """
    fall, error = loss_fall(history, since)
    then, now = _thirds(history, since)
    # Where all late losses lie below all early ones, what spreads within the thirds is the fall itself.
    chance = 0.0 if then and max(now) < min(then) else error
    return fall <= max(STALLED_FALL, chance)


def _thirds(history: History, since: int) -> tuple[list[float], list[float]]:
    """The finite losses of an earlier third of the records and of the last one; nothing with too few to judge."""
    losses = [record.loss for record in history if math.isfinite(record.loss)]
    if len(losses) < ENOUGH_TO_JUDGE:
        return [], []
    third = len(losses) // 3
    return losses[since * third : (since + 1) * third], losses[-third:]


def top_curvature(record: Record) -> float:
    """The Hessian's largest eigenvalue, units loss / parameter^2.

    Args:
        record: with ``top_curvature``; or with a condition number and both norms, from which it is at least
            kappa |g| / |w| (Def. 2.4).

    Returns:
        The curvature, nan where the record has neither.
    """
    values = record.values
    known = values.get("top_curvature", math.nan)
    if not math.isnan(known) or not values.get("weight_norm", 0.0) > 0.0:
        return known
    kappa = values.get("weight_condition_number_exact", values.get("weight_condition_number", math.nan))
    return kappa * values.get("gradient_norm", math.nan) / values["weight_norm"]


def curvature_ratio(record: Record) -> float:
    """The learning rate in units of 2 / curvature: above 1 a gradient step on a quadratic loss makes it grow.

    Args:
        record: one record.

    Returns:
        lr * curvature / 2, nan without a learning rate or a curvature.
    """
    return math.nan if record.learning_rate is None else record.learning_rate * top_curvature(record) / 2.0


def noise_scale(history: History) -> float:
    """Gradient noise scale tr(S) / |G|^2 over the last ``RECENT`` records, both averaged before they are divided.

    From the coherence c over b samples: tr(S) is proportional to b (1 - c) and |G|^2 to b c - 1, both unbiased
    (McCandlish et al. 2018, appendix A.1, in terms of Def. 3.13). Where coherence was not recorded, the median of the
    records' own noise scales.

    Args:
        history: records of one run.

    Returns:
        The noise scale in samples; inf where the mean gradient is lost in the noise, nan where nothing was recorded.
    """
    coherences = [(record.values.get("gradient_coherence", math.nan), record.batch_size) for record in history]
    pairs = [(c, b) for c, b in coherences if math.isfinite(c) and b > 1][-RECENT:]
    if not pairs:
        scales = [record.values.get("gradient_noise_scale", math.nan) for record in history]
        known = [scale if scale >= 0.0 else math.inf for scale in scales if not math.isnan(scale)]
        return median(known[-RECENT:]) if known else math.nan
    signal = sum(b * c - 1.0 for c, b in pairs)
    return sum(b * (1.0 - c) for c, b in pairs) / signal if signal > 0.0 else math.inf


def relative_gradients(record: Record) -> dict[str, float]:
    """Layer by layer, the gradient's norm over the weights', in the order of the record, units loss / parameter^2.

    Args:
        record: one record.

    Returns:
        Layer -> |g| / |w|; layers whose weights vanish, or without a finite number, are left out.
    """
    gradients, weights = record.layers.get("gradient_norm", {}), record.layers.get("weight_norm", {})
    ratios = {layer: g / weights[layer] for layer, g in gradients.items() if weights.get(layer, 0.0) > 0.0}
    return {layer: ratio for layer, ratio in ratios.items() if math.isfinite(ratio)}


def alike_layers(record: Record) -> list[list[str]]:
    """Layers that can be compared over depth: matrices, by their names without numbers.

    In a healthy transformer relative gradients span four decades, as its normalisations have gains of 1 where its
    matrices start at 0.02, and what writes to the residual stream at less; over its depth each kind spans one.

    Args:
        record: one record.

    Returns:
        Groups in the order of the record, as ``h.0.attn`` and ``h.1.attn``; what has no like is a group together.
    """
    kinds: dict[str, list[str]] = {}
    for layer in relative_gradients(record):
        if layer not in record.vector_layers:
            kinds.setdefault(re.sub(r"\d+", "#", layer), []).append(layer)
    return [group for group in kinds.values() if len(group) > 1] + [
        [layer for group in kinds.values() if len(group) == 1 for layer in group]
    ]
