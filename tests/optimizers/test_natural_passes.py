"""What passes tell a BlockNaturalGradient: scales of the loss, several calls, checkpoints, patches, intervals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import (
    assert_same_parameters,
    mean_loss,
    small_batches,
    small_net,
    train,
)
from tests.oracles import tolerance
from torchgeom_optim.optimizers.natural_gradient import BlockNaturalGradient

F64 = torch.float64


def pair() -> tuple[nn.Module, nn.Module]:
    return small_net(dtype=F64), small_net(dtype=F64)


def batches(number: int, **kwargs) -> list[Tensor]:
    return small_batches(number, dtype=F64, **kwargs)


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
    # independent inputs of unit variance: 256 patches give each entry to sqrt(2 / 256), five times over
    torch.testing.assert_close(found[:-1, :-1] / 1600, expected / 1600, rtol=0, atol=5 * math.sqrt(2 / 256))
    assert float(found[-1, -1]) == pytest.approx(1600)


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


def test_a_layer_that_sees_the_weights_of_another_sees_them_as_they_were():
    """Though the other layer has moved before its gradient is multiplied by the inverses."""

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 2), nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.second(self.first.weight.view(2, 5))

    torch.manual_seed(4)
    one = Seeing().to(F64)
    two = copy.deepcopy(one)
    two.second.weight.register_hook(lambda grad: grad.clone())  # whose gradient goes the long way
    x = torch.randn(3, 5, dtype=F64)
    for model in (one, two):
        train(model, BlockNaturalGradient(model, 0.1, "kronecker"), [x] * 3, lambda y: y.square().mean())
    assert_same_parameters(one, two, **tolerance(condition=1e4))
