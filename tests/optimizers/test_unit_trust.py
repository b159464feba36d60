"""The trust region per unit against loops over units, and what it promises."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.optimizers.oracles_trust import TrustedReference
from tests.oracles import tolerance
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.geometry import unit_trust
from torchgeom_optim.models.reference import char_gpt
from torchgeom_optim.optimizers import unit_trust as trust_of_units

BATCH = 32


class Plain(nn.Module):
    """All kinds of parameters: convolution, norm, linear layers with and without bias, a bare one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.shift = nn.Parameter(0.1 * torch.randn(36))
        self.hidden = nn.Linear(36, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu_().flatten(1) + self.shift
        return self.head(torch.relu(self.hidden(x)))


class Grouped(nn.Module):
    """Convolutions in groups, in one and two dimensions, padded and dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.second = nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)).mean(3)
        return self.head(torch.tanh(self.second(y)).mean(2))


class Repeated(nn.Module):
    """An embedding, a layer that is called twice, on other numbers of rows, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.twice = nn.Linear(4, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (2 * x.flatten(1)[:, :5]).round().clamp(-3, 3).long() + 3
        y = self.norm(self.embed(tokens))
        y = y.mean(1) + torch.tanh(self.twice(y)).mean(1)
        y = y + torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.twice(y))))))
        return self.head(y)


def batches(number: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, 2, 6, 6, generator=g, dtype=torch.float64), torch.randint(3, (BATCH,), generator=g))
        for _ in range(number)
    ]


def deep_network() -> nn.Sequential:
    layers = [layer for k in range(5) for layer in (nn.Linear(72 if k == 0 else 6, 6), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(6, 3))


LENGTHS = {Plain: 6, Grouped: 6, Repeated: 4, deep_network: 12}  # twice the layers in a row; 1.5 sqrt(5) is less than 4


def side_by_side(steps: int = 8, fault: str = "", build=Plain, length: int | None = None, **settings):
    length = length or LENGTHS[build]
    torch.manual_seed(0)
    ours = build().double()
    theirs = copy.deepcopy(ours)
    reference = dict(settings)
    lr, rho = reference.pop("lr", None), reference.pop("trust_radius", 1.0)
    pairs = (
        (ours, WhiteningSGD(ours, **settings)),
        (theirs, TrustedReference(theirs, lr, rho, length, fault, **reference)),
    )
    for step, (x, y) in enumerate(batches(steps)):
        x = x * 3 ** (step % 3)  # so that the guard, and the present change, matter
        for model, optimizer in pairs:
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return ours, theirs


MOMENTUM = {"trust_radius": 0.3, "momentum": 0.9, "weight_decay": 0.01}
NESTEROV = {"trust_radius": 0.3, "momentum": 0.8, "nesterov": True}


@pytest.mark.parametrize(
    "settings",
    [{}, MOMENTUM, NESTEROV, {"lr": 3.0}, {"lr": 0.5, "trust_radius": 0.2, "momentum": 0.5, "dampening": 0.3}],
    ids=str,
)
def test_steps_follow_the_rule_unit_by_unit(settings):
    ours, theirs = side_by_side(**settings)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e6))


@pytest.mark.parametrize("settings", [{}, NESTEROV, {"lr": 0.5}], ids=str)
@pytest.mark.parametrize("build", [Grouped, Repeated])
def test_groups_embeddings_shared_weights_and_several_calls_follow_it_too(build, settings):
    ours, theirs = side_by_side(build=build, **settings)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e6))


