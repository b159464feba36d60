"""The gradient graph against matrices that are formed in full."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from tests.oracles import per_sample_gradients, tolerance
from torchgeom_optim.models.gradient_graph import (
    GradientGraph,
    draw_graphs,
    gradient_graph,
    gradient_graphs_by_class,
)

NAMES = ["0.weight", "2.weight", "4.weight"]
SIZES = [20, 30, 18]

MODULE = sys.modules["torchgeom_optim.models.gradient_graph"]  # its name in the package is that of the function


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(count: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, dtype=torch.float64), torch.arange(count) % 3


def full_matrix(model: nn.Module, x: Tensor, y: Tensor, weights: str) -> Tensor:
    """All second derivatives of the mean loss, or the mean outer product, by the weights alone: [P, P]."""
    if weights == "outer_product":
        rows = torch.cat([per_sample_gradients(model, F.cross_entropy, x, y)[name].flatten(1) for name in NAMES], 1)
        return rows.T @ rows / len(x)
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        parts = dict(zip(NAMES, torch.split(vector, SIZES), strict=True))
        named = {name: part.view_as(values[name]) for name, part in parts.items()}
        return F.cross_entropy(functional_call(model, {**values, **named}, x), y)

    return hessian(loss)(torch.cat([values[name].flatten() for name in NAMES]))


def between_neighbours(matrix: Tensor) -> Tensor:
    """The matrix with zeros outside the blocks of neighbouring layers."""
    layer = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    return torch.where((layer[:, None] - layer).abs() == 1, matrix, 0.0)


@pytest.mark.parametrize("weights", ["outer_product", "hessian"])
@pytest.mark.parametrize("small_blocks", [False, True])
def test_all_edges_are_the_matrix(weights, small_blocks, monkeypatch):
    if small_blocks:
        monkeypatch.setattr(MODULE, "_NUMBERS_AT_ONCE", 47)
    model, (x, y) = network(), batch()
    found = gradient_graph(model, x, y, edges=1.0, weights=weights)
    expected = between_neighbours(full_matrix(model, x, y, weights))
    torch.testing.assert_close(found.matrix().to_dense(), expected, **tolerance(condition=10))
    assert not torch.allclose(expected, between_neighbours(full_matrix(model, x, (y + 1) % 3, weights)))


@pytest.mark.parametrize("weights", ["outer_product", "hessian"])
def test_the_strongest_edges_are_kept_layer_by_layer(weights):
    model, (x, y) = network(), batch()
    with torch.no_grad():
        model[4].weight.mul_(1e-3)  # edges between the first two layers are far weaker than between the others
    graph = gradient_graph(model, x, y, edges=11, weights=weights)
    expected = full_matrix(model, x, y, weights)
    for first, second in ((slice(0, 20), slice(20, 50)), (slice(20, 50), slice(50, 68))):
        block = expected[first, second].abs()
        inside = (graph.sources >= first.start) & (graph.sources < first.stop)
        assert inside.sum() == 11
        kept = graph.weights[inside].abs().sort(descending=True).values
        torch.testing.assert_close(kept, block.flatten().topk(11).values, **tolerance(condition=100))
        places = graph.sources[inside], graph.targets[inside]
        torch.testing.assert_close(expected[places], graph.weights[inside], **tolerance(condition=100))


def test_share_and_zeros():
    model, (x, y) = network(), batch()
    assert len(gradient_graph(model, x, y, edges=0.1).weights) == 60 + 54
    nn.init.zeros_(model[2].weight)  # its inputs then get no gradient at all
    assert set(gradient_graph(model, x, y).sources.tolist()) <= set(range(20, 50))


def test_matrix_and_nodes():
    shapes = {"a": torch.Size([2, 2]), "b": torch.Size([1, 3])}
    graph = GradientGraph(shapes, torch.tensor([1, 1]), torch.tensor([4, 6]), torch.tensor([2.0, -3.0]))
    dense = torch.zeros(7, 7)
    dense[1, 4] = dense[4, 1] = 2
    dense[1, 6] = dense[6, 1] = -3
    torch.testing.assert_close(graph.matrix().to_dense(), dense)
    assert graph.nodes("a").tolist() == [1]
    assert graph.nodes("b").tolist() == [0, 2]


def test_by_class():
    model, (x, y) = network(), batch()
    graphs = gradient_graphs_by_class(model, x, y, edges=5)
    assert list(graphs) == [0, 1, 2]
    alone = gradient_graph(model, x[y == 1], y[y == 1], edges=5)
    torch.testing.assert_close(graphs[1].matrix().to_dense(), alone.matrix().to_dense())


def test_the_model_is_left_as_it_was():
    model, (x, y) = nn.Sequential(network(), nn.BatchNorm1d(3).double(), nn.Dropout()).train(), batch()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for weights in ("outer_product", "hessian"):
        gradient_graph(model, x, y, weights=weights)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_picture():
    pytest.importorskip("matplotlib", reason="the picture needs the extra 'plots'")
    model, (x, y) = network(), batch()
    graphs = gradient_graphs_by_class(model, x, y, edges=20)
    figure = draw_graphs(graphs, columns=2, title="by class")
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["0", "1", "2", ""]
    (lines,) = panels[1].collections[:1]
    assert len(lines.get_segments()) == 40
    first = lines.get_segments()[0]
    source, target = int(graphs[1].sources[0]), int(graphs[1].targets[0])
    expected = torch.tensor([[0, (source + 0.5) / 20], [1, (target - 20 + 0.5) / 30]], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(first), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "fisher"}, "weights='fisher'"),
        ({"edges": 0}, "edges=0"),
        ({"edges": 1.5}, r"edges=1\.5"),
        ({"edges": float("nan")}, "edges=nan"),
        ({"parameters": ["0.weight"]}, "1 layers"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        gradient_graph(network(), *batch(), **settings)


def test_too_many_edges(monkeypatch):
    monkeypatch.setattr(MODULE, "_MOST_EDGES", 100)
    with pytest.raises(ValueError, match="at most 100 between two layers"):
        gradient_graph(network(), *batch(), edges=1.0)
