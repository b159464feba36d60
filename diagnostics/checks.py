"""What can be wrong with a run, one check for each: from records to verdicts.

The thesis (M. V. Nelson, Gradient Conditioning in Deep Neural Networks, 2022) says which way a metric points in
networks that converge, and gives one boundary in numbers (section 4.2.1). The other thresholds are ours, and each
stands below with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.trends import (
    RECENT,
    alike_layers,
    curvature_ratio,
    loss_fall,
    noise_scale,
    recent_median,
    relative_gradients,
    stopped_falling,
)

__all__ = [
    "Verdict",
    "batch_too_large",
    "batch_too_small",
    "collapsed_rank",
    "confusion",
    "dead_layers",
    "exploding",
    "layer_gradients",
    "learning_rate_explains",
    "learning_rate_fault",
    "learning_rate_low",
    "non_finite",
    "shattered",
    "turning_gradient",
]

# lr * curvature / 2 is 1 where a plain gradient step stops to lower a quadratic loss. The curvature of one batch lies
# above that of the whole data, and networks train well around 1 (the "edge of stability"): above 1 explains a loss
# that does not fall, 5 is a fault.
CURVATURE_EXPLAINS, CURVATURE_FAULT, CURVATURE_LOW = 1.0, 5.0, 0.01
# McCandlish et al. 2018: a batch at the noise scale wastes neither steps nor samples; a factor of 10 wastes 90 %.
NOISE_FACTOR = 10.0
LAYER_SPAN = 1e3  # relative gradients of alike layers of a network that trains lie within two decades
DEAD = 1e-12  # of the largest layer's relative gradient: zero, but for rounding
EXPLODED = 100.0  # |g| / |w| of the whole network; networks that train have 0.01 to 10
COLLAPSED_RANK = 1.5  # stable rank; 1 is a batch whose gradients all lie along one line
AGREEING = 0.5  # coherence; gradients that lie along one line since they agree are no fault
SHATTERED_INPUT_RANK = 0.15  # thesis, section 4.2.1: most networks above it at initialisation did not converge
SHATTERED_BATCH = 32  # the ranks of few samples are near 1 whatever the network; the thesis has 64
CONFUSED = 0.5  # the thesis gives no number: two gradients at more than 120 degrees
TURNING = 0.5  # the thesis gives no number: a step of the probe's length turns the gradient by more than 60 degrees

INPUT_RANK = "relative_input_gradient_rank"


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


def non_finite(history: History) -> list[Verdict]:
    """A loss that became nan or inf."""
    bad = [k for k, record in enumerate(history) if not math.isfinite(record.loss)]
    if not bad:
        return []
    record, before = history[bad[0]], history[: bad[0]]
    evidence = {"step": float(record.step)}
    if before:
        evidence["last finite loss"] = before[-1].loss
    sharpness = [ratio for ratio in map(curvature_ratio, before[-RECENT:]) if math.isfinite(ratio)]
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


def dead_layers(history: History) -> list[Verdict]:
    """A layer without any gradient twice in a row: zero-initialised heads have that at the first step alone."""
    if len(history) < 2:
        return []
    rows = [relative_gradients(record) for record in history[-2:]]
    largest = max((value for row in rows for value in row.values()), default=math.nan)
    if not largest > 0.0:
        return []
    dead = [layer for layer in rows[-1] if all(row.get(layer, math.inf) <= DEAD * largest for row in rows)]
    if not dead:
        return []
    # Backwards from the loss the gradient ends at the last dead layer; those before it only follow.
    layer = dead[-1]
    before = [ratio for ratio in map(curvature_ratio, history) if math.isfinite(ratio)]
    killed = bool(before) and max(before) > CURVATURE_EXPLAINS
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
                **({"lr * curvature / 2 at most": max(before)} if killed else {}),
            },
            remedy=("The learning rate was beyond what the curvature bears: lower it. " if killed else "")
            + "Its units, or those behind it, are shut for every sample (ReLU below 0, saturation), or the loss does "
            "not depend on it: smaller biases, a lower learning rate, a leaky activation.",
        )
    ]


def layer_gradients(history: History) -> list[Verdict]:
    """Relative gradients that shrink or grow by a factor of LAYER_SPAN from the output towards the input."""
    rows = [relative_gradients(record) for record in history[-RECENT:]]
    rows = [{layer: value for layer, value in row.items() if value > 0.0} for row in rows]
    common = [layer for layer in (rows[-1] if rows else {}) if all(layer in row for row in rows)]
    typical = {layer: median(row[layer] for row in rows) for layer in common}
    # The widest span of all.
    groups = [[layer for layer in group if layer in typical] for group in alike_layers(history[-1])]
    ends = [(min(group, key=typical.__getitem__), max(group, key=typical.__getitem__)) for group in groups if group]
    low, high = max(ends, key=lambda pair: typical[pair[1]] / typical[pair[0]], default=("", ""))
    if not ends or not typical[high] > LAYER_SPAN * typical[low]:
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


def exploding(history: History) -> list[Verdict]:
    """Gradients that outweigh the weights of the whole network."""

    def relative(record: Record) -> float:
        weights = record.values.get("weight_norm", math.nan)
        return record.values.get("gradient_norm", math.nan) / weights if weights > 0.0 else math.nan

    size = recent_median(history, relative)
    if not size > EXPLODED:
        return []
    return [
        Verdict(
            kind="exploding gradients",
            metric="gradient_norm",
            finding=f"the gradient is {size:.1g} times as long as the weights",
            evidence={"|gradient| / |weights|": size},
            remedy="Scale inputs and targets to about 1, start from smaller weights (He, orthogonal), normalise in "
            "between, or clip gradients.",
        )
    ]


def learning_rate_fault(history: History) -> list[Verdict]:
    """A rate far beyond what the curvature bears, unless the loss falls all the same, as under Adam it may."""
    third = [record.loss for record in history][-(len(history) // 3) :]
    falls = not math.isnan(loss_fall(history)[0]) and median(third) < history[0].loss
    return [] if falls and not stopped_falling(history, since=0) else _learning_rate_high(history, CURVATURE_FAULT)


def learning_rate_explains(history: History) -> list[Verdict]:
    """A rate beyond what the curvature bears; for a loss that no longer falls."""
    return _learning_rate_high(history, CURVATURE_EXPLAINS)


def learning_rate_low(history: History) -> list[Verdict]:
    """A rate far below what the curvature bears; for a loss that never fell."""
    ratio, rate = recent_median(history, curvature_ratio), recent_median(history, _learning_rate)
    if not 0.0 < ratio < CURVATURE_LOW:
        return []
    return [
        Verdict(
            kind="learning rate too low",
            metric="top_curvature",
            finding=f"a rate of {rate:.3g} uses {ratio:.1g} of what the curvature bears, and the loss does not fall",
            evidence={"lr": rate, "2 / curvature": rate / ratio, "lr * curvature / 2": ratio},
            remedy=f"For SGD try {0.3 * rate / ratio:.1g}. (This does not measure steps of Adam and the like.)",
        )
    ]


def batch_too_small(history: History) -> list[Verdict]:
    """Batches far below the noise scale; for a loss that no longer falls."""
    noise, batch = noise_scale(history), float(history[-1].batch_size)
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


def batch_too_large(history: History) -> list[Verdict]:
    """Batches far above the noise scale: nothing is wrong, but samples are wasted."""
    if math.isnan(loss_fall(history)[0]):  # first records are not typical: samples agree before anything is learned
        return []
    noise, batch = noise_scale(history), float(history[-1].batch_size)
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


def collapsed_rank(history: History) -> list[Verdict]:
    """Gradients along one line that do not even agree, of a loss that never fell: something outweighs the samples."""
    if not stopped_falling(history, since=0):  # small batches have that on good ways too, or what is left of a loss
        return []
    batch = float(history[-1].batch_size)
    rank = recent_median(history, _value("relative_gradient_rank"))
    coherence = recent_median(history, _value("gradient_coherence"))
    if not rank * batch < COLLAPSED_RANK or batch < 4 or coherence > AGREEING:
        return []
    return [
        Verdict(
            kind="collapsed gradient rank",
            metric="relative_gradient_rank",
            finding="the gradients of all samples lie along one line, and do not agree",
            evidence={"relative rank": rank, "stable rank": rank * batch, "batch size": batch},
            remedy="One sample or one common direction outweighs all others: centre and scale the inputs, look for an "
            "outlier or a sample that is repeated, and for a loss that is not averaged.",
        )
    ]


def shattered(history: History) -> list[Verdict]:
    """Input gradients like noise at the first record; for a loss that never fell."""
    ranks = [record.values["relative_input_gradient_rank"] for record in history if INPUT_RANK in record.values]
    if not ranks or not ranks[0] > SHATTERED_INPUT_RANK or history[-1].batch_size < SHATTERED_BATCH:
        return []
    return [
        Verdict(
            kind="shattered gradients",
            metric=INPUT_RANK,
            finding="input gradients resembled white noise at the first record, as in most networks of the thesis that "
            "did not converge, and the loss does not fall",
            evidence={"at first": ranks[0], "now": ranks[-1], "boundary of the thesis": SHATTERED_INPUT_RANK},
            remedy="Skip connections, normalisation, fewer layers, or a looks-linear initialisation.",
        )
    ]


def confusion(history: History) -> list[Verdict]:
    """Gradients of samples against each other; for a loss that never fell."""
    confusion = recent_median(history, _value("gradient_confusion"))
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


def turning_gradient(history: History) -> list[Verdict]:
    """Gradients that do not outlast a small step; for a loss that no longer falls."""
    cosine = recent_median(history, _value("weight_gradient_cosine"))
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


def _learning_rate_high(history: History, limit: float) -> list[Verdict]:
    ratio, rate = recent_median(history, curvature_ratio), recent_median(history, _learning_rate)
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


def _value(name: str) -> Callable[[Record], float]:
    return lambda record: record.values.get(name, math.nan)


def _learning_rate(record: Record) -> float:
    return math.nan if record.learning_rate is None else record.learning_rate
