"""Features against a loop of autograd.grad, and each normalisation against its formula."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import tolerance
from torchgeom_optim.models import CharGPT
from torchgeom_optim.models.gradnet_features import (
    CandidateGradients,
    above_percentile,
    hidden_units,
    important_coordinates,
    normalize,
    statistics_of,
)


def loop(model: nn.Module, loss_fn, x: Tensor, labels: Tensor) -> list[Tensor]:
    """One autograd.grad for each sample and candidate label."""
    weights = [p for p in model.parameters() if p.dim() >= 2]
    rows = [[[] for _ in weights] for _ in range(len(x))]
    for i in range(len(x)):
        for label in labels[i]:
            loss = loss_fn(model(x[i : i + 1]), label[None])
            for k, grad in enumerate(torch.autograd.grad(loss, weights)):
                rows[i][k].append(grad.reshape(-1))
    return [torch.stack([torch.stack(rows[i][k]) for i in range(len(x))]) for k in range(len(weights))]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(x)))))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.matrix))


def wide_cnn() -> nn.Module:  # takes the grouped convolution when one label is asked for
    layers = (nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4))
    return nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.ZeroPad2d(12), *layers, nn.Flatten(), nn.LazyLinear(3))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    "cnn": wide_cnn,
    "smooth": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)),
    "tied": Tied,
    "bare parameter": Bare,
}


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_a_loop(name, num_labels):
    model = MODELS[name]().double().eval()
    x = torch.randn(4, 4, dtype=torch.float64)
    model(x)
    model.requires_grad_(name != "mlp")  # frozen parameters have gradients too
    labels = torch.randint(3, (4, num_labels))
    ours, logits = CandidateGradients(model)(x, labels)
    torch.testing.assert_close(logits, model(x).detach(), **tolerance(condition=10))
    for one, other in zip(ours, loop(model.requires_grad_(), F.cross_entropy, x, labels), strict=True):
        torch.testing.assert_close(one, other, **tolerance(condition=1000))
        assert not torch.allclose(one / len(x), other)
    assert all(p.grad is None for p in model.parameters())


def test_any_loss_of_a_sample():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, labels = torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4, 2))
    loss_fn = nn.MultiMarginLoss()
    ours, _ = CandidateGradients(model, loss_fn)(x, labels)
    for one, other in zip(ours, loop(model, loss_fn, x, labels), strict=True):
        torch.testing.assert_close(one, other, **tolerance(condition=1000))


def test_the_model_is_left_alone():
    model = MODELS["mlp"]().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    CandidateGradients(model)(torch.randn(6, 4), torch.zeros(6, 1, dtype=torch.long))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    torch.random.set_rng_state(state)


def test_outputs_must_be_logits():
    with pytest.raises(ValueError, match="logits"):
        CandidateGradients(CharGPT(8, context=4, width=4, num_heads=1, num_blocks=1))(
            torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="no parameters"):
        CandidateGradients(nn.LayerNorm(3))


@given(st.integers(1, 40), st.sampled_from([0.0, 50.0, 70.0, 85.0, 90.0, 95.0, 99.0]), st.integers(0, 9), st.booleans())
def test_percentiles_by_their_definition(size, percentile, seed, ties):
    g = torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g = g.round() if ties else g
    kept = above_percentile(g, percentile)
    for row, of_row in zip(g, kept, strict=True):
        if percentile == 0:
            assert bool(of_row.all())
            continue
        threshold = np.percentile(row.abs().numpy(), percentile, method="inverted_cdf")
        assert of_row.tolist() == (row.abs() > threshold).tolist()
        assert int(of_row.sum()) <= round(size * (1 - percentile / 100) + 0.5)


def test_ties_and_zeros():
    assert above_percentile(torch.tensor([2.0, -2.0, 2.0, 0.0]), 50).tolist() == [False] * 4  # all are tied
    assert above_percentile(torch.tensor([0.0, 0.0, 0.0, -1e-9]), 50).tolist() == [False, False, False, True]
    for percentile in (-1.0, 100.0, float("nan")):
        with pytest.raises(ValueError, match="percentile"):
            above_percentile(torch.ones(3), percentile)


# The last two coordinates are degenerate: constant, and always zero.
G = torch.tensor([[1.0, -4.0, 2.0, 0.0], [3.0, 4.0, 2.0, 0.0], [2.0, 9.0, 2.0, 0.0]], dtype=torch.float64)
KEPT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("name", ["none", "scale", "power", "scale_power", "standard", "standard_unit"])
@pytest.mark.parametrize("power", [0.125, 0.5, 2.0])
def test_normalisations_by_their_formulas(name, power):
    ours = normalize(G, KEPT, statistics_of(G), name, power).numpy()
    g, kept, expected = G.numpy(), KEPT.numpy(), np.zeros(G.shape)
    for i, j in np.ndindex(*g.shape):
        column, value = g[:, j], g[i, j]
        if name.startswith("scale"):
            spread = column.max() - column.min()
            value = (value - column.min()) / (spread if spread > 0 else 1.0)
        if name.startswith("standard"):
            deviation = np.sqrt(np.mean((column - column.mean()) ** 2))
            value = (value - column.mean()) / (deviation if deviation > 0 else 1.0)
        if name.endswith("power"):
            value = np.sign(value) * abs(value) ** power
        expected[i, j] = value if kept[i, j] else 0.0
    if name == "standard_unit":
        lengths = np.linalg.norm(expected, axis=1, keepdims=True)
        expected = expected / np.where(lengths > 0, lengths, 1.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-13, atol=1e-15)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", ["scale", "scale_power", "standard", "standard_unit"])
def test_values_beyond_the_calibration_set_count_as_its_ends(name):
    statistics, kept = statistics_of(G), torch.ones(2, 4, dtype=torch.bool)
    beyond = torch.tensor([[-7.0, 5.0, 1e9, -3.0], [4.0, -4.5, 2.0, 1e-9]], dtype=torch.float64)
    ends = torch.tensor([[1.0, 5.0, 2.0, 0.0], [3.0, -4.0, 2.0, 0.0]], dtype=torch.float64)
    ours = normalize(beyond, kept, statistics, name)
    torch.testing.assert_close(ours, normalize(ends, kept, statistics, name), rtol=0, atol=0)
    assert ours.abs().max() <= 3**0.5  # of three samples none lies farther than sqrt(2) deviations from their mean
    assert beyond[0, 2] == 1e9  # which is left as it was
    for free in ("none", "power"):
        assert normalize(beyond, kept, statistics, free).max() > 1e4


def test_normalisation_refusals():
    with pytest.raises(ValueError, match="'scale_power' is the paper's best"):
        normalize(G, KEPT, statistics_of(G), "minmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="power=nan"):
        normalize(G, KEPT, statistics_of(G), "power", float("nan"))


def test_important_coordinates():
    g = torch.tensor([[3.0, 1.0, 0.0, 0.0], [-3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 5.0]])
    chosen = important_coordinates(g, torch.tensor([0, 0, 2]), 3, 0.25)
    assert chosen.tolist() == [[True, False, False, False], [True] * 4, [False, False, False, True]]
    with pytest.raises(ValueError, match="share=0"):
        important_coordinates(g, torch.tensor([0, 0, 2]), 3, 0.0)


def test_hidden_units_meet_the_budget():
    assert hidden_units([1, 1], 2) == [1, 1]
    assert sum(hidden_units([7, 900, 13, 5000], 131)) == 131
    with pytest.raises(ValueError, match="a unit for each layer"):
        hidden_units([3, 4, 5], 2)
