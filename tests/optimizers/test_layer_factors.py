"""Gradients that are known to be products of what layers saw, metrics of samples' gradients, and what stops a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.cases import assert_same_parameters, mean_loss, small_batches, small_net, tensors_of, train
from tests.oracles import per_sample_gradients, tolerance
from torchgeom_optim.optimizers import layer_factors
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64


def wide_net() -> nn.Sequential:
    """Layers with more inputs than the batch has samples."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9, bias=False), nn.Tanh(), nn.Linear(9, 8)).to(F64)


def inputs(number: int = 4, num_samples: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(num_samples, 12, generator=generator, dtype=F64) for _ in range(number)]


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Gets one entry per direction that went through the samples."""
    calls: list[int] = []
    between = layer_factors.CapturedProduct.between

    def counted(self, *args):
        calls.append(len(self.inputs))
        return between(self, *args)

    monkeypatch.setattr(layer_factors.CapturedProduct, "between", counted)
    return calls


def long_way(model: nn.Module) -> None:
    for p in model.parameters():
        p.register_hook(lambda grad: grad.clone())


@pytest.mark.parametrize(("metric", "block"), [("kronecker", "layer"), ("kronecker", "unit"), ("kronecker", "network")])
def test_the_short_way_through_the_samples_is_the_long_one(metric, block, taken):
    ours, theirs = wide_net(), wide_net()
    long_way(theirs)
    settings = {"damping": 0.1, "momentum": 0.5, "inverse_interval": 2}
    train(ours, BlockNaturalGradient(ours, 0.02, metric, block, **settings), inputs())
    assert len(taken) == 4 * 3
    train(theirs, BlockNaturalGradient(theirs, 0.02, metric, block, **settings), inputs())
    assert len(taken) == 4 * 3  # not once more
    assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


def _clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def _clip_values(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)


def _replace(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = 3 * p.grad


def _bias_only(model: nn.Module) -> None:
    for layer in model[::2]:
        if layer.bias is not None:
            layer.bias.grad.mul_(2)


@pytest.mark.parametrize("change", [_clip, _clip_values, _replace, _bias_only])
def test_gradients_that_were_changed_go_the_long_way(change, taken):
    ours, theirs = wide_net(), wide_net()
    long_way(theirs)
    for model in (ours, theirs):
        optimizer = BlockNaturalGradient(model, 0.02, damping=0.1)
        for x in inputs():
            optimizer.zero_grad()
            mean_loss(model(x)).backward()
            change(model)
            optimizer.step()
    assert len(taken) == (4 if change is _bias_only else 0)  # the layer without a bias
    assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


def _penalty(model: nn.Module, x: Tensor) -> Tensor:
    return mean_loss(model(x)) + sum(p.square().sum() for p in model.parameters())


def _weight_used_alone(model: nn.Module, x: Tensor) -> Tensor:
    return mean_loss(model(x)) + nn.functional.linear(x, model[0].weight).square().sum()


def _called_twice(model: nn.Module, x: Tensor) -> Tensor:
    return mean_loss(model(x)) + mean_loss(model(x.flip(1)))


def _accumulated(model: nn.Module, x: Tensor) -> Tensor:
    mean_loss(model(x)).backward()
    return mean_loss(model(x.flip(1)))


@pytest.mark.parametrize("loss", [_penalty, _weight_used_alone, _called_twice, _accumulated])
def test_gradients_to_which_something_else_contributes_go_the_long_way(loss, taken):
    ours, theirs = wide_net(), wide_net()
    long_way(theirs)
    for model in (ours, theirs):
        optimizer = BlockNaturalGradient(model, 0.02, damping=0.1)
        for x in inputs(3):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
    assert len(taken) == (3 * 2 if loss is _weight_used_alone else 0)
    assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


def test_gradients_that_are_changed_behind_our_back_are_found_and_reported(taken):
    ours, theirs = wide_net(), wide_net()
    long_way(theirs)
    for model in (ours, theirs):
        optimizer = BlockNaturalGradient(model, 0.02, damping=0.1)
        for x in inputs():
            optimizer.zero_grad()
            mean_loss(model(x)).backward()
            for p in model.parameters():
                p.grad.data.clamp_(-1e-3, 1e-3)
            optimizer.step()
        notes = [row.note for row in optimizer.report() if row.name.endswith("weight")]
        assert all("through .data" in note for note in notes) == (model is ours)
    assert not taken
    assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


def test_a_batch_may_be_overwritten_before_the_step():
    for has_bias in (True, False):
        models = [nn.Linear(12, 10, bias=has_bias, dtype=F64) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        for model in models:
            optimizer, buffer = BlockNaturalGradient(model, 0.02), inputs(1)[0].clone()
            mean_loss(model(buffer)).backward()
            if model is models[0]:
                buffer.zero_()
            optimizer.step()
        assert_same_parameters(models[0], models[1])


def test_single_samples_and_sequences_go_the_short_way_too(taken):
    # Without batch axis a layer without bias is no product of matrices.
    for shape, least in (((12,), 2), ((1, 12), 3), ((2, 2, 12), 3)):
        ours, theirs = wide_net(), wide_net()
        long_way(theirs)
        x = torch.randn(*shape, dtype=F64)
        for model in (ours, theirs):
            taken.clear()
            optimizer = BlockNaturalGradient(model, 0.02)
            mean_loss(model(x)).backward()
            optimizer.step()
            assert least <= len(taken) <= 3 if model is ours else not taken
        assert_same_parameters(ours, theirs, **tolerance(condition=1e4))


def test_copies_between_backward_and_step_go_the_long_way(taken):
    model = wide_net()
    optimizer = BlockNaturalGradient(model, 0.02)
    mean_loss(model(inputs()[0])).backward()
    copied, twin = copy.deepcopy((optimizer, model))
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    copied.step()
    assert not taken
    optimizer.step()
    assert len(taken) == 3
    assert_same_parameters(twin, model, **tolerance(condition=1e4))


# -- metrics and lengths from the samples' gradients ---------------------------------------------------------------


def samples(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return per_sample_gradients(model, lambda y, _: mean_loss(y), x, x)


def stepped(model: nn.Module, x: Tensor, *args, **kwargs) -> dict[str, Tensor]:
    """The first step that is taken with a batch, by the names of parameters."""
    after = copy.deepcopy(model)
    train(after, BlockNaturalGradient(after, 1.0, *args, eps=0.0, norm_decay=0.0, **kwargs), [x])
    return {n: (p - q).detach() for (n, p), q in zip(after.named_parameters(), model.parameters(), strict=True)}


LAYER_NAMES = ("conv", "hidden", "head")


@pytest.mark.parametrize("block", ["weight", "unit", "layer"])
def test_the_fisher_diagonal_is_that_of_the_samples(block):
    model, x = small_net(dtype=F64), small_batches(1, dtype=F64)[0]
    found, grads = stepped(model, x, "fisher_diagonal", block, damping=0.1, expectation="per_sample"), samples(model, x)
    for name in LAYER_NAMES:
        g = torch.cat([grads[f"{name}.{p}"].flatten(2) if p == "weight" else grads[f"{name}.{p}"][..., None]
                       for p in ("weight", "bias") if f"{name}.{p}" in grads], 2)  # fmt: skip
        square = g.square().mean(0)
        q = square + 0.1 * square.mean()
        norm = square / q  # mean over samples of g^2 / q
        norm = {"weight": norm, "unit": norm.sum(1, keepdim=True), "layer": norm.sum()}[block]
        u = g.mean(0) / q
        own = {"weight": u * g.mean(0), "unit": (u * g.mean(0)).sum(1, keepdim=True)}.get(block, (u * g.mean(0)).sum())
        expected = -u / torch.maximum(norm, own).sqrt()
        moved = found[f"{name}.weight"].flatten(1)
        if f"{name}.bias" in found:
            moved = torch.cat([moved, found[f"{name}.bias"][:, None]], 1)
        alive = square > 0
        torch.testing.assert_close(moved[alive], expected[alive], **tolerance(condition=1e4))


def test_the_fisher_quasi_diagonal_is_that_of_the_samples():
    model, x = small_net(dtype=F64), small_batches(1, dtype=F64)[0]
    found, grads = stepped(model, x, "fisher_quasi_diagonal", "unit", damping=0.1), samples(model, x)
    for name in ("conv", "head"):
        g = torch.cat([grads[f"{name}.weight"].flatten(2), grads[f"{name}.bias"][..., None]], 2)
        squares = g.square().mean(0)
        for j in range(g.shape[1]):
            second = g[:, j].T @ g[:, j] / len(g)
            row, diagonal = second[:-1, -1], second.diagonal()[:-1]
            corner = second[-1, -1] + 0.1 * squares[:, -1].mean()
            if float(second[-1, -1]) == 0:
                continue  # a dead unit
            dense = torch.zeros_like(second)
            dense[:-1, :-1] = torch.outer(row, row) / corner
            dense[:-1, :-1].diagonal().copy_(diagonal + 0.1 * squares[:, :-1].mean())
            dense[-1, :-1] = dense[:-1, -1] = row
            dense[-1, -1] = corner
            mean = g[:, j].mean(0)
            u = torch.linalg.solve(dense, mean)
            moved = torch.cat([found[f"{name}.weight"][j].flatten(), found[f"{name}.bias"][j : j + 1]])
            torch.testing.assert_close(moved, -u / torch.sqrt(u @ mean), **tolerance(condition=1e6))


@pytest.mark.parametrize(("metric", "block"), [("identity", "weight"), ("diagonal", "layer"), ("whitening", "unit"),
                                               ("quasi_diagonal", "unit"), ("exact", "layer")])  # fmt: skip
def test_the_length_over_samples_is_the_mean_of_theirs(metric, block):
    """E is the mean over samples of g_n^T G^-1 g_n: the direction is unchanged, and its length follows."""
    model = nn.Linear(3, 2).to(F64)
    x = torch.randn(6, 3, dtype=F64)
    alone = stepped(model, x, metric, block, damping=0.3)
    found = stepped(model, x, metric, block, damping=0.3, expectation="per_sample")
    g = samples(model, x)
    rows = torch.cat([g["weight"], g["bias"][..., None]], 2)
    mean = rows.mean(0)

    def as_rows(step: dict[str, Tensor]) -> Tensor:
        return torch.cat([step["weight"], step["bias"][:, None]], 1)

    if metric == "identity":
        norms = rows.square().mean(0)
        own = mean.square()
    elif metric == "exact":
        flat = rows.flatten(1)
        fisher = flat.T @ flat / len(flat)
        dense = fisher + 0.3 * fisher.diagonal().mean() * torch.eye(8, dtype=F64)
        norms = torch.einsum("ni,ij,nj->n", flat, torch.linalg.inv(dense), flat).mean()
        own = mean.flatten() @ torch.linalg.solve(dense, mean.flatten())
    elif metric == "diagonal":
        q = mean.square() + 0.3 * mean.square().mean()
        norms, own = (rows.square() / q).sum((1, 2)).mean(), (mean.square() / q).sum()
    else:
        blocks = []
        for j in range(2):
            if metric == "whitening":
                mu, v = x.mean(0), x.var(0, unbiased=False)
                second = torch.diag(torch.cat([v + 0.3 * v.mean(), torch.ones(1, dtype=F64)]))
                centre = torch.eye(4, dtype=F64)
                centre[-1, :-1] = mu
                blocks.append(centre.T @ second @ centre)
            else:
                m = mean[j]
                row, corner = m[:-1] * m[-1], m[-1] ** 2 + 0.3 * (mean[:, -1] ** 2).mean()
                dense = torch.zeros(4, 4, dtype=F64)
                dense[:-1, :-1] = torch.outer(row, row) / corner
                dense[:-1, :-1].diagonal().copy_(m[:-1] ** 2 + 0.3 * (mean[:, :-1] ** 2).mean())
                dense[-1, :-1] = dense[:-1, -1] = row
                dense[-1, -1] = corner
                blocks.append(dense)
        inverse = torch.linalg.inv(torch.stack(blocks))
        norms = torch.einsum("nji,jik,njk->nj", rows, inverse, rows).mean(0)[:, None]
        own = torch.einsum("ji,jik,jk->j", mean, inverse, mean)[:, None]
    ratio = torch.sqrt(own / torch.maximum(norms, own))
    torch.testing.assert_close(as_rows(found), as_rows(alone) * ratio, **tolerance(condition=1e6))
    assert bool((ratio < 0.95).any())


@pytest.mark.parametrize("block", ["layer", "unit"])
def test_the_length_over_samples_of_a_kronecker_product_is_its_effective_dimension(block):
    model = nn.Linear(3, 2).to(F64)
    x = torch.randn(6, 3, dtype=F64)
    alone = stepped(model, x, "kronecker", block, damping=0.3)
    found = stepped(model, x, "kronecker", block, damping=0.3, expectation="per_sample")
    g = samples(model, x)["bias"]
    a = torch.cat([x, torch.ones(6, 1, dtype=F64)], 1)
    factors = [m.T @ m / 6 for m in (a, g)]
    if block == "unit":
        factors[1] = torch.diag(factors[1].diagonal())
    dense = [m + math.sqrt(0.3) * m.diagonal().mean() * torch.eye(len(m), dtype=F64) for m in factors]
    mean = g.T @ a / 6
    u = torch.linalg.solve(dense[1], mean) @ torch.linalg.inv(dense[0])
    of_inputs, of_outputs = (torch.linalg.solve(d, m).diagonal() for d, m in zip(dense, factors, strict=True))
    norm, own = of_inputs.sum() * of_outputs, (u * mean).sum(1)
    if block == "layer":
        norm, own = norm.sum(), own.sum()
    ratio = torch.sqrt(own / torch.maximum(norm, own))
    for name in ("weight", "bias"):
        factor = ratio if block == "layer" or name == "bias" else ratio[:, None]
        torch.testing.assert_close(found[name], alone[name] * factor, **tolerance(condition=1e6))


# -- what is not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
@pytest.mark.parametrize(("metric", "block"), [("kronecker", "layer"), ("kronecker", "unit"), ("exact", "network")])
def test_a_batch_between_two_inversions_is_refused_too(metric, block, spoil):
    model = small_net(dtype=F64)
    optimizer = BlockNaturalGradient(model, 0.01, metric, block, inverse_interval=10, momentum=0.9)
    train(model, optimizer, small_batches(2, dtype=F64))
    before, state = copy.deepcopy(model), tensors_of(optimizer.state_dict())
    optimizer.zero_grad()
    (mean_loss(model(small_batches(1, dtype=F64)[0])) * spoil).backward()
    with pytest.raises(FloatingPointError, match=r"need finite ones.*Nothing was changed"):
        optimizer.step()
    assert_same_parameters(model, before)
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), state, rtol=0, atol=0)
    train(model, optimizer, small_batches(2, dtype=F64))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_function_for_the_loss_scale_takes_the_long_way(taken: list[int], monkeypatch: pytest.MonkeyPatch):
    scale: Callable[[], float] = lambda: 8.0  # noqa: E731
    ours, theirs = wide_net(), wide_net()
    long_way(theirs)
    for model in (ours, theirs):
        optimizer = BlockNaturalGradient(model, 0.02, loss_scale=scale)
        for x in inputs(2):
            optimizer.zero_grad()
            (mean_loss(model(x)) * 8).backward()
            torch._amp_foreach_non_finite_check_and_unscale_(
                [p.grad for p in model.parameters()], torch.zeros(1), torch.tensor([0.125])
            )
            optimizer.step()
    assert not taken
    assert_same_parameters(ours, theirs, **tolerance(condition=1e4))
