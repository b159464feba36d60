"""Spectra beside the metrics: of the Fisher matrix, of the data, and how sloppy both are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.data_spectrum import data_spectrum
from torchgeom_optim.geometry.fisher import FisherVariant, fisher_spectrum
from torchgeom_optim.geometry.mini_batches import map_tensors, tensors_of
from torchgeom_optim.geometry.spectrum import Spectrum

__all__ = ["SPECTRUM_VALUES", "BatchSpectra", "batch_spectra"]

_NUMBERS = ("decades", "slope", "stiff_fraction", "effective_dimension", "participation_ratio")

#: Names of the numbers that a measurement of spectra brings: those of ``Sloppiness``, of each spectrum.
SPECTRUM_VALUES = (
    "fisher_spectrum_trace",
    *(f"{matrix}_{number}" for matrix in ("fisher", "data") for number in _NUMBERS),
)


class BatchSpectra(NamedTuple):
    """What one batch tells of the spectra.

    Attributes:
        values: the numbers of :data:`SPECTRUM_VALUES`; nan where a spectrum has none.
        eigenvalues: ``"fisher"`` and ``"data"`` -> all that are not zero by construction, descending.
        notes: what they are of.
    """

    values: dict[str, float]
    eigenvalues: dict[str, tuple[float, ...]]
    notes: tuple[str, ...]


def batch_spectra(
    model: nn.Module,
    inputs: Any,
    *,
    num_samples: int = 32,
    variant: FisherVariant = "exact",
    select: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> BatchSpectra:
    """The complete spectra of the Fisher matrix and of the data, for the first samples of a batch.

    See :func:`~torchgeom_optim.geometry.fisher.fisher_spectrum`,
    :func:`~torchgeom_optim.geometry.data_spectrum.data_spectrum` (not centred) and
    :class:`~torchgeom_optim.geometry.sloppiness.Sloppiness`. The model computes as in evaluation mode. C backward
    passes over the samples and an eigendecomposition of N C x N C.

    Args:
        model: any module, with logits [N, C] (or [N, ..., C]) as its output.
        inputs: a tensor, a tuple of the model's arguments or a mapping of its keyword arguments.
        num_samples: N at most.
        variant: of the Fisher matrix; ``"outputs"`` for a regression.
        select: picks the logits out of the model's output.
        dtype: of J's products; None for the model's own.

    Returns:
        Numbers, eigenvalues and notes.

    Raises:
        ValueError: ``num_samples`` below 1; or as :func:`fisher_spectrum` has it.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: must be at least 1; 32 is the default.")
    few = map_tensors(lambda x: x[:num_samples], inputs)
    fisher = fisher_spectrum(model, few, variant=variant, select=select, dtype=dtype)
    values = dict.fromkeys(SPECTRUM_VALUES, math.nan)
    values["fisher_spectrum_trace"] = fisher.trace.value
    values.update(_numbers("fisher", fisher))
    eigenvalues = {"fisher": tuple(fisher.eigenvalues.tolist())}
    notes = [f"fisher spectrum: {fisher.variant}, {fisher.normalisation}, evaluation mode"]
    floating = [x for x in tensors_of(few) if x.is_floating_point()]
    if len(floating) == 1:
        data = data_spectrum(floating[0])
        values.update(_numbers("data", data))
        eigenvalues["data"] = tuple(data.eigenvalues.tolist())
    else:
        notes.append(f"data spectrum: one floating point input is needed, the batch has {len(floating)}")
    return BatchSpectra(values, eigenvalues, tuple(notes))


def _numbers(matrix: str, spectrum: Spectrum) -> dict[str, float]:
    if spectrum.rank == 0:
        return {}
    numbers = spectrum.sloppiness()
    return {f"{matrix}_{name}": float(getattr(numbers, name)) for name in _NUMBERS}
