"""A process that dies within a step, at each of the operations in which the processes have to meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from tests.cases import mean_loss, train
from tests.optimizers import ranks
from tests.processes import needs_processes, results_of

pytestmark = needs_processes
PARALLEL: dict[str, Callable[[nn.Module], nn.Module]] = {"whole": lambda model: model, **ranks.PARALLEL}


@contextmanager
def meetings(before_each: Callable[[int], None]) -> Iterator[list[int]]:
    """Inside, the operations in which all processes take part are counted, and announced before they begin."""
    seen: list[int] = []

    def announced(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(len(seen))
            before_each(seen[-1])
            return original(*args, **kwargs)

        return call

    with (
        patch.object(distributed, "all_reduce", announced(distributed.all_reduce)),
        patch.object(DTensor, "full_tensor", announced(DTensor.full_tensor)),
    ):
        yield seen


def at_a_step(name: str, parallel: str, steps: int, settings: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A model whose next step is due, and its optimizer; before the first one momentum comes from a run with SGD."""
    case = ranks.CASES[name]
    model = PARALLEL[parallel](ranks.net())
    parts = ranks.my_part(ranks.batches(steps + 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if steps == 0:
        train(model, sgd, parts)
    optimizer = case(model, process_group=distributed.group.WORLD, **settings)
    if steps == 0:
        optimizer.load_state_dict(sgd.state_dict())
    train(model, optimizer, parts[:-1])
    optimizer.zero_grad()
    mean_loss(model(parts[-1])).backward()
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of all that a step may change, by the way that leads there: what this process has of it."""
    found: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        elif isinstance(value, (dict, list)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{path}.{key}", part)
        else:
            found[path] = value

    visit("model", model.state_dict())
    visit("grads", {name: p.grad for name, p in model.named_parameters()})
    visit("optimizer", optimizer.state_dict())
    return found


def lost(name: str, parallel: str, steps: int, from_end: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The second process ends before a step's last meeting, or before an earlier one."""
    model, optimizer = at_a_step(name, parallel, steps, settings)
    with meetings(lambda number: None) as of_step:
        optimizer.step()
    fatal = len(of_step) - 1 - from_end
    assert fatal >= 0, f"{len(of_step)} meetings"
    model, optimizer = at_a_step(name, parallel, steps, settings)
    before = everything(model, optimizer)

    def before_each(number: int) -> None:
        if number == fatal and distributed.get_rank() == 1:
            os._exit(0)

    with meetings(before_each):
        error = ranks.error_of(optimizer.step)
    calls = sum(len(layer.calls) for layer in optimizer._layers)
    return {"error": error, "before": before, "after": everything(model, optimizer), "calls": calls}


def scenarios(*what: Any) -> Iterable[tuple[str, Callable[[], Any]]]:
    return [("lost", partial(lost, *what))]


@pytest.mark.parametrize(
    ("name", "parallel", "steps", "from_end", "settings"),
    [
        *[("trust_region_lr", "whole", 0, from_end, {"nesterov": True}) for from_end in range(5)],
        *[("trust_region_lr", "whole", 1, from_end, {}) for from_end in range(2)],
        ("whitening_momentum", "whole", 1, 0, {}),
        ("natural_kronecker", "whole", 0, 0, {}),
        ("trust_region_lr", "fsdp", 1, 0, {}),
        ("trust_region_lr", "fsdp", 1, 4, {}),
        ("natural_rmsprop", "fsdp", 0, 0, {}),
        ("natural_rmsprop", "fsdp", 1, 0, {}),
    ],
)
def test_its_death_is_an_error_that_changes_nothing(tmp_path, name, parallel, steps, from_end, settings):
    found = results_of(partial(scenarios, name, parallel, steps, from_end, settings), tmp_path)[0]["lost"]
    assert isinstance(found, dict), found
    assert found["error"].startswith("RuntimeError: got an error from the process group, in which 2 processes")
    assert found["error"].endswith("Nothing was changed.")
    if name != "natural_rmsprop":  # which looks at gradients alone
        assert found["calls"] > 0  # what the pass before told is still there
    after, before = found["after"], found["before"]
    assert after.keys() == before.keys()
    for path, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                after[path], value, rtol=0, atol=0, msg=lambda text, path=path: f"{path}: {text}"
            )
        else:
            assert after[path] == value, path
