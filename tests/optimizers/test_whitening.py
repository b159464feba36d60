"""Eq. (3) against SGD on a stored v, and WhiteningSGD against the paper's lines for a hundred steps."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from tests.cases import whitening_without_bound
from tests.optimizers.oracles_whitening import (
    Averages,
    Reference,
    StoredV,
    fan_in,
    observations,
    outputs_by_row,
    sharing,
)
from tests.oracles import tolerance

RULES = ["whitening", "whitening_second_order", "fan_in"]
LEARNING_RATE = {"whitening": 0.1, "whitening_second_order": 0.02, "fan_in": 0.1}

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (8, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (8, 4)),
    "linear, sequence": (lambda: nn.Linear(4, 3), (5, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (4, 2, 9)),
    "conv1d, groups, no bias": (lambda: nn.Conv1d(4, 4, 2, padding=1, groups=2, bias=False), (4, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)), (4, 2, 5, 4)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (4, 2, 4, 4)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=(1, 2), groups=2), (4, 4, 5, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3), (4, 3, 5, 5)),
    "conv2d, same, circular": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="circular"), (4, 2, 4, 5)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (4, 2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 2, (1, 2, 2), padding=(0, 1, 0)), (3, 2, 2, 3, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), (7, 2)),
}


def draw(shape: tuple[int, ...], generator: torch.Generator, layer: nn.Module) -> Tensor:
    """Inputs with means and scales of their own, that drift."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, shape, generator=generator)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    n = observations(layer, x).shape[-1]
    scale = torch.linspace(0.5, 2.0, n, dtype=torch.float64) * torch.rand((), generator=generator).add(0.5)
    mean = torch.linspace(-1.0, 1.5, n, dtype=torch.float64)
    trailing = (1,) * len(getattr(layer, "kernel_size", ()))
    return x * scale.view(-1, *trailing) + mean.view(-1, *trailing)


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum() / (2 * len(y)) + y.sin().sum() / len(y)


def per_sample_output_gradients(layer: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, and g of every sample's own loss: linear layers take each position for a sample."""
    y = layer(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(y, target), y)
    spatial = len(getattr(layer, "kernel_size", ()))
    num_samples = len(y) if spatial else outputs_by_row(layer, y).shape[0]
    return y.detach(), outputs_by_row(layer, g * num_samples)


def stored_v_against_whitening(name: str, rule: str, fault: str = "", steps: int = 8) -> tuple[nn.Module, nn.Module]:
    """The layer trained both ways, constants changing at every step."""
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    ours = build().double()
    theirs = copy.deepcopy(ours)
    lr = LEARNING_RATE[rule]
    optimizer = whitening_without_bound(ours, lr, rule=rule, decay=0.8, weight_decay=0.01)
    averages = Averages(decay=0.8, fault=fault)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = draw(shape, generator, ours)
        target = torch.randn(ours(x).shape, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss_of(ours(x), target).backward()
        optimizer.step()

        y, g = per_sample_output_gradients(theirs, x, target)
        centred = getattr(theirs, "bias", None) is not None
        constants = averages.constants(
            rule, observations(theirs, x), g, fan_in(theirs), sharing(theirs, y), centred=centred
        )
        stored = StoredV(theirs, *constants)
        torch.testing.assert_close(stored(x).detach(), y, **tolerance(condition=1e3))  # the function has not changed
        sgd = torch.optim.SGD(stored.parameters(), lr, weight_decay=0.01)
        loss_of(stored(x), target).backward()
        sgd.step()
        stored.pull_back()
    return ours, theirs


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_step_is_that_of_sgd_on_a_stored_v(name, rule):
    ours, theirs = stored_v_against_whitening(name, rule)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e4))


