"""Each verdict speaks on numbers that are wrong in just its way, and is silent on their healthy twins."""

from __future__ import annotations

import inspect
import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from torchgeom_optim.diagnostics import Diagnostics, checks
from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.reading import summary, verdicts

# A run in which all is well, as numbers: every check has what it needs and nothing to say.
HEALTHY = {
    "top_curvature": 8.0,
    "gradient_coherence": 0.1,
    "gradient_noise_scale": 60.0,
    "relative_gradient_rank": 0.2,
    "relative_input_gradient_rank": 0.1,
    "gradient_confusion": 0.1,
    "weight_gradient_cosine": 0.99,
    "weight_norm": 10.0,
    "gradient_norm": 1.0,
}
FALLING = [2.3, 2.0, 1.7, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7]
FLAT = [2.3] * 9


def run(losses=FALLING, *, layers=None, rate=0.1, batch=64, notes=(), vector_layers=(), **values) -> History:
    """A history; a value that is a list has one entry for each record."""
    layers = {"0": (1.0, 5.0), "2": (0.8, 6.0), "4": (0.5, 4.0)} if layers is None else layers
    history = History()
    for k, loss in enumerate(losses):
        at_k = {name: value[k] if isinstance(value, list) else value for name, value in {**HEALTHY, **values}.items()}
        by_layer = {
            "gradient_norm": {name: g[k] if isinstance(g, list) else g for name, (g, _) in layers.items()},
            "weight_norm": {name: w for name, (_, w) in layers.items()},
        }
        history.append(
            Record(
                step=10 * k,
                time_s=0.01,
                loss=loss,
                batch_size=batch,
                values={name: value for name, value in at_k.items() if value is not None},
                layers=by_layer,
                notes=notes,
                learning_rate=rate,
                vector_layers=vector_layers,
            )
        )
    return history


def kinds(history: History) -> list[tuple[str, str | None]]:
    return [(verdict.kind, verdict.layer) for verdict in verdicts(history)]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 9])
def test_a_healthy_run_has_no_verdict(count):
    assert kinds(run(FALLING[:count])) == []


def test_a_flat_loss_alone_is_no_verdict():
    assert kinds(run(FLAT)) == []
    assert "none of the recorded metrics says why" in summary(run(FLAT))


CASES = {
    # kind of verdict, its layer: what is wrong, what its twin has instead
    ("loss is no number", None): ({"losses": [2.3, 2.0, 5.0, math.inf]}, {"losses": [2.3, 2.0, 5.0, 1e30]}),
    ("learning rate too high", None): ({"losses": FLAT, "rate": 0.3}, {"losses": FLAT, "rate": 0.2}),
    ("learning rate too low", None): ({"losses": FLAT, "rate": 1e-4}, {"losses": FLAT, "rate": 5e-3}),
    ("batch too small", None): (
        {"losses": FLAT, "batch": 8, "gradient_coherence": 0.13},
        {"losses": FLAT, "batch": 8, "gradient_coherence": 0.3},
    ),
    ("batch larger than needed", None): ({"gradient_coherence": 0.9}, {"gradient_coherence": 0.05}),
    ("vanishing gradients", "0"): (
        {"layers": {"0": (1e-5, 1.0), "2": (1e-3, 1.0), "4": (1.0, 1.0)}},
        {"layers": {"0": (0.01, 1.0), "2": (0.1, 1.0), "4": (1.0, 1.0)}},
    ),
    ("exploding gradients", "0"): (
        {"layers": {"0": (1e5, 1.0), "2": (1e3, 1.0), "4": (1.0, 1.0)}},
        {"layers": {"0": (100.0, 1.0), "2": (10.0, 1.0), "4": (1.0, 1.0)}},
    ),
    ("dead layer", "2"): (
        {"layers": {"0": (0.0, 1.0), "2": (0.0, 1.0), "4": (1.0, 1.0)}},
        {"layers": {"0": (0.1, 1.0), "2": (0.2, 1.0), "4": (1.0, 1.0)}},
    ),
    ("exploding gradients", None): ({"gradient_norm": 5e3, "top_curvature": 8.0}, {"gradient_norm": 500.0}),
    ("collapsed gradient rank", None): (
        {"losses": FLAT, "relative_gradient_rank": 1 / 60},
        {"losses": FLAT, "relative_gradient_rank": 3 / 60},
    ),
    ("shattered gradients", None): (
        {"losses": FLAT, "relative_input_gradient_rank": 0.4},
        {"losses": FALLING, "relative_input_gradient_rank": 0.4},
    ),
    ("gradient confusion", None): (
        {"losses": FLAT, "gradient_confusion": 0.7},
        {"losses": FALLING, "gradient_confusion": 0.7},
    ),
    ("inconsistent steps", None): (
        {"losses": FLAT, "weight_gradient_cosine": -0.2},
        {"losses": FALLING, "weight_gradient_cosine": -0.2},
    ),
}


