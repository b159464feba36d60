"""A compacted network computes what the masked one computes, in fewer numbers."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests.oracles import tolerance
from torchgeom_optim.models import compaction as compaction_module
from torchgeom_optim.models import reference_network
from torchgeom_optim.models.compaction import Compaction, CompactionError, compact


def masked(model: nn.Module, share: float = 0.5, bias: float | None = None, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode, with rows of its hidden layers set to zero.

    Biases are drawn anew, or all those of zeroed rows are set to one value. Norms get statistics as after training.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    with torch.no_grad():
        for layer in layers:
            if layer.bias is not None:
                layer.bias.normal_(generator=generator)
        for layer in layers[:-1]:
            rows = torch.randperm(len(layer.weight), generator=generator)[: int(share * len(layer.weight))]
            layer.weight[rows] = 0
            if bias is not None and layer.bias is not None:
                layer.bias[rows] = bias
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for values in (norm.running_mean, norm.weight, norm.bias):
                    values.normal_(generator=generator)
                norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def check(model: nn.Module, *inputs: Tensor, condition: float = 10.0) -> Compaction:
    """Compact; the outputs agree, and the original is what it was."""
    before = copy.deepcopy(model.state_dict())
    done = compact(model, inputs)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(done.model(*inputs), model(*inputs), **tolerance(condition=condition))
    others = [torch.randn_like(x) if x.is_floating_point() else x.flip(0) for x in inputs]
    torch.testing.assert_close(done.model(*others), model(*others), **tolerance(condition=condition))
    assert done.report.after.parameters == sum(p.numel() for p in done.model.parameters())
    return done


def images(size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(3, channels, size, size, dtype=torch.float64)


NETWORKS = {
    "mlp2": (lambda: reference_network("mlp2", in_features=12), (3, 12)),
    "lenet": (lambda: reference_network("lenet", image_size=16), (3, 3, 16, 16)),
    "lenet with norms": (
        lambda: reference_network("lenet", image_size=16, batch_norm=True, bias_before_norm=False),
        (3, 3, 16, 16),
    ),
    "allcnn9": (lambda: reference_network("allcnn9"), (3, 3, 9, 9)),
    "vgg11": (lambda: reference_network("vgg11", width=0.05), (2, 3, 32, 32)),
    "resnet8": (lambda: reference_network("resnet8"), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bias", [None, 0.7])
def test_compacted_and_masked_networks_agree(name, bias):
    build, shape = NETWORKS[name]
    model = masked(build(), bias=bias)
    report = check(model, torch.randn(shape, dtype=torch.float64)).report
    # Half of the rows and, in the layer above, half of the columns.
    assert report.after.parameters < (0.7 if name == "resnet8" else 0.5) * report.before.parameters
    assert report.after.multiply_adds < 0.75 * report.before.multiply_adds
    assert report.after.num_bytes < report.before.num_bytes


@given(seed=st.integers(0, 2**20), share=st.floats(0.0, 1.0), residual=st.booleans())
def test_any_share_of_any_rows(seed, share, residual):
    model = Residual() if residual else nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    check(masked(model, share, seed=seed), images(4) if residual else torch.randn(3, 5).double(), condition=1e3)


def test_a_network_without_zeros_stays_as_it_is():
    model = masked(NETWORKS["lenet"][0](), share=0.0)
    done = check(model, images(16))
    assert done.report.widths == done.report.kept == {}
    torch.testing.assert_close(dict(done.model.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_widths_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 5)).double()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    done = check(model, images())
    assert done.report.widths == {"0": (6, 4)}
    assert done.model[4].weight.shape == (5, 36)
    columns = model[4].weight.view(5, 6, 9)
    torch.testing.assert_close(done.model[4].bias, model[4].bias + 2 * columns[:, 1].sum(1))  # relu(-1) = 0
    torch.testing.assert_close(done.model[4].weight, columns[:, [0, 2, 3, 5]].flatten(1), rtol=0, atol=0)
    macs = 4 * 27 * 36 + 5 * 36
    assert (done.report.after.multiply_adds, done.report.before.multiply_adds) == (macs, 6 * 27 * 36 + 5 * 54)
    assert done.report.after.num_bytes == 8 * done.report.after.parameters


def test_units_that_fed_only_removed_ones_go_too():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[4].weight[:, 3] = 0  # nobody reads unit 3 of the second layer
        model[2].weight[[0, 1, 2, 4], 2] = 0  # which alone reads unit 2 of the first
    assert check(model, torch.randn(3, 4).double()).report.widths == {"0": (6, 5), "2": (5, 4)}


def test_a_layer_keeps_one_unit():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    nn.init.zeros_(model[2].weight)
    done = check(model, torch.randn(3, 4).double())
    assert done.report.widths == {"0": (6, 1), "2": (5, 1)}


def test_constants_before_zero_padding_share_one_channel():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2))
    model = masked(model, share=0.0)
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = torch.tensor([0.3, 2.0, -1.0, 1e-3, 0.0])
    done = check(model, images(6), condition=1e3)
    assert done.report.widths["0"] == (6, 2)
    assert done.report.kept == {}  # the one that the others were merged into is not complained about
    torch.testing.assert_close(done.model[0].bias[0].item(), 2.0)  # the largest carries, which is best for rounding


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_paddings_keep_constants(mode):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode), nn.Flatten())
    assert check(masked(model, bias=1.5), images()).report.widths["0"] == (6, 3)


def test_a_consumer_without_bias_gets_one_that_follows_its_weight():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5, bias=False)).double()
    nn.init.zeros_(model[0].weight[:2])
    model[2].weight.requires_grad_(False)
    smaller = check(model, torch.randn(3, 4).double()).model
    assert smaller[2].bias is not None
    assert not smaller[2].bias.requires_grad
    assert smaller[0].weight.requires_grad


def test_norm_that_scales_by_zero():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten())
    model = masked(model, share=0.0)
    with torch.no_grad():
        model[1].weight[:4] = 0
    done = check(model, images())
    assert done.report.widths == {"0": (6, 2), "1": (6, 2)}
    assert done.model[1].num_features == 2
    assert done.model[1].running_var.shape == (2,)


def test_depthwise_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.Hardswish(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 1),
    )
    model = masked(nn.Sequential(*model, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), share=0.0)
    with torch.no_grad():
        model[2].weight[:3] = 0  # its outputs are constant, so what it sees of them is superfluous
    done = check(model, images())
    assert done.report.widths == {"0": (6, 3), "2": (6, 3), "3": (6, 3)}
    assert done.model[2].groups == done.model[2].in_channels == 3


class Residual(nn.Module):
    """relu(x + conv2(relu(conv1(x)))) behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 5, 1), nn.ReLU(inplace=True)
        self.conv1, self.conv2 = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.stem(images))
        out = self.relu(self.conv1(x))
        out = self.conv2(out)
        out += x
        return self.head(self.relu(out).mean((2, 3)))