FAULTS = {
    "no_present": (Plain, {}),
    "no_memory": (Plain, {}),
    "uncorrelated": (Plain, {}),
    "no_spread_floor": (Plain, {}),
    "no_slope_floor": (Plain, {"lr": 0.5}),
    "average_of_changes": (Plain, {}),
    "no_guard": (Plain, {}),
    "centred": (Repeated, {}),
    "one_group": (Grouped, {}),
    "one_call": (Repeated, {}),
    "momentum_outside": (Repeated, NESTEROV),
    "long_momentum": (Plain, MOMENTUM),
    "whole_norms": (Repeated, {}),
    "no_chain": (Grouped, {"lr": 0.5}),
    "no_turn": (Plain, {}),
    "whole_turn": (Grouped, {"lr": 3.0}),
    "turned_embeddings": (Repeated, {}),
    "turned_mean": (Plain, {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_rule_leads_elsewhere(fault):
    build, settings = FAULTS[fault]
    ours, theirs = side_by_side(5, fault, build, **settings)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-6)


def test_a_momentum_that_leaves_nothing_of_the_bound_is_refused():
    model = deep_network()
    with pytest.raises(ValueError, match=r"momentum=1.0.*must be in \[0, 1\).*none is needed"):
        WhiteningSGD(model, momentum=1.0)
    WhiteningSGD(model, momentum=1.0, rule="whitening")


@pytest.mark.parametrize("cycles", [False, True])
@pytest.mark.parametrize("settings", [{}, {"lr": 0.1}], ids=str)
def test_momentum_makes_no_training_run_away(settings, cycles):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 5)),
        torch.randn(640, 20),
    )
    y = (x @ torch.randn(20, 5)).argmax(1)
    optimizer = WhiteningSGD(model, momentum=0.9, **settings)
    lr, schedulers = optimizer.param_groups[0]["lr"], torch.optim.lr_scheduler
    if cycles:  # of momentum, too
        scheduler = schedulers.OneCycleLR(optimizer, lr, total_steps=200)
    else:
        scheduler = schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    losses = []
    for step in range(200):
        optimizer.zero_grad()
        batch = slice(64 * (step % 10), 64 * (step % 10) + 64)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    assert max(losses) < 1.5 * losses[0]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("settings", [{}, {"lr": 0.3}], ids=str)
def test_layers_in_a_row_share_the_radius(settings):
    ours, theirs = side_by_side(build=deep_network, **settings)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance(condition=1e6))
    _, alone = side_by_side(3, build=deep_network, length=4, **settings)
    _, shared = side_by_side(3, build=deep_network, length=12, **settings)
    assert not torch.allclose(alone[1].weight, shared[1].weight, rtol=1e-3)


def hidden_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def step_of(model: nn.Module, x: Tensor, y: Tensor, **settings) -> WhiteningSGD:
    optimizer = WhiteningSGD(model, **settings)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


@given(seed=st.integers(0, 2**16), rho=st.sampled_from([0.01, 0.3, 2.0]), lr=st.sampled_from([None, 1e-3, 1.0, 1e3]))
def test_no_unit_moves_further_than_its_share(seed, rho, lr):
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.randn((), generator=g)
    x = torch.randn(16, 6, generator=g, dtype=torch.float64) * scale + 1  # all of it is measured
    model = hidden_network()
    before = copy.deepcopy(model)
    step_of(model, x, torch.randint(3, (16,), generator=g), lr=lr, trust_radius=rho)
    inputs = x
    for old, new in zip(before, model, strict=True):
        if isinstance(old, nn.Linear):
            y = old(inputs)
            sigma_sq = y.var(0, unbiased=False)
            floored = sigma_sq + 1e-3 * sigma_sq.mean() + 1e-5 * inputs.square().mean()
            moved = (new(inputs) - y).square().mean(0).sqrt()
            turn = rho / 6  # what is taken back comes to the move
            most = turn * floored.sqrt() + turn**2 / 4 * sigma_sq.sqrt()
            assert bool((moved <= most * (1 + 1e-9)).all())
        inputs = old(inputs)


def rescaled(model: nn.Sequential, kappa: Tensor) -> nn.Sequential:
    """The same function: what comes into each unit of the first layer is multiplied, what goes out divided."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(kappa[:, None])
        other[0].bias.mul_(kappa)
        other[2].weight.div_(kappa)
    return other


@given(seed=st.integers(0, 2**16), decades=st.floats(0.0, 1.5), lr=st.sampled_from([None, 1e8]))
def test_the_scale_of_units_changes_no_step(seed, decades, lr):
    """Exact but for the shares of a layer's mean that are added to variances, while no unit meets lr itself."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randint(3, (16,), generator=g)
    kappa = 10 ** (decades * (2 * torch.rand(8, generator=g, dtype=torch.float64) - 1))
    model = hidden_network()
    other = rescaled(model, kappa)
    with mock.patch.object(trust_of_units, "spread_floor", lambda mean_spread_sq, input_sq: 0 * mean_spread_sq):
        for _ in range(3):
            for net in (model, other):
                net.zero_grad()
                step_of(net, x, y, damping=0.0, lr=lr)
    torch.testing.assert_close(rescaled(other, 1 / kappa).state_dict(), model.state_dict(), **tolerance(condition=1e6))


