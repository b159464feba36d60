from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.oracles import tolerance
from torchgeom_optim.diagnostics import agreement


def rows(b: int, p: int, seed: int, spread: float = 2.0, mean: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(spread * torch.randn(b, 1, generator=generator, dtype=torch.float64))
    return lengths * (torch.randn(b, p, generator=generator, dtype=torch.float64) + mean)


def confusion_by_loops(h: torch.Tensor) -> float:
    cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in itertools.combinations(h, 2)]
    return -min(0.0, *cosines)


SHAPES = st.tuples(st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))


@given(SHAPES)
def test_against_loops_over_the_gradients(shape):
    h = rows(*shape)
    K, mean, b = h @ h.T, h.mean(0), len(h)
    norms_sq = sum(float(x @ x) for x in h)
    assert_close(float(agreement.gradient_confusion(K)), confusion_by_loops(h), **tolerance(condition=1e3))
    condition = norms_sq / float(h.sum(0).square().sum())
    assert_close(
        float(agreement.gradient_diversity(K)), norms_sq / float(h.sum(0).norm() ** 2), **tolerance(condition=condition)
    )
    coherence = sum(float(mean @ x) for x in h) / norms_sq
    assert_close(float(agreement.gradient_coherence(K)), coherence, **tolerance())
    rank = float(torch.linalg.matrix_norm(h) ** 2 / torch.linalg.matrix_norm(h, 2) ** 2)
    assert_close(float(agreement.effective_rank(K)), rank, **tolerance(condition=b))


@given(SHAPES)
def test_diversity_times_coherence_times_b_is_one(shape):
    h = rows(*shape)
    K = h @ h.T
    product = agreement.gradient_diversity(K) * agreement.gradient_coherence(K) * len(h)
    assert_close(product, torch.ones_like(product), **tolerance())


@given(SHAPES)
def test_ranges(shape):
    h = rows(*shape)
    K, b = h @ h.T, len(h)
    slack = 1e-9
    assert 1 - slack <= float(agreement.effective_rank(K)) <= min(h.shape) + slack
    assert 0 <= float(agreement.gradient_confusion(K)) <= 1
    assert float(agreement.gradient_diversity(K)) >= 1 / b - slack
    assert 0 <= float(agreement.gradient_coherence(K)) <= 1 + slack
    assert 1 <= agreement.gaussian_effective_rank(*h.shape) <= min(h.shape)


@given(SHAPES, st.floats(1e-6, 1e6))
def test_neither_scale_nor_order_of_samples_matters(shape, scale):
    h = rows(*shape)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(1))
    other = scale * h[order]
    for metric in (
        agreement.gradient_confusion,
        agreement.gradient_diversity,
        agreement.gradient_coherence,
        agreement.effective_rank,
        lambda K: agreement.relative_gradient_rank(K, h.shape[1]),
        lambda K: agreement.gradient_noise_scale(K).value,
    ):
        assert_close(metric(other @ other.T), metric(h @ h.T), rtol=1e-6, atol=1e-9)


def test_the_extremes():
    same = torch.ones(4, 4, dtype=torch.float64)
    apart = torch.eye(4, dtype=torch.float64)
    assert float(agreement.gradient_diversity(same)) == 0.25
    assert float(agreement.gradient_coherence(same)) == 1.0
    assert float(agreement.effective_rank(same)) == pytest.approx(1.0)
    assert float(agreement.gradient_diversity(apart)) == 1.0
    assert float(agreement.gradient_coherence(apart)) == 0.25
    assert float(agreement.effective_rank(apart)) == pytest.approx(4.0)
    assert float(agreement.gradient_confusion(same)) == float(agreement.gradient_confusion(apart)) == 0.0
    assert float(agreement.gradient_confusion(torch.tensor([[1.0, -2.0], [-2.0, 4.0]]))) == 1.0


def test_one_number_for_each_matrix():
    h = torch.stack([rows(5, 7, seed) for seed in range(6)]).reshape(2, 3, 5, 7)
    K = h @ h.mT
    sizes = torch.tensor([[7, 8, 9], [10, 20, 3]])
    for metric in (
        agreement.gradient_confusion,
        agreement.gradient_diversity,
        agreement.gradient_coherence,
        agreement.effective_rank,
        lambda K: agreement.gradient_noise_scale(K).trace,
        lambda K: agreement.gradient_confusion(K, 2),
    ):
        assert_close(metric(K), torch.stack([metric(k) for k in K.reshape(6, 5, 5)]).reshape(2, 3))
    pairs = zip(K.reshape(6, 5, 5), sizes.reshape(-1).tolist(), strict=True)
    ranks = [agreement.relative_gradient_rank(k, p) for k, p in pairs]
    assert_close(agreement.relative_gradient_rank(K, sizes), torch.stack(ranks).reshape(2, 3))


