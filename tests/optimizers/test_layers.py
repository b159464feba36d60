"""Which parameter of which layer gets which rule, and that nothing is left untrained."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import (
    OPTIMIZER_CASES,
    OptimizerCase,
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    train,
    whitening_without_bound,
)
from tests.optimizers.oracles_whitening import Reference
from tests.oracles import tolerance
from tests.zoo import ZOO, Case
from torchgeom_optim.optimizers import ParameterRule, WhiteningSGD

WITH_RULE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def rules(optimizer: WhiteningSGD) -> dict[str, tuple[str, str]]:
    return {row.name: (row.rule, row.note) for row in optimizer.report()}


@pytest.mark.parametrize("optimizer_case", [OPTIMIZER_CASES[0], OPTIMIZER_CASES[2]], ids=repr)
@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_every_parameter_with_a_gradient_moves_and_is_named(case: Case, optimizer_case: OptimizerCase):
    model = case.model().train()
    optimizer = optimizer_case(model)
    inputs, targets = case.batch(6)
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            F.cross_entropy(model(inputs), targets).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            moved = not torch.equal(p, before[name])
            has_gradient = grads[name] is not None and bool(grads[name].any())
            assert moved == has_gradient, name
            assert torch.isfinite(p).all(), name
    report = optimizer.report()
    assert [row.name for row in report] == [name for name, _ in model.named_parameters()]
    assert [row.shape for row in report] == [tuple(p.shape) for p in model.parameters()]
    text = str(report)
    for row in report:
        assert isinstance(row, ParameterRule)
        assert row.name in text
        assert row.rule in ("none", "sgd", optimizer_case.kwargs.get("rule", "trust_region"))
        assert row.note or row.rule not in ("none", "sgd")
        owner = model.get_submodule(row.name.rpartition(".")[0])
        if row.rule not in ("none", "sgd") and "share of its own size" not in row.note:
            assert type(owner) in WITH_RULE, row


def test_the_report_says_why():
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.lstm = nn.LSTM(4, 4)
            self.scale = nn.Parameter(torch.ones(4))
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.own = type("Own", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight)})(4, 4)
            self.sparse = nn.Embedding(5, 4, sparse=True)
            self.plain = nn.Linear(4, 4)
            self.unbiased = nn.Conv2d(4, 4, 3, bias=False)

    model = Everything()
    found = rules(whitening_without_bound(model))
    assert found["encoder.self_attn.in_proj_weight"] == ("sgd", "held by MultiheadAttention, which has no rule")
    assert found["encoder.self_attn.out_proj.weight"][0] == "sgd"
    assert "MultiheadAttention" in found["encoder.self_attn.out_proj.bias"][1]
    assert found["encoder.linear1.weight"] == ("whitening", "")
    assert found["encoder.norm1.weight"][0] == "sgd"
    assert found["lstm.weight_ih_l0"][0] == "sgd"
    assert found["scale"][0] == "sgd"
    assert found["frozen.weight"] == ("none", "frozen")
    assert found["parametrized.parametrizations.weight.original1"][0] == "sgd"
    assert "forward of its own" in found["own.weight"][1]
    assert "sparse" in found["sparse.weight"][1]
    assert found["plain.bias"] == ("whitening", "")
    assert "not centred" in found["unbiased.weight"][1]
    assert set(found) == {name for name, _ in model.named_parameters()}


# -- weights that are shared -------------------------------------------------------------------------------------


def test_tied_linear_layers_pool_their_inputs():
    """Without biases, two layers that share a weight are one layer that is called twice."""

    class Tied(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = self.first if shared else nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    one = Tied(shared=True).double()
    two = Tied(shared=False).double()
    two.load_state_dict(one.state_dict(), strict=False)
    batches = [torch.randn(8, 4, dtype=torch.float64) for _ in range(4)]
    for model in (one, two):
        train(model, whitening_without_bound(model, 0.1, momentum=0.9), batches)
    torch.testing.assert_close(two.first.weight, one.first.weight, **tolerance())


@pytest.mark.parametrize("rule", ["whitening", "whitening_second_order", "fan_in"])
def test_biases_of_a_shared_weight_are_scaled_and_the_inputs_not_centred(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    optimizer = whitening_without_bound(model, 0.1, rule=rule)
    before = copy.deepcopy(model)
    mean_loss(model(torch.randn(8, 4, dtype=torch.float64) + 2)).backward()
    optimizer.step()
    found = rules(optimizer)
    assert "shared weight" in found["0.bias"][1]
    assert "not centred" in found["0.weight"][1]
    steps = [(before[k].bias - model[k].bias) / model[k].bias.grad for k in (0, 2)]
    torch.testing.assert_close(steps[0], steps[1], **tolerance(condition=1e3))  # beta^2 lr, of the shared layer
    if rule != "whitening_second_order":
        torch.testing.assert_close(steps[0], torch.full_like(steps[0], 0.1 / 2), **tolerance(condition=1e3))


def test_an_embedding_that_is_the_decoder_too_falls_back_to_sgd_and_says_so():
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.mix = nn.Linear(4, 4)
            self.decoder = nn.Linear(4, 6)
            self.decoder.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decoder(torch.tanh(self.mix(self.embedding(tokens))))

    model = Language()
    optimizer = whitening_without_bound(model, 0.1)
    assert rules(optimizer)["embedding.weight"] == ("sgd", "shared by layers of different types")
    assert rules(optimizer)["decoder.bias"][0] == "sgd"
    assert rules(optimizer)["mix.weight"][0] == "whitening"
    before = copy.deepcopy(model)
    mean_loss(model(torch.randint(6, (5, 3)))).backward()
    optimizer.step()
    torch.testing.assert_close(model.embedding.weight, before.embedding.weight - 0.1 * model.embedding.weight.grad)


def test_a_weight_that_a_module_without_rule_owns_too_falls_back_to_sgd():
    class Decoder(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    embedding = nn.Embedding(6, 4)
    assert rules(whitening_without_bound(nn.Sequential(embedding, Decoder(embedding.weight))))["0.weight"][0] == "sgd"


# -- parts of a layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("rule", ["whitening", "whitening_second_order"])
def test_a_frozen_part_of_a_layer(part, rule):
    """Without a bias that can move, nothing is centred; a bias alone is scaled by beta^2. Beside the paper's lines."""
    models = [small_net(dtype=torch.float64) for _ in range(2)]
    for model in models:
        getattr(model.head, part).requires_grad_(False)
        getattr(model.conv, part).requires_grad_(False)
    settings = {"lr": 0.01, "momentum": 0.9, "rule": rule}
    optimizer, reference = whitening_without_bound(models[0], **settings), Reference(models[1], **settings)
    for x in small_batches(5, dtype=torch.float64):
        for model, opt in zip(models, (optimizer, reference), strict=True):
            model.zero_grad()
            mean_loss(model(x)).backward()
            opt.step()
    assert_same_parameters(models[0], models[1], **tolerance(condition=1e4))
    name = f"head.{part}"
    assert rules(optimizer)[name] == ("none", "frozen")


