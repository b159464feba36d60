"""BlockNaturalGradient against torch's optimizers, WhiteningSGD, and dense solves of matrices that are written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import (
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    tensors_of,
    train,
    whitening_without_bound,
)
from tests.oracles import tolerance
from torchgeom_optim.geometry.metric import NotPositiveDefiniteError
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64


def pair() -> tuple[nn.Module, nn.Module]:
    return small_net(dtype=F64), small_net(dtype=F64)


def batches(number: int, **kwargs) -> list[Tensor]:
    return small_batches(number, dtype=F64, **kwargs)


# -- what the family contains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=str)
def test_rmsprop_is_that_of_torch(settings):
    def smooth() -> nn.Module:  # without dead units: at eps = 0 torch divides their 0 by 0
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)

    ours, theirs, other = smooth(), smooth(), smooth()
    train(ours, BlockNaturalGradient.rmsprop(ours.parameters(), 0.01, 0.9, 0.0, **settings), batches(30))
    train(theirs, torch.optim.RMSprop(theirs.parameters(), 0.01, alpha=0.9, eps=0.0, **settings), batches(30))
    assert_same_parameters(ours, theirs, **tolerance(condition=1e3))
    train(other, BlockNaturalGradient.rmsprop(other, 0.01, 0.9, 0.0, norm_start="first", **settings), batches(30))
    with pytest.raises(AssertionError):  # a start at the first batch is another optimizer
        assert_same_parameters(other, theirs, **tolerance(condition=1e3))


def test_rmsprop_with_eps_under_the_root():
    ours, theirs = pair()
    train(ours, BlockNaturalGradient.rmsprop(ours, 0.01, norm_decay=0.9, eps=1e-3), batches(10))
    squares = [torch.zeros_like(p) for p in theirs.parameters()]
    for x in batches(10):  # §3.4, lambda = 0.1
        theirs.zero_grad()
        mean_loss(theirs(x)).backward()
        with torch.no_grad():
            for p, r in zip(theirs.parameters(), squares, strict=True):
                r.copy_(0.9 * r + 0.1 * p.grad**2)
                p -= 0.01 * p.grad / torch.sqrt(1e-3 + r)
    assert_same_parameters(ours, theirs, **tolerance(condition=1e3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rule", ["fan_in", "whitening"])
def test_units_with_the_expectation_of_section_3_5_are_those_of_whitening_sgd(rule, momentum):
    ours, theirs = pair()
    if rule == "fan_in":
        optimizer = BlockNaturalGradient.fan_in(ours, 0.05, momentum=momentum)
    else:
        optimizer = BlockNaturalGradient(
            ours, 0.05, "whitening", "unit", expectation="fan_in", decay=0.9, momentum=momentum
        )
    train(ours, optimizer, batches(10))
    train(theirs, whitening_without_bound(theirs, 0.05, momentum, rule=rule, decay=0.9), batches(10))
    assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


@pytest.mark.parametrize("block", ["layer", "network"])
def test_normalized_sgd_moves_by_the_learning_rate(block):
    model = small_net(dtype=F64)
    optimizer = BlockNaturalGradient.normalized_sgd(model, 0.03, block)
    for x in batches(3):
        before = copy.deepcopy(model)
        train(model, optimizer, [x])
        moves = {n: (p - dict(before.named_parameters())[n]).detach() for n, p in model.named_parameters()}
        cosine = -sum(float((moves[n] * p.grad).sum()) for n, p in model.named_parameters())
        assert cosine > 0
        layers = [["conv.weight", "conv.bias"], ["hidden.weight"], ["head.weight", "head.bias"], ["shift"]]
        for names in layers if block == "layer" else [list(moves)]:
            length = math.sqrt(sum(float(moves[n].square().sum()) for n in names))
            assert length == pytest.approx(0.03, rel=1e-9)


# -- metrics written out ------------------------------------------------------------------------------------------


def seen(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every layer, of the sum of the samples' losses."""
    inputs, outputs = {}, {}
    handles = [
        m.register_forward_hook(
            lambda m, args, y, n=n: (inputs.update({n: args[0]}), outputs.update({n: y}))[2:] or None
        )
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    loss = mean_loss(model(x)) * len(x)
    grads = torch.autograd.grad(loss, list(outputs.values()))
    for handle in handles:
        handle.remove()
    return {n: (inputs[n].detach(), g) for n, g in zip(outputs, grads, strict=True)}


def patches_and_grads(module: nn.Module, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per group: patches [N, T, q] with a 1 if there is a bias, and output gradients [N, T, m]."""
    if isinstance(module, nn.Linear):
        found = [(x[:, None], g[:, None])]
    else:
        found = [
            (
                F.unfold(part, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2),
                out.flatten(2).transpose(1, 2),
            )
            for part, out in zip(x.chunk(module.groups, 1), g.chunk(module.groups, 1), strict=True)
        ]
    if module.bias is None:
        return found
    return [(torch.cat([a, torch.ones_like(a[..., :1])], -1), out) for a, out in found]


def dense_factors(module: nn.Module, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    factors = []
    for a, out in patches_and_grads(module, x, g):
        big_a = sum(torch.outer(p, p) for sample in a for p in sample) / len(a)
        big_b = sum(torch.outer(p, p) for sample in out for p in sample) / (len(a) * a.shape[1])
        factors.append((big_a, big_b))
    return factors


def dense_fisher(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    groups = patches_and_grads(module, x, g)
    rows = torch.cat([torch.einsum("ntm,ntq->nmq", out, a) for a, out in groups], 1).flatten(1)
    return rows.T @ rows / len(rows)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def rows_of(module: nn.Module, grads: bool = True) -> Tensor:
    weight, bias = (p if p is None or not grads else p.grad for p in (module.weight, module.bias))
    rows = weight.reshape(len(weight), -1)
    return (rows if bias is None else torch.cat([rows, bias[:, None]], 1)).detach()


def dense_metric(
    metric: str, module: nn.Module, past: object, decay: float, x: Tensor, g: Tensor
) -> tuple[object, Tensor]:
    """New averages of a layer, and the whole damped matrix G."""

    def average(before, now):
        return now if before is None else decay * before + (1 - decay) * now

    if metric in ("kronecker", "kronecker_diagonal"):
        now = dense_factors(module, x, g)
        past = past or [(None, None)] * len(now)
        past = [(average(a, a1), average(b, b1)) for (a, b), (a1, b1) in zip(past, now, strict=True)]
        root, blocks = math.sqrt(0.04), []
        for a, b in past:
            b = torch.diag(b.diagonal()) if metric == "kronecker_diagonal" else b
            blocks.append(torch.kron(damped(b, root), damped(a, root)))
        return past, torch.block_diag(*blocks)
    if metric == "exact":
        past = average(past, dense_fisher(module, x, g))
        return past, damped(past, 0.04)
    rows = rows_of(module)
    if metric == "diagonal":
        past = average(past, rows.square())
        return past, torch.diag(past.flatten() + 0.04 * past.mean())
    past = average(past, rows[:, :, None] * rows[:, None, :])  # quasi-diagonal: what is not kept is dropped below
    if module.bias is None:
        on_diagonal = past.diagonal(dim1=1, dim2=2).flatten()
        return past, torch.diag(on_diagonal + 0.04 * on_diagonal.mean())
    blocks, diagonals = [], past.diagonal(dim1=1, dim2=2)
    for block in past:
        row, corner, diagonal = block[:-1, -1], block[-1, -1] + 0.04 * diagonals[:, -1].mean(), block.diagonal()[:-1]
        inner = torch.outer(row, row) / corner
        inner.diagonal().copy_(diagonal + 0.04 * diagonals[:, :-1].mean())
        blocks.append(torch.cat([torch.cat([inner, row[:, None]], 1), torch.cat([row, corner[None]])[None]]))
    return past, torch.block_diag(*blocks)


GRID = [
    ("diagonal", "weight"), ("diagonal", "unit"), ("diagonal", "network"),
    ("quasi_diagonal", "unit"), ("quasi_diagonal", "layer"),
    ("kronecker", "layer"), ("kronecker", "network"), ("kronecker", "unit"), ("exact", "layer"), ("exact", "network"),
]  # fmt: skip


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@pytest.mark.parametrize(("metric", "block"), GRID)
def test_steps_are_those_of_dense_solves(metric, block):
    """Eq. (11) line by line over some steps; layers only, the others are left to plain SGD in both."""
    model, twin = pair()
    kind = "kronecker_diagonal" if (metric, block) == ("kronecker", "unit") else metric
    layers = [p for _, m in layers_of(model) for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in layers)]
    optimizer = BlockNaturalGradient(
        [{"params": layers}, {"params": rest, "rule": "sgd", "lr": 0.0}],
        0.02, metric, block, model=model, damping=0.04, decay=0.7, norm_decay=0.8, eps=1e-6, inverse_interval=1,
    )  # fmt: skip
    pasts, averages = {}, {}
    for x in batches(4):
        train(model, optimizer, [x])
        calls = seen(twin, x)
        twin.zero_grad()
        mean_loss(twin(x)).backward()
        directions, values = {}, {}
        for name, module in layers_of(twin):
            pasts[name], dense = dense_metric(kind, module, pasts.get(name), 0.7, *calls[name])
            rows = rows_of(module)
            u = torch.linalg.solve(dense, rows.flatten()).view(rows.shape)
            product = u * rows
            now = {"weight": product, "unit": product.sum(1, keepdim=True)}.get(block, product.sum())
            averages[name] = now if name not in averages else 0.8 * averages[name] + 0.2 * now
            directions[name], values[name] = u, averages[name]
        total = sum(values.values()) if block == "network" else None
        with torch.no_grad():
            for name, module in layers_of(twin):
                step = -0.02 * directions[name] / torch.sqrt(1e-6 + (values[name] if total is None else total))
                k = module.weight[0].numel()
                module.weight += step[:, :k].view(module.weight.shape)
                if module.bias is not None:
                    module.bias += step[:, k]
        assert_same_parameters(model, twin, **tolerance(condition=1e6))


@pytest.mark.parametrize("metric", ["kronecker", "exact"])
def test_inverses_are_taken_as_often_as_asked(metric):
    """With both intervals 3, steps 2 and 3 use the matrices of step 1; a function of the step says the same."""
    models = [small_net(dtype=F64) for _ in range(4)]
    intervals = [
        {"factor_interval": 3, "inverse_interval": 3},
        {"factor_interval": lambda step: 3, "inverse_interval": lambda step: 3},
        {"decay": 0.0, "factor_interval": 1, "inverse_interval": 3},  # looked at and not used
        {"factor_interval": 1, "inverse_interval": 1},
    ]
    steps = []
    for model, kwargs in zip(models, intervals, strict=True):
        optimizer = BlockNaturalGradient(model, 0.02, metric, **{"decay": 0.0, **kwargs})
        train(model, optimizer, batches(6))
        steps.append(optimizer.state[model.head.weight]["step"])
    for model in models[1:3]:
        assert_same_parameters(model, models[0])
    assert steps == [6] * 4
    with pytest.raises(AssertionError):
        assert_same_parameters(models[3], models[0], rtol=1e-3)


def test_the_length_of_a_step_in_the_metric_is_the_learning_rate():
    model = small_net(dtype=F64)
    optimizer = BlockNaturalGradient.trpo(model, 0.05, metric="exact", damping=0.1, inverse_interval=1)
    before, x = copy.deepcopy(model), batches(1)[0]
    calls = seen(model, x)
    train(model, optimizer, [x])
    length_sq = 0.0
    for (name, module), (_, old) in zip(layers_of(model), layers_of(before), strict=True):
        move = (rows_of(module, grads=False) - rows_of(old, grads=False)).flatten()
        length_sq += float(move @ damped(dense_fisher(old, *calls[name]), 0.1) @ move)
    for name in ("norm.weight", "norm.bias", "shift"):  # identity
        move = (dict(model.named_parameters())[name] - dict(before.named_parameters())[name]).detach()
        length_sq += float(move.square().sum())
    assert math.sqrt(length_sq) == pytest.approx(0.05, rel=1e-9)


# -- scales and passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["kronecker", "exact"])
def test_sums_means_and_loss_scales_make_no_difference_to_the_metric(metric):
    def metric_of(**kwargs) -> list[Tensor]:
        model = small_net(dtype=F64)
        optimizer = BlockNaturalGradient(model, 0.02, metric, **kwargs)
        loss = mean_loss
        if kwargs.get("loss_reduction") == "sum":
            loss = lambda y: mean_loss(y) * len(y)  # noqa: E731
        scale = kwargs.get("loss_scale", 1.0)
        scale = scale() if callable(scale) else scale
        train(model, optimizer, batches(1), lambda y: loss(y) * scale)
        keys = ("input_factor", "output_factor", "fisher")
        return [v for state in optimizer.state.values() for key, v in state.items() if key in keys]

    expected = metric_of()
    assert len(expected) == (3 if metric == "exact" else 6)
    for kwargs in ({"loss_reduction": "sum"}, {"loss_scale": 64.0}, {"loss_scale": lambda: torch.tensor(64.0)}):
        torch.testing.assert_close(metric_of(**kwargs), expected, **tolerance(condition=100))


@pytest.mark.parametrize("metric", ["kronecker", "exact"])
def test_two_calls_say_what_one_of_both_batches_says(metric):
    one, two = pair()
    x = batches(1, num_samples=8)[0]
    optimizers = [BlockNaturalGradient(m, 0.02, metric, loss_reduction="sum") for m in (one, two)]
    (mean_loss(one(x)) * 8).backward()
    (mean_loss(two(x[:3])) * 3).backward()
    (mean_loss(two(x[3:])) * 5).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same_parameters(one, two, **tolerance(condition=1e4))


def test_checkpointed_segments_are_seen_once():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    for metric in ("kronecker", "exact", "whitening"):
        ours, theirs = pair()
        wrapped = Checkpointed(ours)
        block = "unit" if metric == "whitening" else "layer"
        train(wrapped, BlockNaturalGradient(wrapped, 0.02, metric, block), batches(3))
        train(theirs, BlockNaturalGradient(theirs, 0.02, metric, block), batches(3))
        assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


def test_many_patches_are_thinned_out_evenly():
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 3, 3, padding=1).to(F64)
    x = torch.randn(16, 2, 40, 40, dtype=F64)
    optimizer = BlockNaturalGradient(conv, 0.1, "kronecker")
    conv(x).square().mean().backward()
    optimizer.step()
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18)
    expected = patches.T @ patches / 16
    found = optimizer.state[conv.weight]["input_factor"][0]
    # independent inputs of unit variance: 512 patches give each entry to sqrt(2 / 512), five times over
    torch.testing.assert_close(found[:-1, :-1] / 1600, expected / 1600, rtol=0, atol=5 * math.sqrt(2 / 512))
    assert float(found[-1, -1]) == pytest.approx(1600)


# -- every kind of parameter ---------------------------------------------------------------------------------------

EVERY = [
    ("identity", "weight"), ("identity", "layer"), ("diagonal", "unit"), ("quasi_diagonal", "unit"),
    ("whitening", "unit"), ("kronecker", "layer"), ("kronecker", "unit"), ("exact", "layer"), ("kronecker", "network"),
    ("scale_free_whitening", "unit"), ("fisher_diagonal", "weight"), ("fisher_quasi_diagonal", "unit"),
]  # fmt: skip
DIAGONALS = ("diagonal", "quasi_diagonal", "fisher_diagonal", "fisher_quasi_diagonal")


class Tokens(nn.Module):
    """Embedding, attention, recurrence, norms, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.block(self.embed(tokens)))[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("metric", "block"), EVERY)
def test_nothing_is_left_untrained(metric, block, tied):
    model = Tokens()
    if not tied:
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    before = copy.deepcopy(model)
    # a metric made of small gradients makes large steps
    optimizer = BlockNaturalGradient(model, 1e-4 if "diagonal" in metric else 0.01, metric, block)
    tokens = torch.randint(7, (6, 5))
    losses = train(model, optimizer, [tokens] * 20, lambda y: F.cross_entropy(y.flatten(0, 1), tokens.flatten()))
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q), name
        assert torch.isfinite(p).all(), name
    assert losses[-1] < losses[0]
    rules = {row.name: row.rule for row in optimizer.report()}
    own = {"kronecker": "kronecker_diagonal" if block == "unit" else "kronecker"}.get(metric, metric)
    assert rules["block.linear1.weight"] == own
    assert rules["block.norm1.weight"] == ("diagonal" if metric in DIAGONALS else "identity")
    assert set(rules.values()) <= {own, "identity", "diagonal"}


