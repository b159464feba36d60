"""InPCA against its definition, against principal component analysis, and on what it must refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry.inpca import inpca, intensive_distances

CLOSE = tolerance(condition=1e3)


def predictions(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)


def distances_by_loop(p: Tensor) -> Tensor:
    p = p[:, None] if p.dim() == 2 else p
    D = torch.zeros(len(p), len(p), dtype=torch.float64)
    for i in range(len(p)):
        for j in range(len(p)):
            for x in range(p.shape[1]):
                D[i, j] -= 8 * math.log(sum(math.sqrt(float(a * b)) for a, b in zip(p[i, x], p[j, x], strict=True)))
    return D


@pytest.mark.parametrize("shape", [(6, 3), (5, 4, 3)], ids=["samples", "models"])
def test_distances_are_those_of_the_definition(shape: tuple[int, ...]) -> None:
    p = predictions(*shape)
    D, clipped, overlaps = intensive_distances(p)
    torch.testing.assert_close(D, distances_by_loop(p), **CLOSE)
    assert (clipped, overlaps) == (0, 15 if len(shape) == 2 else 40)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(D / 2, distances_by_loop(p), **CLOSE)


@pytest.mark.parametrize("shape", [(40, 4), (30, 2, 3)], ids=["samples", "models"])
def test_coordinates_give_the_distances_back_with_signs(shape: tuple[int, ...]) -> None:
    p = predictions(*shape)
    result = inpca(p)
    T, signs = result.coordinates, result.eigenvalues.sign()
    D = ((T[:, None] - T[None]).square() * signs).sum(-1)
    torch.testing.assert_close(D, distances_by_loop(p), **CLOSE)
    torch.testing.assert_close(result.embedded_distances(), distances_by_loop(p), **CLOSE)
    assert bool((result.eigenvalues.abs().diff() <= 0).all())
    assert bool(result.imaginary.any())  # the test would not notice dropped signs otherwise
    with pytest.raises(AssertionError):
        torch.testing.assert_close((T[:, None] - T[None]).square().sum(-1), distances_by_loop(p), **CLOSE)


def test_nearby_distributions_have_the_principal_components_of_their_roots() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, generator=generator, dtype=torch.float64)
    nudges = torch.randn(20, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.4, 0.2])
    step = 1e-4
    p = (logits + step * nudges).softmax(-1)
    roots = 2 * p.sqrt()
    U, S, _ = torch.linalg.svd(roots - roots.mean(0), full_matrices=False)
    expected = U[:, :2] * S[:2]
    result = inpca(p)
    # Equal to leading order in the step; three probabilities leave two dimensions.
    torch.testing.assert_close(result.coordinates[:, :2].abs(), expected.abs(), rtol=1e-2, atol=10 * step**2)
    torch.testing.assert_close(result.eigenvalues[:2], S[:2].square(), rtol=1e-3, atol=0.0)
    assert not bool(result.imaginary[:2].any())
    assert float(result.eigenvalues[2:].abs().max()) < 1e-3 * float(result.eigenvalues[1])


@given(n=st.integers(3, 12), classes=st.integers(2, 6), seed=st.integers(0, 99))
def test_points_and_classes_in_another_order(n: int, classes: int, seed: int) -> None:
    p = predictions(n, classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    points, labels = torch.randperm(n, generator=generator), torch.randperm(classes, generator=generator)
    result, other = inpca(p), inpca(p[points][:, labels])
    torch.testing.assert_close(other.distances, result.distances[points][:, points], **CLOSE)
    k = min(len(result.eigenvalues), len(other.eigenvalues), 2)
    torch.testing.assert_close(other.eigenvalues[:k], result.eigenvalues[:k], **CLOSE)
    torch.testing.assert_close(other.embedded_distances(), result.embedded_distances()[points][:, points], **CLOSE)


def test_binary_predictions_have_a_closed_form() -> None:
    # Two points at angles t and s on the quarter circle (cos, sin): overlap cos(t - s).
    p = torch.tensor([[math.cos(t) ** 2, math.sin(t) ** 2] for t in (0.2, 1.1)], dtype=torch.float64)
    result = inpca(p)
    expected = -8 * math.log(math.cos(0.9))
    torch.testing.assert_close(result.eigenvalues, torch.tensor([expected / 2], dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(result.distances[0, 1], torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_predictions_without_overlap_are_clipped_and_counted() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    result = inpca(p, smallest_overlap=1e-10)
    assert (result.num_clipped, result.num_overlaps, result.smallest_overlap) == (2, 3, 1e-10)
    far = -8 * math.log(1e-10)
    D = torch.tensor([[0.0, far, far], [far, 0.0, 4 * math.log(2)], [far, 4 * math.log(2), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(result.distances, D, **CLOSE)
    torch.testing.assert_close(result.embedded_distances(), D, **CLOSE)
    models = torch.stack([p, p.flip(0)])  # at two of three samples the two models do not overlap
    assert (inpca(models).num_clipped, inpca(models).num_overlaps) == (2, 3)
    assert math.isfinite(float(inpca(models).distances.max()))


def test_float32_predictions_are_embedded_in_float64() -> None:
    p = predictions(6, 3).float()
    result = inpca(p)
    assert result.coordinates.dtype == torch.float64
    torch.testing.assert_close(result.distances, intensive_distances(p.double())[0], **tolerance(torch.float32))


def test_an_embedding_in_fewer_axes() -> None:
    result = inpca(predictions(10, 4))
    T, signs = result.coordinates[:, :2], result.eigenvalues[:2].sign()
    expected = ((T[:, None] - T[None]).square() * signs).sum(-1)
    torch.testing.assert_close(result.embedded_distances(2), expected, **CLOSE)
    with pytest.raises(ValueError, match="num_axes=99"):
        result.embedded_distances(99)


NAN = math.nan
P = predictions(4, 3)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (P[:1].expand(4, 3), "all 4 points have the same distribution"),
        (P[:1], "n >= 2"),
        (P[0], "shape \\[3\\]"),
        (P * 2, "do not add up to 1"),
        (P - 0.5, "negative"),
        (torch.full((4, 3), NAN), "not finite"),
        (torch.cat([P, torch.tensor([[math.inf, 0, 0]])]), "not finite"),
        (torch.ones(4, 3, dtype=torch.long), "torch.int64"),
        ([[0.5, 0.5]], "list"),
    ],
)
def test_what_is_refused(p: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inpca(p)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, NAN, math.inf])
def test_the_smallest_overlap_must_make_sense(value: float) -> None:
    with pytest.raises(ValueError, match=r"smallest_overlap=.*must be in"):
        inpca(P, smallest_overlap=value)
