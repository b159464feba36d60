"""What a person would do about the numbers: typed verdicts, and the same in words.

Each verdict stands on numbers of its own and is silent without them. Two kinds are told apart. *Faults* hold by
themselves: a loss that is no number, a layer without gradient. *Explanations* are values that many networks have on
their way to a good end, so that they count only where the loss has stopped falling and no fault explains that.

The thesis (gradient_conditioning_thesis, M. V. Nelson, 2022) says which way a metric points in networks that
converge, and gives one boundary in numbers (section 4.2.1, the input gradients' rank at initialisation). The other
thresholds are ours; each stands below with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from torchgeom_optim.diagnostics.history import History, Record

__all__ = ["Verdict", "summary", "verdicts"]

RECENT = 5  # a verdict looks at the medians of the last so many records: one batch is noisy
ENOUGH_TO_JUDGE = 6  # records before anything is said about whether the loss falls
STALLED_FALL = 0.02  # a loss that fell by less than this share, last third against first third, has stopped falling
# lr * curvature / 2 is 1 where a plain gradient step stops to lower a quadratic loss. The curvature of one batch lies
# above that of the whole data, and networks train well around 1 (the "edge of stability"): above 1 explains a loss
# that does not fall, 5 is a fault.
CURVATURE_EXPLAINS, CURVATURE_FAULT, CURVATURE_LOW = 1.0, 5.0, 0.01
# McCandlish et al. 2018: a batch at the noise scale wastes neither steps nor samples; a factor of 10 wastes 90 %.
NOISE_FACTOR = 10.0
LAYER_SPAN = 1e3  # relative gradients of the layers of a network that trains lie within two decades
DEAD = 1e-12  # of the largest layer's relative gradient: zero, but for rounding
COLLAPSED_RANK = 1.25  # stable rank; 1 is a batch whose gradients all point along one line
SHATTERED_INPUT_RANK = 0.15  # thesis, section 4.2.1: most networks above it at initialisation did not converge
CONFUSED = 0.5  # the thesis gives no number: gradients of two groups at more than 120 degrees
TURNING = 0.5  # the thesis gives no number: a step of the probe's length turns the gradient by more than 60 degrees


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One finding.

    Args:
        kind: short name, the same whatever the numbers ("learning rate too high").
        metric: the metric that it stands on.
        layer: where it comes from; None is the whole network.
        finding: what was found, a sentence.
        evidence: the numbers behind it.
        remedy: what usually helps, a sentence.
    """

    kind: str
    metric: str
    finding: str
    remedy: str
    layer: str | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.evidence.items())
        return f"{self.kind}{where}: {self.finding} ({numbers}). {self.remedy}"


def verdicts(history: History) -> list[Verdict]:
    """All that stands out in a history, faults first.

    Args:
        history: records of one run.

    Returns:
        Verdicts; none if nothing stands out. Explanations of a loss that does not fall are left out while a fault
        explains it.

    Example:
        >>> from torchgeom_optim.diagnostics.history import History, Record
        >>> history = History()
        >>> history.append(Record(step=0, time_s=0.0, loss=float("nan"), batch_size=8, values={}))
        >>> [verdict.kind for verdict in verdicts(history)]
        ['loss is no number']
    """
    if not len(history):
        return []
    faults = [verdict for check in _FAULTS for verdict in check(history)]
    if faults:
        return faults
    hints = [verdict for check in _HINTS for verdict in check(history)]
    return hints + ([verdict for check in _EXPLANATIONS for verdict in check(history)] if _stalled(history) else [])


def summary(history: History) -> str:
    """The verdicts in plain words, under a line that says how the run went.

    Args:
        history: records of one run.

    Returns:
        Some lines of text, without a closing line break.
    """
    if not len(history):
        return "No records yet."
    first, last = history[0], history[-1]
    lines = [f"{len(history)} records, steps {first.step} to {last.step}; loss {first.loss:.4g} to {last.loss:.4g}."]
    found = verdicts(history)
    lines += [f"- {verdict}" for verdict in found]
    if not found:
        fell = _loss_fall(history)
        lines.append(
            "Too few records to say whether the loss falls; nothing else stands out."
            if math.isnan(fell)
            else "The loss falls, and nothing stands out."
            if fell > STALLED_FALL
            else "The loss does not fall, and none of the recorded metrics says why."
        )
    missing = [f"{what} ({needs})" for what, needs, there in _coverage(history) if not there]
    if missing:
        lines.append(f"Not looked at, for want of records: {'; '.join(missing)}.")
    notes = dict.fromkeys(note for record in history for note in record.notes)
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])


