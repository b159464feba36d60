"""The gate program computes what the network computes, for every companion that has an oracle of its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.oracles import tolerance
from torchgeom_optim.models import UnsupportedBaseError
from torchgeom_optim.models.gradnet_gates import GateProgram
from torchgeom_optim.models.gradnet_steps import Layer, applied


class Residual(nn.Module):
    """Functional ReLUs and poolings, a sum, a concatenation, a tied layer, sizes read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.block = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block(F.relu(self.block(x))))
        x = F.max_pool2d(F.relu(x), 2, stride=1)
        x = torch.cat([x, x / 2], 1)
        x = F.dropout(x, 0.5, self.training)
        return self.head(x.mean((2, 3)).view(x.size(0), -1))


class Constants(nn.Module):
    """Numbers that are added, from either side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(1.0 - x)) + 1.0
        x = torch.add(2.0 - x, 3, alpha=0.5) - x.size(1)
        x = torch.add(x, other=1.5)
        x += 1
        return self.second(F.relu(x)) + x.size(0)


def stack(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (
        stack(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.LeakyReLU(0.1),
              nn.Linear(4, 3)),
        (2, 2, 2),
    ),
    "cnn": (
        stack(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, groups=1),
              nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3, 3)),
        (2, 7, 7),
    ),
    "overlapping windows": (
        stack(nn.Conv2d(1, 3, 3), nn.MaxPool2d(3, stride=1, padding=1), nn.LeakyReLU(0.2), nn.MaxPool2d(2, dilation=2),
              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
        (1, 8, 8),
    ),
    "batch norm": (
        stack(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3),
              nn.BatchNorm1d(3)),
        (2, 6, 6),
    ),
    "one axis": (stack(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)), (2, 8)),
    "residual": (Residual, (2, 4, 4)),
    "constants": (Constants, (4,)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = CASES[request.param]
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval(), torch.randn(4, *shape, dtype=torch.float64)


def companion(weights: dict[str, Tensor]) -> Callable[[Layer, Tensor | None, Tensor | None], Tensor]:
    return lambda layer, a, b: applied(layer.module, b, weights.get(layer.weight), weights.get(layer.bias))


def test_the_base_and_a_companion_with_its_weights(case):
    model, x = case
    program = GateProgram(model)
    record = program.record((x,))
    torch.testing.assert_close(record["logits"], model(x), **tolerance(condition=10))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = program.carry(record, companion(weights), tangent=False)
    torch.testing.assert_close(logits, model(x), **tolerance(condition=10))
    u = torch.randn_like(logits)
    ours = torch.autograd.grad((logits * u).sum(), list(weights.values()))
    theirs = torch.autograd.grad((model(x) * u).sum(), list(model.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance(condition=100))


def test_a_tangent_is_the_derivative(case):
    model, x = case
    program, weights = GateProgram(model), dict(model.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in weights.items()}

    def tangent(layer: Layer, a: Tensor | None, b: Tensor | None) -> Tensor:
        moved = applied(layer.module, a, direction[layer.weight], direction.get(layer.bias))
        return moved if b is None else moved + applied(layer.module, b, weights[layer.weight], None)

    ours = program.carry(program.record((x,), inputs=True), tangent, tangent=True)
    _, theirs = torch.func.jvp(lambda w: functional_call(model, w, (x,)), (weights,), (direction,))
    torch.testing.assert_close(ours, theirs, **tolerance(condition=100))
    wrong = program.carry(program.record((x,), inputs=True), lambda *call: -tangent(*call), tangent=True)
    assert not torch.allclose(wrong, theirs)  # signs of a chain of layers do not cancel


def test_gates_stay_the_bases_own():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.zero_()
    program, x = GateProgram(model), torch.tensor([[2.0]], dtype=torch.float64)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights["0.weight"].neg_()  # the first unit is now negative, but its gate is open
    out = program.carry(program.record((x,)), companion(weights), tangent=False)
    expected = torch.tensor([[-2.0, 0.0]], dtype=torch.float64) @ weights["2.weight"].T + weights["2.bias"]
    torch.testing.assert_close(out, expected)


def test_the_model_is_left_alone():
    model = CASES["batch norm"][0]().train()
    before = copy.deepcopy(model.state_dict())
    program = GateProgram(model)
    program.record((torch.randn(3, 2, 6, 6),))
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_copy_is_of_the_copied_network():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    holder = nn.Module()
    holder.base, holder.program = model, GateProgram(model)
    other = pickle.loads(pickle.dumps(copy.deepcopy(holder)))
    nn.init.zeros_(other.base[2].weight)
    nn.init.zeros_(other.base[2].bias)
    x = torch.randn(4, 2)
    assert other.program.record((x,))["logits"].abs().max() == 0
    torch.testing.assert_close(holder.program.record((x,))["logits"], model(x))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "layer '1' of type Tanh"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "layer '1' of type LayerNorm"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "BatchNorm1d"),
        (Bare(), "'scale'"),
        (TwoInputs(), "2 inputs"),
        (nn.ReLU(), "no layer with weights"),
    ],
)
def test_what_bends_otherwise_is_refused_by_name(model, named):
    with pytest.raises(UnsupportedBaseError, match=named):
        GateProgram(model)
