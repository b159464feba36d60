"""GeodesicSparsifier: exact masks, both methods, there and back, resumption, and what goes wrong on the way."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchgeom_optim.optimizers import (
    Dense,
    GeodesicSparsifier,
    Mask,
    NofM,
    OtherWeights,
    Sparsity,
    Units,
    apply_prune_masks,
)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def batch(seed: int = 0, count: int = 60) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(sparsifier: GeodesicSparsifier) -> None:
    number = 0
    while not sparsifier.arrived:
        sparsifier.step(batch(number))
        number += 1


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def change(model: nn.Module, dense: nn.Module) -> float:
    x = batch(99, 400)
    with torch.no_grad():
        return float((model(x) - dense(x)).norm() / dense(x).norm())


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters())


@pytest.mark.parametrize("method", ["compensated", "paper"])
@pytest.mark.parametrize(
    ("target", "expected"),
    [(Sparsity(0.6), 214), (Units({"0": 4}), 36), (NofM(2, 4), 178), (Sparsity(0.5, "layer"), 178)],
)
def test_masks_are_exact_at_arrival(method, target, expected):
    model = mlp()
    sparsifier = GeodesicSparsifier(model, target, method=method, steps=2)
    walk(sparsifier)
    assert zeros(model) == expected
    assert sum(int((~keep).sum()) for keep in sparsifier.masks.values()) == expected
    assert sparsifier.path[-1].distance == 0.0
    assert len(sparsifier.path) == 3


def test_the_compensated_path_keeps_the_function_better_than_cutting():
    dense, model, cut = mlp(), mlp(), mlp()
    walk(GeodesicSparsifier(model, Sparsity(0.5), metric="outputs", steps=5, damping=1e-3, corrections=20))
    weights = [p for p in cut.parameters() if p.dim() > 1]
    threshold = torch.cat([p.detach().abs().flatten() for p in weights]).median()
    with torch.no_grad():
        for p in weights:
            p.mul_(p.abs() > threshold)
    assert change(model, dense) < 0.35 * change(cut, dense)


def test_equation_5_keeps_the_function_better_than_cutting():
    dense, model = mlp(), mlp()
    walk(GeodesicSparsifier(model, Sparsity(0.5), method="paper", metric="outputs", steps=8, damping=1e-3))
    cut = mlp()
    walk(GeodesicSparsifier(cut, Sparsity(0.5), method="paper", steps=1, damping=1e9))
    assert change(model, dense) < 0.7 * change(cut, dense)


def test_the_paper_takes_beta_too():
    first, second = mlp(), mlp()
    GeodesicSparsifier(first, Sparsity(0.5), method="paper", metric="outputs", pull=50.0, steps=3).step(batch())
    # mean_squared_output is the same J; only lengths are told in other units.
    other = GeodesicSparsifier(second, Sparsity(0.5), method="paper", metric="mean_squared_output", pull=50.0, steps=3)
    point = other.step(batch())
    torch.testing.assert_close(flat(first), flat(second))
    assert point.length > 0
    frozen = mlp()
    groups = [{"params": frozen[0].parameters(), "may_move": False}, {"params": frozen[2:].parameters()}]
    refused = GeodesicSparsifier(groups, Sparsity(0.5), model=frozen, method="paper", pull=1.0)
    # What may not move may still be cut; entries that do neither are not free.
    with pytest.raises(ValueError, match="beta needs"):
        refused.step(batch())


def test_a_linear_network_ends_at_the_least_squares_answer():
    """One linear layer, outputs as metric: what is left is the best fit to the dense outputs by the kept inputs."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 2)).double()
    dense = copy.deepcopy(model)
    x = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[:, [1, 4]] = False
    sparsifier = GeodesicSparsifier(
        model, Mask({"0.weight": keep}), metric="outputs", steps=3, damping=1e-13, factor_damping=1e-13, corrections=60
    )
    while not sparsifier.arrived:
        sparsifier.step(x)
    inputs = torch.cat([x[:, [0, 2, 3, 5]], torch.ones(50, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(inputs, dense(x).detach()).solution
    torch.testing.assert_close(model(x).detach(), inputs @ best, rtol=1e-8, atol=1e-8)  # conjugate gradients' end
    assert zeros(model) == 4


def test_dense_to_sparse_to_dense():
    dense, model = mlp(), mlp()
    sparsifier = GeodesicSparsifier(model, Sparsity(0.5), steps=2)
    walk(sparsifier)
    length = sparsifier.path[-1].length
    sparsifier.target = Dense()
    assert not sparsifier.arrived
    walk(sparsifier)
    torch.testing.assert_close(flat(model), flat(dense), rtol=0.0, atol=0.0)
    assert sparsifier.masks == {}
    assert sparsifier.path[-1].drift == 0.0
    assert sparsifier.path[-1].length > length


def test_units_out_others_out_and_some_back():
    dense, model = mlp(), mlp()
    sparsifier = GeodesicSparsifier(model, Units({"0": 6}), metric="outputs", steps=2)
    walk(sparsifier)
    sparsifier.target = Units({"2": 2})
    walk(sparsifier)
    assert zeros(model) == 6 * 9 + 2 * 17
    sparsifier.walk_to(Dense({"0": 3}), 3)
    walk(sparsifier)
    assert len(sparsifier.path) == 1 + 2 + 2 + 3
    assert zeros(model) == 3 * 9 + 2 * 17
    gone = model[0].bias == 0
    gone_first = torch.stack([(model[0].weight[j] == dense[0].weight[j]).all() for j in range(16)])
    assert int(gone_first.sum()) == 3
    assert int(gone.sum()) == 3


def test_between_two_networks():
    first, second, model = mlp(0), mlp(1), mlp(0)
    sparsifier = GeodesicSparsifier(model, OtherWeights(second), metric="outputs", steps=8, keep=100)
    straight = GeodesicSparsifier(copy.deepcopy(first), OtherWeights(second), metric="outputs", steps=8, damping=1e6,
                                  factor_damping=1e6, corrections=0)  # fmt: skip
    for number in range(4):
        sparsifier.step(batch(number))
        straight.step(batch(number))
    expected = torch.lerp(flat(first), flat(second), 0.5)
    torch.testing.assert_close(flat(straight._model), expected, rtol=1e-3, atol=1e-3)  # damping is not infinite
    assert change(model, first) < 0.5 * change(straight._model, first)
    walk(sparsifier)
    torch.testing.assert_close(flat(model), flat(second), rtol=0.0, atol=0.0)
    distances = [point.distance for point in sparsifier.path]
    assert distances == sorted(distances, reverse=True)


def test_groups_say_what_moves_and_what_is_cut():
    model, before = mlp(), mlp()
    groups = [
        {"params": model[0].parameters(), "may_cut": False},
        {"params": model[2].parameters(), "may_move": False},
    ]
    sparsifier = GeodesicSparsifier(groups, Sparsity(0.5), model=model, steps=2)
    walk(sparsifier)
    assert list(sparsifier.masks) == ["2.weight"]
    assert bool((model[0].weight != before[0].weight).any())
    kept = model[2].weight != 0
    torch.testing.assert_close(model[2].weight[kept], before[2].weight[kept], rtol=0.0, atol=0.0)
    torch.testing.assert_close(model[4].weight, before[4].weight, rtol=0.0, atol=0.0)


def test_the_model_is_a_host():
    model = mlp()
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state, ids = torch.get_rng_state(), [id(p) for p in model.parameters()]
    GeodesicSparsifier(model, Sparsity(0.5), steps=2).step(batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert [id(p) for p in model.parameters()] == ids


def test_resuming_walks_the_same_path():
    whole, halves = mlp(), mlp()
    reference = GeodesicSparsifier(whole, Sparsity(0.7), steps=4)
    first = GeodesicSparsifier(halves, Sparsity(0.7), steps=4)
    for number in range(4):
        reference.step(batch(number))
    for number in range(2):
        first.step(batch(number))
    file = io.BytesIO()
    torch.save((halves.state_dict(), first.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    halves = mlp()
    second = GeodesicSparsifier(halves, Sparsity(0.7), steps=4)
    halves.load_state_dict(weights)
    second.load_state_dict(state)
    copied = copy.deepcopy(second)
    for number in (2, 3):
        second.step(batch(number))
        copied.step(batch(number))
    torch.testing.assert_close(flat(halves), flat(whole), rtol=0.0, atol=0.0)
    torch.testing.assert_close(flat(copied._model), flat(whole), rtol=0.0, atol=0.0)
    assert second.arrived
    assert [p._replace(seconds=0) for p in second.path] == [p._replace(seconds=0) for p in reference.path]
    with pytest.raises(ValueError, match="steps=5"):
        GeodesicSparsifier(mlp(), Sparsity(0.7), steps=5).load_state_dict(state)
    with pytest.raises(ValueError, match="no place on a path"):
        second.load_state_dict(torch.optim.SGD(halves.parameters(), 0.1).state_dict())


def test_going_back():
    model = mlp()
    sparsifier = GeodesicSparsifier(model, Sparsity(0.6), steps=4, keep=2)
    weights = [flat(model)]
    for number in range(4):
        sparsifier.step(batch(number))
        weights.append(flat(model))
    with pytest.raises(ValueError, match=r"must be one of \[4, 1, 0\]"):
        sparsifier.undo(2)
    assert sparsifier.undo().step == 3
    torch.testing.assert_close(flat(model), weights[3], rtol=0.0, atol=0.0)
    assert not sparsifier.arrived
    sparsifier.step(batch(7))
    assert sparsifier.arrived
    assert sparsifier.undo(4).step == 0
    torch.testing.assert_close(flat(model), weights[0], rtol=0.0, atol=0.0)
    assert sparsifier.masks == {}


def labels_of(dense: nn.Module, x: Tensor) -> Tensor:
    return dense(x).argmax(1)


def test_accuracies_early_stop_and_the_best_point():
    model, dense = mlp(), mlp()
    x = batch(50, 200)
    loader = [(part, labels_of(dense, part)) for part in x.split(64)]
    sparsifier = GeodesicSparsifier(model, Sparsity(0.97), steps=6, evaluate=loader, least_accuracy=0.9, keep=10)
    path = sparsifier.run([batch(1), batch(2)])
    assert sparsifier.stopped
    assert not sparsifier.arrived
    assert path[0].accuracy == 1.0
    assert all(point.accuracy >= 0.9 for point in path)
    expected = float((labels_of(model, x) == labels_of(dense, x)).double().mean())
    torch.testing.assert_close(path[-1].accuracy, expected)
    with pytest.raises(RuntimeError, match="the path has stopped"):
        sparsifier.step(batch())
    assert str(path).count("\n") == len(path)
    sparsifier.undo(sparsifier.best())
    assert sparsifier.path[-1].accuracy == max(point.accuracy for point in path)


def test_several_loaders_by_name():
    model, other = mlp(0), mlp(1)
    x = batch(50, 200)
    loaders = {"first": [(x, labels_of(model, x))], "second": [(x, labels_of(other, x))]}
    sparsifier = GeodesicSparsifier(model, OtherWeights(other), steps=5, keep=5, evaluate=loaders)
    sparsifier.run([batch(1)])
    assert sparsifier.path[0].accuracies["first"] == 1.0
    assert sparsifier.path[-1].accuracies["second"] == 1.0
    lowest = [point.accuracy for point in sparsifier.path]
    sparsifier.undo(sparsifier.best())
    assert sparsifier.path[-1].accuracy == max(lowest)


@pytest.mark.parametrize("pair", [list, tuple])
def test_a_path_along_a_loader_goes_without_its_labels(pair):
    models = mlp(), mlp()
    x = batch(1)
    for model, given in zip(models, (x, pair((x, labels_of(models[0], x)))), strict=True):
        GeodesicSparsifier(model, Sparsity(0.5), steps=2).run([given])
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_the_share_that_is_cut_is_of_what_the_target_counts():
    sparsifier = GeodesicSparsifier(mlp(), Sparsity(0.5), steps=2)
    assert sparsifier.run([batch()])[-1].cut == pytest.approx(0.5, abs=0.01)  # of 356 weights, without 31 biases


def test_training_in_between_leaves_the_cut_at_zero():
    model = mlp()
    sparsifier = GeodesicSparsifier(model, Sparsity(0.5), steps=3, undo_drift=False)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    trained = []

    def between() -> None:
        sgd.zero_grad()
        model(batch(5)).square().sum().backward()
        sgd.step()
        trained.append(zeros(model))

    sparsifier.run([batch()], between=between)
    assert len(trained) == 2
    assert trained[1] < round(318 * 0.5)
    assert zeros(model) == 178


def test_masks_as_torch_keeps_them():
    model, other = mlp(), mlp()
    sparsifier = GeodesicSparsifier(model, Sparsity(0.5), steps=2)
    walk(sparsifier)
    before = model(batch()).detach()
    apply_prune_masks(model, sparsifier.masks)
    assert prune.is_pruned(model)
    torch.testing.assert_close(model(batch()).detach(), before, rtol=0.0, atol=0.0)
    model(batch()).sum().backward()
    assert bool((model[0].weight_orig.grad[model[0].weight_mask == 0] == 0).all())
    with pytest.raises(ValueError, match="Nothing was changed"):
        apply_prune_masks(other, {"0.weight": torch.ones(16, 8), "nowhere": torch.ones(2)})
    assert not prune.is_pruned(other)


def test_batch_norm_is_reestimated_on_request():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).double()
    kept = copy.deepcopy(model)
    sparsifier = GeodesicSparsifier(model, Sparsity(0.5), steps=2, batch_norm="reestimate", batch_size=60)
    x = 3 + batch()
    sparsifier.step(x)
    hidden = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, hidden.var(0))
    assert model[1].momentum == 0.1
    assert model[1].training
    sparsifier.undo()
    torch.testing.assert_close(model[1].running_mean, torch.zeros(16, dtype=torch.float64))
    GeodesicSparsifier(kept, Sparsity(0.5), steps=2).step(x)
    torch.testing.assert_close(kept[1].running_mean, torch.zeros(16, dtype=torch.float64))


def test_a_convolutional_network_with_a_transposed_one_that_has_no_rule():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3)
    )
    dense = copy.deepcopy(model)
    x = torch.randn(80, 1, 6, 6)
    sparsifier = GeodesicSparsifier(model, Sparsity(0.5), metric="outputs", steps=3)
    while not sparsifier.arrived:
        sparsifier.step(x)
    moved = (model(x) - dense(x)).norm() / dense(x).norm()
    assert float(moved.detach()) < 0.1
    assert zeros(model) == (54 + 96 + 1200 // 4) // 2


@pytest.mark.parametrize("when", ["in the step", "at the evaluation"])
def test_interrupted_in_the_middle_the_network_is_at_the_last_point(when, monkeypatch):
    model = mlp()
    calls = []

    def evaluate(_: nn.Module) -> float:
        calls.append(1)
        if when == "at the evaluation" and len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    sparsifier = GeodesicSparsifier(model, Sparsity(0.6), steps=4, evaluate=evaluate)
    sparsifier.step(batch())
    before, points, masks = flat(model), list(sparsifier.path), sparsifier.masks
    with monkeypatch.context() as patch:
        if when == "in the step":  # the weights are half written when the correction begins

            def interrupt(*_: object) -> Tensor:
                assert bool((flat(model) != before).any())
                raise KeyboardInterrupt

            patch.setattr("torchgeom_optim.optimizers.geodesic.correction", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sparsifier.step(batch(1))
    torch.testing.assert_close(flat(model), before, rtol=0.0, atol=0.0)
    assert list(sparsifier.path) == points
    torch.testing.assert_close(sparsifier.masks, masks)
    sparsifier.step(batch(1))
    assert len(sparsifier.path) == 3


def test_what_goes_wrong_leaves_the_network_alone():
    model = mlp()
    sparsifier = GeodesicSparsifier(model, Sparsity(0.5), steps=2)
    before = flat(model)
    with pytest.raises(ValueError, match="not finite"):
        sparsifier.step(batch() * math.nan)
    with pytest.raises(RuntimeError):
        sparsifier.step(torch.randn(4, 5))
    torch.testing.assert_close(flat(model), before, rtol=0.0, atol=0.0)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights that are not finite"):
        sparsifier.step(batch())
    dead = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)).double()
    nn.init.constant_(dead[0].bias, -100.0)
    with pytest.raises(ValueError, match="the metric vanishes"):
        GeodesicSparsifier(dead, Sparsity(0.5)).step(batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, "method='newton'"),
        ({"metric": "loss"}, "metric='loss'"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"factor_damping": math.nan}, "factor_damping=nan"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "whole number"),
        ({"corrections": -1}, "corrections=-1"),
        ({"pull": 1.0}, "belongs to method='paper'"),
        ({"least_accuracy": 0.9}, "without evaluate"),
        ({"batch_norm": "drop"}, "batch_norm='drop'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GeodesicSparsifier(mlp(), Sparsity(0.5), **options)


def test_bad_models_groups_and_targets():
    model = mlp()
    with pytest.raises(TypeError, match=r"need the torch\.nn\.Module"):
        GeodesicSparsifier(model.parameters(), Sparsity(0.5))
    with pytest.raises(ValueError, match="does not own"):
        GeodesicSparsifier(mlp(1).parameters(), Sparsity(0.5), model=model)
    with pytest.raises(ValueError, match="got two models"):
        GeodesicSparsifier(model, Sparsity(0.5), model=mlp())
    with pytest.raises(TypeError, match="may_cut"):
        GeodesicSparsifier([{"params": model.parameters(), "may_cut": 1}], Sparsity(0.5), model=model)
    with pytest.raises(TypeError, match="need a Target"):
        GeodesicSparsifier(model, 0.5)
    with pytest.raises(ValueError, match="steps=0"):
        GeodesicSparsifier(model, Sparsity(0.5)).walk_to(Sparsity(0.6), 0)
    held = [{"params": model[0].parameters(), "may_move": False}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="moves entries that their groups hold"):
        GeodesicSparsifier(held, OtherWeights(mlp(1)), model=model)
    sparsifier = GeodesicSparsifier(model, Sparsity(0.5))
    with pytest.raises(RuntimeError, match="Build another"):
        sparsifier.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="ran dry"):
        sparsifier.run([])
    walk(sparsifier)
    with pytest.raises(RuntimeError, match="the path has arrived"):
        sparsifier.step(batch())
