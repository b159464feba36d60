"""The Fisher matrix of a network in its variants: which J has it as J'J / N, and its spectrum."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.labels import with_drawn_labels
from torchgeom_optim.geometry.spectrum import Normalisation, Spectrum, jacobian_spectrum

__all__ = ["FisherVariant", "fisher_jacobian", "fisher_spectrum"]

FisherVariant = Literal["exact", "drawn", "empirical", "outputs"]


def fisher_spectrum(
    model: nn.Module,
    data: Any,
    targets: Tensor | None = None,
    num_eigenvalues: int | None = None,
    *,
    variant: FisherVariant = "exact",
    normalisation: Normalisation = "mean",
    tolerance: float | None = None,
    block_size: int = 2,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = torch.float64,
    **jacobian_options: Any,
) -> Spectrum:
    """The spectrum of a network's Fisher matrix: :func:`fisher_jacobian` and :func:`jacobian_spectrum` in one.

    Args:
        model: see :func:`fisher_jacobian`.
        data: see there.
        targets: see there.
        num_eigenvalues: see :func:`jacobian_spectrum`, as all that follow.
        variant: see :func:`fisher_jacobian`.
        normalisation: "mean" or "sum" over samples.
        tolerance: residual allowed.
        block_size: columns per product.
        max_products: columns at most.
        generator: for labels, start and probes.
        dtype: of J's products. A Gram matrix squares the condition number: of a spectrum in float32 less than 7 decades
            can be seen, of one in float64 15. With products in float32, eigenvalues may be too: see
            :class:`~torchgeom_optim.geometry.spectrum.Spectrum`.
        **jacobian_options: for :class:`Jacobian`: parameters, batch_size, memory_limit, select, class_dim, keep_modes.

    Returns:
        The spectrum.

    Example:
        >>> spectrum = fisher_spectrum(nn.Linear(4, 3), torch.randn(20, 4))
        >>> len(spectrum.eigenvalues), spectrum.rank, spectrum.variant
        (15, 10, 'exact')
    """
    jacobian = fisher_jacobian(
        model, data, targets, variant=variant, generator=generator, dtype=dtype, **jacobian_options
    )
    return jacobian_spectrum(
        jacobian,
        num_eigenvalues,
        variant=variant,
        normalisation=normalisation,
        tolerance=tolerance,
        block_size=block_size,
        max_products=max_products,
        generator=generator,
    )


def fisher_jacobian(
    model: nn.Module,
    data: Any,
    targets: Tensor | None = None,
    *,
    variant: FisherVariant = "exact",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = torch.float64,
    **jacobian_options: Any,
) -> Jacobian:
    """The J whose J'J / N is a Fisher matrix, p = softmax(outputs).

    - "exact": sum over all classes, F = 1/N sum_x sum_c p_c grad(log p_c) grad(log p_c)'; J of 2 sqrt(p), N C rows.
    - "drawn": one label per sample (per position, where there are several) drawn from p; J of its log-probability, N
      rows. Its mean over draws is the exact one; a single draw has other eigenvalues, and rank N at most.
    - "empirical": the given labels in the drawn ones' place. It is the second moment of the gradients, and not the
      Fisher matrix of anything; it vanishes where the training loss does.
    - "outputs": J of the outputs. J'J / N is the Fisher matrix of a Gaussian of unit variance about them (regression),
      and the Gauss-Newton matrix of half the squared error.

    Args:
        model: any module, with the sample along the first axis.
        data: see :class:`Jacobian`.
        targets: labels, for "empirical", where they do not come with the mini-batches.
        variant: which.
        generator: for "drawn"; by default one seeded with 0.
        dtype: of J; None for the model's own.
        **jacobian_options: for :class:`Jacobian`.

    Returns:
        The operator. J carries no 1/N.

    Raises:
        ValueError: unknown variant; labels missing or given without use; and as :class:`Jacobian` has it.
    """
    if variant not in get_args(FisherVariant):
        raise ValueError(f"variant={variant!r}: must be one of {', '.join(map(repr, get_args(FisherVariant)))}.")
    if targets is not None and variant != "empirical":
        raise ValueError(
            f"targets with variant={variant!r}, which has no use for them: only 'empirical' takes the given labels. "
            "Leave them out, or choose that."
        )
    options = {**jacobian_options, "dtype": dtype}
    if variant == "exact":
        return Jacobian(model, data, of="sqrt_probabilities", **options)
    if variant == "outputs":
        return Jacobian(model, data, of="outputs", **options)
    if variant == "drawn":
        generator = generator or torch.Generator().manual_seed(0)
        data, targets = with_drawn_labels(model, data, generator, **options)
    return Jacobian(model, data, targets, of="log_probabilities", **options)
