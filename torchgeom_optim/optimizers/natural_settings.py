"""What can be set about a BlockNaturalGradient: the checks, and the measured values of what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchgeom_optim.geometry.metric import BLOCKS
from torchgeom_optim.optimizers.hyperparameters import check_choice, check_interval, check_range, check_sgd_settings
from torchgeom_optim.optimizers.metric_grid import FINEST_BLOCK, WITH_MATRICES

__all__ = ["Interval", "check_group", "check_once", "default_damping", "default_lr"]

Interval = int | Callable[[int], int]

# Lengths of a step with which no loss of mlp2, lenet and char_gpt after 100 steps, decaying to 0, was far from that of
# the network's own best (benchmarks/does_the_natural_gradient_lower_the_loss.py): the half-decade whose worst ratio to
# it is least, or the next lower one where that is close to divergence.
_RATES: dict[tuple[str, str], float] = {
    ("identity", "weight"): 0.001,
    ("identity", "layer"): 1.0,
    ("identity", "network"): 1.0,
    ("diagonal", "layer"): 0.001,
    ("fisher_diagonal", "layer"): 0.003,
    ("quasi_diagonal", "unit"): 0.0003,
    ("fisher_quasi_diagonal", "unit"): 0.003,
    ("whitening", "unit"): 0.03,
    ("whitening", "layer"): 0.1,
    ("scale_free_whitening", "unit"): 0.01,
    ("kronecker", "layer"): 0.03,
    ("kronecker", "network"): 0.03,
    ("kronecker_diagonal", "unit"): 0.003,
}
# Likewise: with 0.01 matrices diverge on lenet, and metrics of mini-batch gradients are unstable.
_DAMPING = {**dict.fromkeys((*WITH_MATRICES, "quasi_diagonal", "fisher_quasi_diagonal"), 1.0), "diagonal": 0.1}


def check_once(settings: Mapping[str, Any]) -> None:
    """Check what is the same for all groups.

    Args:
        settings: by their names in the constructor.

    Raises:
        ValueError: not one of the choices, or out of its range.
        TypeError: an interval that is none.
    """
    check_choice(settings, "metric", tuple(FINEST_BLOCK), "for all groups")
    check_choice(settings, "block", (*BLOCKS, "network"), "for all groups")
    check_choice(settings, "norm_start", ("first", "zero"), "for all groups")
    check_choice(settings, "expectation", ("average", "per_sample", "fan_in"), "for all groups")
    check_choice(settings, "loss_reduction", ("mean", "sum"), "as the loss treats samples")
    check_interval(settings["factor_interval"], "factor_interval")
    check_interval(settings["inverse_interval"], "inverse_interval")
    loss_scale: float | Tensor | Callable[[], float | Tensor] = settings["loss_scale"]
    if not callable(loss_scale) and not 0.0 < float(loss_scale) < math.inf:
        raise ValueError(f"loss_scale={loss_scale}: must be in (0, inf). Try scaler.get_scale, or 1 without a scaler.")


def check_group(group: Mapping[str, Any], where: str, metric: str) -> None:
    """Check the hyper-parameters of a group.

    Args:
        group: by name.
        where: how messages call the group.
        metric: of the optimizer, which is the group's rule unless that is "sgd".

    Raises:
        ValueError: a value out of its range.
        TypeError: a value of the wrong type.
    """
    check_range(group, "lr", where, hint="0.03 is a common start.")
    check_sgd_settings(group, where)
    check_range(group, "eps", where, hint="0 gives steps of exactly the wanted length.")
    check_range(group, "norm_decay", where, high=1.0, hint="0.95 averages over about 20 steps, 0 over one.")
    check_range(group, "decay", where, high=1.0, hint="0.95 averages over about 20 steps.")
    check_range(group, "damping", where, hint="1 for matrices and quasi-diagonals, 0.01 for others is a start.")
    check_choice(group, "rule", (metric, "sgd"), where)
    if metric == "quasi_diagonal" and group["damping"] == 0:
        raise ValueError(
            f"damping=0 ({where}): the quasi-diagonal metric of one batch is singular; need damping > 0. "
            "1 is the default."
        )


def default_lr(metric: str, block: str, expectation: str, momentum: float = 0.0) -> float:
    """A length of the step that suited three networks, without momentum; times 1 - momentum with it.

    Args:
        metric: one of the names above.
        block: a block, or "network".
        expectation: "average", with which they were measured; others have another scale.
        momentum: with which a direction is stepped along for 1 / (1 - momentum) steps; one in (0, 1) is counted.

    Returns:
        The length.

    Raises:
        ValueError: none was measured.
    """
    if expectation != "average":
        raise ValueError(
            f"lr=None with expectation={expectation!r}: need a number, as rates were measured with 'average', whose "
            "steps have another scale; try lr=3 with 'fan_in', or half-decades from 0.03 on with 'per_sample'."
        )
    if (metric, block) not in _RATES:
        others = ", ".join(f"{lr:g} for {other!r}" for (name, other), lr in _RATES.items() if name == metric)
        raise ValueError(
            f"lr=None with metric={metric!r}, block={block!r}: need a number, as none was measured for these; "
            f"{f'measured are {others}' if others else 'try 0.003'}."
        )
    is_counted = isinstance(momentum, (int, float)) and 0 < momentum < 1  # others are checked later
    return _RATES[metric, block] * (1 - momentum if is_counted else 1.0)


def default_damping(metric: str) -> float:
    """The share of a metric's own mean that is added to it.

    Args:
        metric: one of the names above.

    Returns:
        The share.
    """
    return _DAMPING.get(metric, 0.01)
