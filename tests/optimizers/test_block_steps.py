"""Steps that are taken in place, a few units at a time: the same as through torch's SGD, all at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.cases import NATURAL_MEMBERS, assert_same_parameters, small_batches, small_net, tensors_of, train
from tests.oracles import tolerance
from torchgeom_optim.optimizers import block_metrics
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64
# Momentum is for torch's SGD to keep; so little of it that it changes nothing.
THROUGH_SGD = {"momentum": 1e-300}

every_member = pytest.mark.parametrize(("metric", "block"), NATURAL_MEMBERS)


def trained(metric: str, block: str, **settings) -> tuple[nn.Module, list[Tensor]]:
    model = small_net(dtype=F64)
    optimizer = BlockNaturalGradient(model, metric=metric, block=block, **{"lr": 0.01, **settings})
    train(model, optimizer, small_batches(4, dtype=F64))
    kept = [{k: v for k, v in values.items() if k != "momentum_buffer"} for values in optimizer.state.values()]
    return model, tensors_of(kept)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.5},
        {"maximize": True},
        {"lr": torch.tensor(0.01, dtype=F64), "weight_decay": 0.5},
        {"norm_decay": 0.0, "eps": 0.0},
        {"norm_decay": 0.9, "norm_start": "zero"},
        {"expectation": "per_sample"},
    ],
    ids=str,
)
@every_member
def test_in_place_it_is_the_step_of_sgd_along_the_directions(metric, block, settings):
    (one, states), (other, expected) = (
        trained(metric, block, **settings),
        trained(metric, block, **settings, **THROUGH_SGD),
    )
    assert_same_parameters(one, other, **tolerance(condition=1e3))
    torch.testing.assert_close(states, expected, **tolerance(condition=1e3))
    with pytest.raises(AssertionError):
        assert_same_parameters(one, trained(metric, block, **{**settings, "lr": 0.0101})[0], **tolerance(condition=1e3))


@pytest.mark.parametrize("numbers", [1, 12, 40])
@every_member
def test_a_few_units_at_a_time_move_as_all_at_once(metric, block, numbers, monkeypatch):
    settings = {"weight_decay": 0.1, "norm_decay": 0.9}
    model, states = trained(metric, block, **settings)
    splits = list[int]()
    pieces = block_metrics.Solved.pieces

    def counted(self, *, may_split):
        found = list(pieces(self, may_split=may_split))
        splits.append(len(found))
        yield from found

    monkeypatch.setattr(block_metrics, "_CACHED_NUMBERS", numbers)
    monkeypatch.setattr(block_metrics.Solved, "pieces", counted)
    again, found = trained(metric, block, **settings)
    assert_same_parameters(again, model, **tolerance(condition=1e3))
    torch.testing.assert_close(found, states, **tolerance(condition=1e3))
    if metric != "kronecker":  # whose layers come whole, whatever the blocks
        assert (max(splits) > 1) == (block in ("weight", "unit"))


def test_weight_and_bias_in_groups_of_their_own_keep_their_rates():
    model = nn.Linear(4, 3).to(F64)
    alone = copy.deepcopy(model)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
    optimizer = BlockNaturalGradient(groups, 1.0, "whitening", "unit", model=model)
    x, before = torch.randn(8, 4, dtype=F64), model.bias.detach().clone()
    train(model, optimizer, [x])
    train(alone, BlockNaturalGradient(alone, 0.1, "whitening", "unit"), [x])
    torch.testing.assert_close(model.weight, alone.weight, **tolerance())
    torch.testing.assert_close(model.bias - before, 2 * (alone.bias - before), **tolerance())
