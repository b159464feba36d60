"""What can be set about a BlockNaturalGradient, what is refused, and the values of what is left out."""

from __future__ import annotations

import pytest
from torch import nn

from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient


@pytest.mark.parametrize(
    ("metric", "block", "finest"),
    [
        ("quasi_diagonal", "weight", "unit"),
        ("whitening", "weight", "unit"),
        ("kronecker", "weight", "layer"),
        ("kronecker_diagonal", "weight", "unit"),
        ("exact", "unit", "layer"),
    ],
)
def test_blocks_that_a_metric_couples_are_refused(metric, block, finest):
    with pytest.raises(ValueError, match=f"couples the parameters of one {finest}.*try block='{finest}'"):
        BlockNaturalGradient(nn.Linear(2, 2), metric=metric, block=block)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"metric": "hessian"}, ValueError, "metric='hessian'.*must be one of"),
        ({"block": "row"}, ValueError, "block='row'.*must be one of"),
        ({"norm_start": 0}, ValueError, "norm_start=0"),
        ({"metric": "quasi_diagonal", "damping": 0.0}, ValueError, "singular; need damping > 0"),
        ({"expectation": "fan_in"}, ValueError, "need block='unit'"),
        ({"factor_interval": 0}, ValueError, "factor_interval=0: must be in"),
        ({"inverse_interval": 2.5}, TypeError, "inverse_interval=2.5: need a whole number"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale=0.0: must be in"),
    ],
)
def test_bad_settings(kwargs, error, message):
    with pytest.raises(error, match=message):
        BlockNaturalGradient(nn.Linear(2, 2), 0.01, **kwargs)


def test_without_a_rate_it_is_the_one_that_was_measured():
    model = nn.Linear(2, 2)
    for metric, block, lr, damping in (
        ("kronecker", "layer", 0.03, 1.0),
        ("kronecker", "unit", 0.003, 1.0),
        ("whitening", "unit", 0.03, 0.01),
        ("quasi_diagonal", "unit", 0.0003, 1.0),
        ("diagonal", "layer", 0.001, 0.1),
    ):
        (group,) = BlockNaturalGradient(model, None, metric, block).param_groups
        assert (group["lr"], group["damping"]) == (lr, damping)
        (group,) = BlockNaturalGradient(model, None, metric, block, momentum=0.75).param_groups
        assert group["lr"] == lr / 4
    for build in (BlockNaturalGradient.rmsprop, BlockNaturalGradient.normalized_sgd, BlockNaturalGradient.trpo,
                  BlockNaturalGradient.kfac):  # fmt: skip
        named = build(model)
        (group,) = BlockNaturalGradient(model, None, named.metric, named.block).param_groups
        assert named.param_groups[0]["lr"] == group["lr"]
    with pytest.raises(ValueError, match=r"lr=None with metric='exact'.*need a number.*try 0.003"):
        BlockNaturalGradient(model, metric="exact")
    with pytest.raises(ValueError, match=r"measured are 0.03 for 'unit', 0.1 for 'layer'"):
        BlockNaturalGradient(model, metric="whitening", block="network")
    for block, expectation in (("layer", "per_sample"), ("unit", "fan_in")):
        with pytest.raises(ValueError, match=rf"lr=None with expectation='{expectation}': need a number.*try lr="):
            BlockNaturalGradient(model, metric="identity", block=block, expectation=expectation)
    assert BlockNaturalGradient.fan_in(model).param_groups[0]["lr"] == 3.0
    with pytest.raises(TypeError, match=r"lr=None \(group 0\).*need a number.*common start\.$"):
        BlockNaturalGradient([{"params": model.parameters(), "lr": None}], metric="kronecker", model=model)
