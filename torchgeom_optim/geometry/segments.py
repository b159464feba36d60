"""Vectors of several layers in a row, so that the number of operations hardly grows with that of the layers."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Segments", "constants"]


class Segments:
    """Lengths of vectors that are joined: means over each, and a number of each for all of its entries.

    Args:
        sizes: of the vectors, in their order.
        like: says dtype and device.

    Example:
        >>> segments = Segments((2, 3), torch.zeros(()))
        >>> segments.means(torch.tensor([1.0, 3.0, 0.0, 0.0, 9.0]))
        tensor([2., 3.])
        >>> segments.spread(torch.tensor([5.0, 7.0]))
        tensor([5., 5., 7., 7., 7.])
    """

    def __init__(self, sizes: tuple[int, ...], like: Tensor) -> None:
        self._place, self._share = _places(sizes, like.dtype, like.device)
        self.sizes = sizes

    def means(self, joined: Tensor) -> Tensor:
        """The mean over each vector, [number of vectors]."""
        return joined.new_zeros(len(self.sizes)).index_add_(0, self._place, joined * self._share)

    def spread(self, numbers: Tensor) -> Tensor:
        """For each entry the number that belongs to its vector."""
        return numbers.index_select(0, self._place)

    def split(self, joined: Tensor) -> tuple[Tensor, ...]:
        """The vectors, as views."""
        return torch.split(joined, list(self.sizes))


@lru_cache(maxsize=64)  # making them takes a while
def _places(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(sizes)
    place = torch.arange(len(sizes)).repeat_interleave(lengths)
    share = lengths.to(dtype).clamp_(min=1).reciprocal_().repeat_interleave(lengths)
    return place.to(device), share.to(device)


@lru_cache(maxsize=64)
def constants(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers as a tensor, which is made once and must not be changed.

    Args:
        numbers: one for each vector.
        dtype: of the tensor.
        device: of the tensor.

    Returns:
        Shape [number of vectors].
    """
    return torch.tensor(numbers, dtype=dtype, device=device)
