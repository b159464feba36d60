"""The metrics by name, the presets, and what each metric has to be computed from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

__all__ = ["METRICS", "PRESETS", "MetricsChoice", "Preset", "chosen_metrics"]

Preset: TypeAlias = Literal["free", "default", "cheap", "full"]
MetricsChoice: TypeAlias = "Preset | Iterable[str]"

#: Metric -> where it comes from:
#: "gram" the Gram matrix of the batch's gradients, which rides on the loop's own pass;
#: "weights" the weights as they are; "step" two optimizer steps in a row;
#: "moves" gradients at moved weights, a pass each; "inputs" one backward pass to the inputs;
#: "input_moves" passes of single samples at moved inputs; "hessian" Hessian-vector products; "spectrum" C backward
#: passes and an eigendecomposition.
METRICS: dict[str, str] = {
    "gradient_confusion": "gram",
    "gradient_diversity": "gram",
    "gradient_coherence": "gram",
    "relative_gradient_rank": "gram",
    "gradient_noise_scale": "gram",
    "gradient_norm": "gram",
    "fisher_trace": "gram",
    "weight_norm": "weights",
    "weight_condition_number_two_step": "step",
    "weight_condition_number": "moves",
    "weight_gradient_cosine": "moves",
    "weight_gradient_diversity": "moves",
    "weight_gradient_coherence": "moves",
    "relative_input_gradient_rank": "inputs",
    "input_condition_number": "input_moves",
    "weight_condition_number_exact": "hessian",
    "top_curvature": "hessian",
    "spectrum": "spectrum",
}

_DEFAULT = (*(name for name, source in METRICS.items() if source == "gram"), "weight_norm")
_CHEAP = (*_DEFAULT, *(name for name, source in METRICS.items() if source in ("step", "moves", "inputs")))

#: Preset -> its metrics, from the cheapest to the dearest.
PRESETS: dict[str, tuple[str, ...]] = {
    # No product and no pass of their own: the optimizer's own weights and gradients, two steps in a row.
    "free": ("weight_norm", "gradient_norm", "weight_condition_number_two_step"),
    # One Gram matrix on the loop's own backward pass.
    "default": _DEFAULT,
    # And about four further passes over the batch.
    "cheap": _CHEAP,
    # And tens of them.
    "full": tuple(name for name in METRICS if name != "spectrum"),
}


def chosen_metrics(metrics: MetricsChoice) -> tuple[str, ...]:
    """A preset or a list of metrics and presets, as names of metrics.

    Args:
        metrics: "free", "default", "cheap", "full"; or names of metrics and presets, ``"spectrum"`` among them.

    Returns:
        The metrics, each once, in the order of :data:`METRICS`.

    Raises:
        ValueError: an unknown name, or none at all.

    Example:
        >>> chosen_metrics(["free", "gradient_diversity"])
        ('gradient_diversity', 'gradient_norm', 'weight_norm', 'weight_condition_number_two_step')
    """
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    chosen: set[str] = set()
    for name in names:
        if name in PRESETS:
            chosen.update(PRESETS[name])
        elif name in METRICS:
            chosen.add(name)
        else:
            known = [*get_args(Preset), *METRICS]
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "'default' is a common start."
            raise ValueError(f"metrics={name!r}: must be among {', '.join(known)}; {hint}")
    if not chosen:
        raise ValueError(f"metrics={metrics!r}: at least one is needed; 'default' is a common start.")
    return tuple(name for name in METRICS if name in chosen)
