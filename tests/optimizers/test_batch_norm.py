"""Folding batch normalization: the outputs stay, what cannot be folded is named, and training goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.cases import mean_loss, train, whitening_without_bound
from tests.oracles import tolerance
from torchgeom_optim.optimizers import fold_batch_norm


def with_statistics(model: nn.Module) -> nn.Module:
    """In float64, with norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.double().eval()


PAIRS = {
    "linear": (lambda **bias: nn.Linear(4, 5, **bias), nn.BatchNorm1d, (6, 4)),
    "conv1d": (lambda **bias: nn.Conv1d(4, 5, 2, **bias), nn.BatchNorm1d, (6, 4, 5)),
    "conv2d": (lambda **bias: nn.Conv2d(4, 5, 3, padding=1, stride=2, **bias), nn.BatchNorm2d, (6, 4, 5, 5)),
    "conv3d": (lambda **bias: nn.Conv3d(4, 5, 2, **bias), nn.BatchNorm3d, (6, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_outputs_stay(pair, bias, affine):
    build, norm, shape = PAIRS[pair]
    model = with_statistics(nn.Sequential(build(bias=bias), norm(5, affine=affine, eps=1e-2), nn.Tanh()))
    x = torch.randn(shape, dtype=torch.float64)
    before, weight = model(x), model[0].weight
    (folded,) = fold_batch_norm(model)
    torch.testing.assert_close(model(x), before, **tolerance(condition=1e2))
    assert (folded.norm_name, folded.layer_name, folded.layer) == ("1", "0", model[0])
    assert folded.created_bias == (not bias)
    assert model[0].weight is weight  # parameters keep their identity
    assert isinstance(model[1], nn.Identity)
    assert isinstance(model[0].bias, nn.Parameter)
    assert fold_batch_norm(model) == []


def test_a_grouped_convolution_and_a_norm_by_two_names():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            self.body = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), self.norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model, x = with_statistics(Net()), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = model(x)
    assert len(fold_batch_norm(model)) == 1
    torch.testing.assert_close(model(x), before, **tolerance(condition=1e2))


def test_resnet18():
    models = pytest.importorskip("torchvision", reason="torchvision is an extra").models
    model, x = with_statistics(models.resnet18(num_classes=4)), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        assert len(fold_batch_norm(model)) == 20
        torch.testing.assert_close(model(x), before, **tolerance(condition=1e4))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class Branching(nn.Module):
    """The layer's output is used beside the norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


class ByValue(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def shared_weight() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    return model


def conv_and(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), *layers)


REFUSED = {
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), "0 does not follow a layer"),
    "after an activation": (lambda: conv_and(nn.ReLU(), nn.BatchNorm2d(3)), "2 does not follow a layer"),
    "no statistics": (lambda: conv_and(nn.BatchNorm2d(3, track_running_stats=False)), "1 keeps no running"),
    "branching": (Branching, "norm .*used more than once"),
    "called twice": (Twice, "norm .*used more than once"),
    "shared weight": (shared_weight, "1 .*shares its parameters"),
    "control flow": (ByValue, "torch.fx cannot trace"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
        "1 .*",
    ),
    "one of two": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)),
        "3 does not follow",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_norm_and_change_nothing(name):
    build, message = REFUSED[name]
    model = with_statistics(build())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(model)
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)

    optimizer = whitening_without_bound(model, 0.1, rule="sgd")
    with pytest.raises(ValueError, match=message):
        optimizer.fold_batch_norm(lr=0.5)
    assert (optimizer.param_groups[0]["rule"], optimizer.param_groups[0]["lr"]) == ("sgd", 0.1)


# -- the switch of App. E ----------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).double()


def batches(number: int) -> list[Tensor]:
    return [torch.randn(12, 2, 6, 6, dtype=torch.float64) for _ in range(number)]


@pytest.mark.parametrize("named", [False, True])
def test_training_goes_on_with_whitening(named):
    model = network()
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = whitening_without_bound(parameters, 0.02, momentum=0.9, model=model, rule="sgd")
    first = train(model, optimizer, batches(5))
    kept = optimizer.state[model[7].weight]["momentum_buffer"].clone()
    model.eval()
    x = batches(1)[0]
    before = model(x)
    folded = optimizer.fold_batch_norm(lr=0.05)
    torch.testing.assert_close(model(x), before, **tolerance(condition=1e3))
    assert [f.created_bias for f in folded] == [True, False]

    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    if named:
        by_name = dict(zip(group["param_names"], group["params"], strict=True))
        assert {name: id(p) for name, p in by_name.items()} == {n: id(p) for n, p in model.named_parameters()}
    assert (group["lr"], group["rule"], group["momentum"]) == (0.05, "trust_region", 0.9)
    assert set(optimizer.state) <= set(model.parameters())
    assert not optimizer.state.get(model[0].weight)  # its momentum belonged to other coordinates
    torch.testing.assert_close(optimizer.state[model[7].weight]["momentum_buffer"], kept, rtol=0, atol=0)
    assert {row.rule for row in optimizer.report()} == {"trust_region"}

    losses = train(model.train(), optimizer, batches(10))
    assert all(torch.isfinite(loss) for loss in losses)
    assert losses[-1] < first[0]

    fresh = network()  # a checkpoint fits a network that was folded alike
    other = whitening_without_bound(fresh, 0.02, momentum=0.9, rule="sgd")
    other.fold_batch_norm()
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    x = batches(1)
    torch.testing.assert_close(train(fresh, other, x), train(model, optimizer, x), rtol=0, atol=0)


def test_groups_keep_what_is_their_own():
    model = network()
    norms = [p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    others = [p for p in model.parameters() if not any(p is q for q in norms)]
    optimizer = whitening_without_bound(
        [{"params": norms, "weight_decay": 0.0}, {"params": others, "lr": 0.3}], 0.02, model=model, rule="sgd"
    )
    optimizer.fold_batch_norm(rule="fan_in")
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 6]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.3]
    assert {group["rule"] for group in optimizer.param_groups} == {"fan_in"}
    train(model, optimizer, batches(2))


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_warm_up_may_begin_at_zero(lr):
    model = network()
    optimizer = whitening_without_bound(model, 0.02, rule="sgd")
    optimizer.fold_batch_norm(lr=lr)
    (group,) = optimizer.param_groups
    assert group["reference_lr"] is None  # 0 is no scale to go by: as in the constructor the rate is the radius
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, optimizer, batches(1))
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    group["lr"] = 0.1
    train(model, optimizer, batches(1))
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_layers_that_are_not_trained_may_be_folded():
    model = network()
    model[:6].requires_grad_(False)
    optimizer = whitening_without_bound(model[7].parameters(), 0.02, model=model, rule="sgd")
    assert len(optimizer.fold_batch_norm()) == 2
    assert len(optimizer.param_groups[0]["params"]) == 2
    train(model, optimizer, batches(2))


def test_bad_calls_change_nothing():
    model = network()
    with pytest.raises(RuntimeError, match="without a model"):
        whitening_without_bound(model.parameters(), 0.1).fold_batch_norm()
    optimizer = whitening_without_bound(model, 0.1, rule="sgd")
    for settings in ({"lr": float("nan")}, {"rule": "adam"}):
        with pytest.raises(ValueError, match="must be"):
            optimizer.fold_batch_norm(**settings)
    assert isinstance(model[1], nn.BatchNorm2d)
    mean_loss(model(batches(1)[0])).backward()
    optimizer.step()
