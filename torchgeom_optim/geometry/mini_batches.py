"""Data as mini-batches that can be gone through again and again and are the same each time.

An operator that is applied many times needs every pass to see the same samples in the same order: a product
with J from one order and one with J' from another belong to no matrix at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

__all__ = ["MiniBatch", "MiniBatches", "map_tensors", "tensors_of"]

# A tensor, a tuple, list or mapping of such, or a constant that every sample shares.
Tree: TypeAlias = Any


class MiniBatch(NamedTuple):
    """Inputs of some samples, and their targets if there are any."""

    inputs: Tree
    targets: Tensor | None
    size: int

    def call(self, model: Callable[..., Any]) -> Any:
        """The model's outputs: a tuple of inputs are its arguments, a mapping its keyword arguments."""
        if isinstance(self.inputs, tuple):
            return model(*self.inputs)
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        return model(self.inputs)

    def part(self, start: int, stop: int) -> MiniBatch:
        """Samples start to stop."""
        targets = None if self.targets is None else self.targets[start:stop]
        return MiniBatch(map_tensors(lambda x: x[start:stop], self.inputs), targets, min(stop, self.size) - start)


class MiniBatches:
    """Mini-batches of data that is a whole, or comes in mini-batches of its own.

    A whole: a tensor [N, ...], a tuple (the model's arguments) or a mapping (its keyword arguments), with tensors
    nested in them to any depth, the samples along the first axis of each; ``targets`` beside it. Any other
    iterable must give mini-batches, each an input as above or a pair (inputs, targets), as a DataLoader gives
    them; a model with several inputs takes ((a, b), targets). It is gone through once per pass, and each time
    its samples must be the same, which is checked by their sums.

    Args:
        data: the data.
        targets: [N, ...], where the data is a whole; None if there are none.
        with_targets: whether targets are needed; where not, those that come along are dropped.
        device: where tensors are moved to.
        dtype: of floating-point inputs and targets; None leaves them as they are.

    Raises:
        TypeError: the data is an iterator, which can be gone through only once.
        ValueError: there are no samples, no targets where they are needed, samples that do not fit their targets,
            values that are not finite, or a loader that shuffles.
    """

    def __init__(
        self, data: Any, targets: Tensor | None, with_targets: bool, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self._whole = isinstance(data, (Tensor, tuple, Mapping))
        self._with_targets = with_targets
        self._device, self._dtype = device, dtype
        self._data, self._targets = data, targets
        if not self._whole:
            _check_repeatable(data, targets)
        self._marks: list[Tensor] = []
        sizes = []
        for batch in self._own_batches():
            mark = _sums(batch)
            if not bool(torch.isfinite(mark).all()):
                raise ValueError(
                    "data or targets hold values that are not finite: every number must be finite. "
                    "Look for nan in the inputs with torch.isfinite."
                )
            self._marks.append(mark)
            sizes.append(batch.size)
        self.num_samples = sum(sizes)
        self.largest = max(sizes, default=0)
        if self.num_samples == 0:
            raise ValueError("data gave no sample: at least one is needed. Is the loader or the tensor empty?")

    def parts(self, size: int) -> Iterator[MiniBatch]:
        """Go through all samples in mini-batches of at most ``size``.

        Args:
            size: samples per mini-batch; those that the data comes in are cut, never joined.

        Yields:
            Mini-batches, in the order of the samples.

        Raises:
            RuntimeError: the data is not what it was at first.
        """
        passes = 0
        for k, batch in enumerate(self._own_batches()):
            if not self._whole and not (k < len(self._marks) and torch.equal(_sums(batch), self._marks[k])):
                raise RuntimeError(
                    f"mini-batch {k} differs from that of the first pass over the data: every pass must give the "
                    "same samples in the same order. Use shuffle=False and no random transforms, or a list of batches."
                )
            passes = k + 1
            for start in range(0, batch.size, size):
                yield batch.part(start, start + size) if batch.size > size else batch
        if passes < len(self._marks):
            raise RuntimeError(
                f"the data ran dry after {passes} mini-batches: its first pass gave {len(self._marks)}. Data that "
                "can be "
                "gone through again is needed: a list of mini-batches, or a DataLoader over a map-style dataset."
            )

    def _own_batches(self) -> Iterator[MiniBatch]:
        if self._whole:
            yield self._taken(self._data, self._targets)
            return
        for item in self._data:
            parts = list(item) if isinstance(item, (tuple, list)) else [item]
            if len(parts) not in (1, 2):
                raise ValueError(
                    f"a mini-batch of {len(parts)} parts: an input or a pair (inputs, targets) is needed. "
                    "Several inputs go in a tuple of their own: ((a, b), targets)."
                )
            yield self._taken(parts[0], parts[1] if len(parts) == 2 else None)

    def _taken(self, inputs: Tree, targets: Tensor | None) -> MiniBatch:
        if self._with_targets and not isinstance(targets, Tensor):
            raise ValueError(
                f"targets are {type(targets).__name__}: the loss and the log-probabilities need a tensor of them. Give "
                "targets=..., or data in mini-batches (inputs, targets)."
            )
        inputs = map_tensors(self._moved, inputs)
        targets = self._moved(targets) if self._with_targets and targets is not None else None
        lengths = [len(x) if x.dim() else -1 for x in (*tensors_of(inputs), *([] if targets is None else [targets]))]
        if not lengths or min(lengths) != max(lengths) or lengths[0] < 0:
            raise ValueError(
                f"first axes of inputs and targets: {lengths or 'no tensor'}; they must all be the number of samples. "
                "If the model takes samples along another axis, wrap it in a module that transposes."
            )
        return MiniBatch(inputs, targets, lengths[0])

    def _moved(self, x: Tensor) -> Tensor:
        dtype = self._dtype if x.is_floating_point() else None
        moved = x.detach().to(device=self._device, dtype=dtype)
        return moved.clone() if moved.is_inference() else moved  # else autograd would refuse it


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same tree with each tensor replaced; whatever is neither tensor nor container stays."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [map_tensors(function, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors_of(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in the order in which :func:`map_tensors` meets them."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(note, tree)
    return found


def _sums(batch: MiniBatch) -> Tensor:
    # A sum weighted by position, so that samples in another order are noticed too.
    tensors = [*tensors_of(batch.inputs), *([] if batch.targets is None else [batch.targets])]
    sums = []
    for x in tensors:
        per_sample = x.to(torch.float64).reshape(len(x), x.shape[1:].numel()).sum(1)
        sums.append(per_sample @ torch.arange(1.0, len(x) + 1, dtype=torch.float64, device=x.device))
    return torch.stack(sums)


def _check_repeatable(data: Iterable[Any], targets: Tensor | None) -> None:
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise TypeError(
            f"data is {type(data).__name__}: a tensor, a tuple or mapping of tensors, or mini-batches that can be gone "
            "through again are needed. Try list(data), or the DataLoader itself."
        )
    if targets is not None:
        raise ValueError(
            "targets beside data in mini-batches: they must come with them. Give pairs (inputs, targets), or "
            "data as one tensor."
        )
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise ValueError(
            "data is a DataLoader that shuffles: every pass must give the samples in the same order. Use shuffle=False."
        )
