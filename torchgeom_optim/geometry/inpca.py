"""Intensive principal component analysis: distributions as points in a space that may have imaginary axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["InPCA", "inpca", "intensive_distances"]

_BLOCK_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class InPCA:
    r"""Points whose signed squared distances are the intensive distances of the distributions.

        D_ij = sum_k sign(eigenvalues_k) (coordinates_ik - coordinates_jk)^2

    Attributes:
        coordinates: T = U sqrt(|Sigma|), [n, R]; columns by descending |eigenvalue|. A column's sign is chosen so that
            its entry of largest magnitude is positive.
        eigenvalues: signed, [R]. A negative one belongs to an imaginary axis, along which squared distances count
            negatively; leaving such axes out, as is often done, breaks the equation above.
        distances: D, [n, n], dimensionless; zero diagonal.
        num_clipped: overlaps (pairs i < j, for each sample where points are models) below the smallest.
        num_overlaps: out of how many.
        smallest_overlap: the value they were raised to.
    """

    coordinates: Tensor
    eigenvalues: Tensor
    distances: Tensor
    num_clipped: int
    num_overlaps: int
    smallest_overlap: float

    @property
    def imaginary(self) -> Tensor:
        """Which axes are imaginary: [R], bool."""
        return self.eigenvalues < 0

    def embedded_distances(self, num_axes: int | None = None) -> Tensor:
        """Signed squared distances from the first coordinates.

        Args:
            num_axes: how many; all by default, which gives D back.

        Returns:
            [n, n].

        Raises:
            ValueError: there are not as many axes.
        """
        num_axes = len(self.eigenvalues) if num_axes is None else num_axes
        if not 0 <= num_axes <= len(self.eigenvalues):
            raise ValueError(f"num_axes={num_axes}: must be in [0, {len(self.eigenvalues)}], the axes there are.")
        T, signs = self.coordinates[:, :num_axes], self.eigenvalues[:num_axes].sign()
        lengths = (T.square() * signs).sum(1)
        return lengths[:, None] + lengths - 2 * (T * signs) @ T.T


def inpca(probabilities: Tensor, *, smallest_overlap: float = 1e-30) -> InPCA:
    r"""Embed distributions by their intensive distances.

        D_ij = -8 log sum_c sqrt(p_c(i) p_c(j)),  W = -1/2 P D P,  P = I - 11'/n,  W = U Sigma U',  T = U sqrt(|Sigma|)

    Source: Quinn, Clement, De Bernardis, Niemack & Sethna (2019), "Visualizing probabilistic models: intensive
    principal component analysis"; D is their intensive distance (squared), of which W is the doubly centred form.
    Nothing is changed but that overlaps too small are raised to ``smallest_overlap``, and counted. For nearby
    distributions D_ij = |2 sqrt(p_i) - 2 sqrt(p_j)|^2 to leading order, and T is the ordinary principal component
    analysis of 2 sqrt(p).

    Axes whose |Sigma_k| is below n eps max|Sigma| are rounding and left out.

    Args:
        probabilities: [n, C], a distribution for each of n points, such as the samples under one model; or [n, N, C],
            the predictions of n models for the same N samples, whose distances are added up over the samples (those
            of the joint distributions of N independent labels). Computed in float64.
        smallest_overlap: in (0, 1). Distributions without common support are infinitely far apart; at most
            -8 log(smallest_overlap), 553 by default, is counted for one sample.

    Returns:
        The embedding.

    Raises:
        ValueError: fewer than two points; no probabilities; all points alike; ``smallest_overlap`` out of range.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64)
        >>> result = inpca(p)
        >>> torch.allclose(result.embedded_distances(), result.distances)
        True
    """
    distances, clipped, overlaps = intensive_distances(probabilities, smallest_overlap)
    W = -0.5 * (distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean())
    values, vectors = torch.linalg.eigh((W + W.T) / 2)
    order = values.abs().argsort(descending=True, stable=True)
    values, vectors = values[order], vectors[:, order]
    num_samples = 1 if probabilities.dim() == 2 else probabilities.shape[1]
    rounding = 100 * torch.finfo(probabilities.dtype).eps
    if not bool(distances.max() > num_samples * rounding**2):  # differences of roots enter squared
        raise ValueError(
            f"all {len(values)} points have the same distribution up to rounding: two that differ are needed. Are the "
            "inputs all equal, or the predictions constant?"
        )
    kept = values.abs() > len(values) * torch.finfo(values.dtype).eps * values[0].abs()
    coordinates = vectors[:, kept] * values[kept].abs().sqrt()
    extremes = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    return InPCA(coordinates * extremes.sign(), values[kept], distances, clipped, overlaps, smallest_overlap)


def intensive_distances(probabilities: Tensor, smallest_overlap: float = 1e-30) -> tuple[Tensor, int, int]:
    """D_ij = -8 log sum_c sqrt(p_c(i) p_c(j)), added up over the samples where there are several.

    Args:
        probabilities: [n, C] or [n, N, C].
        smallest_overlap: overlaps below it are raised to it.

    Returns:
        D [n, n] in float64; the number of overlaps raised; the number of overlaps (pairs times samples).

    Raises:
        ValueError: fewer than two points; no probabilities; ``smallest_overlap`` out of range.
    """
    if not 0.0 < smallest_overlap < 1.0:
        raise ValueError(f"smallest_overlap={smallest_overlap}: must be in (0, 1); 1e-30 is the default.")
    p = _checked(probabilities)
    n, num_samples, _ = p.shape
    roots = p.sqrt().transpose(0, 1)  # [N, n, C]
    distances = roots.new_zeros(n, n)
    clipped = torch.zeros((), dtype=torch.long, device=p.device)
    step = max(1, _BLOCK_BYTES // (n * n * roots.element_size()))
    for start in range(0, num_samples, step):
        block = roots[start : start + step]
        overlaps = block @ block.transpose(1, 2)
        clipped += (overlaps < smallest_overlap).sum()
        far = overlaps.clamp(min=smallest_overlap).log()
        # 1 - overlap = |sqrt p - sqrt q|^2 / 2, which does not cancel where the two are close.
        gap = torch.cdist(block, block, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
        distances -= 8 * torch.where(gap < 0.5, torch.log1p(-gap.clamp(max=0.5)), far).sum(0)
    distances = (distances + distances.T) / 2
    distances.fill_diagonal_(0.0)
    # Each pair was met twice; a point's overlap with itself is 1 and was never clipped.
    return distances, int(clipped) // 2, num_samples * n * (n - 1) // 2


def _checked(probabilities: Tensor) -> Tensor:
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        got = probabilities.dtype if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise ValueError(f"probabilities of {got}: a floating-point tensor is needed. Try logits.softmax(-1).")
    if probabilities.dim() not in (2, 3) or len(probabilities) < 2 or 0 in probabilities.shape:
        raise ValueError(
            f"probabilities of shape {list(probabilities.shape)}: [n, C], or [n, N, C] for n models, with n >= 2 is "
            "needed. One point alone has no distances."
        )
    p = probabilities.detach()
    # What float16 rounds away over many classes is mended below; logits or counts are not let through.
    allowed = 10 * math.sqrt(torch.finfo(p.dtype).eps)
    p = p.double()
    if not bool((p >= 0).all()) or not bool(((p.sum(-1) - 1).abs() <= allowed).all()):
        raise ValueError(
            "probabilities that are negative, not finite, or do not add up to 1 along the last axis: distributions are "
            "needed. Try logits.softmax(-1), and look for nan in the logits."
        )
    p = p / p.sum(-1, keepdim=True)
    return p[:, None] if p.dim() == 2 else p
