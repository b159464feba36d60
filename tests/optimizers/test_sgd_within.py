"""Where WhiteningSGD is torch.optim.SGD: bare parameters, ``rule="sgd"``, and a run that SGD began."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from tests.cases import assert_same_parameters, mean_loss, small_batches, small_net, train, whitening_without_bound
from tests.optimizers.oracles_whitening import Averages, StoredV, fan_in, observations
from tests.oracles import tolerance
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "dampening": 0.3, "maximize": True},
    {"weight_decay": 0.2, "maximize": True},
]


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bare_parameters_are_stepped_as_sgd_steps_them(settings, foreach, lr):
    shapes_and_types = itertools.product([(), (3,), (2, 3)], [torch.float32, torch.bfloat16, torch.complex64])
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype in shapes_and_types]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = whitening_without_bound(ours, lr, foreach=foreach, **settings)
    sgd = torch.optim.SGD(theirs, lr, foreach=foreach, **settings)
    for step in range(4):
        for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn_like(p) if (number + step) % 4 else None
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        sgd.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=str)
def test_sparse_gradients(settings):
    ours, tokens = nn.Embedding(6, 3, sparse=True), torch.tensor([1, 4, 4])
    theirs = copy.deepcopy(ours)
    optimizer, sgd = (
        whitening_without_bound(ours, 0.1, **settings),
        torch.optim.SGD(theirs.parameters(), 0.1, **settings),
    )
    for model, opt in ((ours, optimizer), (theirs, sgd)):
        for _ in range(3):
            opt.zero_grad()
            model(tokens).square().sum().backward()
            opt.step()
    assert_same_parameters(ours, theirs)
    assert "sparse" in optimizer.report()[0].note


@pytest.mark.parametrize(
    "build", [WhiteningSGD, BlockNaturalGradient, BlockNaturalGradient.kfac, BlockNaturalGradient.trpo]
)
def test_without_a_model_a_warning_says_that_it_is_sgd(build):
    model = small_net()
    with pytest.warns(UserWarning, match=r"was given no model.*torch.optim.SGD.*\(groups, model=model\)"):
        build(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(model)
        build(model.parameters(), model=model)
        WhiteningSGD(model.parameters(), rule="sgd")
        WhiteningSGD([{"params": model.parameters(), "rule": "sgd"}])
        BlockNaturalGradient.rmsprop(model.parameters())
        BlockNaturalGradient.normalized_sgd(model.parameters())


@pytest.mark.parametrize("build", [WhiteningSGD, BlockNaturalGradient])
def test_a_model_in_the_place_of_the_learning_rate(build):
    model = small_net()
    with pytest.raises(TypeError, match=r"lr \(default\): got a SmallNet; need a number. Give a model as model="):
        build(model.parameters(), model)


@pytest.mark.filterwarnings("ignore:.*was given no model")
@pytest.mark.parametrize("way_in", ["rule", "no model", "groups"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_models_too(settings, way_in):
    ours, theirs, batches = small_net(), small_net(), small_batches(5)
    if way_in == "rule":
        optimizer = whitening_without_bound(ours, 0.02, rule="sgd", **settings)
    elif way_in == "no model":
        optimizer = whitening_without_bound(ours.parameters(), 0.02, **settings)
    else:
        optimizer = whitening_without_bound(
            [{"params": ours.parameters(), "rule": "sgd"}], 0.02, model=ours, **settings
        )
    train(ours, optimizer, batches)
    train(theirs, torch.optim.SGD(theirs.parameters(), 0.02, **settings), batches)
    assert_same_parameters(ours, theirs)
    assert {row.rule for row in optimizer.report()} == {"sgd"}


@pytest.mark.filterwarnings("ignore:.*was given no model")
def test_a_checkpoint_of_sgd_goes_on_as_sgd_where_sgd_is_meant():
    for settings in ({"rule": "sgd"}, {}):
        ours, theirs, batches = small_net(), small_net(), small_batches(6)
        sgd = torch.optim.SGD(theirs.parameters(), 0.02, momentum=0.9)
        train(theirs, sgd, batches[:3])
        ours.load_state_dict(theirs.state_dict())
        optimizer = whitening_without_bound(ours if settings else ours.parameters(), 0.02, momentum=0.9, **settings)
        optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
        train(ours, optimizer, batches[3:])
        train(theirs, sgd, batches[3:])
        assert_same_parameters(ours, theirs)


def test_momentum_of_parameters_without_a_layer_goes_on():
    ours, theirs, (first, second) = small_net(), small_net(), small_batches(2)
    sgd = torch.optim.SGD(theirs.parameters(), 0.02, momentum=0.9)
    train(theirs, sgd, [first])
    ours.load_state_dict(theirs.state_dict())
    optimizer = whitening_without_bound(ours, 0.02, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    train(ours, optimizer, [second])
    train(theirs, sgd, [second])
    for name in ("norm.weight", "norm.bias", "shift"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name), rtol=0, atol=0)


@pytest.mark.parametrize("build", [WhiteningSGD, BlockNaturalGradient])
def test_nothing_of_a_checkpoint_of_adam_is_taken_over(build):
    """Its "step" and its averages would stay in every checkpoint from then on, and be taken for our own."""
    theirs, ours = small_net(), small_net()
    adam = torch.optim.Adam(theirs.parameters(), 0.02)
    train(theirs, adam, small_batches(1))
    optimizer = build(ours)
    optimizer.load_state_dict(adam.state_dict())
    assert not any(optimizer.state_dict()["state"].values())
    assert adam.state_dict()["state"][0]["step"] == 1
    train(ours, optimizer, small_batches(1))


@pytest.mark.parametrize("rule", ["trust_region", "whitening", "whitening_second_order", "fan_in"])
def test_a_layer_of_which_sgd_knew_but_the_momentum_cannot_be_stepped_without_a_call(rule):
    theirs, ours = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    sgd = torch.optim.SGD(theirs.parameters(), 0.02, momentum=0.9)
    train(theirs, sgd, [torch.randn(8, 4)])
    optimizer = WhiteningSGD(ours, 0.02, momentum=0.9, rule=rule)
    optimizer.load_state_dict(sgd.state_dict())
    mean_loss(ours[0](torch.randn(8, 4))).backward()
    ours[1].weight.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"layer '1' has a gradient, but no pass.*Nothing was changed"):
        optimizer.step()


@pytest.mark.parametrize("bias", [True, False])
def test_momentum_of_a_checkpoint_of_sgd_is_put_into_our_coordinates(bias):
    """The first step is that of SGD on a stored v whose buffer is the gradient in v that the old buffer stands for."""
    theirs = nn.Linear(4, 3, bias=bias).double()
    x, target = torch.randn(2, 8, 4, dtype=torch.float64) + 1, torch.randn(8, 3, dtype=torch.float64)
    sgd = torch.optim.SGD(theirs.parameters(), 0.02, momentum=0.9)
    for k in range(2):
        sgd.zero_grad()
        mean_loss(theirs(x[0]) - k).backward()
        sgd.step()
    ours = copy.deepcopy(theirs)
    optimizer = whitening_without_bound(ours, 0.05, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.05

    loss = lambda y: (y - target).square().sum() / 16  # noqa: E731
    loss(ours(x[1])).backward()
    optimizer.step()

    # mean and variance are those of the new batch; a linear loss with the old buffer as its gradient gives v's buffer
    g = torch.zeros(8, 3, dtype=torch.float64)
    constants = Averages().constants("whitening", observations(theirs, x[1]), g, fan_in(theirs), 1, centred=bias)
    buffers = [sgd.state[p]["momentum_buffer"] for p in theirs.parameters()]
    stored = StoredV(theirs, *constants)
    old = copy.deepcopy(theirs)
    for p, v in zip(old.parameters(), buffers, strict=True):
        p.data.copy_(v)
    alpha, mu, beta = constants
    inner = torch.optim.SGD(stored.parameters(), 0.05, momentum=0.9)
    loss(stored(x[1])).backward()
    weight_buffer = old.weight.detach()
    bias_buffer = old.bias.detach() if bias else torch.zeros(3, dtype=torch.float64)
    inner.state[stored.v]["momentum_buffer"] = beta[:, None] * alpha * (weight_buffer - bias_buffer[:, None] * mu)
    if bias:
        inner.state[stored.v0]["momentum_buffer"] = beta * bias_buffer
    inner.step()
    stored.pull_back()
    assert_same_parameters(ours, theirs, **tolerance(condition=1e2))


def test_hyper_parameters_stay_as_constructed_when_a_run_of_sgd_goes_on():
    ours, theirs, batches = small_net(), small_net(), small_batches(2)
    sgd = torch.optim.SGD(theirs.parameters(), 0.7, momentum=0.8, weight_decay=0.3, nesterov=True)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1)
    train(theirs, sgd, batches)
    scheduler.step()
    optimizer = whitening_without_bound(ours, 0.02, momentum=0.9)
    constructed = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.load_state_dict(sgd.state_dict())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)  # takes lr for its initial one
    kept = {key: value for key, value in optimizer.param_groups[0].items() if key in constructed}
    assert kept == constructed


def test_a_checkpoint_of_sgd_for_another_model_is_refused():
    theirs = nn.Linear(5, 4)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    theirs(torch.randn(3, 5)).sum().backward()
    sgd.step()
    optimizer = whitening_without_bound(nn.Linear(4, 5), 0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum.*shape \(4, 5\).*another model"):
        optimizer.load_state_dict(sgd.state_dict())
    assert not optimizer.state
