"""Moves that add up: layers in a row, layers beside skip connections, factors of products."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.geometry import unit_trust
from torchgeom_optim.models.reference import lenet, mlp_deep, resnet8, resnet20
from torchgeom_optim.optimizers import chain_length


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:5]:
            x = x + torch.relu_(layer(x))
        return self.layers[5](x.view(3, -1).t().relu_().t())


@pytest.mark.parametrize(
    ("build", "shape", "length"),
    [
        (lambda: nn.Linear(3, 2), (4, 3), 2),
        (Skipping, (3, 3), 4),
        (lenet, (2, 3, 32, 32), 10),
        (mlp_deep, (2, 784), 20),
        (resnet8, (2, 3, 8, 8), 8),  # of ten layers, four of them on the shortest path
        (resnet20, (2, 3, 8, 8), 8),  # of 22
    ],
)
def test_residual_branches_count_like_random_numbers(build, shape, length):
    model = build()
    optimizer = WhiteningSGD(model)
    model(torch.randn(shape)).square().mean().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["chain_length"] == length
    assert WhiteningSGD(model, chain_length=7).param_groups[0]["chain_length"] == 7


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))


def attention(x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.chunk(3, -1)
    return torch.softmax(q @ k.mT, -1) @ v


def fused_attention(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.view(2, 5, 1, 2).transpose(1, 2) for part in x.split(2, -1))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 2)


@pytest.mark.parametrize(
    ("between", "factors"),
    [
        (torch.relu, None),
        (lambda x: 3 * x + 1, None),
        (lambda x: nn.functional.dropout(x, 0.5), None),
        (lambda x: x / x.norm(), None),
        (rms_norm, None),
        (gelu, None),
        (lambda x: x * torch.sigmoid(x), None),
        (lambda x: nn.functional.glu(x, -1), 2),
        (lambda x: x[..., :3] * torch.sigmoid(x[..., 3:]), 2),
        (lambda x: torch.mul(*x.chunk(2, -1)), 2),
        (lambda x: x @ x.mT, 2),
        (lambda x: torch.addcmul(x[..., :2], x[..., 2:4], x[..., 4:]), 2),  # a product and what is added to it
        (lambda x: torch.baddbmm(x @ torch.ones(6, 5), x, x.mT), 2),
        (attention, 3),
        (fused_attention, 3),
        (lambda x: torch.relu(attention(x)) + x[..., :2], 3),
        (lambda x: attention(x) @ attention(x).mT, 4),  # no more are counted
    ],
)
def test_factors_of_products_share_the_radius(between, factors):
    first = nn.Linear(4, 6)
    x = torch.randn(2, 5, 4)
    middle = between(first(x))
    last = nn.Linear(middle.shape[-1], 3)
    model = nn.ModuleList([first, last])
    optimizer = WhiteningSGD(model)
    last(between(first(x))).square().mean().backward()
    optimizer.step()
    assert optimizer.state[first.weight].get("factors") == factors
    assert "factors" not in optimizer.state[last.weight]


def test_separate_layers_whose_outputs_are_multiplied_all_share():
    torch.manual_seed(0)
    gate, value, last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
    model = nn.ModuleList([gate, value, last]).double()
    other = copy.deepcopy(model)
    x = torch.randn(8, 4, dtype=torch.float64)
    moves = []
    for net, length in ((model, None), (other, 4)):  # a length that is given: no product is looked for
        before = [layer.weight.detach().clone() for layer in net]
        optimizer = WhiteningSGD(net, chain_length=length)
        net[2](net[0](x).sigmoid() * net[1](x)).square().mean().backward()
        with mock.patch.object(unit_trust, "_TAKEN_BACK", 0.0):  # which is of second order
            optimizer.step()
        moves.append([layer.weight.detach() - old for layer, old in zip(net, before, strict=True)])
    for move, alone, factors in zip(*moves, (2, 2, 1), strict=True):
        torch.testing.assert_close(move * factors, alone, **tolerance())


def test_factors_are_part_of_the_state():
    gate, value, last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
    model = nn.ModuleList([gate, value, last])
    optimizer = WhiteningSGD(model)
    last(gate(torch.randn(8, 4)).sigmoid() * value(torch.randn(8, 4))).square().mean().backward()
    optimizer.step()
    other = copy.deepcopy(model)
    resumed = WhiteningSGD(other)
    resumed.load_state_dict(optimizer.state_dict())
    assert [resumed.state[layer.weight].get("factors") for layer in other] == [2, 2, None]


def test_what_is_added_to_a_product_is_no_factor_of_it():
    stream, gate, value, last = (nn.Linear(3, 3) for _ in range(4))
    optimizer = WhiteningSGD(nn.ModuleList([stream, gate, value, last]))
    x = stream(torch.randn(8, 3))
    x = x + gate(x).sigmoid() * value(x)
    last(x).square().mean().backward()
    optimizer.step()
    assert [optimizer.state[layer.weight].get("factors") for layer in (stream, gate, value, last)] == [None, 2, 2, None]


class Named(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.name = "a name of its own"
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_functions_of_the_user_may_keep_what_they_like():
    first, last = nn.Linear(3, 3), nn.Linear(3, 2)
    optimizer = WhiteningSGD(nn.ModuleList([first, last]))
    last(Named.apply(first(torch.randn(4, 3)))).square().mean().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["chain_length"] == 4


def test_each_operation_is_looked_at_once():
    """Along a stream that all layers read, and where each reads the outputs of all that came before."""
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(40))
    for reads_all in (False, True):
        chain, x = chain_length.ChainLength(), torch.randn(2, 3)
        with mock.patch.object(chain_length, "_joined", wraps=chain_length._joined) as looked_at:
            outputs = [x]
            for layer in layers:
                x = torch.stack(outputs).sum(0) if reads_all else x
                y = layer(x)
                chain.see(layer.weight, x, y)
                x = x + y
                outputs.append(y)
        assert chain.length == 10
        assert looked_at.call_count <= 80


def test_once_found_nothing_is_looked_for():
    model = lenet()
    optimizer = WhiteningSGD([{"params": model.parameters()}, {"params": []}], model=model)
    for expected in (5, 0):
        with mock.patch.object(optimizer._chain, "see", wraps=optimizer._chain.see) as see:
            optimizer.zero_grad()
            model(torch.randn(2, 3, 32, 32)).square().mean().backward()
            optimizer.step()
        assert see.call_count == expected


def test_copies_in_the_middle_of_a_pass_look_anew():
    gate, value, last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
    model = nn.ModuleList([gate, value, last])
    optimizer, x = WhiteningSGD(model), torch.randn(8, 4)
    y = gate(x).sigmoid() * value(x)
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    last(y).square().mean().backward()
    optimizer.step()
    for net, other in copies:
        net[2](net[0](x).sigmoid() * net[1](x)).square().mean().backward()
        other.step()
        torch.testing.assert_close(net.state_dict(), model.state_dict())
        assert other.state[net[0].weight]["factors"] == 2


def plain(depth: int) -> nn.Sequential:
    return nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(4, 4), nn.ReLU())])


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("way", ["same group", "group of its own", "length that is given"])
def test_layers_that_are_unfrozen_lengthen_the_chain(way, is_copied):
    model, x = plain(8), torch.randn(16, 4)
    body, head = list(model[:-2].parameters()), list(model[-2:].parameters())
    for p in body:
        p.requires_grad_(False)
    if way == "group of its own":
        optimizer = WhiteningSGD([{"params": head}], model=model)
    else:
        optimizer = WhiteningSGD(model, chain_length=5 if way == "length that is given" else None)

    def step() -> list[int]:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return [group["chain_length"] for group in optimizer.param_groups]

    first = [5] if way == "length that is given" else [2]
    assert [step() for _ in range(2)] == [first] * 2
    if is_copied:
        model, optimizer = copy.deepcopy((model, optimizer))
        body = list(model[:-2].parameters())
    for p in body:
        p.requires_grad_(True)
    if way == "group of its own":
        optimizer.add_param_group({"params": body})
    step()
    assert step() == {"same group": [16], "group of its own": [16, 16], "length that is given": [5]}[way]
    with mock.patch.object(optimizer._chain, "see") as see:
        step()
    see.assert_not_called()
