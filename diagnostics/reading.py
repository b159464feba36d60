"""What a person would make of a history: typed verdicts, and the same in words.

Each verdict stands on numbers of its own and is silent without them. Two kinds are told apart. *Faults* hold by
themselves: a loss that is no number, a layer without gradient. *Explanations* are values that many networks have on
their way to a good end: they count only where the loss has stopped falling, or never fell, and no fault explains that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torchgeom_optim.diagnostics import checks
from torchgeom_optim.diagnostics.checks import Verdict
from torchgeom_optim.diagnostics.history import History
from torchgeom_optim.diagnostics.trends import curvature_ratio, loss_fall, relative_gradients, stopped_falling

__all__ = ["Verdict", "summary", "verdicts"]

_Check = Callable[[History], list[Verdict]]
_FAULTS: tuple[_Check, ...] = (
    checks.non_finite,
    checks.dead_layers,
    checks.layer_gradients,
    checks.exploding,
    checks.learning_rate_fault,
    checks.collapsed_rank,
)
# Of a loss that no longer falls.
_OF_A_PLATEAU: tuple[_Check, ...] = (checks.learning_rate_explains, checks.batch_too_small, checks.turning_gradient)
# Of one that never did: the first that speaks, the surest first. Networks that train well can have the last two.
_OF_NO_START: tuple[_Check, ...] = (checks.learning_rate_low, checks.confusion, checks.shattered)


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
    found = checks.batch_too_large(history)
    explanations: list[Verdict] = []
    if stopped_falling(history) or stopped_falling(history, since=0):
        explanations = [verdict for check in _OF_A_PLATEAU for verdict in check(history)]
    if not explanations and stopped_falling(history, since=0):
        explanations = next((said for check in _OF_NO_START if (said := check(history))), [])
    return found + explanations


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
        lines.append(
            "Too few records to say whether the loss falls; nothing else stands out."
            if math.isnan(loss_fall(history)[0])
            else "The loss does not fall any more, and none of the recorded metrics says why."
            if stopped_falling(history)
            else "The loss falls, and nothing stands out."
        )
    missing = [f"{what} ({needs})" for what, needs, there in _coverage(history) if not there]
    if missing:
        lines.append(f"Not looked at, for want of records: {'; '.join(missing)}.")
    notes = dict.fromkeys(note for record in history for note in record.notes)
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])


def _coverage(history: History) -> list[tuple[str, str, bool]]:
    """What can be looked at, what it needs, and whether a record has it."""

    def has(*names: str) -> bool:
        return any(name in record.values for record in history for name in names)

    curvature = any(math.isfinite(curvature_ratio(record)) for record in history)
    return [
        ("learning rate", "top_curvature and an optimizer", curvature),
        ("batch size", "gradient_noise_scale", has("gradient_noise_scale", "gradient_coherence")),
        ("layers", "gradient_norm and weight_norm by layer", any(relative_gradients(record) for record in history)),
        ("rank", "relative_gradient_rank", has("relative_gradient_rank")),
        ("confusion", "gradient_confusion", has("gradient_confusion")),
        ("shattered gradients", checks.INPUT_RANK, has(checks.INPUT_RANK)),
        ("consistency of steps", "weight_gradient_cosine", has("weight_gradient_cosine")),
    ]
