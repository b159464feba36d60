"""Runs scenarios in processes that form one group, with gloo."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

WORLD_SIZE = 2
Scenarios = Callable[[], Iterable[tuple[str, Callable[[], Any]]]]

needs_processes = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch was built without gloo"
)


def results_of(scenarios: Scenarios, folder: Path) -> list[dict[str, Any]]:
    """What each scenario returned, or the traceback of what went wrong, by rank.

    One pair of processes goes through them all, since starting it takes the longest.
    """
    # Forks of a server that has imported torch and done nothing: what tests did before may not survive a fork.
    how = "forkserver" if sys.platform == "linux" else "spawn"
    multiprocessing.set_forkserver_preload(["torch.distributed", "torchgeom_optim"])
    torch.multiprocessing.start_processes(_run, (scenarios, str(folder)), nprocs=WORLD_SIZE, start_method=how)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def _run(rank: int, scenarios: Scenarios, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", WORLD_SIZE)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=300)
    )
    results: dict[str, Any] = {}
    for name, scenario in scenarios():
        torch.save(results, Path(folder) / f"{rank}.pt")  # a scenario may end its process
        torch.manual_seed(0)
        try:
            results[name] = scenario()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, Path(folder) / f"{rank}.pt")
