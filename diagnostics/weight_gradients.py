r"""How the batch gradient changes with the weights, in the forms of Chapter 4 of the thesis.

h is the batch gradient at w, h_k that at w + omega_k, k = 1 ... n, all on the same batch. The functions take what has
to be known of them, so that the n gradients need not be kept side by side; leading axes (layers) are kept.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["weight_gradient_coherence", "weight_gradient_cosine", "weight_gradient_diversity"]


def weight_gradient_cosine(inner_products: Tensor, norms_sq: Tensor, base_norm_sq: Tensor) -> Tensor:
    r"""The least cosine between the gradient and one after a small move, in [-1, 1]; 1 if the move changes nothing.

        min_k <h_k, h> / (|h_k| |h|)          Def. 4.1, Eq. (4.1)

    Args:
        inner_products: <h_k, h>, [..., n].
        norms_sq: |h_k|^2, [..., n].
        base_norm_sq: |h|^2, [...].

    Returns:
        [...].
    """
    return (inner_products / (norms_sq * base_norm_sq.unsqueeze(-1)).sqrt()).clamp(-1.0, 1.0).amin(-1)


def weight_gradient_diversity(norms_sq: Tensor, sum_norm_sq: Tensor) -> Tensor:
    r"""How far the moved gradients are from adding up: 1/n if the moves change nothing.

        sum_k |h_k|^2 / |sum_k h_k|^2          Def. 4.1, Eq. (4.2)

    Args:
        norms_sq: |h_k|^2, [..., n].
        sum_norm_sq: |sum_k h_k|^2, [...].

    Returns:
        [...]. Compare at equal n.
    """
    return norms_sq.sum(-1) / sum_norm_sq


def weight_gradient_coherence(inner_products: Tensor, norms_sq: Tensor) -> Tensor:
    r"""The share of the moved gradients that points along the gradient: 1 if the moves change nothing.

        sum_k <h, h_k> / sum_k |h_k|^2          Def. 4.1, Eq. (4.3)

    It is above 1 where the gradient shrinks along the moves. It is not 1 / (n diversity), since h is not the mean of
    the h_k.

    Args:
        inner_products: <h_k, h>, [..., n].
        norms_sq: |h_k|^2, [..., n].

    Returns:
        [...].
    """
    return inner_products.sum(-1) / norms_sq.sum(-1)