@pytest.mark.parametrize(("b", "groups"), [(8, 4), (7, 3), (5, 5)])
def test_groups_are_means_of_consecutive_samples(b, groups):
    h = rows(b, 6, 3)
    index = [i * groups // b for i in range(b)]
    means = torch.stack([h[[i for i in range(b) if index[i] == g]].mean(0) for g in range(groups)])
    assert_close(agreement.group_means(h @ h.T, groups), means @ means.T, **tolerance(condition=1e3))
    assert_close(
        float(agreement.gradient_confusion(h @ h.T, groups)), confusion_by_loops(means), **tolerance(condition=1e3)
    )


def test_the_noise_scale_against_numpy_and_its_expectation():
    h = rows(9, 5, 0, spread=0.3, mean=1.0)
    trace = float(h.var(0, correction=1).sum())
    norm_sq = float(h.mean(0).square().sum()) - trace / 9
    noise = agreement.gradient_noise_scale(h @ h.T)
    assert_close(float(noise.trace), trace, **tolerance(condition=100))
    assert_close(float(noise.norm_sq), norm_sq, **tolerance(condition=100))
    assert_close(float(noise.value), trace / norm_sq, **tolerance(condition=1000))
    # Unbiased: over many batches the two estimates average to the covariance's trace and the mean's square.
    many = torch.randn(4000, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    noise = agreement.gradient_noise_scale(many @ many.mT)
    for estimate, truth in ((noise.trace, 3.0), (noise.norm_sq, 0.75)):
        assert abs(float(estimate.mean()) - truth) < 5 * float(estimate.std()) / math.sqrt(4000)


@pytest.mark.parametrize(("b", "p"), [(8, 8), (8, 40), (40, 8), (16, 16), (32, 1000), (64, 20_000)])
def test_the_rank_of_noise_formula_against_draws(b, p):
    formula = agreement.gaussian_effective_rank(b, p)
    mean, error = agreement.sampled_gaussian_effective_rank(b, p, 100, torch.Generator().manual_seed(1))
    assert abs(formula - mean) < 5 * error + 0.02 * mean
    # To first order, which is good for large shapes.
    if b * p > 10_000:
        assert formula == pytest.approx(b * p / (math.sqrt(b) + math.sqrt(p)) ** 2, rel=0.03)


def test_draws_of_the_triangular_factor_are_draws_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(400, 5, 12, generator=generator, dtype=torch.float64)
    ranks = torch.linalg.matrix_norm(Y) ** 2 / torch.linalg.matrix_norm(Y, 2) ** 2
    mean, error = agreement.sampled_gaussian_effective_rank(5, 12, 400, generator)
    assert abs(mean - float(ranks.mean())) < 5 * (error + float(ranks.std()) / 20)
    wrong, _ = agreement.sampled_gaussian_effective_rank(5, 6, 400, generator)
    assert abs(wrong - float(ranks.mean())) > 5 * error


def test_what_is_not_finite_stays_so_and_vanishing_gradients_do_no_harm():
    K = torch.eye(3)
    K[0, 1] = K[1, 0] = math.nan
    for metric in (agreement.gradient_confusion, agreement.gradient_diversity, agreement.effective_rank):
        assert math.isnan(float(metric(K)))
    zero = torch.zeros(2, 3, 3)
    zero[1] = torch.eye(3)
    assert agreement.gradient_confusion(zero).tolist() == [0.0, 0.0]
    assert math.isnan(float(agreement.gradient_diversity(zero)[0]))
    assert agreement.effective_rank(zero)[1] == 3
    opposed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert float(agreement.gradient_diversity(opposed)) == math.inf
    assert float(agreement.gradient_noise_scale(opposed).norm_sq) < 0


def test_refusals():
    with pytest.raises(ValueError, match="b >= 2"):
        agreement.gradient_confusion(torch.ones(1, 1))
    with pytest.raises(ValueError, match="b >= 2"):
        agreement.gradient_noise_scale(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        agreement.gradient_diversity(torch.ones(2, 3))
    with pytest.raises(ValueError, match="num_groups=4"):
        agreement.gradient_confusion(torch.eye(3), 4)
    with pytest.raises(ValueError, match="dimension=0"):
        agreement.gaussian_effective_rank(3, 0)
    with pytest.raises(ValueError, match="num_draws=0"):
        agreement.sampled_gaussian_effective_rank(3, 3, 0)