@pytest.mark.parametrize("expected", CASES)
def test_what_is_wrong_is_said(expected):
    broken, _ = CASES[expected]
    assert kinds(run(**broken)) == [expected]
    (verdict,) = verdicts(run(**broken))
    assert verdict.finding
    assert verdict.remedy
    assert verdict.evidence
    assert str(verdict) in summary(run(**broken))


@pytest.mark.parametrize("expected", CASES)
def test_the_twin_is_silent(expected):
    _, healthy = CASES[expected]
    assert kinds(run(**healthy)) == []


def test_a_collapsed_rank_is_no_fault_where_the_loss_fell():
    for count in (1, 3, 9):
        assert kinds(run(FALLING[:count], relative_gradient_rank=1 / 60)) == []
    solved = [2.3, 1.0, 0.5, *[0.01] * 6]  # few samples have a loss left, and theirs is the gradient
    assert kinds(run(solved, relative_gradient_rank=1 / 60)) == []


def test_a_much_too_high_rate_is_said_before_the_loss_can_tell():
    assert kinds(run(FALLING[:1], rate=2.0)) == [("learning rate too high", None)]
    assert kinds(run(FALLING[:1], rate=1.0)) == []
    assert kinds(run(FALLING, rate=2.0)) == []  # as under Adam: it falls all the same


def test_the_remedy_for_the_rate_lies_below_the_bound():
    (verdict,) = verdicts(run(FLAT, rate=0.4))
    assert verdict.evidence == pytest.approx({"lr": 0.4, "2 / curvature": 0.25, "lr * curvature / 2": 1.6})
    assert "For SGD try 0.1," in verdict.remedy


def test_a_condition_number_stands_in_for_the_curvature():
    # lambda >= kappa |g| / |w| = 80 * 1 / 10
    assert kinds(run(FLAT, rate=0.3, top_curvature=None, weight_condition_number=80.0)) == [
        ("learning rate too high", None)
    ]
    assert kinds(run(FLAT, rate=0.3, top_curvature=None)) == []
    assert kinds(run(FLAT, rate=None)) == []


def test_the_loss_that_ended_names_the_rate_where_that_was_the_cause():
    losses = [2.3, 2.0, 5.0, math.nan]
    steep, too_high = verdicts(run(losses, rate=2.0))
    assert too_high.kind == "learning rate too high"
    (gentle,) = verdicts(run(losses))
    assert steep.evidence["lr * curvature / 2 before"] == 8.0
    assert steep.evidence["step"] == 30
    assert steep.evidence["last finite loss"] == 5.0
    assert "learning rate was beyond" in steep.remedy
    assert "learning rate was beyond" not in gentle.remedy
    assert kinds(run([math.nan])) == [("loss is no number", None)]


def test_a_head_that_starts_at_zero_is_not_dead():
    layers = {"0": ([0.0, 0.1, 0.2], 1.0), "2": ([0.0, 0.1, 0.2], 1.0), "4": (1.0, 1.0)}
    for count in (1, 2, 3):
        assert kinds(run(FALLING[:count], layers=layers)) == []


def test_gradients_are_compared_over_depth_and_not_between_kinds_of_layers():
    # As in a transformer: projections start small, and normalisations have gains of 1.
    sizes = {"norm": 1e-4, "attn": 0.01, "project": 30.0}
    layers = {f"h.{k}.{kind}": (size * (1 + k), 1.0) for k in range(3) for kind, size in sizes.items()}
    vectors = ("h.0.norm", "h.1.norm", "h.2.norm")
    assert kinds(run(layers={"embed": (1.0, 1.0), **layers}, vector_layers=vectors)) == []
    broken = {**layers, "h.0.attn": (100.0, 1.0)}
    assert kinds(run(layers=broken, vector_layers=vectors)) == [("exploding gradients", "h.0.attn")]
    others = {"first": (0.1, 1.0), **layers, "head": (200.0, 1.0)}
    assert kinds(run(layers=others, vector_layers=vectors)) == [("vanishing gradients", "first")]
    # In a plain sequence names do not tell the kind.
    sequence = {"0": (1.0, 1.0), "1": (1e-4, 1.0), "3": (0.5, 1.0)}
    assert kinds(run(layers=sequence, vector_layers=("1",))) == []
    assert kinds(run(layers=sequence)) == [("exploding gradients", "0")]


