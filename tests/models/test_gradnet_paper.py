"""The paper's network: prediction by the loop over labels, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim.models import CandidateNetwork


def base() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.randn(7, 4, dtype=torch.float64, generator=generator())


def network(**settings) -> CandidateNetwork:
    net = CandidateNetwork(base(), 3, hidden=(2, 5), generator=generator(), **settings)
    net.calibrate(torch.randn(30, 4, dtype=torch.float64, generator=generator(1)), generator(2))
    return net.eval()


@pytest.mark.parametrize("settings", [{}, {"label_share": 0.3}, {"batch_norm": True, "dropout": 0.5}])
@pytest.mark.parametrize("memory_limit", [1, 2**28])
def test_prediction_is_the_sum_over_labels(settings, memory_limit):
    net = network(memory_limit=memory_limit, **settings)
    total = torch.zeros(7, 3, dtype=torch.float64)
    for label in range(3):
        total += net.logits(net.record(X, torch.full((7, 1), label)))
    torch.testing.assert_close(net(X), total, **tolerance(condition=100))


def test_features_are_sparse_and_in_range():
    features = network(percentile=80).record(X)["features"]
    first, second = features[..., :24], features[..., 24:]
    assert features.shape == (7, 3, 24 + 18)
    assert int((first != 0).sum(-1).max()) <= 4
    assert int((second != 0).sum(-1).max()) <= 3
    assert features.abs().max() > 0.5


def test_fixed_coordinates_of_a_label_are_respected():
    net = network(label_share=0.25, percentile=0, normalization="none")
    features = net.record(X)["features"]
    for label in range(3):
        assert not features[:, label, :24][:, ~net.labels0[label]].any()
    assert int(net.labels0[0].sum()) == 6


def test_labels_are_drawn_uniformly_from_the_generator():
    net = network()
    every = net.record(X)["features"]
    one = net.training_record(X, generator(5))["features"]
    drawn = torch.randint(3, (7, 1), generator=generator(5))
    torch.testing.assert_close(one, every[torch.arange(7), drawn[:, 0]][:, None], **tolerance(condition=100))
    again = net.training_view({"features": every}, generator(5))["features"]
    expected = torch.randint(3, (7,), generator=generator(5))
    torch.testing.assert_close(again, every[torch.arange(7), expected][:, None], rtol=0, atol=0)


def test_blocks_of_the_papers_network():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net = CandidateNetwork(model, 3)
    assert [block.out_features for block in net.blocks] == [5, 100, 25]
    assert sum(block.out_features for block in CandidateNetwork(base(), 3, hidden=40).blocks) == 40


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden": (1, 2, 3)}, "hidden"),
        ({"hidden": (0, 2)}, "hidden"),
        ({"percentile": 100.0}, "percentile"),
        ({"power": 0.0}, "power"),
        ({"normalization": "l1"}, "normalization"),
        ({"dropout": 1.0}, "dropout"),
        ({"memory_limit": 0}, "memory_limit"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(ValueError, match=named):
        CandidateNetwork(base(), 3, **settings)


def test_dropout_drops_units_of_a_training_record_alone():
    net = network(dropout=0.25).train()
    record = net.training_record(X, generator())
    assert record["kept"].shape == (7, 7)
    assert set(record["kept"].unique().tolist()) == {0.0, 1 / 0.75}
    plain = {"features": record["features"]}
    hidden = torch.cat([net.blocks[0](plain["features"][:, 0, :24]), net.blocks[1](plain["features"][:, 0, 24:])], 1)
    expected = net.output(torch.relu(hidden) * record["kept"])
    torch.testing.assert_close(net.logits(record), expected, **tolerance(condition=10))
    assert not torch.allclose(net.logits(plain), expected)
    assert "kept" not in net.record(X)
    assert "kept" in net.training_view(net.record(X), generator())