@given(seed=st.integers(0, 2**16), decades=st.floats(-1.5, 1.5))
def test_the_scale_of_hidden_layers_changes_no_step(seed, decades):
    """Floors and all, but for the share of the inputs' square by which layers of zeros get away from them."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randint(3, (16,), generator=g)
    model, kappa = hidden_network(), torch.full((8,), 10**decades, dtype=torch.float64)
    other = rescaled(model, kappa)
    with mock.patch.object(unit_trust, "_STILL_SHARE", 0.0):
        step_of(model, x, y)
        step_of(other, x, y)
    torch.testing.assert_close(rescaled(other, 1 / kappa).state_dict(), model.state_dict(), **tolerance(condition=1e6))


def test_rescaling_units_in_the_middle_does_no_harm():
    x, y = batches(1)[0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model = model.double()
    optimizer, losses = WhiteningSGD(model, trust_radius=0.5), []
    for step in range(60):
        if step == 30:
            with torch.no_grad():
                kappa = 10 ** (2 * torch.rand(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1)
                model[1].weight.mul_(kappa[:, None])
                model[1].bias.mul_(kappa)
                model[3].weight.div_(kappa)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) <= 1.3 * losses[0]
    assert max(losses[30:]) <= max(losses[20:30])


def test_a_unit_that_is_silent_on_the_probe_and_zero_weights_do_not_break_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    with torch.no_grad():
        model[0].bias[0] = -1e3  # never active
    optimizer = WhiteningSGD(model)
    head = model[2].weight.detach().clone()
    for x, y in batches(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.flatten(1)[:, :4]), (y > 0).long()).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool((model[2].weight != head).any())  # a layer that starts at zero does not stay there


def test_a_batch_of_one_moves_the_weights_by_a_finite_step():
    model = hidden_network()
    optimizer = WhiteningSGD(model)
    before = copy.deepcopy(model)
    for x in torch.randn(4, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([1])).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert bool(p.isfinite().all())
        assert not torch.equal(p, q)


def test_schedulers_move_learning_rate_and_bound_together():
    model, x = hidden_network(), torch.randn(16, 6, dtype=torch.float64)
    other = copy.deepcopy(model)
    for net, start in ((model, 1.0), (other, 0.25)):
        optimizer = WhiteningSGD(net, lr=1e3, trust_radius=0.4)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, start=start: start)
        net(x).square().mean().backward()
        with mock.patch.object(unit_trust, "_TAKEN_BACK", 0.0):  # which is of second order
            optimizer.step()
    first = hidden_network()
    moves = [net[0].weight - first[0].weight for net in (model, other)]
    torch.testing.assert_close(moves[1] * 4, moves[0], **tolerance(condition=1e3))


def test_without_a_learning_rate_the_radius_is_the_learning_rate():
    optimizer = WhiteningSGD(hidden_network(), trust_radius=0.7)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert WhiteningSGD(hidden_network(), rule="whitening").param_groups[0]["lr"] == 0.1
    assert WhiteningSGD(hidden_network().parameters()).param_groups[0]["lr"] == 0.1


def test_the_length_of_the_chain_is_found():
    model = hidden_network()
    assert step_of(model, torch.randn(4, 6).double(), torch.tensor([0, 1, 2, 0])).param_groups[0]["chain_length"] == 6
    network = char_gpt()
    optimizer = WhiteningSGD(network)
    network(torch.randint(128, (2, 8))).logsumexp(-1).mean().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["chain_length"] == 5  # 1.5 times the root of ten layers
    factors = {name for name, p in network.named_parameters() if optimizer.state[p].get("factors") == 3}
    assert factors == {f"blocks.{k}.query_key_value.weight" for k in (0, 1)}
    assert {row.rule for row in optimizer.report()} == {"trust_region"}
    assert "share of its own size" in str(optimizer.report())


def test_it_trains_far_beyond_the_learning_rates_of_sgd():
    finals = []
    for lr in (None, 1e2, 1e4):
        model = hidden_network()
        optimizer = WhiteningSGD(model, lr=lr)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=80)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(64, 6, generator=g, dtype=torch.float64)
        y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
        for _ in range(80):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
        finals.append(loss.item())
    assert all(math.isfinite(final) and final < 0.5 for final in finals), finals


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_inputs_that_are_all_zero_do_no_harm():
    for bias in (False, True):
        model = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Linear(3, 2)).double()
        plain_step(model, WhiteningSGD(model), torch.zeros(8, 4, dtype=torch.float64))
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_chain_is_not_taken_from_steps_and_copies_that_saw_none():
    model, x = deep_network().double(), batches(1)[0][0]
    optimizer = WhiteningSGD([{"params": model.parameters()}, {"params": []}], model=model)
    optimizer.step()  # without a gradient
    assert optimizer.param_groups[0]["chain_length"] is None
    model(x).square().mean().backward()
    optimizer.load_state_dict(optimizer.state_dict())  # looks at the model anew
    _, other = copy.deepcopy((model, optimizer))
    for each in (optimizer, other):
        assert each._chain.length == 12
    optimizer.step()
    assert optimizer.param_groups[0]["chain_length"] == 12


def test_a_rule_that_is_set_between_the_passes_and_the_step_takes_effect_with_the_next_pass():
    model, x = hidden_network(), torch.randn(8, 6, dtype=torch.float64)
    other = WhiteningSGD(model)
    plain_step(model, other, x)
    other.param_groups[0]["rule"] = "sgd"
    other.zero_grad()
    model(x).square().mean().backward()
    other.param_groups[0]["rule"] = "trust_region"
    for _ in range(2):
        plain_step(model, other, x)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_rate_that_is_raised_from_zero_by_hand_is_a_radius(zero):
    model = hidden_network()
    before = copy.deepcopy(model.state_dict())
    optimizer = WhiteningSGD(model, lr=zero)
    x = torch.randn(16, 6, dtype=torch.float64)
    plain_step(model, optimizer, x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for lr in (1e-5, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        plain_step(model, optimizer, x)
    moved = torch.cat([(p - before[name]).flatten() for name, p in model.named_parameters()])
    assert 0 < float(moved.detach().abs().max()) < 1


def test_sparse_and_complex_parameters_are_bounded_as_a_whole():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 3, sparse=True)}).double()
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    before = copy.deepcopy(model.state_dict())
    optimizer = WhiteningSGD(model, trust_radius=0.4)
    y = model["embedding"](torch.tensor([0, 2, 2])) * model.phase
    (y.abs().square().sum() * 1e6).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (p - before[name]).abs().square().mean().sqrt()
        size = before[name].abs().square().mean().sqrt() + 0.01
        assert 0 < float(moved) <= 0.1 * float(size)
    assert {row.rule for row in optimizer.report()} == {"trust_region"}


def test_a_checkpoint_of_a_layer_with_other_outputs_is_refused():
    narrow, wide = nn.Linear(4, 3), nn.Linear(4, 6)
    optimizer = WhiteningSGD(narrow)
    plain_step(narrow, optimizer, torch.randn(8, 4))
    state = optimizer.state_dict()
    state["state"] = {
        k: {n: v for n, v in values.items() if n != "momentum_buffer"} for k, values in state["state"].items()
    }
    with pytest.raises(ValueError, match="spread_sq of shape"):
        WhiteningSGD(wide).load_state_dict(state)


@pytest.mark.parametrize("build", [hidden_network, lambda: nn.Embedding(6, 3, sparse=True)], ids=["layers", "sparse"])
def test_a_batch_whose_squares_overflow_is_forgotten_at_once(build):
    model = build().float()
    x = torch.arange(6) if isinstance(model, nn.Embedding) else torch.randn(16, 6)
    optimizer = WhiteningSGD(model)
    plain_step(model, optimizer, x)
    known = {p: state["slope_sq"].clone() for p, state in optimizer.state.items() if "slope_sq" in state}
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    (model(x).sin().mean() * 1e25).backward()
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-6)
    for p, slope_sq in known.items():
        torch.testing.assert_close(optimizer.state[p]["slope_sq"], slope_sq)
    plain_step(model, optimizer, x)
    for name, p in model.named_parameters():
        assert float((p - before[name]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("build", [hidden_network, lambda: nn.Embedding(6, 3, sparse=True)], ids=["layers", "sparse"])
def test_gradients_whose_squares_overflow_do_not_stop_it_for_good(build):
    """In float32 the squares of 1e20 are infinite; in the step itself nothing moves, later on it goes on."""
    model = build().float()
    x = torch.arange(6) if isinstance(model, nn.Embedding) else torch.randn(16, 6)
    optimizer = WhiteningSGD(model, decay=0.1)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    (model(x).sin().mean() * 1e25).backward()
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-3, atol=1e-3)
    assert all(bool(state["slope_sq"].isfinite().all()) for state in optimizer.state.values() if "slope_sq" in state)
    for _ in range(60):
        plain_step(model, optimizer, x)
    for name, p in model.named_parameters():
        assert bool(p.isfinite().all())
        assert float((p - before[name]).detach().abs().max()) > 0.01


@pytest.mark.parametrize("overflowing_steps", [1, 3])
def test_an_overflow_in_the_first_batches_does_not_slow_what_follows(overflowing_steps):
    """Six hundred steps, against a run whose first batches were ordinary and are left out there."""
    losses = {}
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    for factor in (1e25, 0.0):
        model = hidden_network().float()
        before = copy.deepcopy(model.state_dict())
        optimizer = WhiteningSGD(model)
        for _ in range(overflowing_steps):
            optimizer.zero_grad()
            (model(x).square().mean() * factor).backward()
            optimizer.step()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-6)
        found = []
        for step in range(600):
            for group in optimizer.param_groups:
                group["lr"] = 1 - step / 600
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            found.append(float(loss))
        losses[factor] = torch.tensor(found)
    first = losses[0.0][0]
    assert float(losses[1e25][-1]) < 1e-2 * first
    torch.testing.assert_close(losses[1e25] / first, losses[0.0] / first, rtol=0, atol=0.05)


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer, *, except_for: str = "") -> bool:
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != except_for]
    return all(bool(value.isfinite().all()) for value in [*model.parameters(), *kept] if isinstance(value, Tensor))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [1e10, 1e18])
def test_large_outputs_without_a_slope_move_nothing(size, momentum):
    """sigma^2 / t is beyond float32, and the direction 0."""
    model = hidden_network().float()
    before = copy.deepcopy(model.state_dict())
    optimizer = WhiteningSGD(model, momentum=momentum)
    for slope in (0.0, 1e-30):
        optimizer.zero_grad()
        (model(torch.randn(16, 6) * size).sin().mean() * slope).backward()
        optimizer.step()
        assert all_finite(model, optimizer)
    torch.testing.assert_close(model.state_dict()["4.weight"], before["4.weight"], rtol=0, atol=1.0)


def test_a_layer_that_is_silent_on_all_probes_waits_for_one_that_is_not():
    model = nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    optimizer = WhiteningSGD(model)
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    padded = x.clone()
    padded[::2] = 0.0  # the ones that are looked at
    plain_step(model, optimizer, padded)
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)
    plain_step(model, optimizer, x)
    assert 1e-3 < float((model.weight - before).detach().abs().max()) < 1.0


def test_a_unit_with_infinite_outputs_does_not_spoil_its_layer():
    model = nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0] = 3e38
    before = model[0].weight.detach().clone()
    optimizer = WhiteningSGD(model)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).abs() + 4
    for _ in range(2):
        plain_step(model, optimizer, x)
        assert all_finite(model, optimizer, except_for="spread_sq")
    moved = (model[0].weight - before).detach()[1:]
    assert 1e-4 < float(moved.abs().max()) < 1.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_directions_that_overflow_move_nothing_and_leave_no_momentum(momentum):
    model = hidden_network().float()
    optimizer = WhiteningSGD(model, momentum=momentum)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)) * 1e-5
    before = copy.deepcopy(model.state_dict())
    (model(x).sin().sum() * 1e37).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()
    assert all_finite(model, optimizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-6)
    for _ in range(3):
        plain_step(model, optimizer, x)
    for name, p in model.named_parameters():
        assert 1e-12 < float((p - before[name]).detach().abs().max()) < 100, name


@pytest.mark.parametrize("is_first", [True, False])
def test_a_batch_of_inputs_whose_squares_overflow_is_passed_over(is_first):
    """As missing values of 1e20 are, which some formats fill gaps with."""
    model = hidden_network().float()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    filled = x.clone()
    filled[3, 2] = 1e20
    optimizer = WhiteningSGD(model)
    for batch in (filled, x) if is_first else (x, filled, x):
        plain_step(model, optimizer, batch)
    assert all_finite(model, optimizer)
    before = model[0].weight.detach().clone()
    plain_step(model, optimizer, x)
    assert 1e-4 < float((model[0].weight - before).detach().abs().max()) < 1.0


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(6, 4, sparse=True), nn.LayerNorm(4)
        self.gate, self.value, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.bare = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor, *, is_called: bool = True) -> Tensor:
        x = self.norm(self.embed(tokens))
        last = self.last if is_called else lambda x: nn.functional.linear(x, self.last.weight, self.last.bias)
        return self.bare * last(self.gate(x).sigmoid() * self.value(x))


def of_the_rule_before(optimizer: WhiteningSGD) -> dict:
    """E[r_j^2], by which the rule went before it went by slopes, without factors; chains were shorter."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    for values in state_dict["state"].values():
        values.pop("factors", None)
        if "slope_sq" in values:
            values["change_sq"] = torch.full_like(values.pop("slope_sq"), 1e6)
    state_dict["param_groups"][0] |= {"chain_length": 2, "damping": 0.01}
    return state_dict