def _non_finite(history: History) -> list[Verdict]:
    bad = [k for k, record in enumerate(history) if not math.isfinite(record.loss)]
    if not bad:
        return []
    record, before = history[bad[0]], history[: bad[0]]
    evidence = {"step": float(record.step)}
    if before:
        evidence["last finite loss"] = before[-1].loss
    sharpness = [ratio for ratio in map(_curvature_ratio, before[-RECENT:]) if math.isfinite(ratio)]
    if sharpness:
        evidence["lr * curvature / 2 before"] = max(sharpness)
    steep = bool(sharpness) and max(sharpness) > CURVATURE_EXPLAINS
    return [
        Verdict(
            kind="loss is no number",
            metric="loss",
            finding=f"the loss became {record.loss} at step {record.step}",
            evidence=evidence,
            remedy="The learning rate was beyond what the curvature bears: start from a smaller one, or warm it up."
            if steep
            else "Look for a log or a division of 0 and for half precision without a loss scale; else start from a "
            "smaller learning rate, or clip gradients.",
        )
    ]


def _dead_layers(history: History) -> list[Verdict]:
    """A layer without any gradient twice in a row: zero-initialised heads have that at the first step alone."""
    if len(history) < 2:
        return []
    rows = [_relative_gradients(record) for record in history[-2:]]
    largest = max((value for row in rows for value in row.values()), default=math.nan)
    if not largest > 0.0:
        return []
    dead = [layer for layer in rows[-1] if all(row.get(layer, math.inf) <= DEAD * largest for row in rows)]
    if not dead:
        return []
    order = list(rows[-1])
    # Backwards from the loss the gradient ends at the last dead layer; those before it only follow.
    alive_after = [layer for layer in dead if order.index(layer) + 1 < len(order)]
    layer = (alive_after or dead)[-1]
    return [
        Verdict(
            kind="dead layer",
            metric="gradient_norm",
            layer=layer,
            finding=f"no gradient reaches it, nor {len(dead) - 1} other layers"
            if len(dead) > 1
            else "its gradient is 0",
            evidence={
                "relative gradient": max(row[layer] for row in rows),
                "largest of all layers": largest,
                "dead layers": float(len(dead)),
            },
            remedy="Its units, or those behind it, are shut for every sample (ReLU below 0, saturation): initialise "
            "anew with smaller biases, lower the learning rate, or take a leaky activation.",
        )
    ]


def _layer_gradients(history: History) -> list[Verdict]:
    """Relative gradients that shrink or grow by a factor of LAYER_SPAN from the output towards the input."""
    rows = [_relative_gradients(record) for record in history[-RECENT:]]
    rows = [{layer: value for layer, value in row.items() if value > 0.0} for row in rows]
    common = [layer for layer in (rows[-1] if rows else {}) if all(layer in row for row in rows)]
    if len(common) < 2:
        return []
    typical = {layer: median(row[layer] for row in rows) for layer in common}
    low, high = min(common, key=typical.__getitem__), max(common, key=typical.__getitem__)
    if not typical[high] > LAYER_SPAN * typical[low]:
        return []
    vanishing = common.index(low) < common.index(high)
    return [
        Verdict(
            kind="vanishing gradients" if vanishing else "exploding gradients",
            metric="gradient_norm",
            layer=low if vanishing else high,
            finding=f"its gradient is {typical[low] / typical[high]:.1g} of that of {high}, relative to the weights"
            if vanishing
            else f"its gradient is {typical[high] / typical[low]:.1g} times that of {low}, relative to the weights",
            evidence={f"relative gradient of {layer}": typical[layer] for layer in (low, high)},
            remedy="Skip connections or normalisation keep gradients of one size over depth, as does an initialisation "
            "that suits the activation (He for ReLU, orthogonal, looks-linear)."
            + ("" if vanishing else " Clipping gradients helps against the worst."),
        )
    ]


def _learning_rate_fault(history: History) -> list[Verdict]:
    return _learning_rate_high(history, CURVATURE_FAULT)


def _learning_rate_explains(history: History) -> list[Verdict]:
    too_high = _learning_rate_high(history, CURVATURE_EXPLAINS)
    ratio = _typical(history, _curvature_ratio)
    if too_high or not ratio < CURVATURE_LOW:
        return too_high
    rate = _typical(history, _learning_rate)
    return [
        Verdict(
            kind="learning rate too low",
            metric="top_curvature",
            finding=f"a rate of {rate:.3g} uses {ratio:.1g} of what the curvature bears, and the loss does not fall",
            evidence={"lr": rate, "2 / curvature": rate / ratio, "lr * curvature / 2": ratio},
            remedy=f"For SGD try {0.3 * rate / ratio:.1g}. (This does not measure steps of Adam and the like.)",
        )
    ]


