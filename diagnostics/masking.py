"""Some coordinates in place of all: random masking, section 1.6 of the thesis."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchgeom_optim.geometry.gram_accumulator import layer_of

__all__ = ["RandomMask"]


class RandomMask:
    """The same random coordinates of every vector: a fixed share of each layer's, rounded up, drawn once.

    Inner products and norms over them, times P / k, estimate those over all P; scale-free metrics need no factor. The
    relative standard error of a squared norm is about sqrt((kurtosis - 1) / k) for k coordinates kept (kurtosis
    E[x^4] / E[x^2]^2 of the entries, 3 if Gaussian and often 100 for gradients): :meth:`relative_error` tells it for a
    given vector. The thesis shows only measured errors (its Figs. 2.3, 3.1, 3.6, 3.14 to 3.18, 4.1).

    Args:
        shapes: parameter -> shape.
        fraction: share of each layer's coordinates, in (0, 1].
        generator: on the CPU; by default one of its own, seeded with 0.
        device: where the masked vectors live.

    Raises:
        ValueError: the fraction is out of range.

    Example:
        >>> mask = RandomMask({"0.weight": torch.Size([10, 10]), "0.bias": torch.Size([10])}, 0.05)
        >>> mask.size  # 5 % of 110, rounded up
        6
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        fraction: float,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction={fraction}: must be in (0, 1]; 0.05 is the thesis's example.")
        generator = generator or torch.Generator().manual_seed(0)
        self.fraction = fraction
        self._indices: dict[str, Tensor] = {}
        layers: dict[str, list[str]] = {}
        for name in shapes:
            layers.setdefault(layer_of(name), []).append(name)
        for names in layers.values():
            sizes = [shapes[name].numel() for name in names]
            chosen = _draw(sum(sizes), fraction, generator)
            start = 0
            for name, size in zip(names, sizes, strict=True):
                own = chosen[(chosen >= start) & (chosen < start + size)] - start
                self._indices[name] = own.to(device)
                start += size
        self._indices = {name: self._indices[name] for name in shapes}
        self.size = sum(len(index) for index in self._indices.values())

    def __call__(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The chosen coordinates: name -> [k of this parameter]."""
        return {name: x.detach().reshape(-1)[self._indices[name]] for name, x in named.items()}

    def relative_error(self, named: Mapping[str, Tensor]) -> float:
        """Standard error of the estimate of |x|^2, relative to |x|^2; from the chosen coordinates alone.

        Args:
            named: parameter -> tensor.

        Returns:
            sqrt((mean x^4 / (mean x^2)^2 - 1) / k), without the correction for a finite population; nan for zeros.
        """
        x = torch.cat(list(self(named).values())).double()
        kurtosis = x.pow(4).mean() / x.square().mean().square()
        return float(((kurtosis - 1).clamp(min=0.0) / self.size).sqrt())


def _draw(size: int, fraction: float, generator: torch.Generator) -> Tensor:
    """ceil(fraction * size) different numbers below size, ascending."""
    count = min(size, math.ceil(fraction * size - 1e-9))
    if count > size // 3:
        return torch.randperm(size, generator=generator)[:count].sort().values
    # Drawn and drawn again until there are enough: a permutation of 10^8 numbers takes a gigabyte.
    chosen = torch.empty(0, dtype=torch.int64)
    while len(chosen) < count:
        more = torch.randint(size, (2 * (count - len(chosen)),), generator=generator)
        chosen = torch.unique(torch.cat([chosen, more]))
    # unique() sorts; which of the surplus is left out must not depend on the order.
    keep = torch.randperm(len(chosen), generator=generator)[:count]
    return chosen[keep.sort().values]
