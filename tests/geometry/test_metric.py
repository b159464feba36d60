"""Block metrics against matrices that are written out, and what they promise under changes of coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import tolerance
from torchgeom_optim.geometry.matrix_metric import ExactMetric, KroneckerMetric, pi_split, relative_split
from torchgeom_optim.geometry.metric import (
    BLOCKS,
    DiagonalMetric,
    IdentityMetric,
    LayerMetric,
    LayerVector,
    NotPositiveDefiniteError,
    QuasiDiagonalMetric,
    WhiteningMetric,
    block_sums,
    scale_blocks,
)

M = 4  # units


class Case(NamedTuple):
    metric: LayerMetric
    dense: Tensor  # [P, P] in the order of the units: each one's weights, and then its bias
    like: LayerVector
    finest: str


def spd(n: int, generator: torch.Generator, condition: float = 30.0) -> Tensor:
    """A symmetric matrix whose eigenvalues go from 1 to the condition number."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ basis.T


def positive(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.3


def rows_of(vector: LayerVector) -> Tensor:
    rows = vector.weight.reshape(len(vector.weight), -1)
    return rows if vector.bias is None else torch.cat([rows, vector.bias[:, None]], 1)


def drawn(like: LayerVector, generator: torch.Generator) -> LayerVector:
    bias = None if like.bias is None else torch.randn(M, generator=generator, dtype=torch.float64)
    return LayerVector(torch.randn(like.weight.shape, generator=generator, dtype=torch.float64), bias)


def layer(kernel: tuple[int, ...], bias: bool, n: int = 3) -> LayerVector:
    return LayerVector(torch.zeros(M, n, *kernel), torch.zeros(M) if bias else None)


def identity(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator) -> Case:
    like = layer(kernel, bias)
    return Case(IdentityMetric(), torch.eye(rows_of(like).numel(), dtype=torch.float64), like, "weight")


def diagonal(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator) -> Case:
    like = layer(kernel, bias)
    q = LayerVector(*(None if p is None else positive(*p.shape, generator=g) for p in like))
    mean = rows_of(q).mean()
    return Case(DiagonalMetric.damped(q, 0.1), torch.diag(rows_of(q).flatten() + 0.1 * mean), like, "weight")


def quasi_diagonal(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator) -> Case:
    like = layer(kernel, True)
    k = rows_of(like).shape[1] - 1
    whole = torch.stack([spd(k + 1, g) for _ in range(M)])
    on_diagonal, row, corner = whole.diagonal(dim1=1, dim2=2)[:, :k], whole[:, :k, k], whole[:, k, k]
    blocks = []
    for j in range(M):
        damped = corner[j] + 0.2 * corner.mean()
        block = torch.outer(row[j], row[j]) / damped  # what is not kept is completed through the bias
        block.diagonal().copy_(on_diagonal[j] + 0.2 * on_diagonal.mean())
        blocks.append(torch.cat([torch.cat([block, row[j][:, None]], 1), torch.cat([row[j], damped[None]])[None]]))
    shape = like.weight.shape
    metric = QuasiDiagonalMetric.damped(on_diagonal.reshape(shape), row.reshape(shape), corner, 0.2)
    return Case(metric, torch.block_diag(*blocks), like, "unit")


def whitening(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator) -> Case:
    like = layer(kernel, bias, n=2)
    positions = math.prod(kernel)
    mean, scale = torch.randn(2 * groups, generator=g, dtype=torch.float64), positive(2 * groups, generator=g)
    beta_sq = positive(M, generator=g)
    blocks = []
    for j in range(M):
        own = slice(2 * (j * groups // M), 2 * (j * groups // M) + 2)
        x = torch.cat([mean[own].repeat_interleave(positions), torch.ones(1, dtype=torch.float64)])
        variance = torch.cat([1 / scale[own].repeat_interleave(positions), torch.zeros(1, dtype=torch.float64)])
        block = torch.outer(x, x) + torch.diag(variance)  # E[x x^T] of uncorrelated inputs, and a 1
        blocks.append((block if bias else torch.diag(variance[:-1])) / beta_sq[j])
    return Case(
        WhiteningMetric(mean if bias else None, scale, beta_sq, groups), torch.block_diag(*blocks), like, "unit"
    )


def kronecker(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator, *, diagonal: bool = False) -> Case:
    like = layer(kernel, bias)
    q, m = rows_of(like).shape[1], M // groups
    a = [spd(q, g) for _ in range(groups)]
    b = [torch.diag(positive(m, generator=g)) if diagonal else spd(m, g) for _ in range(groups)]
    eye_a, eye_b = torch.eye(q, dtype=torch.float64), torch.eye(m, dtype=torch.float64)
    dense = torch.block_diag(*(torch.kron(bg + 0.2 * eye_b, ag + 0.1 * eye_a) for ag, bg in zip(a, b, strict=True)))
    outputs = torch.stack([bg.diagonal() for bg in b] if diagonal else b)
    metric = KroneckerMetric.factorise(torch.stack(a), outputs, 0.1, torch.full((groups,), 0.2, dtype=torch.float64))
    return Case(metric, dense, like, "unit" if diagonal else "layer")


def one_sided(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator) -> Case:
    return kronecker(kernel, bias, groups, g, diagonal=True)


def exact(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator) -> Case:
    like = layer(kernel, bias, n=2)
    p = rows_of(like).numel()
    matrix = spd(p, g)
    return Case(
        ExactMetric.factorise(matrix[None], 0.3), matrix + 0.3 * torch.eye(p, dtype=torch.float64), like, "layer"
    )


def exact_per_unit(kernel: tuple[int, ...], bias: bool, groups: int, g: torch.Generator) -> Case:
    like = layer(kernel, bias)
    matrices = torch.stack([spd(rows_of(like).shape[1], g) for _ in range(M)])
    return Case(ExactMetric.factorise(matrices), torch.block_diag(*matrices), like, "unit")


MAKERS: list[Callable[..., Case]] = [
    identity, diagonal, quasi_diagonal, whitening, kronecker, one_sided, exact, exact_per_unit,
]  # fmt: skip
every_metric = pytest.mark.parametrize("maker", MAKERS, ids=lambda f: f.__name__)
every_layer = pytest.mark.parametrize(
    ("kernel", "bias", "groups"), [((), True, 1), ((), False, 1), ((2, 2), True, 2), ((3,), False, 2)]
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_vector(actual: LayerVector, rows: Tensor, condition: float = 1e3) -> None:
    torch.testing.assert_close(rows_of(actual), rows, **tolerance(condition=condition))


@every_layer
@every_metric
def test_apply_and_solve_are_those_of_the_matrix(maker, kernel, bias, groups):
    g = generator()
    metric, dense, like, _ = maker(kernel, bias, groups, g)
    d = drawn(like, g)
    rows = rows_of(d)
    assert_same_vector(metric.apply(d), (dense @ rows.flatten()).view(rows.shape))
    solution = metric.solve(d)
    expected = torch.linalg.solve(dense, rows.flatten()).view(rows.shape)
    assert_same_vector(solution.vector, expected)
    assert_same_vector(solution.checked(), expected)
    assert solution.vector.weight.shape == d.weight.shape
    assert bool(solution.succeeded)
    assert 0 < float(solution.smallest_pivot) <= float(dense.diagonal().max())
    with pytest.raises(AssertionError):  # the wrong metric is noticed
        assert_same_vector(metric.solve(d).vector, torch.linalg.solve(1.001 * dense, rows.flatten()).view(rows.shape))
    assert_same_vector(metric.solve_once(d), expected)
    assert_same_vector(d, rows)


@every_layer
@every_metric
def test_norms_of_blocks_are_those_of_the_blocks_of_the_matrix(maker, kernel, bias, groups):
    g = generator(1)
    metric, dense, like, finest = maker(kernel, bias, groups, g)
    d = drawn(like, g)
    rows = rows_of(d)
    k = rows.shape[1]
    per_block = {"weight": 1, "unit": k, "layer": M * k}
    for block in BLOCKS:
        if BLOCKS.index(block) < BLOCKS.index(finest):
            for norm in (metric.norm_sq, metric.dual_norm_sq):
                with pytest.raises(ValueError, match=f"try block='{finest}'"):
                    norm(d, block)
            continue
        size = per_block[block]
        pieces = [slice(i, i + size) for i in range(0, M * k, size)]
        x = rows.flatten()
        squares = torch.stack([x[p] @ dense[p, p] @ x[p] for p in pieces])
        dual = torch.stack([x[p] @ torch.linalg.solve(dense[p, p], x[p]) for p in pieces])
        for values, expected in ((metric.norm_sq(d, block), squares), (metric.dual_norm_sq(d, block), dual)):
            if block == "weight":
                flat = rows_of(LayerVector(values[0], values[1] if bias else None)).flatten()
            else:
                flat = values[0].reshape(-1)
            torch.testing.assert_close(flat, expected, **tolerance(condition=1e3))
    with pytest.raises(ValueError, match="block='row'"):
        metric.norm_sq(d, "row")


@every_metric
def test_the_given_tensors_are_left_alone(maker):
    g = generator(2)
    metric, _, like, _ = maker((), True, 1, g)
    d = drawn(like, g)
    before = [t.clone() for t in d]
    metric.apply(d)
    metric.solve(d)
    torch.testing.assert_close(list(d), before, rtol=0, atol=0)


@given(st.integers(0, 10_000), st.sampled_from(BLOCKS), st.booleans())
def test_scaling_blocks_scales_their_sums(seed, block, bias):
    g = generator(seed)
    d = drawn(layer((2,), bias), g)
    factors = tuple(positive(*values.shape, generator=g) for values in block_sums(d, d, block))
    scaled = scale_blocks(d, factors, block)
    expected = tuple(f**2 * s for f, s in zip(factors, block_sums(d, d, block), strict=True))
    torch.testing.assert_close(block_sums(scaled, scaled, block), expected, **tolerance())


# -- relations between metrics ------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_whitening_is_the_quasi_diagonal_metric_whose_units_share_their_inputs(seed):
    g = generator(seed)
    mean, variance, beta_sq = torch.randn(3, generator=g).double(), positive(3, generator=g), positive(M, generator=g)
    corner = 1 / beta_sq
    row, on_diagonal = corner[:, None] * mean, corner[:, None] * (variance + mean**2)
    d = drawn(layer((), True), g)
    quasi = QuasiDiagonalMetric.damped(on_diagonal, row, corner, 0.0)
    assert_same_vector(WhiteningMetric(mean, 1 / variance, beta_sq).solve(d).vector, rows_of(quasi.solve(d).vector))


def test_whitening_with_one_output_scale_for_all_units():
    g = generator(3)
    mean, scale, d = torch.randn(3, generator=g).double(), positive(3, generator=g), drawn(layer((), True), g)
    one = WhiteningMetric(mean, scale, 0.25)
    many = WhiteningMetric(mean, scale, torch.full((M,), 0.25, dtype=torch.float64))
    assert_same_vector(one.solve(d).vector, rows_of(many.solve(d).vector))
    assert_same_vector(one.apply(d), rows_of(many.apply(d)))
    torch.testing.assert_close(one.smallest_pivot(), many.smallest_pivot(), **tolerance())


@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(-2, 2))
def test_the_quasi_diagonal_length_does_not_depend_on_shift_and_scale_of_an_input(seed, shift, log_scale):
    """Under x_0 -> a x_0 + t, weights and bias changed so that the function stays."""
    g, a = generator(seed), math.exp(log_scale)
    to_new = torch.eye(4, dtype=torch.float64)  # of (x_0, x_1, x_2, 1)
    to_new[0, 0], to_new[0, 3] = a, shift
    d = drawn(layer((), True), g)
    rows = rows_of(d)
    gradient = rows @ to_new.T  # g a^T with the new inputs
    blocks = torch.stack([spd(4, g) for _ in range(M)])
    new = to_new @ blocks @ to_new.T
    lengths = []
    for matrices, vector in ((blocks, rows), (new, gradient)):
        parts = matrices.diagonal(dim1=1, dim2=2)[:, :3], matrices[:, :3, 3], matrices[:, 3, 3]
        metric = QuasiDiagonalMetric.damped(*parts, 0.0)
        lengths.append(metric.dual_norm_sq(LayerVector(vector[:, :3], vector[:, 3]), "unit")[0])
    torch.testing.assert_close(lengths[1], lengths[0], **tolerance(condition=1e6))


@given(st.integers(0, 10_000), st.floats(1e-4, 10.0), st.floats(-3, 3), st.floats(-3, 3))
def test_relative_damping_is_the_pi_split_and_goes_with_the_units(seed, damping, log_a, log_b):
    g = generator(seed)
    a, b = spd(3, g)[None] * 10**log_a, spd(M, g)[None] * 10**log_b
    mean_a, mean_b = a[0].trace() / 3, b[0].trace() / M
    split = relative_split(a, b, damping)
    torch.testing.assert_close(split, pi_split(a, b, damping * mean_a * mean_b), **tolerance(condition=100))
    torch.testing.assert_close(split[0] * split[1], (damping * mean_a * mean_b)[None], **tolerance(condition=100))
    d = drawn(layer((), False), g)
    lengths = [
        KroneckerMetric.factorise(x, y, *relative_split(x, y, damping)).dual_norm_sq(d)[0] * scale
        for x, y, scale in ((a, b, 1.0), (a * 7, b / 3, 7 / 3))
    ]
    torch.testing.assert_close(lengths[1], lengths[0], **tolerance(condition=1e4))


def test_the_pi_split_adds_the_least():
    """Martens and Grosse 2015, §6.3: pi minimises pi tr(I (x) B) + tr(A (x) I) / pi, here over a grid."""
    g = generator(4)
    a, b = spd(5, g), spd(3, g, condition=4.0)
    add_a, add_b = pi_split(a[None], b[None], 0.01)
    grid = torch.logspace(-3, 3, 2001, dtype=torch.float64)
    added = 5 * grid * 0.1 * b.trace() + 3 * a.trace() * 0.1 / grid
    torch.testing.assert_close(add_a[0] / 0.1, grid[added.argmin()], rtol=4e-3, atol=0)  # half a step of the grid
    torch.testing.assert_close(add_a * add_b, torch.full((1,), 0.01, dtype=torch.float64), **tolerance())


def test_of_a_zero_factor_damping_stays_finite():
    zero, one = torch.zeros(1, 2, 2), torch.eye(3)[None]
    for split in (pi_split(zero, one, 0.1), pi_split(zero, zero, 0.1), relative_split(zero, one, 0.1)):
        assert all(torch.isfinite(part).all() for part in split)


@pytest.mark.parametrize("maker", [kronecker, one_sided, exact, exact_per_unit], ids=lambda f: f.__name__)
def test_the_effective_dimension_is_a_trace(maker):
    """The mean of g^T G^-1 g over gradients with other second moments F than G, in all and unit by unit."""
    case = maker((), True, 1, generator())
    other = maker((), True, 1, generator(1))
    if isinstance(case.metric, KroneckerMetric):
        found = case.metric.effective_dimension(other.metric.input_factor, other.metric.output_factor)
    else:
        found = case.metric.effective_dimension(other.metric.matrix)
    products = torch.linalg.solve(case.dense, other.dense).diagonal()
    expected = products.sum() if case.finest == "layer" else products.view(M, -1).sum(1)
    torch.testing.assert_close(found, expected, **tolerance(condition=1e3))
    itself = torch.full_like(expected, float(len(case.dense)) if case.finest == "layer" else len(case.dense) / M)
    with pytest.raises(AssertionError):  # of G itself it would be the number of parameters
        torch.testing.assert_close(found, itself, rtol=1e-3, atol=0)


def test_what_never_had_a_gradient_gets_no_step():
    moments, g = torch.zeros(2, 3), torch.zeros(2, 3)
    moments[0], g[0] = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([1.0, 0.0, 2.0])
    bias_sq, bias = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    gradient = LayerVector(g, bias)
    for damping in (0.0, 0.1):
        metrics = [
            DiagonalMetric.damped(LayerVector(moments, bias_sq), damping, math.inf),
            QuasiDiagonalMetric.damped(moments, torch.zeros(2, 3), bias_sq, damping, math.inf),
        ]
        for metric in metrics:
            u = metric.solve(gradient).vector
            assert bool((u.weight[0, [0, 2]] > 0).all())
            torch.testing.assert_close(u.weight[1], torch.zeros(3))
            assert float(u.bias[1]) == float(u.weight[0, 1]) == 0
    nothing = DiagonalMetric.damped(LayerVector(moments * 0, bias_sq * 0), 0.1, math.inf).solve(gradient).vector
    torch.testing.assert_close(list(nothing), [torch.zeros(2, 3), torch.zeros(2)])
    plain = DiagonalMetric.damped(LayerVector(moments, bias_sq), 0.0).solve(gradient).vector
    assert torch.isnan(plain.weight[1]).all()


# -- failures -----------------------------------------------------------------------------------------------------


def not_definite() -> list[tuple[LayerMetric, float]]:
    indefinite = torch.tensor([[[4.0, 2.0, 0.0], [2.0, 1.0 - 0.5, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    good = torch.eye(M, dtype=torch.float64)[None]
    weights, bias = torch.ones(M, 2, dtype=torch.float64), torch.ones(M, dtype=torch.float64)
    zeros, holed = torch.zeros(2, dtype=torch.float64), weights.clone()
    holed[1, 1] = -0.25
    return [
        (DiagonalMetric(LayerVector(holed, bias)), -0.25),
        (DiagonalMetric(LayerVector(weights, bias * 0)), 0.0),
        (QuasiDiagonalMetric(bias, weights, holed), -0.25),
        (WhiteningMetric(zeros, torch.tensor([1.0, -4.0], dtype=torch.float64)), -0.25),
        (WhiteningMetric(zeros, zeros + 1, bias * math.inf), 0.0),
        (KroneckerMetric.factorise(indefinite, good), -0.5),
        (KroneckerMetric.factorise(good[:, :3, :3], -good[0].diagonal()[None] / 4), -0.25),
        (ExactMetric.factorise(indefinite.repeat(M, 1, 1)), -0.5),
        (ExactMetric.factorise(torch.full((M, 3, 3), math.nan, dtype=torch.float64)), math.nan),
    ]


@pytest.mark.parametrize("number", range(9))
def test_a_solve_that_fails_says_so(number):
    metric, pivot = not_definite()[number]
    solution = metric.solve(drawn(layer((), True, n=2), generator()))
    assert not bool(solution.succeeded)
    with pytest.raises(NotPositiveDefiniteError, match=r"smallest pivot.*more damping") as raised:
        solution.checked()
    assert raised.value.smallest_pivot == pytest.approx(pivot, abs=1e-12, nan_ok=True)
    if isinstance(metric, (KroneckerMetric, ExactMetric)):
        assert torch.isnan(solution.vector.weight).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1)])
def test_infinite_matrices_are_no_metric(shape):
    infinite, one = torch.full(shape, math.inf), torch.ones(shape)
    metrics: list[LayerMetric] = [KroneckerMetric.factorise(infinite, infinite)]
    if len(shape) == 3:
        metrics.append(ExactMetric.factorise(infinite))
    for metric in metrics:
        with pytest.raises(NotPositiveDefiniteError, match="smallest pivot"):
            metric.require_positive_definite()
    KroneckerMetric.factorise(one, one).require_positive_definite()


def test_a_failed_block_does_not_spoil_the_others():
    matrices = torch.stack([torch.eye(2), -torch.eye(2)]).double()
    u = ExactMetric.factorise(matrices).solve(LayerVector(torch.ones(2, 2).double())).vector.weight
    torch.testing.assert_close(u[0], torch.ones(2).double())
    assert torch.isnan(u[1]).all()


def test_a_bias_row_needs_a_bias():
    metric = quasi_diagonal((), True, 1, generator()).metric
    for operation in (metric.apply, metric.solve):
        with pytest.raises(ValueError, match="needs one: try DiagonalMetric"):
            operation(LayerVector(torch.ones(M, 3)))
