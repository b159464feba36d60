"""The gradient kernel against its formula, and what the theory promises of it."""

from __future__ import annotations

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import per_sample_gradients, tolerance
from torchgeom_optim.geometry.metric import NotPositiveDefiniteError
from torchgeom_optim.models.gradient_kernel import GradientKernel


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def batch(count: int = 40) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, dtype=torch.float64), torch.randint(3, (count,))


def rows_of_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([g.flatten(1) for g in per_sample_gradients(model, F.cross_entropy, x, y).values()], 1)


def rows_of_candidates(model: nn.Module, x: Tensor) -> Tensor:
    """[C, N, P]."""
    return torch.stack([rows_of_loss(model, x, torch.full((len(x),), c)) for c in range(3)])


def dense_metric(rows: Tensor, metric: str, damping: float) -> Tensor:
    """G of rows [C, N, P], formed in full; the layers of the network have 8 and 9 parameters."""
    full = torch.einsum("cnp,cnq->pq", rows, rows) / rows.shape[1]
    if metric == "identity":
        return torch.eye(len(full), dtype=full.dtype)
    result = torch.zeros_like(full)
    for layer in (slice(0, 8), slice(8, 17)):
        block = full[layer, layer] if metric == "block" else full[layer, layer].diagonal().diag()
        result[layer, layer] = block + damping * block.diagonal().mean() * torch.eye(len(block), dtype=full.dtype)
    return result


@pytest.mark.parametrize("metric", ["identity", "diagonal", "block"])
def test_candidates_against_the_formula(metric):
    model, (x, _) = network(), batch()
    rows = rows_of_candidates(model, x)
    inverse = torch.linalg.inv(dense_metric(rows, metric, 0.1))
    expected = torch.einsum("cnp,pq,cmq->nm", rows, inverse, rows)
    kernel = GradientKernel(model, x, metric=metric)
    # condition of a block is at most its trace over its damping
    torch.testing.assert_close(kernel(x), expected, **tolerance(condition=1e3))
    torch.testing.assert_close(kernel(x[:7], x[5:]), expected[:7, 5:], **tolerance(condition=1e3))
    phi = kernel.features(x)
    torch.testing.assert_close(phi @ phi.T, expected, **tolerance(condition=1e3))
    undamped = GradientKernel(model, x, metric=metric, damping=0.3)(x)
    assert metric == "identity" or not torch.allclose(undamped, expected, rtol=1e-3)


def test_labelled_loss_is_equation_three():
    model, (x, y) = network(), batch()
    rows = rows_of_loss(model, x, y)
    inverse = torch.linalg.inv(dense_metric(rows[None], "diagonal", 0.2))
    kernel = GradientKernel(model, x, y, of="loss", loss_fn=F.cross_entropy, damping=0.2)
    found = kernel(x, x[:9], targets=y, other_targets=y[:9])
    torch.testing.assert_close(found, rows @ inverse @ rows[:9].T, **tolerance(condition=100))


def test_quasi_arithmetic_mean():
    model, (x, _) = network(), batch()
    rows = rows_of_candidates(model, x)
    moments = rows.abs().pow(4).sum(0).mean(0).sqrt()
    found = GradientKernel(model, x, damping=0.0, mean_exponent=2.0)(x)
    torch.testing.assert_close(found, torch.einsum("cnp,cmp->nm", rows / moments, rows), **tolerance(condition=1e3))


