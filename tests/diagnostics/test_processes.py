"""Two processes with half of the batch each, against one with the whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.diagnostics import ranks
from tests.oracles import tolerance
from tests.processes import needs_processes, results_of
from torchgeom_optim.diagnostics import METRICS, Record
from torchgeom_optim.diagnostics.spectrum import SPECTRUM_VALUES

pytestmark = needs_processes


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    return results_of(ranks.scenarios, tmp_path_factory.mktemp("ranks"))


def records_of(results: list[dict[str, Any]], name: str) -> list[Record]:
    """The same in both processes, but for the time that they took."""
    one, two = (result[name] for result in results)
    assert isinstance(one, list), one  # else it is what went wrong there
    first, second = ([Record.from_json(line) for line in lines] for lines in (one, two))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close((a.values, a.layers), (b.values, b.layers), rtol=0, atol=0, equal_nan=True)
        assert (a.step, a.batch_size, a.notes, a.spectrum) == (b.step, b.batch_size, b.notes, b.spectrum)
        torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=0)
    return first


def alone(metrics: Any, **options: Any) -> list[Record]:
    return [Record.from_json(line) for line in ranks.train(ranks.network(), ranks.batches(), metrics, **options)]


@pytest.fixture(scope="module")
def whole() -> list[Record]:
    """One process's numbers."""
    return alone(ranks.EVERYTHING)


def assert_same(found: list[Record], expected: list[Record]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.batch_size) == (other.step, other.batch_size)
        # The changes of a gradient over a step of 1e-3 lose three digits.
        torch.testing.assert_close(
            ({"loss": one.loss, **one.values}, one.layers),
            ({"loss": other.loss, **other.values}, other.layers),
            **tolerance(condition=1e5),
            equal_nan=True,
        )
        torch.testing.assert_close(one.spectrum, other.spectrum, **tolerance(condition=1e5))


def test_every_metric_is_that_of_the_whole_batch(results, whole):
    found = records_of(results, "everything")
    assert set(found[1].values) == {*METRICS, *SPECTRUM_VALUES} - {"spectrum"}
    assert not any(math.isnan(value) for value in found[1].values.values())
    assert found[1].batch_size == 8
    assert_same(found, whole)


def test_a_process_by_itself_has_other_numbers(results, whole):
    """The test above is able to fail."""
    first, second = ([Record.from_json(line) for line in result["own parts"]] for result in results)
    for name in first[0].values:
        assert len({round(record.values[name], 6) for record in (first[0], second[0], whole[0])}) == 3


@pytest.mark.parametrize(
    ("name", "metrics", "options"),
    [
        ("free", "free", {}),
        ("no optimizer", ["gradient_norm"], {"with_optimizer": False}),
        ("sum", "default", {"criterion": nn.CrossEntropyLoss(reduction="sum")}),
        ("compiled", "default", {}),
    ],
)
def test_presets_sums_and_wrappers(results, name, metrics, options):
    found = records_of(results, name)
    expected = alone(metrics, **options)
    # With a sum the processes' mean is half of what one would step by: the weights part after the first step.
    assert_same(found[:1], expected[:1]) if name == "sum" else assert_same(found, expected)


def test_unequal_parts_are_one_batch_and_named(results, whole):
    (found,) = records_of(results, "unequal")
    without = [name for name in found.values if METRICS.get(name) != "step"]
    assert found.batch_size == 8
    torch.testing.assert_close(
        {name: found.values[name] for name in without},
        {name: whole[0].values[name] for name in without},
        **tolerance(condition=1e5),
    )
    assert any("unequal batches" in note for note in found.notes)


def test_processes_agree_where_each_has_random_numbers_of_its_own(results):
    for record in records_of(results, "masks"):
        assert math.isfinite(record.values["weight_condition_number"])


def test_training_is_bit_for_bit_what_it_is_without(results):
    for result in results:
        torch.testing.assert_close(result["attached True"], result["attached False"], rtol=0, atol=0)


def test_integers_and_truth_values_and_samples_of_other_sizes(results):
    (found,) = records_of(results, "one length")
    assert found.batch_size == 4
    assert math.isfinite(found.values["gradient_confusion"])
    (refused,) = records_of(results, "two lengths")
    assert math.isnan(refused.values["gradient_confusion"])
    assert math.isfinite(refused.values["weight_norm"])
    (note,) = (note for note in refused.notes if "not measured over all processes" in note)
    assert note.startswith("gradient_confusion, gradient_diversity")
    assert "process 1 has samples of [5] int64" in note


def test_what_one_process_does_not_know_none_measures(results):
    for record in records_of(results, "not known"):
        assert math.isnan(record.values["gradient_confusion"])
        reason = "process 1 does not know its batch (the criterion's input is not what the model returned)"
        assert any(reason in note for note in record.notes)


@pytest.mark.parametrize("how", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_parameters_are_refused_by_name(results, how):
    for result in results:
        assert "the parameters are sharded over processes" in result[how]


def test_a_group_of_one_process_measures_its_own_pass(results):
    assert [result["alone"] for result in results] == [True, True]