def test_one_hot_inputs_of_an_embedding_are_those_of_a_linear_layer():
    tokens, table = torch.randint(5, (9,)), torch.randn(5, 3, dtype=F64)
    embedding, linear = nn.Embedding(5, 3, _weight=table.clone()), nn.Linear(5, 3, bias=False, dtype=F64)
    with torch.no_grad():
        linear.weight.copy_(table.T)
    for metric, block in EVERY:
        if metric.endswith("whitening"):
            continue
        steps = []
        for layer, x in ((embedding, tokens), (linear, F.one_hot(tokens, 5).to(F64))):
            model = copy.deepcopy(layer)
            optimizer = BlockNaturalGradient(model, 0.1, metric, block, norm_decay=0.0)
            for _ in range(3):
                optimizer.zero_grad()
                model(x).sin().sum(-1).mean().backward()
                optimizer.step()
            steps.append(model.weight.detach())
        torch.testing.assert_close(steps[0], steps[1].T, **tolerance(condition=1e6))


def test_complex_parameters_are_stepped_as_their_real_twins():
    z = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    r = nn.Parameter(torch.view_as_real(z.detach()).clone())
    for metric, block in (("identity", "weight"), ("identity", "unit"), ("diagonal", "layer")):
        optimizers = [BlockNaturalGradient([p], 0.1, metric, block, momentum=0.9) for p in (z, r)]
        for _ in range(3):
            r.grad = torch.randn(3, 2, 2, dtype=F64)
            z.grad = torch.view_as_complex(r.grad.clone())
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(torch.view_as_real(z), r, **tolerance())