def test_low_rank_against_eigenvectors_of_the_full_matrix():
    model, (x, _) = network(), batch()
    rows = rows_of_candidates(model, x)
    values, vectors = torch.linalg.eigh(torch.einsum("cnp,cnq->pq", rows, rows) / len(x))
    for rank in (3, 6):
        top, V = values[-rank:], vectors[:, -rank:]
        projected = rows @ V
        expected = torch.einsum("cnr,r,cmr->nm", projected, 1 / (top + 0.1 * top.mean()), projected)
        # Lanczos gives eigenvectors to the root of its tolerance of 1e-6.
        found = GradientKernel(model, x, metric="low_rank", rank=rank)(x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    everything = GradientKernel(model, x, metric="low_rank", damping=0.0)
    expected = torch.einsum("cnp,pq,cmq->nm", rows, torch.linalg.pinv(rows.flatten(0, 1).mT @ rows.flatten(0, 1)), rows)
    torch.testing.assert_close(everything(x), len(x) * expected, rtol=1e-6, atol=1e-6)


class Reparametrized(nn.Module):
    """The same function of other parameters: theta = A phi."""

    def __init__(self, model: nn.Module, mixing: Tensor) -> None:
        super().__init__()
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.phi = nn.Parameter(torch.linalg.solve(mixing, theta))
        self.register_buffer("mixing", mixing)
        self.function = [model]  # hidden: its parameters are not ours

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.mixing @ self.phi, [shape.numel() for shape in self.shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return torch.func.functional_call(self.function[0], values, x)


def mixing_matrix(seed: int, condition: float, size: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q for _ in range(2)
    )
    return left @ torch.logspace(0, -math.log10(condition), size, dtype=torch.float64).diag() @ right


@given(seed=st.integers(0, 2**20), condition=st.floats(1.0, 30.0))
def test_exact_metric_is_invariant_under_reparametrisation(seed, condition):
    model, (x, _) = network(), batch()
    other = Reparametrized(model, mixing_matrix(seed, condition))
    first, second = (GradientKernel(m, x, metric="low_rank", damping=0.0) for m in (model, other))
    new = torch.randn(5, 3, dtype=torch.float64)
    # the conditions of G and of A'A multiply, and each kernel's own error is that of its eigenvectors
    torch.testing.assert_close(second(new, x), first(new, x), rtol=1e-5, atol=1e-5)
    if condition > 3:
        plain, changed = (GradientKernel(m, metric="identity")(x) for m in (model, other))
        assert not torch.allclose(plain, changed, rtol=1e-3)


@given(seed=st.integers(0, 2**20), metric=st.sampled_from(["diagonal", "block", "low_rank"]))
def test_layerwise_invariance(seed, metric):
    """Rescaled units leave the diagonal metric's kernel, mixed parameters of a layer the block metric's."""
    model, (x, _) = network(), batch()
    generator = torch.Generator().manual_seed(seed)
    if metric == "diagonal":
        mixing = torch.rand(17, generator=generator, dtype=torch.float64).add(0.5).diag()
        settings = {"damping": 0.0}
    else:
        mixing = torch.block_diag(mixing_matrix(seed, 3.0, 8), mixing_matrix(seed + 1, 3.0, 9))
        settings = {"damping": 0.0}
    other = Reparametrized(model, mixing)
    if metric == "block":  # phi is one parameter there: give it the blocks by hand
        rows = rows_of_candidates(model, x) @ mixing
        # The output layer's block has the null direction of equal shifts: it is damped, so it takes the first alone.
        block = torch.einsum("cnp,cnq->pq", rows[..., :8], rows[..., :8]) / len(x)
        expected = torch.einsum("cnp,pq,cmq->nm", rows[..., :8], torch.linalg.inv(block), rows[..., :8])
        found = GradientKernel(model, x, metric="block", parameters=["model.0.weight", "model.0.bias"], **settings)(x)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    else:
        found, expected = (GradientKernel(m, x, metric=metric, **settings)(x) for m in (other, model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 2**20),
    metric=st.sampled_from(["identity", "diagonal", "block", "low_rank"]),
    of=st.sampled_from(["candidates", "outputs", "sqrt_probabilities"]),
)
def test_symmetric_and_positive_semidefinite(seed, metric, of):
    torch.manual_seed(seed)
    model, (x, _) = network(), batch(12)
    K = GradientKernel(model, x, metric=metric, of=of)(x)
    torch.testing.assert_close(K, K.T, rtol=0, atol=0)
    values = torch.linalg.eigvalsh(K)
    assert values[0] >= -50 * torch.finfo(K.dtype).eps * len(K) * values[-1]


def test_blocks_of_any_size_give_the_same():
    model, (x, _) = network(), batch()
    whole = GradientKernel(model, x)(x)
    torch.testing.assert_close(GradientKernel(model, x, batch_size=7, memory_limit=1)(x), whole)
    torch.testing.assert_close(GradientKernel(model, x, batch_size=7, memory_limit=20_000)(x, x), whole)


def test_the_model_is_left_as_it_was():
    model, (x, _) = nn.Sequential(network(), nn.BatchNorm1d(3), nn.Dropout()).double().train(), batch()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    GradientKernel(model, x)(x)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_support_vectors_and_ridge_on_the_kernel():
    sklearn = pytest.importorskip("sklearn", reason="an example of the extra 'demo'")
    assert sklearn
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.svm import SVC

    x, _ = batch(160)
    y = (x[:, 0] * x[:, 1] > 0).long()  # not linear in x, and the network knows nothing of it
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    kernel = GradientKernel(model, x[:120], metric="diagonal")
    train, test = kernel(x[:120]), kernel(x[120:], x[:120])
    machine = SVC(kernel="precomputed", C=10.0).fit(train, y[:120])
    assert machine.score(test, y[120:]) > 0.85
    ridge = KernelRidge(kernel="precomputed", alpha=1.0).fit(train, 2 * y[:120] - 1)
    assert ((ridge.predict(test) > 0) == (y[120:] == 1).numpy()).mean() > 0.8
    assert SVC(kernel="linear").fit(x[:120], y[:120]).score(x[120:], y[120:]) < 0.75


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "exact"}, "metric='exact'"),
        ({"damping": math.nan}, "damping=nan"),
        ({"memory_limit": 0}, "memory_limit=0"),
        ({"rank": 3}, "rank=3 with metric='diagonal'"),
        ({"rank": 0, "metric": "low_rank"}, "rank=0"),
        ({"mean_exponent": 0.0}, r"mean_exponent=0\.0"),
        ({"mean_exponent": 2.0, "metric": "block"}, "'diagonal' alone"),
        ({"data": None}, "no data"),
        ({"of": "loss"}, "loss_fn"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientKernel(network(), **{"data": batch()[0], **settings})


def test_singular_and_too_large_metrics():
    x = batch()[0]
    with pytest.raises(NotPositiveDefiniteError):
        GradientKernel(network(), x[:2], metric="block", damping=0.0)
    with pytest.raises(ValueError, match="a layer has 4500 parameters"):
        GradientKernel(nn.Linear(1499, 3), torch.randn(2, 1499), metric="block")
    dead = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3, bias=False)).double()
    nn.init.constant_(dead[0].bias, -100.0)
    nn.init.zeros_(dead[0].weight)
    with pytest.raises(ValueError, match="gradients of all data vanish"):
        GradientKernel(dead, x, metric="low_rank")