@pytest.mark.parametrize(
    ("name", "rule", "fault"),
    [
        ("linear", "whitening", "mu_sign"),
        ("conv2d, groups", "whitening", "mu_sign"),
        ("conv2d", "whitening", "no_sharing"),
        ("conv2d", "whitening_second_order", "no_sharing"),
        ("conv2d", "fan_in", "no_sharing"),
        ("linear", "whitening", "no_sample_count"),
        ("embedding", "whitening", "no_sample_count"),
        ("linear", "whitening", "no_guard"),
    ],
)
def test_a_wrong_answer_would_be_noticed(name, rule, fault):
    ours, theirs = stored_v_against_whitening(name, rule, fault)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e4))


@pytest.mark.parametrize("rule", ["whitening", "fan_in"])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        {"momentum": 0.5, "dampening": 0.3, "maximize": True, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["linear", "linear, no bias", "conv2d, groups", "conv1d, groups, no bias"])
def test_momentum_is_that_of_sgd_on_a_stored_v_while_the_constants_stay(name, settings, rule):
    build, shape = LAYERS[name]
    ours = build().double()
    theirs = copy.deepcopy(ours)
    generator = torch.Generator().manual_seed(1)
    x = draw(shape, generator, ours)  # the same inputs at every step: mean and variance stay
    targets = [torch.randn(ours(x).shape, generator=generator, dtype=torch.float64) for _ in range(20)]
    optimizer = whitening_without_bound(ours, 0.02, rule=rule, **settings)
    y, g = per_sample_output_gradients(theirs, x, targets[0])
    constants = Averages().constants(
        rule, observations(theirs, x), g, fan_in(theirs), sharing(theirs, y), centred=theirs.bias is not None
    )
    stored = StoredV(theirs, *constants)
    sgd = torch.optim.SGD(stored.parameters(), 0.02, **settings)
    for target in targets:
        for module, opt in ((ours, optimizer), (stored, sgd)):
            opt.zero_grad()
            loss_of(module(x), target).backward()
            opt.step()
    stored.pull_back()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e4))


# -- a hundred steps beside the paper's lines --------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


NETWORKS = {"mlp": (mlp, (16, 5)), "cnn": (cnn, (6, 2, 8, 8))}
SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.03, "momentum": 0.9},
    {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.05, "momentum": 0.6, "dampening": 0.4, "weight_decay": 0.02},
    {"lr": 0.03, "maximize": True, "weight_decay": 0.5},
    {"lr": 0.1, "decay": 0.5, "damping": 0.3},
    {"lr": 0.01, "rule": "whitening_second_order"},
    {"lr": 0.02, "rule": "fan_in", "momentum": 0.9},
]


def side_by_side(
    network: str, settings: dict, *, steps: int = 100, fault: str = "", training: bool = True
) -> tuple[nn.Module, nn.Module]:
    build, shape = NETWORKS[network]
    torch.manual_seed(0)
    ours = build().double().train(training)
    theirs = copy.deepcopy(ours)
    optimizer = whitening_without_bound(ours, **settings)
    reference = Reference(theirs, fault=fault, **settings)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + step % 7) + 0.5
        labels = torch.randint(3, shape[:1], generator=generator)
        for model, opt in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            torch.manual_seed(step)  # for the dropout
            loss = nn.functional.cross_entropy(model(x).tanh(), labels)  # bounded, so that ascent is too
            loss.backward()
            opt.step()
        if step == 50:  # a checkpoint, written and read
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = whitening_without_bound(ours, lr=123.0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
    return ours, theirs


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_hundred_steps_follow_the_papers_lines(network, settings):
    ours, theirs = side_by_side(network, settings)
    torch.testing.assert_close(
        ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e5)
    )  # 100 steps, each of which amplifies the rounding of the ones before


@pytest.mark.parametrize("network", NETWORKS)
def test_evaluation_mode_is_no_different(network):
    ours, theirs = side_by_side(network, {"lr": 0.03, "momentum": 0.9}, training=False)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e5))


@pytest.mark.parametrize("fault", ["mu_sign", "no_sharing", "no_sample_count", "no_guard"])
def test_other_lines_lead_elsewhere(fault):
    ours, theirs = side_by_side("cnn", {"lr": 0.03}, steps=10, fault=fault)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e5))