def _learning_rate_high(history: History, limit: float) -> list[Verdict]:
    ratio, rate = _typical(history, _curvature_ratio), _typical(history, _learning_rate)
    if not ratio > limit:
        return []
    return [
        Verdict(
            kind="learning rate too high",
            metric="top_curvature",
            finding=f"the curvature bears steps up to 2 / curvature = {rate / ratio:.3g}, the rate is {rate:.3g}",
            evidence={"lr": rate, "2 / curvature": rate / ratio, "lr * curvature / 2": ratio},
            remedy=f"For SGD try {0.5 * rate / ratio:.1g}, or less with momentum; a warm-up or normalisation lets the "
            "curvature come down first.",
        )
    ]


def _batch_too_small(history: History) -> list[Verdict]:
    noise, batch = _noise_scale(history), float(history[-1].batch_size)
    if not noise > NOISE_FACTOR * batch:
        return []
    return [
        Verdict(
            kind="batch too small",
            metric="gradient_noise_scale",
            finding=f"batches of {batch:.0f} are noise for the most part, and the loss does not fall",
            evidence={"batch size": batch, "noise scale": noise},
            remedy="Larger batches, accumulated ones too, or a smaller learning rate, which averages over more.",
        )
    ]


def _batch_too_large(history: History) -> list[Verdict]:
    if len(history) < ENOUGH_TO_JUDGE:
        return []
    noise, batch = _noise_scale(history), float(history[-1].batch_size)
    if not NOISE_FACTOR * noise < batch:
        return []
    return [
        Verdict(
            kind="batch larger than needed",
            metric="gradient_noise_scale",
            finding=f"the samples of a batch of {batch:.0f} say the same: a smaller one gives nearly the same gradient",
            evidence={"batch size": batch, "noise scale": noise},
            remedy=f"Batches of {max(1.0, NOISE_FACTOR * noise):.0f} make nearly the same steps for less.",
        )
    ]


def _collapsed_rank(history: History) -> list[Verdict]:
    batch = float(history[-1].batch_size)
    rank = _typical(history, _value("relative_gradient_rank"))
    if not rank * batch < COLLAPSED_RANK or batch < 4:
        return []
    return [
        Verdict(
            kind="collapsed gradient rank",
            metric="relative_gradient_rank",
            finding="the gradients of all samples lie along one line",
            evidence={"relative rank": rank, "stable rank": rank * batch, "batch size": batch},
            remedy="One sample or one common direction outweighs all others: centre and scale the inputs, look for an "
            "outlier or a sample that is repeated, and for a loss that is not averaged.",
        )
    ]


def _shattered(history: History) -> list[Verdict]:
    ranks = [record.values["relative_input_gradient_rank"] for record in history if _INPUT_RANK in record.values]
    if not ranks or not ranks[0] > SHATTERED_INPUT_RANK:
        return []
    return [
        Verdict(
            kind="shattered gradients",
            metric=_INPUT_RANK,
            finding="input gradients resembled white noise at the first record, as in most networks of the thesis that "
            "did not converge, and the loss does not fall",
            evidence={"at first": ranks[0], "now": ranks[-1], "boundary of the thesis": SHATTERED_INPUT_RANK},
            remedy="Skip connections, normalisation, fewer layers, or a looks-linear initialisation.",
        )
    ]


def _confusion(history: History) -> list[Verdict]:
    confusion = _typical(history, _value("gradient_confusion"))
    if not confusion > CONFUSED:
        return []
    return [
        Verdict(
            kind="gradient confusion",
            metric="gradient_confusion",
            finding="what lowers the loss of some samples raises that of others, and the loss does not fall",
            evidence={"confusion": confusion},
            remedy="Skip connections or normalisation, wider or fewer layers; larger batches against what is left.",
        )
    ]


def _turning_gradient(history: History) -> list[Verdict]:
    cosine = _typical(history, _value("weight_gradient_cosine"))
    if not cosine < TURNING:
        return []
    return [
        Verdict(
            kind="inconsistent steps",
            metric="weight_gradient_cosine",
            finding="a small step turns the gradient, so that a step does not lead where the gradient points",
            evidence={"cosine": cosine},
            remedy="A smaller learning rate; normalisation or skip connections, which smooth the loss.",
        )
    ]


