"""What the processes of test_processes.py do: each scenario in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.processes import WORLD_SIZE
from torchgeom_optim.diagnostics import Diagnostics, Options
from torchgeom_optim.diagnostics.processes import Processes

EVERYTHING = ["full", "spectrum"]
OPTIONS = Options(curvature_tolerance=1e-9, groups=4)
Data = list[tuple[Tensor, Tensor]]


def network(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(12, 4)
        ).double()


def batches(num: int = 2, size: int = 8) -> Data:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator).double(), torch.randint(4, (size,), generator=generator))
        for _ in range(num)
    ]


def my_part(data: Data, first: int = 4) -> Data:
    part = slice(None, first) if distributed.get_rank() == 0 else slice(first, None)
    return [(x[part], y[part]) for x, y in data]


def train(
    model: nn.Module, data: Data, metrics: Any, criterion: nn.Module | None = None, with_optimizer: bool = True
) -> list[str]:
    """A short training, and its records, a line for each."""
    criterion = criterion or nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    diagnostics = Diagnostics(model, criterion, every=1, metrics=metrics, options=OPTIONS)
    with diagnostics.attach(optimizer if with_optimizer else None):
        for x, y in data:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return [record.to_json() for record in diagnostics.history]


def halves(metrics: Any, **options: Any) -> list[str]:
    return train(DistributedDataParallel(network()), my_part(batches()), metrics, **options)


def unequal() -> list[str]:
    return train(DistributedDataParallel(network()), my_part(batches(1), 3), EVERYTHING)


def own_parts() -> list[str]:
    """The model inside the wrapper: what each process sees of its own."""
    metrics = ["gradient_confusion", "gradient_norm", "weight_condition_number", "input_condition_number"]
    return train(network(), my_part(batches(1)), metrics)


def masks() -> list[str]:
    """Dropout, whose random numbers the processes do not share."""
    torch.manual_seed(distributed.get_rank())
    return train(DistributedDataParallel(network(0.5)), my_part(batches()), "cheap")


def weights_after(attached: bool) -> dict[str, Tensor]:
    model = DistributedDataParallel(network(0.5))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    diagnostics = Diagnostics(model, criterion, every=1, metrics=["cheap", "spectrum"])
    if attached:
        diagnostics.attach(optimizer)
    for x, y in my_part(batches()):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    diagnostics.close()
    return {**model.module.state_dict(), "rng": torch.get_rng_state()}


class Sequences(nn.Module):
    """Mean embedding of however many tokens there are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.embed(tokens) * mask.unsqueeze(-1)).mean(1))


def sequences(lengths: tuple[int, int]) -> list[str]:
    """Integers and truth values; of one length, or of several, which do not make one batch."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = DistributedDataParallel(Sequences().double())
    rank, generator = distributed.get_rank(), torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (4, 6), generator=generator)[2 * rank : 2 * rank + 2, : lengths[rank]]
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1)
    with Diagnostics(model, criterion, every=1, metrics="cheap").attach(optimizer) as diagnostics:
        criterion(model(tokens, mask=tokens > 0), tokens[:, 0] % 4).backward()
        optimizer.step()
    return [record.to_json() for record in diagnostics.history]


def not_known() -> list[str]:
    """One process's criterion gets something else than the outputs."""
    model = DistributedDataParallel(network())
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1)
    with Diagnostics(model, criterion, every=1, metrics="cheap").attach(optimizer) as diagnostics:
        for x, y in my_part(batches(2)):
            outputs = model(x)
            criterion(2 * outputs if distributed.get_rank() else outputs, y).backward()
            optimizer.step()
    return [record.to_json() for record in diagnostics.history]


def compiled() -> list[str]:
    model = torch.compile(DistributedDataParallel(network()), backend="eager")
    return train(model, my_part(batches()), "default")


def refused(how: str) -> str:
    model: nn.Module = network()
    if how == "fully_shard":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    else:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    try:
        Diagnostics(model, nn.CrossEntropyLoss())
    except ValueError as error:
        return str(error)
    return "no error"


def alone() -> bool:
    """A group of one."""
    groups = [distributed.new_group([rank]) for rank in range(WORLD_SIZE)]
    wrapped = DistributedDataParallel(network(), process_group=groups[distributed.get_rank()])
    return Processes.of(wrapped) is None


def scenarios() -> Iterable[tuple[str, Callable[[], Any]]]:
    yield "everything", lambda: halves(EVERYTHING)
    yield "free", lambda: halves("free")
    yield "no optimizer", lambda: halves(["gradient_norm"], with_optimizer=False)
    yield "sum", lambda: halves("default", criterion=nn.CrossEntropyLoss(reduction="sum"))
    yield "unequal", unequal
    yield "own parts", own_parts
    yield "masks", masks
    for attached in (False, True):
        yield f"attached {attached}", lambda attached=attached: weights_after(attached)
    yield "one length", lambda: sequences((6, 6))
    yield "two lengths", lambda: sequences((6, 5))
    yield "not known", not_known
    yield "compiled", compiled
    yield "alone", alone
    for how in ("fully_shard", "FullyShardedDataParallel"):
        yield how, lambda how=how: refused(how)