def test_a_bias_that_is_frozen_for_a_while():
    models = [nn.Linear(4, 3).double()]
    models.append(copy.deepcopy(models[0]))
    optimizer, reference = whitening_without_bound(models[0], 0.05), Reference(models[1], 0.05)
    for step in range(9):
        x = torch.randn(16, 4, dtype=torch.float64) + 2
        for model, opt in zip(models, (optimizer, reference), strict=True):
            model.zero_grad()
            model.bias.requires_grad_(not 3 <= step < 6)
            mean_loss(model(x)).backward()
            opt.step()
    assert_same_parameters(models[0], models[1], **tolerance(condition=1e4))


def test_a_layer_that_is_thawed_mid_training_starts_with_the_statistics_of_then():
    model = small_net(dtype=torch.float64)
    model.hidden.requires_grad_(False)
    optimizer = whitening_without_bound(model, 0.01, momentum=0.9)
    batches = small_batches(4, dtype=torch.float64)
    train(model, optimizer, batches[:2])
    fresh = copy.deepcopy(model)
    for net in (model, fresh):
        net.hidden.requires_grad_(True)
    other = whitening_without_bound(fresh, 0.01, momentum=0.9)
    train(model, optimizer, batches[2:3])
    train(fresh, other, batches[2:3])
    torch.testing.assert_close(model.hidden.weight, fresh.hidden.weight, **tolerance())