def test_a_bias_that_is_frozen_for_a_while():
    for metric, block in EVERY:
        model = small_net(dtype=F64)
        optimizer = BlockNaturalGradient(model, 0.01, metric, block, inverse_interval=5)
        for trains in (True, False, True):
            model.head.bias.requires_grad_(trains)
            bias = model.head.bias.detach().clone()
            train(model, optimizer, batches(2))
            assert torch.equal(bias, model.head.bias) != trains
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_decay_is_decoupled():
    ours, theirs = pair()
    train(ours, BlockNaturalGradient(ours, 0.1, "identity", "layer", weight_decay=0.5), batches(1))
    with torch.no_grad():
        grads = copy.deepcopy(theirs)
    train(grads, BlockNaturalGradient(grads, 0.1, "identity", "layer"), batches(1))
    for p, q, start in zip(ours.parameters(), grads.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.05 * start, **tolerance())


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "block", "finest"),
    [
        ("quasi_diagonal", "weight", "unit"),
        ("whitening", "weight", "unit"),
        ("kronecker", "weight", "layer"),
        ("kronecker_diagonal", "weight", "unit"),
        ("exact", "unit", "layer"),
    ],
)
def test_blocks_that_a_metric_couples_are_refused(metric, block, finest):
    with pytest.raises(ValueError, match=f"couples the parameters of one {finest}.*try block='{finest}'"):
        BlockNaturalGradient(nn.Linear(2, 2), metric=metric, block=block)


