"""Two processes with half of the batch each, against one with the whole batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import OptimizerCase, train
from tests.optimizers import ranks
from tests.oracles import tolerance
from tests.processes import needs_processes, results_of
from torchgeom_optim.optimizers.distributed import Ranks

pytestmark = needs_processes
parallel = pytest.mark.parametrize("kind", ranks.PARALLEL)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    return results_of(ranks.scenarios, tmp_path_factory.mktemp("ranks"))


def alone(
    case: OptimizerCase,
    build: Callable[[], nn.Module] = ranks.net,
    batches: Callable[[], list[Tensor]] = ranks.batches,
) -> dict[str, Tensor]:
    """The trajectory's end with one process."""
    model = build()
    train(model, case(model), batches())
    return ranks.parameters_of(model)


def assert_all_agree(results: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    """Bit for bit, or the processes would drift apart."""
    one, two = (result[name] for result in results)
    assert isinstance(one, dict), one  # else it is what went wrong there
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    return one


def assert_all_are(results: list[dict[str, Any]], name: str, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(assert_all_agree(results, name), expected, **tolerance(condition=1e3))


@pytest.mark.parametrize(
    ("kind", "name"), [*(("ddp", name) for name in ranks.CASES), *(("fsdp", name) for name in ranks.FSDP_CASES)]
)
def test_two_halves_are_one_batch(results, kind, name):
    assert_all_are(results, f"halves {kind} {name}", alone(ranks.CASES[name]))


@parallel
@pytest.mark.parametrize("name", ranks.TOKEN_CASES)
def test_embeddings_tied_weights_and_fewer_rows_than_processes(results, kind, name):
    expected = alone(ranks.CASES[name], lambda: ranks.seeded(ranks.TokenNet), ranks.token_batches)
    if name in ranks.MEASURE_ON_A_FEW:
        torch.testing.assert_close(assert_all_agree(results, f"tokens {kind} {name}"), expected, rtol=0.05, atol=0.01)
    else:
        assert_all_are(results, f"tokens {kind} {name}", expected)


@pytest.mark.parametrize("name", ranks.COLUMN_CASES)
def test_weights_may_be_sharded_by_columns(results, name):
    assert_all_are(results, f"halves columns {name}", alone(ranks.CASES[name]))


def test_embeddings_may_be_sharded_by_columns(results):
    expected = alone(ranks.CASES["trust_region"], lambda: ranks.seeded(ranks.TokenNet), ranks.token_batches)
    torch.testing.assert_close(assert_all_agree(results, "tokens columns"), expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ranks.FAR_CASES)
def test_the_spread_of_outputs_far_from_zero_keeps_its_digits(results, name):
    """E[y^2] - E[y]^2 would have none left: the squares are 1e8, in single precision."""
    expected = ranks.spreads(ranks.CASES[name], ranks.far_batches(), ranks.far_from_zero())
    torch.testing.assert_close(assert_all_agree(results, f"far {name}"), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ranks.FAR_CASES)
def test_infinite_outputs_of_one_process_are_forgotten_by_all(results, name):
    expected = ranks.gaps(ranks.CASES[name], ranks.far_batches())
    assert all(bool(value.isfinite().all()) for value in expected.values())
    torch.testing.assert_close(assert_all_agree(results, f"gaps {name}"), expected, rtol=0.01, atol=0)


@parallel
@pytest.mark.parametrize("scenario", ["unequal", "accumulated", "averaged_twice", "scaled", "resumed"])
@pytest.mark.parametrize("name", ranks.PASS_CASES)
def test_however_the_batch_is_cut(results, scenario, kind, name):
    expected = alone(ranks.CASES[name])
    if name in ranks.MEASURE_ON_A_FEW and scenario not in ("scaled", "resumed"):  # other samples than one process takes
        found = assert_all_agree(results, f"{scenario} {kind} {name}")
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)
    else:
        assert_all_are(results, f"{scenario} {kind} {name}", expected)


@pytest.mark.parametrize("name", ranks.BRANCH_CASES)
def test_a_layer_that_some_or_all_processes_do_not_call(results, name):
    expected = alone(ranks.CASES[name], lambda: ranks.seeded(ranks.Branches), ranks.branch_batches)
    assert_all_are(results, f"branches {name}", expected)


@pytest.mark.parametrize("name", ranks.FAR_CASES)
def test_a_layer_that_one_process_called_may_sit_a_step_out(results, name):
    expected = ranks.sits_out(ranks.CASES[name], lambda model: model, ranks.branch_batches()[:2])
    assert_all_are(results, f"sits out {name}", expected)


def test_a_group_of_one_process_trains_for_itself(results):
    for rank, result in enumerate(results):
        case = ranks.CASES["whitening"]
        expected = alone(case, batches=lambda number=1 + rank: ranks.batches(3)[:number])
        torch.testing.assert_close(result["alone"], expected, **tolerance())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "tensor parallel",
            "ValueError: got the parameter 'head.weight'.*tensor parallelism.*need.*fully_shard.*rule='sgd'",
        ),
        ("flattened", "ValueError: got parameters.*FullyShardedDataParallel.*need.*fully_shard.*rule='sgd'"),
        ("different models", "RuntimeError: got processes whose models.*differ.*need.*process_group.*Nothing was"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(results, what, message):
    for result in results:
        assert re.search(message, result[f"refused {what}"]), result[f"refused {what}"]


def test_means_with_one_process_are_the_tensors_themselves():
    x = torch.randn(3)
    assert Ranks().number == 1
    assert Ranks().means([x], [0.0])[0] is x
