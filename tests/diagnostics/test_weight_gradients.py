from __future__ import annotations

import torch
from torch.testing import assert_close

from tests.oracles import tolerance
from torchgeom_optim.diagnostics import weight_gradients


def numbers(h, moved):
    inner, norms_sq = moved @ h, moved.square().sum(-1)
    return (
        weight_gradients.weight_gradient_cosine(inner, norms_sq, h.square().sum()),
        weight_gradients.weight_gradient_diversity(norms_sq, moved.sum(0).square().sum()),
        weight_gradients.weight_gradient_coherence(inner, norms_sq),
    )


def test_against_loops():
    h, moved = torch.randn(7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    cosine, diversity, coherence = numbers(h, moved)
    assert_close(cosine, min(m @ h / (m.norm() * h.norm()) for m in moved), **tolerance())
    assert_close(diversity, sum(m @ m for m in moved) / sum(moved).norm() ** 2, **tolerance(condition=100))
    assert_close(coherence, sum(h @ m for m in moved) / sum(m @ m for m in moved), **tolerance())


def test_a_gradient_that_does_not_change_and_one_that_turns_round():
    h = torch.tensor([3.0, 4.0])
    assert [float(x) for x in numbers(h, torch.stack([h, h]))] == [1.0, 0.5, 1.0]
    cosine, diversity, coherence = numbers(h, torch.stack([h, -h]))
    assert (float(cosine), float(diversity), float(coherence)) == (-1.0, float("inf"), 0.0)


def test_layers_keep_their_axis():
    h, moved = torch.randn(3, 5), torch.randn(3, 2, 5)
    inner, norms_sq = (moved * h[:, None]).sum(-1), moved.square().sum(-1)
    cosine = weight_gradients.weight_gradient_cosine(inner, norms_sq, h.square().sum(-1))
    diversity = weight_gradients.weight_gradient_diversity(norms_sq, moved.sum(1).square().sum(-1))
    coherence = weight_gradients.weight_gradient_coherence(inner, norms_sq)
    for k in range(3):
        for found, expected in zip((cosine, diversity, coherence), numbers(h[k], moved[k]), strict=True):
            assert_close(found[k], expected)