@pytest.mark.parametrize(("metric", "block"), EVERY)
def test_zero_gradients_and_dead_units_are_no_trouble(metric, block):
    model = small_net(dtype=F64)
    with torch.no_grad():
        model.hidden.weight[:2] = 0.0
        model.head.weight[:, :2] = 0.0  # two units that are never heard of
    for factors in ((0.0, 0.0), (0.0, 1.0, 0.0, 1.0)):
        twin = copy.deepcopy(model)
        optimizer = BlockNaturalGradient(twin, 0.01, metric, block)
        for factor in factors:
            train(twin, optimizer, batches(1), lambda y, factor=factor: factor * mean_loss(y))
        assert all(torch.isfinite(p).all() for p in twin.parameters())
        torch.testing.assert_close(twin.hidden.weight[:2], model.hidden.weight[:2], rtol=0, atol=0)
        if not any(factors):
            assert_same_parameters(twin, model)


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["kronecker", "exact"])
def test_a_batch_without_finite_gradients_is_an_error_and_changes_nothing(metric, what):
    model = small_net(dtype=F64)
    # Without looking at gradients beforehand, as is the default off the CPU.
    settings = {"inverse_interval": 1, "momentum": 0.9, "error_if_nonfinite": False}
    optimizer = BlockNaturalGradient(model, 0.01, metric, **settings)
    train(model, optimizer, batches(2))
    before, state = copy.deepcopy(model), tensors_of(optimizer.state_dict())
    optimizer.zero_grad()
    (mean_loss(model(batches(1)[0])) * what).backward()
    with pytest.raises(NotPositiveDefiniteError):
        optimizer.step()
    assert_same_parameters(model, before)
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), state, rtol=0, atol=0)
    train(model, optimizer, batches(2))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_checkpoint_of_another_metric_is_refused():
    one, two = pair()
    optimizers = [BlockNaturalGradient(m, 0.01, metric) for m, metric in ((one, "kronecker"), (two, "identity"))]
    train(one, optimizers[0], batches(1))
    before = copy.deepcopy(optimizers[1].state_dict())
    with pytest.raises(ValueError, match="metric 'kronecker', need 'identity'"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state_dict() == before
    other = BlockNaturalGradient(two, 0.01, "kronecker", "network", momentum=0.9)
    three = small_net(dtype=F64)
    units = BlockNaturalGradient(three, 0.01, "kronecker_diagonal", "unit", norm_decay=0.9)
    train(three, units, batches(1))
    whole = BlockNaturalGradient(two, 0.01, "kronecker_diagonal", "layer")
    with pytest.raises(ValueError, match=r"norm_sq.*other blocks"):
        whole.load_state_dict(units.state_dict())
    other.load_state_dict(optimizers[0].state_dict())


def test_momentum_of_sgd_is_taken_over():
    """At the first step the momentum goes through the same map as the gradient does."""
    ours, theirs = pair()
    sgd = torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9)
    train(theirs, sgd, batches(3))
    ours.load_state_dict(theirs.state_dict())
    for metric, block in EVERY:
        model = copy.deepcopy(ours)
        optimizer = BlockNaturalGradient(model, 0.01, metric, block, momentum=0.9, norm_decay=0.0)
        optimizer.load_state_dict(sgd.state_dict())
        x = batches(1)[0]
        mean_loss(model(x)).backward()
        with torch.no_grad():  # a gradient that is parallel to the momentum: then so are their directions
            for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
                p.grad = sgd.state[q]["momentum_buffer"] / 4
        optimizer.step()
        twin = copy.deepcopy(ours)
        plain = BlockNaturalGradient(twin, 0.01, metric, block, norm_decay=0.0)
        mean_loss(twin(x)).backward()
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        plain.step()
        for p, q, start in zip(model.parameters(), twin.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(p - start, (1 + 0.9 * 4) * (q - start), **tolerance(condition=1e4))


@pytest.mark.parametrize("metric", ["kronecker", "whitening", "fisher_diagonal"])
def test_shallow_copies_of_layers_and_empty_batches_tell_nothing(metric):
    models = [small_net(), small_net()]
    for model, looks in zip(models, (False, True), strict=True):
        optimizer = BlockNaturalGradient(model, 0.01, metric, "layer")
        x = small_batches(1)[0]
        mean_loss(model(x)).backward()
        if looks:
            copied = copy.copy(model.head)  # carries the hooks of the layer
            y = copied(torch.randn(2, copied.in_features))
            assert y.shape == (2, copied.out_features)
            model(x[:0]).sum().backward()
        optimizer.step()
    assert_same_parameters(*models)


def test_functions_of_the_step_are_asked():
    asked: list[int] = []
    model = small_net()
    every = lambda step: asked.append(step) or 2  # noqa: E731
    train(model, BlockNaturalGradient(model, 0.01, "kronecker", inverse_interval=every), small_batches(3))
    assert sorted(set(asked)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"metric": "hessian"}, ValueError, "metric='hessian'.*must be one of"),
        ({"block": "row"}, ValueError, "block='row'.*must be one of"),
        ({"norm_start": 0}, ValueError, "norm_start=0"),
        ({"metric": "quasi_diagonal", "damping": 0.0}, ValueError, "singular; need damping > 0"),
        ({"expectation": "fan_in"}, ValueError, "need block='unit'"),
        ({"factor_interval": 0}, ValueError, "factor_interval=0: must be in"),
        ({"inverse_interval": 2.5}, TypeError, "inverse_interval=2.5: need a whole number"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale=0.0: must be in"),
    ],
)
def test_bad_settings(kwargs, error, message):
    with pytest.raises(error, match=message):
        BlockNaturalGradient(nn.Linear(2, 2), 0.01, **kwargs)


