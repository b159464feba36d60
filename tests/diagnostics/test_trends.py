"""Numbers read off a history, against the definitions written out."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.trends import (
    alike_layers,
    curvature_ratio,
    loss_fall,
    noise_scale,
    recent_median,
    relative_gradients,
    stopped_falling,
    top_curvature,
)


def history_of(losses=(1.0,), batch=8, **columns) -> History:
    history = History()
    for k, loss in enumerate(losses):
        values = {name: column[k] for name, column in columns.items()}
        history.append(Record(step=k, time_s=0.0, loss=loss, batch_size=batch, values=values, learning_rate=0.1))
    return history


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12))
def test_recent_median_is_that_of_the_last_five(values):
    history = history_of(values, norm=values)
    assert recent_median(history, lambda record: record.values["norm"]) == median(values[-5:])


def test_recent_median_leaves_out_what_is_not_finite():
    history = history_of([1.0] * 4, norm=[3.0, math.nan, 5.0, math.inf])
    assert recent_median(history, lambda record: record.values["norm"]) == 4.0
    assert math.isnan(recent_median(History(), lambda record: record.loss))


def test_loss_fall():
    assert loss_fall(history_of([4.0, 4.0, 3.0, 3.0, 1.0, 1.0])) == (0.75, 0.0)
    assert loss_fall(history_of([4.0, 4.0, 2.0, 2.0, 1.0, 1.0]), since=1) == (0.5, 0.0)
    fall, error = loss_fall(history_of([5.0, 3.0, 3.0, 3.0, 2.0, 1.0]))
    assert fall == pytest.approx(2.5 / 4)
    assert error == pytest.approx(1.48 * 1.25 * math.hypot(1.0, 0.5) / math.sqrt(2) / 4)
    assert all(map(math.isnan, loss_fall(history_of([3.0] * 5))))
    assert loss_fall(history_of([0.0] * 6)) == (0.0, 0.0)


def test_a_flat_noisy_loss_has_stopped_and_a_falling_one_has_not():
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert stopped_falling(history_of((2.0 + 0.2 * noise).tolist()))
    falling = 2.0 * torch.exp(-torch.arange(30) / 10) * (1 + 0.2 * noise)
    assert not stopped_falling(history_of(falling.tolist()))
    assert not stopped_falling(history_of([2.0] * 3))  # nobody knows yet


def test_a_steep_fall_is_no_chance():
    losses = [2.3, 0.4, 0.2, 0.1, 0.05, 0.02]  # within its thirds it spreads as far as between them
    assert not stopped_falling(history_of(losses), since=0)
    assert stopped_falling(history_of(losses[::-1]), since=0)
    assert stopped_falling(history_of([2.3, 0.4, 0.2, 0.1, 0.5, 0.02]), since=0)  # one late loss among the early ones


def test_curvature_is_measured_or_follows_from_a_condition_number():
    def record(**values):
        return Record(step=0, time_s=0.0, loss=1.0, batch_size=8, values=values, learning_rate=0.5)

    norms = {"gradient_norm": 2.0, "weight_norm": 4.0}
    assert top_curvature(record(top_curvature=3.0, weight_condition_number=90.0, **norms)) == 3.0
    assert top_curvature(record(weight_condition_number=10.0, **norms)) == 5.0
    assert top_curvature(record(weight_condition_number=10.0, weight_condition_number_exact=20.0, **norms)) == 10.0
    assert curvature_ratio(record(weight_condition_number=10.0, **norms)) == 0.5 * 5.0 / 2
    assert math.isnan(top_curvature(record()))
    assert math.isnan(
        curvature_ratio(Record(step=0, time_s=0.0, loss=1.0, batch_size=8, values={"top_curvature": 3.0}))
    )


def test_noise_scale_is_that_of_the_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(8, 5, generator=generator, dtype=torch.float64) + 1.0
    mean = gradients.mean(0)
    trace = ((gradients - mean) ** 2).sum() / 7
    expected = trace / (mean @ mean - trace / 8)
    coherence = float((gradients @ mean).sum() / (gradients**2).sum())
    assert noise_scale(history_of(gradient_coherence=[coherence])) == pytest.approx(float(expected))


def test_noise_scale_of_noise_and_of_nothing():
    assert noise_scale(history_of(gradient_coherence=[0.01])) == math.inf
    assert noise_scale(history_of([1.0] * 3, gradient_noise_scale=[3.0, math.inf, 5.0])) == 5.0
    assert math.isnan(noise_scale(history_of()))
    assert math.isnan(noise_scale(history_of(batch=1, gradient_coherence=[1.0])))


def test_relative_gradients_keep_their_order():
    layers = {
        "gradient_norm": {"b": 1.0, "a": 4.0, "c": math.nan, "d": 1.0},
        "weight_norm": {"b": 2.0, "a": 2.0, "c": 1.0, "d": 0.0},
    }
    record = Record(step=0, time_s=0.0, loss=1.0, batch_size=8, values={}, layers=layers)
    assert list(relative_gradients(record).items()) == [("b", 0.5), ("a", 2.0)]


def test_alike_layers_are_matrices_of_one_name_but_for_numbers():
    names = ["embed", "h.0.norm", "h.0.attn", "h.0.mlp1", "h.10.norm", "h.10.attn", "h.10.mlp1", "norm", "dead", "head"]
    layers = {
        "gradient_norm": dict.fromkeys(names, 1.0),
        "weight_norm": {**dict.fromkeys(names, 1.0), "dead": 0.0},
    }
    norms = ("h.0.norm", "h.10.norm", "norm")
    record = Record(step=0, time_s=0.0, loss=1.0, batch_size=8, values={}, layers=layers, vector_layers=norms)
    assert alike_layers(record) == [["h.0.attn", "h.10.attn"], ["h.0.mlp1", "h.10.mlp1"], ["embed", "head"]]
    assert alike_layers(Record(step=0, time_s=0.0, loss=1.0, batch_size=8, values={})) == [[]]
