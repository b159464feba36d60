"""Several processes that train one model: means over what each has seen, and tensors of which each holds a part."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = [
    "Ranks",
    "in_process_group",
    "is_sharded",
    "is_sharded_by_rows",
    "local_part",
    "part_along",
    "part_like",
    "process_group_of",
    "require_whole_layers",
    "whole",
    "with_local",
]


def in_process_group() -> bool:
    """Whether torch.distributed is in use, if only with one process."""
    return distributed.is_available() and distributed.is_initialized()


class Ranks:
    """The processes (ranks) that train one model, each on data of its own.

    A deep copy is among the same processes; one that comes out of a pickle is among those of the default group.

    Args:
        process_group: None for the default group, if there is one. A group of one process trains for itself.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self._group = process_group
        self._has_agreed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self._group)

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()

    @property
    def number(self) -> int:
        """How many they are; 1 where torch.distributed is not in use."""
        return distributed.get_world_size(self._group) if in_process_group() else 1

    def means(self, tensors: Sequence[Tensor], counts: Sequence[float]) -> list[Tensor]:
        r"""Means over all processes, x = \sum_k c_k x_k / \sum_k c_k, equal on each bit for bit.

        All tensors go in one collective operation, or in one per device and dtype; nothing waits for the device.

        Args:
            tensors: x_k of this process, floating point; on every process the same number, shapes and dtypes.
            counts: c_k of this process, one for each tensor, not negative; a process that has seen nothing gives 0
                (its tensor must be finite even so).

        Returns:
            New tensors; 0 where all counts are 0. With one process, the tensors themselves.

        Raises:
            RuntimeError: another process has failed, or is at something else.
        """
        if self.number == 1 or not tensors:
            return list(tensors)
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for place, tensor in enumerate(tensors):
            alike[tensor.device, tensor.dtype].append(place)
        means = list(tensors)
        for places in alike.values():
            weights = [float(counts[place]) for place in places]
            parts = torch._foreach_mul([tensors[place].reshape(-1) for place in places], weights)  # pyright: ignore[reportPrivateImportUsage]
            total = torch.cat([*parts, parts[0].new_tensor(weights)])
            self._reduce(total, distributed.ReduceOp.SUM)
            *sums, counted = torch.split(total, [part.numel() for part in parts] + [len(parts)])
            shares = counted.clamp(min=torch.finfo(counted.dtype).tiny).reciprocal_()
            for place, values, share in zip(places, sums, shares.unbind(), strict=True):
                means[place] = (values * share).view(tensors[place].shape)
        return means

    def largest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of the values that the processes give, place by place; waits for the device if there are several.

        Args:
            values: of this process, as many as of any other.
            device: that the processes communicate from.

        Returns:
            The same numbers in all of them.
        """
        if self.number == 1:
            return list(values)
        found = torch.tensor([float(value) for value in values], device=device)
        self._reduce(found, distributed.ReduceOp.MAX)
        largest: list[float] = found.tolist()
        return largest

    def require_agreement(self, layout: Sequence[Hashable], device: torch.device) -> None:
        """Compare, the first time, what the processes are about to average.

        Args:
            layout: numbers and tuples of numbers.
            device: that the processes communicate from.

        Raises:
            RuntimeError: they differ.
        """
        if self._has_agreed:
            return
        key = hash(tuple(layout)) >> 1  # of numbers: the same in every process; its negative is a number, too
        both = torch.tensor([key, -key], device=device)
        self._reduce(both, distributed.ReduceOp.MAX)
        highest, negative_lowest = both.tolist()
        if highest != -negative_lowest:
            raise RuntimeError(
                f"got processes whose models or hyper-parameters differ, among {self.number}; need the same model and "
                "the same parameter groups in all of them: try process_group=, with those that train one model "
                "together. Nothing was changed."
            )
        self._has_agreed = True

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        with _naming_the_group(self.number):
            distributed.all_reduce(tensor, operation, group=self._group)


@contextmanager
def _naming_the_group(number: int) -> Iterator[None]:
    """Inside, what goes wrong between the processes is told as that."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"got an error from the process group, in which {number} processes take each step together ({error}); need "
            "all of them to take this step: look for the first that failed, and start all again from the last "
            "checkpoint. Nothing was changed."
        ) from error


# -- tensors of which each process holds a part --------------------------------------------------------------------


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, as the parameters of ``fully_shard`` are."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a while, and then there is none
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor, brought together from all processes, which must all call this; else the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with _naming_the_group(tensor.device_mesh.size()):
        return tensor.full_tensor()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has completely, the part that it has of ``like``; nothing is communicated.

    Args:
        tensor: equal on all processes; dimensions over which ``like`` is sharded are of the same length.
        like: says how it is to be sharded, if it is.

    Returns:
        A DTensor if ``like`` is one, else the tensor itself.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    complete = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return cast(Tensor, complete.redistribute(mesh, like.placements))


def part_along(tensor: Tensor, like: DTensor) -> Tensor:
    """What is to be multiplied with this process's part of ``like``; nothing is communicated.

    Args:
        tensor: equal on all processes; each dimension is of the same length as that of ``like``, or 1.
        like: sharded along any dimensions.

    Returns:
        The tensor, cut as ``like`` is, but for dimensions of length 1.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    whole_here = [Replicate()] * mesh.ndim
    single = [dim for dim, length in enumerate(tensor.shape) if length == 1]
    placements = [Replicate() if any(map(placement.is_shard, single)) else placement for placement in like.placements]
    complete = DTensor.from_local(tensor, mesh, whole_here, run_check=False)
    return local_part(cast(Tensor, complete.redistribute(mesh, placements)))


def is_sharded_by_rows(tensor: Tensor) -> bool:
    """Whether it is a DTensor of which every process has complete rows."""
    return is_sharded(tensor) and all(p.is_shard(0) or p.is_replicate() for p in tensor.placements)


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor; else the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def with_local(local: Tensor, like: Tensor) -> Tensor:
    """The reverse: a DTensor sharded like another one, of which this process's part is given."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def process_group_of(model: nn.Module | None) -> ProcessGroup | None:
    """The group of a model inside DistributedDataParallel or ``fully_shard``; None for the default group."""
    if model is None or not in_process_group():
        return None
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    for p in model.parameters():
        if is_sharded(p) and p.device_mesh.ndim == 1:
            return p.device_mesh.get_group()
    return None


def require_whole_layers(model: nn.Module, has_rule: Callable[[Tensor], bool]) -> None:
    """Refuse parameters that lie on several processes in a way in which their layers cannot be stepped.

    Args:
        model: looked through whole.
        has_rule: whether a parameter is to get more than a plain SGD step.

    Raises:
        ValueError: FullyShardedDataParallel has flattened parameters, or tensor parallelism has split layers, which
            then see but a part of their inputs.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without which there are no such parameters
    is_fsdp2 = fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"got parameters that FullyShardedDataParallel has flattened (in the module {name!r}); need whole "
                "ones, or rows of them: try torch.distributed.fsdp.fully_shard, or groups with rule='sgd'."
            )
        for key, p in module._parameters.items():
            if not is_sharded(p) or not has_rule(p):
                continue
            if not is_fsdp2 or sum(placement.is_shard() for placement in p.placements) > 1:
                placements = ", ".join(map(repr, p.placements))
                raise ValueError(
                    f"got the parameter {f'{name}.{key}'!r} as a DTensor with placements ({placements}), as of tensor "
                    "parallelism; need parameters that are whole, or sharded by torch.distributed.fsdp.fully_shard "
                    "alone: try that, or a group with rule='sgd' for this one."
                )