_INPUT_RANK = "relative_input_gradient_rank"
_Check = Callable[[History], list[Verdict]]
_FAULTS: tuple[_Check, ...] = (_non_finite, _dead_layers, _layer_gradients, _learning_rate_fault, _collapsed_rank)
_HINTS: tuple[_Check, ...] = (_batch_too_large,)
_EXPLANATIONS: tuple[_Check, ...] = (
    _learning_rate_explains,
    _batch_too_small,
    _turning_gradient,
    _confusion,
    _shattered,
)


def _coverage(history: History) -> list[tuple[str, str, bool]]:
    """What can be looked at, what it needs, and whether a record has it."""

    def has(*names: str) -> bool:
        return any(name in record.values for record in history for name in names)

    curvature = any(math.isfinite(_curvature_ratio(record)) for record in history)
    return [
        ("learning rate", "top_curvature and an optimizer", curvature),
        ("batch size", "gradient_noise_scale", has("gradient_noise_scale", "gradient_coherence")),
        ("layers", "gradient_norm and weight_norm by layer", any(_relative_gradients(record) for record in history)),
        ("rank", "relative_gradient_rank", has("relative_gradient_rank")),
        ("confusion", "gradient_confusion", has("gradient_confusion")),
        ("shattered gradients", _INPUT_RANK, has(_INPUT_RANK)),
        ("consistency of steps", "weight_gradient_cosine", has("weight_gradient_cosine")),
    ]


def _loss_fall(history: History) -> float:
    """Share by which the loss fell, median of the last third against that of the first; nan where it cannot be said."""
    losses = [record.loss for record in history if math.isfinite(record.loss)]
    if len(losses) < ENOUGH_TO_JUDGE:
        return math.nan
    third = len(losses) // 3
    first, last = median(losses[:third]), median(losses[-third:])
    return (first - last) / abs(first) if first else 0.0


def _stalled(history: History) -> bool:
    return _loss_fall(history) <= STALLED_FALL


def _value(name: str) -> Callable[[Record], float]:
    return lambda record: record.values.get(name, math.nan)


def _learning_rate(record: Record) -> float:
    return math.nan if record.learning_rate is None else record.learning_rate


def _curvature_ratio(record: Record) -> float:
    """The rate in units of 2 / lambda; without lambda, lambda >= kappa |g| / |w| from a condition number (Def. 2.4)."""
    values = record.values
    curvature = values.get("top_curvature", math.nan)
    if math.isnan(curvature) and values.get("weight_norm", 0.0) > 0.0:
        kappa = values.get("weight_condition_number_exact", values.get("weight_condition_number", math.nan))
        curvature = kappa * values.get("gradient_norm", math.nan) / values["weight_norm"]
    return _learning_rate(record) * curvature / 2.0


def _typical(history: History, of: Callable[[Record], float]) -> float:
    """Median of a number's last RECENT finite values, nan without any."""
    finite = [value for value in map(of, history) if math.isfinite(value)]
    return median(finite[-RECENT:]) if finite else math.nan


def _noise_scale(history: History) -> float:
    """tr(Sigma) / |G|^2 over the last records, numerator and denominator averaged apart."""
    # With coherence c over b samples tr(Sigma) is proportional to b(1 - c) and |G|^2 to bc - 1, both unbiased. Averages
    # of the two are steadier than one of their quotient. A denominator that is not positive means noise alone.
    recent = [(record.values.get("gradient_coherence", math.nan), record.batch_size) for record in history]
    pairs = [(c, b) for c, b in recent if math.isfinite(c) and b > 1][-RECENT:]
    if not pairs:
        scales = [record.values.get("gradient_noise_scale", math.nan) for record in history]
        known = [scale if scale >= 0.0 else math.inf for scale in scales if not math.isnan(scale)]
        return median(known[-RECENT:]) if known else math.nan
    numerator = sum(b * (1.0 - c) for c, b in pairs)
    denominator = sum(b * c - 1.0 for c, b in pairs)
    return numerator / denominator if denominator > 0.0 else math.inf


def _relative_gradients(record: Record) -> dict[str, float]:
    """Layer -> |g| / |w|, in the order of the record; layers without weights or a finite number are left out."""
    gradients, weights = record.layers.get("gradient_norm", {}), record.layers.get("weight_norm", {})
    ratios = {layer: g / weights[layer] for layer, g in gradients.items() if weights.get(layer, 0.0) > 0.0}
    return {layer: ratio for layer, ratio in ratios.items() if math.isfinite(ratio)}
