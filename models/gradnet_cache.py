"""What a network computed on a data set, kept in memory or on disk, so that training around it need not ask again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["RecordCache", "fingerprint"]

_INDEX = "records.json"
_NO_SAMPLE = "data gave no sample: at least one is needed. Is the loader empty?"


class RecordCache:
    """Records of N samples with their targets; in a folder they are memory-mapped and never held as a whole.

    Images keep their memory format: those with their channels innermost are arrays [N, H, W, C].

    Args:
        arrays: name to [N, ...], "targets" among them.
        owner: fingerprint of the network and the settings that the records belong to.
        channels_last: names of the arrays whose last axis is the channels of an image, the tensors' second.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], owner: str, channels_last: Iterable[str] = ()) -> None:
        self._arrays, self.owner, self._channels_last = dict(arrays), owner, frozenset(channels_last)

    def __len__(self) -> int:
        return len(self._arrays["targets"])

    @property
    def num_bytes(self) -> int:
        """Of all records together."""
        return sum(array.nbytes for array in self._arrays.values())

    @classmethod
    def build(
        cls, records: Iterable[tuple[Mapping[str, Tensor], Tensor]], owner: str, folder: str | Path | None = None
    ) -> RecordCache:
        """Keep records batch by batch.

        Args:
            records: pairs of a record and its targets.
            owner: see the class.
            folder: where to, made if need be; a cache that is there is replaced. None for memory.

        Returns:
            The cache.

        Raises:
            ValueError: no sample came.
        """
        if folder is not None:
            return _written(records, owner, Path(folder))
        parts: dict[str, list[np.ndarray]] = {}
        last: dict[str, bool] = {}
        for record, targets in records:
            for name, tensor in {**record, "targets": targets}.items():
                parts.setdefault(name, []).append(_array(tensor, last.setdefault(name, _is_channels_last(tensor))))
        if not parts:
            raise ValueError(_NO_SAMPLE)
        arrays = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
        return cls(arrays, owner, [name for name, is_last in last.items() if is_last])

    @classmethod
    def open(cls, folder: str | Path) -> RecordCache:
        """A cache that has been built in this folder, by another program perhaps.

        Args:
            folder: of :meth:`build`.

        Returns:
            The cache, memory-mapped.

        Raises:
            FileNotFoundError: there is none, or it was not finished.
        """
        path = Path(folder) / _INDEX
        if not path.is_file():
            raise FileNotFoundError(f"no cache in {folder}: {_INDEX} must be there. Build one with GradNet.cache(...).")
        index = json.loads(path.read_text(encoding="utf-8"))
        arrays = {
            name: np.memmap(Path(folder) / of["file"], of["dtype"], "r", shape=tuple(of["shape"]))
            for name, of in index["arrays"].items()
        }
        return cls(arrays, index["owner"], [name for name, of in index["arrays"].items() if of["channels_last"]])

    def batches(
        self, size: int, generator: torch.Generator | None, device: torch.device
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """All samples once.

        Args:
            size: samples per batch.
            generator: of their order; None for the order they came in.
            device: where to.

        Yields:
            Pairs of a record and its targets.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for part in torch.split(order, size):
            record = {name: torch.from_numpy(array[part.numpy()]).to(device) for name, array in self._arrays.items()}
            record |= {name: record[name].permute(0, 3, 1, 2) for name in self._channels_last}
            yield record, record.pop("targets")


def fingerprint(model: nn.Module, *settings: object) -> str:
    """A digest of a network's parameters and buffers, and of some settings.

    Args:
        model: the network.
        *settings: whatever else must be the same, by its text.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _written(records: Iterable[tuple[Mapping[str, Tensor], Tensor]], owner: str, folder: Path) -> RecordCache:
    """One file of raw numbers for each name, appended to batch by batch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)  # until it is written again the folder holds no cache
    arrays: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for record, targets in records:
            for name, tensor in {**record, "targets": targets}.items():
                last = arrays[name]["channels_last"] if name in arrays else _is_channels_last(tensor)
                array = _array(tensor, last)
                if name not in files:
                    path = folder / f"{len(files)}.raw"
                    files[name] = stack.enter_context(path.open("wb"))
                    shape = [0, *array.shape[1:]]
                    arrays[name] = {
                        "file": path.name, "dtype": array.dtype.str, "shape": shape, "channels_last": last
                    }  # fmt: skip
                arrays[name]["shape"][0] += len(array)
                files[name].write(array.tobytes())
    if not arrays:
        raise ValueError(_NO_SAMPLE)
    (folder / _INDEX).write_text(json.dumps({"owner": owner, "arrays": arrays}, indent=1), encoding="utf-8")
    return RecordCache.open(folder)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _array(tensor: Tensor, channels_last: bool) -> np.ndarray:
    tensor = tensor.detach().permute(0, 2, 3, 1) if channels_last else tensor.detach()
    return tensor.cpu().contiguous().numpy()