def test_a_checkpoint_of_the_rule_before_this_one_is_taken_up():
    tokens = torch.randint(6, (32,), generator=torch.Generator().manual_seed(0))
    model = Gated()
    optimizer = WhiteningSGD(model)
    plain_step(model, optimizer, tokens)
    given = of_the_rule_before(optimizer)
    before = copy.deepcopy(given)
    resumed = WhiteningSGD(model)
    resumed.load_state_dict(given)
    assert given["param_groups"] == before["param_groups"]
    torch.testing.assert_close(given["state"], before["state"])
    plain_step(model, resumed, tokens)
    assert not any("change_sq" in values for values in resumed.state.values())
    for layer in (model.gate, model.value, model.last):
        state = resumed.state[layer.weight]
        torch.testing.assert_close(state["slope_sq"], 0.95e6 * state["spread_sq"], rtol=0.05, atol=0.0)
    spread_sq = 0.01 * (model.norm.weight.detach().square() + 0.01)
    torch.testing.assert_close(resumed.state[model.norm.weight]["slope_sq"], 0.95e6 * spread_sq, rtol=0.05, atol=0.0)
    for p in (model.bare, model.embed.weight):
        mean_sq = p.detach().square().mean()[None]
        torch.testing.assert_close(resumed.state[p]["slope_sq"], 0.95e6 * mean_sq, rtol=0.05, atol=0.0)
    assert [resumed.state[p].get("factors") for p in (model.gate.weight, model.value.weight)] == [2, 2]
    assert (resumed.param_groups[0]["chain_length"], resumed.param_groups[0]["damping"]) == (4, 0.01)