def test_without_a_rate_it_is_the_one_that_was_measured():
    model = nn.Linear(2, 2)
    for metric, block, lr, damping in (
        ("kronecker", "layer", 0.03, 1.0),
        ("kronecker", "unit", 0.003, 1.0),
        ("whitening", "unit", 0.03, 0.01),
        ("quasi_diagonal", "unit", 0.0003, 1.0),
        ("diagonal", "layer", 0.001, 0.1),
    ):
        (group,) = BlockNaturalGradient(model, None, metric, block).param_groups
        assert (group["lr"], group["damping"]) == (lr, damping)
    for build in (BlockNaturalGradient.rmsprop, BlockNaturalGradient.normalized_sgd, BlockNaturalGradient.trpo,
                  BlockNaturalGradient.kfac):  # fmt: skip
        named = build(model)
        (group,) = BlockNaturalGradient(model, None, named.metric, named.block).param_groups
        assert named.param_groups[0]["lr"] == group["lr"]
    with pytest.raises(ValueError, match=r"lr=None with metric='exact'.*need a number.*try 0.003"):
        BlockNaturalGradient(model, metric="exact")
    with pytest.raises(ValueError, match=r"measured are 0.03 for 'unit', 0.1 for 'layer'"):
        BlockNaturalGradient(model, metric="whitening", block="network")
    for block, expectation in (("layer", "per_sample"), ("unit", "fan_in")):
        with pytest.raises(ValueError, match=rf"lr=None with expectation='{expectation}': need a number.*try lr="):
            BlockNaturalGradient(model, metric="identity", block=block, expectation=expectation)
    assert BlockNaturalGradient.fan_in(model).param_groups[0]["lr"] == 3.0
    with pytest.raises(TypeError, match=r"lr=None \(group 0\).*need a number.*common start\.$"):
        BlockNaturalGradient([{"params": model.parameters(), "lr": None}], metric="kronecker", model=model)


@pytest.mark.parametrize("metric", ["quasi_diagonal", "fisher_quasi_diagonal"])
def test_a_unit_that_is_nearly_silent_hardly_moves(metric):
    """Damping is a share of the layer's mean: else every unit moves by the same length, however small its gradients."""
    model = nn.Linear(3, 2).to(F64)
    x, before = torch.randn(8, 3, dtype=F64), copy.deepcopy(model)
    optimizer = BlockNaturalGradient(model, 0.01, metric, "unit", norm_decay=0.9, decay=0.9)
    for _ in range(2):
        before = copy.deepcopy(model)
        train(model, optimizer, [x], lambda y: (y * torch.tensor([1.0, 1e-4], dtype=F64)).square().mean())
    loud, silent = (model.weight - before.weight).norm(dim=1)
    assert 0 < silent < 10 * loud