def test_residual_sum():
    model = masked(Residual(), share=0.0)
    with torch.no_grad():
        model.conv1.weight[[0, 1]], model.conv1.bias[[0, 1]] = 0.0, 0.0
        model.conv2.weight[[2, 3]], model.conv2.bias[3] = 0.0, 2.0
        model.stem.weight[3], model.stem.bias[3] = 0.0, -1.0
    done = check(model, images())
    assert done.report.widths == {"stem": (5, 4), "conv1": (6, 4), "conv2": (5, 4)}  # 3 goes, 2 lives on in the stem
    assert done.report.kept == {"conv2": {"added to what varies (a skip connection) before 'conv1'": 1}}
    assert "conv2: 1 idle units stay: added to what varies" in str(done.report)
    with pytest.raises(CompactionError, match=r"1 units of 'conv2'.*'conv1'.*strict=False"):
        compact(model, images(), strict=True)


class Functional(nn.Module):
    """Functions, a view, a concatenation, a gate, an unused branch that depends on a size, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Linear(4, 4)
        self.head = nn.Linear(9, 3)

    def forward(self, images: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        if len(images) > 100 or mask is not None:
            raise RuntimeError
        left = F.avg_pool2d(F.gelu(self.left(images)), 2)
        pooled = F.adaptive_avg_pool2d(left, 1).flatten(1)
        left = left * torch.sigmoid(self.gate(pooled)).unsqueeze(-1).unsqueeze(-1)
        right = F.max_pool2d(torch.tanh(self.right(images)) * scale, 2)
        both = torch.cat([left, right], dim=1).mean(dim=[2, 3])
        return self.head(F.dropout(both, training=self.training).view(both.size(0), -1))


def test_functions_and_concatenation():
    model = masked(Functional(), share=0.0)
    with torch.no_grad():
        model.right.weight[[0, 2]] = 0
        model.left.weight[1] = 0
    done = check(model, images())
    assert done.report.widths == {"right": (5, 3)}
    (reason,) = done.report.kept["left"]  # a gate of another layout is not followed
    assert "mul" in reason
    torch.testing.assert_close(compact(model, {"images": images()}).report.widths, done.report.widths)


def test_views_by_hand():
    class View(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.head, self.channels = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), channels

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x.view(x.shape[0], self.channels, x.shape[2] * x.shape[3]).mean(-1))

    for channels, widths in ((-1, {"conv": (4, 2)}), (4, {})):
        model = masked(View(channels))
        assert check(model, images()).report.widths == widths


class Refused(nn.Module):
    """Hidden units lead into something that is not followed."""

    def __init__(self, then: nn.Module | None = None, view: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.first, self.then, self.head = nn.Linear(4, 6), then or nn.Identity(), nn.Linear(6, 6)
        self.view, self.twice = view, twice

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.then(self.first(x))
        hidden = hidden.view(-1, 6) if self.view else hidden
        return self.head(self.head(hidden)) if self.twice else self.head(hidden)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Refused(nn.LayerNorm(6)), "'then' (LayerNorm)"),
        (Refused(nn.Softmax(1)), "'then' (Softmax)"),
        (Refused(nn.Unflatten(1, (2, 3))), "'then' (Unflatten)"),
        (Refused(view=True), "reshapes to a fixed size"),
        (Refused(twice=True), "'head' is used more than once"),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU()), "'1' (ReLU)"),
    ],
)
def test_what_cannot_be_followed_is_named(model, reason):
    if isinstance(model, nn.Sequential):
        reason = "an output of the network"
    if isinstance(model, Refused) and isinstance(model.then, nn.Unflatten):
        model.head = nn.Linear(3, 6)
    model = model.double()
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        first.weight[:2] = 0
    done = check(model, torch.randn(3, 4).double())
    assert done.report.widths == {}
    ((name, reasons),) = done.report.kept.items()
    assert name in ("first", "0")
    assert reason in next(iter(reasons))


def test_grouped_convolution_and_tied_weights_are_kept():
    model = masked(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten()))
    assert "in 2 groups" in next(iter(check(model, images()).report.kept["0"]))
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[:2] = 0
    assert check(model, torch.randn(3, 6).double()).report.widths == {}


def test_a_submodule_that_cannot_be_followed_is_taken_whole():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), Odd(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].weight[0] = model[1].weight[0] = 0
    with torch.no_grad():
        done = check(model, torch.randn(3, 4).double())
    assert done.report.not_followed == ("2",)
    assert done.report.widths == {"0": (6, 5)}
    assert "2: not followed" in str(done.report)
    with pytest.raises(ValueError, match="forward of Odd cannot be followed"):
        compact(Odd(), torch.randn(3, 4))


@pytest.mark.parametrize("mask", ["prune", "parametrization"])
def test_masks_become_permanent_in_the_copy(mask):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    if mask == "prune":
        prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    else:
        parametrizations.orthogonal(model[2])
        with torch.no_grad():
            model[0].weight[:3] = 0
    x = torch.randn(3, 4).double()
    model(x)  # the masked weight now hangs on a graph
    expected = model(x)
    done = compact(model, x)
    torch.testing.assert_close(done.model(x), expected, **tolerance(condition=10))
    assert done.report.widths == {"0": (6, 3)}
    assert {name for name, _ in done.model.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(model(x), expected)
    assert prune.is_pruned(model) == (mask == "prune")


def test_the_copy_is_of_the_same_kind():
    model = masked(Residual(), bias=0.0).train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.conv2.eval()
    x = images()
    kept = x.clone()
    with torch.random.fork_rng([]):
        state = torch.get_rng_state()
        smaller, report = compact(model, x, latency_rounds=2)
        assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    assert type(smaller) is Residual
    assert smaller.training
    assert not smaller.conv2.training
    assert model.head.weight.grad is not None
    assert all(p.grad is None and p.is_leaf for p in smaller.parameters())
    again = pickle.loads(pickle.dumps(smaller)).eval()
    torch.testing.assert_close(again(x), smaller.eval()(x))
    smaller(x).sum().backward()
    assert report.before.latency_s is not None
    assert report.before.latency_s > 0
    assert "latency in ms" in str(report)


def test_bad_input():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="latency_rounds=-1"):
        compact(model, torch.randn(3, 4), latency_rounds=-1)
    compiled = nn.Module()
    compiled._orig_mod = model
    with pytest.raises(ValueError, match="_orig_mod"):
        compact(compiled, torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compact(model, torch.randn(3, 5))


def test_a_forward_that_counts_channels_is_caught():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden) / hidden.shape[1]

    model = Counting()
    nn.init.zeros_(model.first.weight[:3])
    with pytest.raises(CompactionError, match="differ by"):
        compact(model, torch.randn(3, 4))


def test_the_agreement_is_tested_for_real(monkeypatch):
    """The twin of the first test: a constant that is forgotten is noticed."""
    model = masked(NETWORKS["mlp2"][0](), bias=0.7)
    x = torch.randn(3, 12).double()
    monkeypatch.setattr(compaction_module, "_check_same", lambda *_: None)
    narrow = compaction_module._narrow

    def forgetful(layer, removal):
        if layer.inputs is not None:
            layer.inputs.constants.zero_()
        narrow(layer, removal)

    monkeypatch.setattr(compaction_module, "_narrow", forgetful)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(compact(model, x).model(x), model(x), **tolerance(condition=1e3))