@pytest.mark.parametrize("weight_rule", ["sgd", "left out"])
def test_a_bias_goes_as_its_weight_goes(weight_rule):
    """Eq. (3) moves the bias against a step of the weight, which here is not taken."""
    ours = nn.Linear(4, 3).double()
    theirs = copy.deepcopy(ours)
    groups = [{"params": [ours.bias]}]
    if weight_rule == "sgd":
        groups.append({"params": [ours.weight], "rule": "sgd"})
    optimizer = whitening_without_bound(groups, 0.1, model=ours)
    sgd = torch.optim.SGD(theirs.parameters() if weight_rule == "sgd" else [theirs.bias], 0.1)
    batches = [torch.randn(8, 4, dtype=torch.float64) + 2 for _ in range(2)]
    train(ours, optimizer, batches)
    train(theirs, sgd, batches)
    assert_same_parameters(ours, theirs)
    assert rules(optimizer)["bias"][0] == "sgd"


def test_a_bias_outside_of_the_rule_leaves_the_inputs_uncentred():
    ours = nn.Linear(4, 3).double()
    theirs = copy.deepcopy(ours)
    theirs.bias.requires_grad_(False)
    (x,) = [torch.randn(8, 4, dtype=torch.float64) + 2]
    before = ours.bias.detach().clone()
    train(
        ours,
        whitening_without_bound([{"params": [ours.weight]}, {"params": [ours.bias], "rule": "sgd"}], 0.1, model=ours),
        [x],
    )
    train(theirs, whitening_without_bound(theirs, 0.1), [x])
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
    torch.testing.assert_close(ours.bias, before - 0.1 * ours.bias.grad, rtol=0, atol=0)


# -- unusual inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(3, 4, 2), (3, 6)), (nn.Conv2d(3, 4, 2), (3, 5, 6)), (nn.Conv2d(3, 4, 2), (3, 3, 3))],
    ids=str,
)
def test_a_sample_without_batch_axis_is_a_batch_of_one(layer, shape):
    one, two, x = layer.double(), copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)
    for model, batch in ((one, x), (two, x[None])):
        optimizer = whitening_without_bound(model, 0.1, rule="whitening_second_order")
        model(batch).relu_().square().sum().backward()
        optimizer.step()
    assert_same_parameters(one, two, **tolerance(condition=1e2))


@pytest.mark.parametrize("rule", ["whitening", "whitening_second_order", "fan_in"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(4, 3, 2)], ids=["linear", "conv"])
def test_an_empty_call_counts_for_nothing(build, rule):
    one = build().double()
    two = copy.deepcopy(one)
    x = torch.randn(6, *([4] if isinstance(one, nn.Linear) else [4, 3, 3]), dtype=torch.float64)
    for model in (one, two):
        optimizer = whitening_without_bound(model, 0.1, rule=rule)
        for _ in range(2):
            optimizer.zero_grad()
            if model is two:
                model(x[:0]).sum().backward()
            model(x).square().sum(1).mean().backward()
            optimizer.step()
    assert_same_parameters(two, one)


@pytest.mark.parametrize(
    "rule",
    [
        "whitening",
        "whitening_second_order",
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_that_are_all_zero_give_finite_steps(rule, bias):
    model = nn.Sequential(nn.Linear(4, 4, bias=bias), nn.ReLU(), nn.Linear(4, 3, bias=bias))
    if bias and rule == "whitening_second_order":
        nn.init.constant_(model[0].bias, -1.0)  # all units dead
        nn.init.constant_(model[2].bias, 1.0)  # at the minimum of the loss
    train(model, whitening_without_bound(model, 0.1, rule=rule), [torch.zeros(5, 4)])
    assert all(torch.isfinite(p).all() for p in model.parameters())