def test_faults_silence_what_they_explain():
    layers = {"0": (0.0, 1.0), "2": (0.0, 1.0), "4": (1.0, 1.0)}
    history = run(FLAT, layers=layers, rate=1e-6, gradient_confusion=0.9, relative_input_gradient_rank=0.5)
    assert kinds(history) == [("dead layer", "2")]


def test_single_outliers_do_not_speak():
    spike = [8.0] * 8 + [8e3]
    assert kinds(run(FALLING, top_curvature=spike)) == []


def test_noise_scale_without_coherence():
    def small(scale):
        return kinds(run(FLAT, batch=8, gradient_coherence=None, gradient_noise_scale=scale))

    assert small(1000.0) == [("batch too small", None)]
    assert small(-30.0) == small(math.inf) == [("batch too small", None)]  # more noise than such a batch can tell
    assert small(40.0) == small(None) == small(math.nan) == []


def test_noise_scale_from_coherence_is_a_ratio_of_averages():
    # b (1 - c) / (b c - 1), numerators and denominators summed over the last five records
    coherence = [0.135] * 8 + [0.12]
    (verdict,) = verdicts(run(FLAT, batch=8, gradient_coherence=coherence))
    assert verdict.kind == "batch too small"
    expected = (4 * 8 * 0.865 + 8 * 0.88) / (4 * 0.08 - 0.04)
    assert verdict.evidence == pytest.approx({"batch size": 8, "noise scale": expected})


def test_summary_is_readable():
    assert summary(History()) == "No records yet."
    text = summary(run(FALLING, notes=("batch norm couples the samples",)))
    assert text.splitlines() == [
        "9 records, steps 0 to 80; loss 2.3 to 0.7.",
        "The loss falls, and nothing stands out.",
        "Note: batch norm couples the samples",
    ]
    text = summary(run(FALLING[:2], top_curvature=None, gradient_confusion=None))
    assert "Too few records to say whether the loss falls" in text
    assert (
        "Not looked at, for want of records: learning rate (top_curvature and an optimizer); "
        "confusion (gradient_confusion)." in text
    )


def test_values_that_are_not_finite_do_no_harm():
    history = run(FLAT, **dict.fromkeys(HEALTHY, math.nan))
    assert kinds(history) == []
    history = run(FALLING, layers={"0": (math.nan, 1.0), "2": (1.0, 0.0), "4": (1.0, 1.0)})
    assert kinds(history) == []
    assert kinds(run(FALLING, layers={})) == []


# The same on networks: each is broken in one way, and its twin is the same network without that.


def task():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 12, generator=generator, dtype=torch.float64)
    teacher = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, (x @ teacher + 0.5 * torch.randn(512, 4, generator=generator, dtype=torch.float64)).argmax(1)


def mlp(*widths: int, gain: float = 1.0, activation=nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), activation()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        layers[-2].weight.data.mul_(gain)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers, nn.Linear(widths[-1], 4, dtype=torch.float64))


def trained(model, *, rate=0.1, batch=32, x=None, y=None, metrics=("default",)) -> list[tuple[str, str | None]]:
    """Verdicts on sixty steps, measured at every fifth."""
    own_x, own_y = task()
    x, y = own_x if x is None else x, own_y if y is None else y
    generator = torch.Generator().manual_seed(0)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=rate), nn.CrossEntropyLoss()
    with Diagnostics(model, criterion, every=5, metrics=metrics).attach(optimizer) as diagnostics:
        for _ in range(60):
            index = torch.randint(len(x), (batch,), generator=generator)
            optimizer.zero_grad()
            criterion(model(x[index]), y[index]).backward()
            optimizer.step()
    return kinds(diagnostics.history)


def with_bias(model: nn.Sequential, bias: float) -> nn.Sequential:
    with torch.no_grad():
        model[2].bias.fill_(bias)
    return model


CURVATURE = ("default", "top_curvature")


def test_network_with_a_rate_too_high():
    verdict = [("learning rate too high", None)]
    assert trained(mlp(12, 24, 24, activation=nn.Tanh), rate=5.0, metrics=CURVATURE) == verdict
    assert trained(mlp(12, 24, 24, activation=nn.Tanh), rate=0.3, metrics=CURVATURE) == []


