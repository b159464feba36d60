"""The batch of all processes that train one model with DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves

from torchgeom_optim.geometry.per_sample import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GlobalBatch", "Processes", "wrapped_by"]

T = TypeVar("T")


@dataclass(frozen=True)
class GlobalBatch:
    """What the processes have together.

    Args:
        loss: mean over all their samples.
        num_samples: theirs together; 0 if some process does not know its own.
        batch: samples of the first process, then of the second, and so on; None if it was not asked for, or cannot be.
        problem: why it cannot be.
        is_even: whether all have equally many samples.
    """

    loss: float
    num_samples: int
    batch: Batch | None = None
    problem: str = ""
    is_even: bool = True


@dataclass(frozen=True)
class _Part:
    """What a process tells of its batch before tensors are sent."""

    loss: float
    num_samples: int
    layout: tuple[tuple[tuple[int, ...], str], ...]
    problem: str


class Processes:
    """The processes of a DistributedDataParallel. All of its methods are collective: each process calls them in turn.

    Args:
        group: of the wrapper.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    @classmethod
    def of(cls, model: nn.Module) -> Processes | None:
        """Those that a wrapper in the model is for; None if there is none, or but one process."""
        for module in wrapped_by(model):
            if isinstance(module, nn.parallel.DistributedDataParallel):
                group = module.process_group
                return None if group is None or distributed.get_world_size(group) == 1 else cls(group)
        return None

    def gather(self, batch: Batch | None, loss: float, problem: str = "", tensors: bool = True) -> GlobalBatch:
        """Put the processes' batches together.

        Args:
            batch: of this process; None if it is not known.
            loss: its mean loss.
            problem: why it is not known.
            tensors: whether the batch itself is wanted, beside the loss.

        Returns:
            The same in every process, its tensors on the device of this one's.
        """
        leaves = [] if batch is None else _tensors(batch)
        layout = tuple((tuple(x.shape[1:]), str(x.dtype)) for x in leaves)
        own = _Part(loss, 0 if batch is None else batch.num_samples, layout, problem)
        parts = self._told(own)
        total = sum(part.num_samples for part in parts) if all(part.num_samples for part in parts) else 0
        weights = [part.num_samples for part in parts] if total else [1] * len(parts)
        mean = sum(w * part.loss for w, part in zip(weights, parts, strict=True)) / sum(weights)
        found = GlobalBatch(mean, total, is_even=len(set(weights)) == 1, problem=_problem(parts))
        if batch is None or found.problem or not tensors:
            return found
        joined = iter([self._joined(x, weights) for x in leaves])
        return GlobalBatch(mean, total, batch.map(lambda x: next(joined)), is_even=found.is_even)

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        values: list[Any] = [value]
        source = distributed.get_global_rank(self._group, 0)
        distributed.broadcast_object_list(values, src=source, group=self._group)
        return cast(T, values[0])

    def _told(self, own: _Part) -> list[_Part]:
        parts: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(parts, own, group=self._group)
        return parts

    def _joined(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """All processes' samples; what is sent has to be of equal size."""
        sent = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach()
        missing = max(sizes) - len(x)
        sent = torch.cat([sent, sent.new_zeros(missing, *x.shape[1:])]) if missing else sent.contiguous()
        parts = [torch.empty_like(sent) for _ in sizes]
        distributed.all_gather(parts, sent, group=self._group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(x.dtype)


def wrapped_by(model: nn.Module) -> Iterator[nn.Module]:
    """The module, and what it wraps, from the outside in: those of torch.compile and of DistributedDataParallel.

    Args:
        model: what the loop calls.

    Yields:
        Modules, the innermost last.
    """
    inner: Any = model
    while True:
        yield inner
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return


def _tensors(batch: Batch) -> list[Tensor]:
    """In the order in which ``Batch.map`` changes them."""
    return [*tree_leaves(batch.inputs), *([] if batch.targets is None else tree_leaves(batch.targets))]


def _problem(parts: Sequence[_Part]) -> str:
    for rank, part in enumerate(parts):
        if not part.num_samples:
            return f"process {rank} does not know its batch" + (f" ({part.problem})" if part.problem else "")
        if part.layout != parts[0].layout:
            return (
                f"process {rank} has samples of {_shapes(part)}, process 0 of {_shapes(parts[0])}; pad them to one size"
            )
    return ""


def _shapes(part: _Part) -> str:
    return ", ".join(f"{list(shape)} {dtype.removeprefix('torch.')}" for shape, dtype in part.layout)
