"""GradNet as a user has it: the base untouched, files, caches, seeds, interruptions, bad input."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgeom_optim.models import GradNet, NonFiniteLossError, RecordCache, UnsupportedBaseError

METHODS = ("gated", "linearised", "paper")
C = 3


def base(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, C)).double()


def data(samples: int = 60, seed: int = 0, size: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 4, 4, dtype=torch.float64, generator=generator)
    x = x + 1.0
    y = x[:, 0, :, :3].mean(1).argmax(1)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, samples, size)]


DATA = data()
X = data(8, seed=1)[0][0]


@pytest.mark.parametrize("method", METHODS)
def test_training_helps_and_the_base_is_untouched(method):
    model = base().train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    gradnet = GradNet(model, C, method=method).fit(DATA, 8, validation=DATA, progress=False)
    gradnet.train()
    assert gradnet.head.training
    gradnet.eval()
    gradnet.predict(X)
    assert gradnet.history[-1]["loss"] < gradnet.history[0]["loss"]
    assert gradnet.history[-1]["validation_accuracy"] == gradnet.accuracy(DATA)
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(gradnet.predict_proba(X).sum(1), torch.ones(8, dtype=torch.float64))
    assert torch.equal(gradnet.predict(X), gradnet(X).argmax(1))


DRAWING = [*((method, {}) for method in METHODS), ("paper", {"dropout": 0.5})]


@pytest.mark.parametrize(("method", "settings"), DRAWING)
def test_a_seed_fixes_the_result_and_global_randomness_does_not_matter(method, settings):
    results = []
    for draws in (1, 5):
        model = base()
        torch.rand(draws)
        state = torch.get_rng_state()
        gradnet = GradNet(model, C, method=method, seed=3, **settings).fit(DATA, 2)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(gradnet(X))
    assert torch.equal(*results)
    if method != "linearised":  # which draws nothing
        assert not torch.equal(GradNet(base(), C, method=method, seed=4).fit(DATA, 2)(X), results[0])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_agree(method, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="the extra 'files' is not installed")
    settings = {"gated": {"block": 5}, "linearised": {"damping": 0.5}, "paper": {"hidden": (3, 4), "percentile": 60.0}}
    model = base()
    gradnet = GradNet(model, C, method=method, **settings[method]).fit(DATA, 2)
    alone, whole = tmp_path / f"alone{suffix}", tmp_path / f"whole{suffix}"
    gradnet.save(alone)
    gradnet.save(whole, with_base=True)
    assert torch.equal(GradNet.load(alone, copy.deepcopy(model))(X), gradnet(X))
    assert torch.equal(GradNet.load(whole, base(seed=9))(X), gradnet(X))
    with pytest.raises(ValueError, match="another base"):
        GradNet.load(alone, base(seed=9))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alone.name, whole.name])


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles(method):
    gradnet = GradNet(base(), C, method=method).fit(DATA, 1)
    for other in (copy.deepcopy(gradnet), pickle.loads(pickle.dumps(gradnet))):
        assert torch.equal(other(X), gradnet(X))
        other.base[0].weight.data.neg_()
        assert not torch.equal(other(X), gradnet(X))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_cached_training(method, on_disk, tmp_path):
    model = base()
    folder = tmp_path / "cache" if on_disk else None
    results = []
    for _ in range(2):
        gradnet = GradNet(model, C, method=method, sample=DATA[0][0])
        cache = gradnet.cache(DATA, folder)
        assert len(cache) == 60
        results.append(gradnet.fit(RecordCache.open(folder) if folder else cache, 3, batch_size=16)(X))
    assert torch.equal(*results)
    assert gradnet.history[-1]["loss"] < gradnet.history[0]["loss"]
    with pytest.raises(ValueError, match="another base"):
        GradNet(base(seed=5), C, method=method, sample=DATA[0][0]).fit(cache, 1)


def test_cached_training_is_training():
    plain = GradNet(base(), C).fit(DATA, 2, schedule="constant")
    cached = GradNet(base(), C)
    whole = cached.cache([DATA[0]])
    cached.fit(whole, 2, batch_size=20, schedule="constant")
    once = GradNet(base(), C).fit([DATA[0]], 2, schedule="constant")
    torch.testing.assert_close(cached(X), once(X))
    assert not torch.equal(plain(X), once(X))


class Interrupted(list):
    """Stops in the middle of a later pass."""

    def __init__(self, batches: list, after: int) -> None:
        super().__init__(batches)
        self.after = after

    def __iter__(self) -> Iterator:
        for batch in super().__iter__():
            self.after -= 1
            if self.after < 0:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize(("method", "settings"), DRAWING)
def test_an_interrupted_fit_resumes(method, settings, tmp_path):
    path = tmp_path / "fit.pt"
    whole = GradNet(base(), C, method=method, **settings).fit(DATA, 4)
    gradnet = GradNet(base(), C, method=method, **settings)
    with pytest.raises(KeyboardInterrupt):
        gradnet.fit(Interrupted(DATA, 8 if method == "gated" else 11), 4, checkpoint=path)
    for again in (GradNet(base(), C, method=method, **settings), gradnet):
        resumed = again.fit(DATA, 4, checkpoint=shutil.copy(path, tmp_path / "again.pt"))
        assert len(resumed.history) == 4
        assert resumed.history == whole.history
        assert torch.equal(resumed(X), whole(X))
    with pytest.raises(ValueError, match="other settings"):
        GradNet(base(), C, method=method, seed=8).fit(DATA, 4, checkpoint=path)


@pytest.mark.parametrize("after", [0, 2, 8])  # at the first look, in the first epoch, and later
@pytest.mark.parametrize("fitted", ["never", "before"])
@pytest.mark.parametrize("with_checkpoint", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_fit_leaves_all_as_it_was(method, with_checkpoint, fitted, after, tmp_path):
    model = base().train()
    gradnet = GradNet(model, C, method=method)
    if fitted == "before":
        gradnet.fit(DATA, 1)
    head, history = gradnet.head, gradnet.history
    before, mode = copy.deepcopy(gradnet.state_dict()), gradnet.training
    with pytest.raises(KeyboardInterrupt):
        gradnet.fit(Interrupted(DATA, after), 4, checkpoint=tmp_path / "fit.pt" if with_checkpoint else None)
    assert gradnet.head is head
    assert gradnet.history is history
    assert gradnet.training is mode
    assert head is None or not head.training
    assert gradnet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in gradnet.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_progress_bar_counts_batches(capsys):
    pytest.importorskip("tqdm", reason="the bar needs the extra 'demo'")
    GradNet(base(), C).fit(DATA, 2, progress=True)
    assert "6/6" in capsys.readouterr().err
    GradNet(base(), C).fit(DATA, 2, progress=False)
    assert capsys.readouterr().err == ""


def test_images_keep_their_memory_format_in_a_cache(tmp_path):
    gradnet = GradNet(base(), C, method="linearised", sample=DATA[0][0])
    fresh = gradnet.head.record(DATA[0][0])
    gradnet.cache(DATA, tmp_path)
    for cache in (gradnet.cache(DATA), RecordCache.open(tmp_path)):
        kept, targets = next(iter(cache.batches(20, None, torch.device("cpu"))))
        assert torch.equal(targets, DATA[0][1])
        assert kept.keys() == fresh.keys()
        for name, value in fresh.items():
            assert torch.equal(kept[name], value), name
            assert kept[name].stride() == value.stride() or 1 in value.shape, name


def test_early_stopping_returns_to_the_best():
    rise = [(DATA[0][0], torch.randint(C, (20,), generator=torch.Generator().manual_seed(i))) for i in range(3)]
    gradnet = GradNet(base(), C).fit(
        rise, 30, validation=data(40, seed=7), patience=2, optimizer=lambda p: torch.optim.Adam(p, 0.05)
    )
    accuracies = [row["validation_accuracy"] for row in gradnet.history]
    assert len(accuracies) < 30
    assert accuracies.index(max(accuracies)) == len(accuracies) - 3
    assert gradnet.accuracy(data(40, seed=7)) == max(accuracies)


def test_any_loss_and_any_optimizer():
    loss_fn = nn.MultiMarginLoss(reduction="sum")
    for method in METHODS:
        gradnet = GradNet(base(), C, method=method, loss_fn=loss_fn)
        gradnet.fit(DATA, 4, optimizer=lambda p: torch.optim.SGD(p, 1e-3))
        assert gradnet.history[-1]["loss"] < gradnet.history[0]["loss"]


def test_several_inputs_and_num_classes_from_a_sample():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 4), nn.Linear(3, 4)
            self.head = nn.Linear(4, C)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.tanh(self.one(x) * self.two(y)))

    x, y = torch.randn(30, 2), torch.randn(30, 3)
    labels = torch.arange(30) % C
    for method in ("linearised", "paper"):
        gradnet = GradNet(Two(), sample=(x, y), method=method)
        assert gradnet.num_classes == C
        gradnet.fit([((x, y), labels)], 3)
        assert gradnet.predict((x, y)).shape == (30,)
    with pytest.raises(UnsupportedBaseError, match="2 inputs"):
        GradNet(Two(), C)


def good(method: str = "gated", **settings) -> GradNet:
    return GradNet(base(), C, method=method, **settings)


def relabelled(value: int) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.full_like(y, value)) for x, y in DATA]


def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs - outputs.mean(0), targets)


def with_nan() -> list[tuple[Tensor, Tensor]]:
    x = DATA[1][0].clone()
    x[3, 0, 0, 0] = float("nan")
    return [DATA[0], (x, DATA[1][1])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("batches", "error", "named"),
    [
        (relabelled(C), ValueError, "labels from 3 to 3"),
        (relabelled(-1), ValueError, "labels from -1"),
        (relabelled(1), ValueError, r"classes \[0, 2\] of 3 do not occur"),
        ([(x, y.double()) for x, y in DATA], ValueError, "whole numbers"),
        (with_nan(), ValueError, "finite"),
        ([], ValueError, "no sample|not calibrated"),
        ([DATA[0][0]], TypeError, "pairs"),
        (DATA[0][0], TypeError, r"data is a tensor.*list\(zip"),
        (iter(DATA), TypeError, "gone through again"),
    ],
)
def test_bad_data_changes_nothing(method, batches, error, named):
    model = base().train()
    gradnet = GradNet(model, C, method=method, sample=DATA[0][0])
    before = copy.deepcopy(gradnet.state_dict())
    with pytest.raises(error, match=named):
        gradnet.fit(batches, 2)
    for name, value in gradnet.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("normalization", ["scale", "scale_power", "standard"])
def test_coordinates_that_calibration_hardly_saw_do_no_harm(normalization):
    def batch(size: float, seed: int) -> tuple[Tensor, Tensor]:
        x = data(40, seed, 40)[0][0]
        x = torch.cat([x[:, 0, 0, :3], size * torch.randn(40, 9, dtype=x.dtype)], 1)
        return x, x[:, :3].argmax(1)

    torch.manual_seed(0)
    model = nn.Linear(12, C).double()
    batches = [batch(1e-9, 0), *(batch(1.0, seed) for seed in range(1, 9))]
    gradnet = GradNet(model, C, method="paper", sample=batches[0][0], normalization=normalization, percentile=0)
    gradnet.fit(batches, 4)
    assert gradnet.history[-1]["loss"] < gradnet.history[0]["loss"] < 3


def test_a_fit_that_diverges_says_so():
    gradnet = good("paper", sample=X, normalization="none")
    with pytest.raises(NonFiniteLossError, match="smaller learning rate") as caught:
        gradnet.fit(DATA, 3, optimizer=lambda p: torch.optim.SGD(p, 1e200))
    assert caught.value.epoch == 1
    assert not math.isfinite(caught.value.loss)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_loader_that_fails_changes_nothing(calibrated):
    class Failing(list):
        passes = 0

        def __iter__(self) -> Iterator:
            self.passes += 1
            yield from super().__iter__()
            if self.passes > 2:
                raise OSError("the disk is gone")

    gradnet = GradNet(base(), C, method="linearised", sample=DATA[0][0] if calibrated else None)
    before = copy.deepcopy(gradnet.state_dict())
    with pytest.raises(OSError, match="the disk is gone"):
        gradnet.fit(Failing(DATA), 4)
    assert gradnet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in gradnet.state_dict().items())


def test_missing_classes_may_be_accepted():
    good().fit(relabelled(1), 1, missing_classes=True)


def test_a_loss_that_couples_samples():
    for method in METHODS:
        with pytest.raises(ValueError, match="couples the samples"):
            good(method, loss_fn=coupled).fit(DATA, 1)


def test_hooks_that_matter_are_noticed():
    models = {method: base() for method in METHODS}
    for model in models.values():
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedBaseError, match="do not give its outputs"):
        GradNet(models["gated"], C).fit(DATA, 1)
    # The others do without the gates then.
    linearised = GradNet(models["linearised"], sample=X, method="linearised")
    torch.testing.assert_close(linearised(X), models["linearised"].eval()(X).detach())
    paper = GradNet(models["paper"], sample=X, method="paper")
    gradients, logits = paper.head._gradients(X, torch.zeros(8, 1, dtype=torch.long))
    torch.testing.assert_close(logits, models["paper"].eval()(X).detach())
    loss = F.cross_entropy(models["paper"](X), torch.zeros(8, dtype=torch.long), reduction="sum")
    (expected,) = torch.autograd.grad(loss, models["paper"][0].weight)
    torch.testing.assert_close(gradients[0].sum((0, 1)), expected.reshape(-1))


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: GradNet(base(), C, method="kernel"), ValueError, "method='kernel'"),
        (lambda: GradNet(base()), ValueError, "num_classes nor a sample"),
        (lambda: GradNet(base(), 1), ValueError, "num_classes=1"),
        (lambda: GradNet(base(), 5, sample=X), ValueError, r"\[N, 5\] are needed"),
        (lambda: GradNet(nn.Flatten(), C), ValueError, "no parameters"),
        (lambda: GradNet(base(), C, method="linearised", block=3), TypeError, "block"),
        (lambda: GradNet(base(), C, method="paper", percentile=101.0), ValueError, "percentile"),
        (lambda: GradNet(base(), C, method="linearised", damping=-1.0).fit(DATA, 1), ValueError, "damping"),
        (lambda: good("linearised")(X), RuntimeError, "not calibrated"),
        (lambda: good().fit(DATA, -1), ValueError, "epochs=-1"),
        (lambda: good().fit(DATA, 1, patience=2), ValueError, "validation"),
        (lambda: good().fit(DATA, 1, schedule="cosine"), ValueError, "schedule"),
    ],
)
def test_bad_settings(make, error, named):
    with pytest.raises(error, match=named):
        make()


def test_a_cache_that_was_not_finished(tmp_path: Path):
    def breaking() -> Iterator[tuple[Tensor, Tensor]]:
        yield DATA[0]
        raise OSError("disk full")

    gradnet = good()
    gradnet.cache(DATA, tmp_path)
    with pytest.raises(OSError, match="disk full"):
        gradnet.cache(breaking(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no cache"):
        RecordCache.open(tmp_path)
    with pytest.raises(ValueError, match="no sample"):
        gradnet.cache([])
