"""The spectrum of the data, which the paper lays beside that of the Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchgeom_optim.geometry.lanczos import Estimate
from torchgeom_optim.geometry.mini_batches import MiniBatches, tensors_of
from torchgeom_optim.geometry.spectrum import Spectrum

__all__ = ["data_spectrum"]

_EPS = torch.finfo(torch.float64).eps


def data_spectrum(data: Any, *, centred: bool = False) -> Spectrum:
    r"""Eigenvalues of the data's autocorrelation X'X / N, X [N, D] the flattened samples.

    Source: Cowlagi & Chaudhari, Fig. 2, "data autocorrelation matrix", not centred; its nonzero eigenvalues are those
    of X X'/N. For linear regression with one output and no bias it is the Fisher matrix.

    Args:
        data: a tensor [N, ...], or mini-batches, each an input or a pair (inputs, targets), as for :class:`Jacobian`.
        centred: subtract each feature's mean first (the covariance, with 1/N).

    Returns:
        The complete spectrum; ``eigenvectors`` are directions in the space of the inputs, [D, k].

    Raises:
        ValueError: inputs that are several tensors, integers or not finite; all equal and centred.
    """
    batches = MiniBatches(data, None, False, torch.device("cpu"), None)
    parts = [tensors_of(batch.inputs) for batch in batches.parts(batches.largest)]
    if any(len(part) != 1 or not part[0].is_floating_point() for part in parts):
        raise ValueError(
            f"inputs of {[str(x.dtype) for x in parts[0]]}: one floating-point tensor per sample is needed. Give the "
            "one that the spectrum is asked of, tokens as their embeddings."
        )
    X = torch.cat([part[0].reshape(len(part[0]), -1) for part in parts]).double()
    largest = float(X.abs().max())
    if centred:
        X = X - X.mean(0)
        if not bool(X.abs().max() > len(X) * _EPS * largest):
            raise ValueError(
                f"all {len(X)} inputs are equal: they must differ, or nothing is left once they are centred. Give "
                "other samples, or centred=False."
            )
    num_samples, features = X.shape
    S = torch.linalg.svdvals(X)  # of X and not of a Gram matrix: the condition number is not squared
    values = S.square() / num_samples
    # Backward stability: the singular values are off by some eps |X|, and so small eigenvalues by far less than large.
    error = max(X.shape) * _EPS * S[0]
    return Spectrum(
        eigenvalues=values,
        residuals=(2 * S * error + error.square()) / num_samples,
        roundoff=float(error.square()) / num_samples,
        trace=Estimate(float(X.square().sum()) / num_samples, 0.0),
        matrix="X'X, X the centred data" if centred else "X'X, X the data",
        normalisation=f"mean over N = {num_samples} samples",
        variant="data",
        num_samples=num_samples,
        size=features,
        complete=True,
        converged=True,
        num_products=0,
        dtype=torch.float64,
        _vectors=lambda num: _right_vectors(X, num),
    )


def _right_vectors(X: Tensor, num: int) -> Tensor:
    Vh: Tensor = torch.linalg.svd(X, full_matrices=False)[2]
    return Vh[:num].T.contiguous()
