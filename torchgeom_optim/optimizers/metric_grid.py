"""Which metrics there are, which blocks each can be cut into, and what it has to see."""

from __future__ import annotations

from typing import Literal, cast

from torchgeom_optim.geometry.metric import BLOCKS, Block
from torchgeom_optim.optimizers.layer_factors import FactorKind

__all__ = [
    "FINEST_BLOCK",
    "FROM_GRADIENTS",
    "OF_INPUTS",
    "OF_SAMPLES",
    "WITH_MATRICES",
    "Metric",
    "check_combination",
    "kind_of_factors",
    "without_layer",
]

Metric = Literal[
    "identity",
    "diagonal",
    "fisher_diagonal",
    "quasi_diagonal",
    "fisher_quasi_diagonal",
    "whitening",
    "scale_free_whitening",
    "kronecker",
    "kronecker_diagonal",
    "exact",
]

FINEST_BLOCK: dict[str, Block] = {
    "identity": "weight",
    "diagonal": "weight",
    "fisher_diagonal": "weight",
    "quasi_diagonal": "unit",
    "fisher_quasi_diagonal": "unit",
    "whitening": "unit",
    "scale_free_whitening": "unit",
    "kronecker": "layer",
    "kronecker_diagonal": "unit",
    "exact": "layer",
}
FROM_GRADIENTS = ("identity", "diagonal", "quasi_diagonal")  # need nothing but p.grad
OF_INPUTS = ("whitening", "scale_free_whitening")  # made of their mean and variance
WITH_MATRICES = ("kronecker", "kronecker_diagonal", "exact")  # which are inverted now and then, and may refuse to be
OF_SAMPLES = ("fisher_diagonal", "fisher_quasi_diagonal", *WITH_MATRICES)  # means over the samples' gradients


def kind_of_factors(metric: str, expectation: str) -> FactorKind | None:
    """What is to be taken from a layer's call, besides its inputs' mean and variance.

    Args:
        metric: one of the names above.
        expectation: "per_sample" looks at the samples' gradients, whatever the metric is made of.

    Returns:
        The kind, or None for nothing.
    """
    if metric in WITH_MATRICES:
        return cast(FactorKind, metric)
    if metric not in OF_SAMPLES and expectation != "per_sample":
        return None
    return "moments_with_row" if metric.endswith("quasi_diagonal") or metric in OF_INPUTS else "moments"


def without_layer(metric: str) -> Metric:
    """What a parameter without a layer gets in the place of a metric, as nobody sees its inputs."""
    return "diagonal" if metric.endswith("diagonal") and "kronecker" not in metric else "identity"


def check_combination(metric: str, block: str, expectation: str) -> None:
    """Refuse what makes no sense together.

    Args:
        metric: one of the names above.
        block: a block, or "network".
        expectation: "average", "per_sample" or "fan_in".

    Raises:
        ValueError: the metric couples parameters of different blocks, or the expectation is not one of this metric.
    """
    finest = FINEST_BLOCK[metric]
    if block in BLOCKS[: BLOCKS.index(finest)]:
        raise ValueError(
            f"metric={metric!r} with block={block!r}: this metric couples the parameters of one {finest}; need blocks "
            f"that it does not couple: try block={finest!r}, or metric='diagonal'."
        )
    if expectation == "fan_in" and (block != "unit" or metric not in ("identity", "whitening")):
        raise ValueError(
            f"expectation='fan_in' with metric={metric!r}, block={block!r}: need block='unit' and metric 'identity' or "
            "'whitening', for which §3.5 derives it; try expectation='average'."
        )