def test_network_with_a_rate_too_low():
    assert trained(mlp(12, 24, 24), rate=1e-6, metrics=CURVATURE) == [("learning rate too low", None)]
    assert trained(mlp(12, 24, 24), metrics=CURVATURE) == []


def test_network_whose_loss_ends():
    found = trained(mlp(12, 24, 24), rate=1e8)
    assert found[0] == ("loss is no number", None)
    assert trained(mlp(12, 24, 24)) == []


def test_network_with_a_dead_layer():
    assert trained(with_bias(mlp(12, 24, 24), -50.0)) == [("dead layer", "2")]
    assert trained(with_bias(mlp(12, 24, 24), 0.1)) == []


def test_network_whose_gradients_vanish():
    assert trained(mlp(*[12] * 9, gain=0.2, activation=nn.Tanh), rate=0.01) == [("vanishing gradients", "0")]
    assert trained(mlp(*[12] * 9, gain=0.8, activation=nn.Tanh), rate=0.01) == []


def test_network_whose_gradients_explode():
    assert trained(mlp(*[12] * 9, gain=4.0), rate=1e-12) == [("exploding gradients", None)]
    assert trained(mlp(*[12] * 9)) == []


def test_network_with_samples_that_say_the_same():
    x, y = task()
    assert trained(mlp(12, 24, 24), x=1 + 0.01 * x, y=torch.zeros_like(y), batch=64, rate=0.01) == [
        ("batch larger than needed", None)
    ]
    assert trained(mlp(12, 24, 24), batch=64) == []


def test_network_with_an_outlier():
    x, y = task()
    x, y = x[:8], y[:8].clone()
    outlier = x.clone()
    outlier[0] *= 100.0
    y[0] = mlp(12, 24, 24)(outlier[:1]).argmin()  # as wrong as can be
    assert trained(mlp(12, 24, 24), x=outlier, y=y, rate=1e-7) == [("collapsed gradient rank", None)]
    assert trained(mlp(12, 24, 24), x=x, y=y, rate=1e-7) == []


def test_network_with_batches_of_noise():
    x, y = task()
    labels = torch.randint(4, y.shape, generator=torch.Generator().manual_seed(5))
    assert trained(mlp(12, 24, 24), x=x, y=labels, batch=4, rate=0.003) == [("batch too small", None)]
    assert trained(mlp(12, 24, 24), batch=32) == []


def test_network_whose_units_are_of_unequal_scale():
    """The same function: the first layer's weights divided by 30, the second's multiplied by it."""
    unequal = mlp(12, 24, 24)
    with torch.no_grad():
        unequal[0].weight.div_(30.0)
        unequal[2].weight.mul_(30.0)
    assert trained(unequal, rate=1e-6) == [("exploding gradients", "0")]
    assert trained(mlp(12, 24, 24)) == []


def test_network_with_labels_that_contradict_each_other():
    x, y = task()
    x = x[:8].repeat(4, 1)
    contradictory, consistent = torch.arange(4).repeat_interleave(8), y[:8].repeat(4)
    assert trained(mlp(12, 24, 24), x=x, y=contradictory, rate=0.03) == [("gradient confusion", None)]
    assert trained(mlp(12, 24, 24), x=x, y=consistent, rate=0.03) == []


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def test_network_that_no_small_step_is_small_for():
    x, _ = task()
    turning = ("default", "weight_gradient_cosine")
    found = trained(mlp(12, 24, 24, activation=Sine), x=3000.0 * x, rate=0.01, metrics=turning)
    assert ("inconsistent steps", None) in found
    assert trained(mlp(12, 24, 24, activation=Sine), metrics=turning) == []


class Skip(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def ten_layers(block: type[nn.Sequential], gain: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(12, 24)]
    for _ in range(10):
        layer = nn.Linear(24, 24)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        layers.append(block(layer, nn.ReLU()))
    return nn.Sequential(*layers, nn.Linear(24, 4)).double()


def test_network_whose_input_gradients_are_noise():
    """The thesis's example and its remedy."""
    ranks = ("default", "relative_input_gradient_rank")
    assert trained(ten_layers(nn.Sequential, 2**0.5), rate=0.01, metrics=ranks) == [("shattered gradients", None)]
    assert trained(ten_layers(Skip, 0.3), rate=0.01, metrics=ranks) == []


def test_every_kind_of_verdict_has_a_broken_run():
    said = set(re.findall(r'kind="([^"]+)"', inspect.getsource(checks)))
    assert said <= {kind for kind, _ in CASES}