def test_a_length_that_is_given_outlives_such_a_checkpoint():
    model, tokens = Gated(), torch.arange(6)
    optimizer = WhiteningSGD(model)
    plain_step(model, optimizer, tokens)
    resumed = WhiteningSGD(model, chain_length=7)
    resumed.load_state_dict(of_the_rule_before(optimizer))
    assert resumed.param_groups[0]["chain_length"] == 7


def test_a_layer_that_sits_out_the_first_step_goes_by_such_a_checkpoint():
    model, tokens = Gated(), torch.arange(6)
    optimizer = WhiteningSGD(model)
    plain_step(model, optimizer, tokens)
    resumed = WhiteningSGD(model)
    resumed.load_state_dict(of_the_rule_before(optimizer))
    resumed.zero_grad()
    model(tokens, is_called=False).square().mean().backward()
    resumed.step()
    state = resumed.state[model.last.weight]
    torch.testing.assert_close(state["slope_sq"], 1e6 * state["spread_sq"], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_a_single_sample_does_not_set_the_step(size):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    model = hidden_network()
    optimizer, losses = WhiteningSGD(model), []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1 - step / 60
        optimizer.zero_grad()
        seen = torch.where(torch.arange(64)[:, None] == 5, size * x, x) if step == 30 else x
        nn.functional.cross_entropy(model(seen), y).backward()
        optimizer.step()
        losses.append(float(nn.functional.cross_entropy(model(x), y).detach()))
    assert losses[30] < 10 * losses[0]
    assert losses[-1] < losses[0]


def test_a_layer_whose_first_inputs_were_zero_is_not_held_back_for_long():
    """Its outputs' spread was rounding, 1e-16: eight steps of at most 16 times."""
    model = nn.Linear(4, 3)
    optimizer = WhiteningSGD(model)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    before = model.weight.detach().clone()
    for batch in (torch.zeros(16, 4), *[x] * 10):
        plain_step(model, optimizer, batch)
    assert float((model.weight - before).detach().abs().max()) > 1e-2


def test_targets_far_from_zero_are_reached_as_those_near_it():
    """The bias keeps the mean of what is turned."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    finals = []
    for shift in (0.0, 1e4):
        model = hidden_regression()
        with torch.no_grad():
            model[2].bias += shift
        optimizer = WhiteningSGD(model)
        for step in range(60):
            for group in optimizer.param_groups:
                group["lr"] = 1 - step / 60
            optimizer.zero_grad()
            loss = (model(x) - x.prod(1, keepdim=True) - shift).square().mean()
            loss.backward()
            optimizer.step()
        finals.append(loss.item())
    assert finals[1] == pytest.approx(finals[0], rel=0.05)


def hidden_regression() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).double()
