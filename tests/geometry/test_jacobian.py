"""The Jacobian operator against one ``autograd.grad`` per row, over networks of every kind."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.geometry.oracles_jacobian import (
    CLOSE,
    HEADS,
    Rounded,
    data,
    head_arguments,
    head_of_sample,
    small_mlp,
    trainable,
)
from tests.oracles import jacobian as oracle
from tests.oracles import tolerance
from tests.zoo import ZOO, Case
from torchgeom_optim.geometry.jacobian import Jacobian

# Exactness


@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_agrees_with_autograd_row_by_row(case: Case) -> None:
    model = case.model()
    x, _ = case.batch()
    expected = oracle(lambda i: model(x[i : i + 1]), len(x), trainable(model))
    J = Jacobian(model, x, batch_size=3)
    v, u = torch.randn(J.shape[1], 2).double(), torch.randn(J.shape[0], 2).double()
    assert J.shape == tuple(expected.shape)
    torch.testing.assert_close(J.dense(), expected, **CLOSE)
    torch.testing.assert_close(torch.cat(list(J.rows())), expected, **CLOSE)
    torch.testing.assert_close(J @ v, expected @ v, **CLOSE)
    torch.testing.assert_close(J @ v[:, 0], expected @ v[:, 0], **CLOSE)
    torch.testing.assert_close(J.T @ u, expected.T @ u, **CLOSE)
    torch.testing.assert_close(J.T @ u[:, 0], expected.T @ u[:, 0], **CLOSE)
    torch.testing.assert_close(J.gram(), expected @ expected.T, **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(J.gram() / len(x), expected @ expected.T, **CLOSE)


@pytest.mark.parametrize("of", HEADS)
@pytest.mark.parametrize("case", [c for c in ZOO if c.name in ("mlp", "cnn", "tied_embedding", "lstm")], ids=repr)
def test_every_head(case: Case, of: str) -> None:
    model = case.model()
    x, y = case.batch()
    expected = oracle(head_of_sample(of, model, x, y), len(x), trainable(model))
    J = Jacobian(model, x, **head_arguments(of, y), batch_size=3)
    v, u = torch.randn(J.shape[1], 2).double(), torch.randn(J.shape[0], 2).double()
    torch.testing.assert_close(J.dense(), expected, **CLOSE)
    torch.testing.assert_close(J @ v, expected @ v, **CLOSE)
    torch.testing.assert_close(J.T @ u, expected.T @ u, **CLOSE)
    torch.testing.assert_close(J.gram(), expected @ expected.T, **CLOSE)


def test_square_roots_of_probabilities_give_the_fisher_matrix() -> None:
    model, (x, _) = small_mlp(), data()
    fisher = torch.zeros(31, 31, dtype=torch.float64)
    for i in range(len(x)):
        log_p = torch.log_softmax(model(x[i]), 0)
        for c in range(3):
            grads = torch.autograd.grad(log_p[c], trainable(model), retain_graph=True)
            score = torch.cat([g.reshape(-1) for g in grads])
            fisher += log_p[c].exp().detach() * torch.outer(score, score)
    rows = Jacobian(model, x, of="sqrt_probabilities").dense()
    torch.testing.assert_close(rows.T @ rows, fisher, **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rows.T @ rows / len(x), fisher, **CLOSE)
    outputs = Jacobian(model, x).dense()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(outputs.T @ outputs, fisher, **CLOSE)


def test_square_roots_stay_finite_where_probabilities_underflow() -> None:
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [-2000.0]]))
    assert bool(torch.isfinite(Jacobian(model, torch.ones(2, 1).double(), of="sqrt_probabilities").gram()).all())


def test_gram_and_fisher_have_the_same_nonzero_eigenvalues() -> None:
    model, (x, _) = small_mlp(), data()
    J = Jacobian(model, x, of="sqrt_probabilities")
    rows = J.dense()
    small, large = torch.linalg.eigvalsh(J.gram()), torch.linalg.eigvalsh(rows.T @ rows)
    count = 10  # N (C - 1): each sample's rows weighted by sqrt(p) add up to nothing
    torch.testing.assert_close(small[-count:], large[-count:], **tolerance(condition=float(small[-1] / small[-count])))
    torch.testing.assert_close(small[:-count], torch.zeros(5).double(), **tolerance(condition=float(small[-1])))


def test_a_mean_loss_gradient_is_a_product() -> None:
    model, (x, y) = small_mlp(), data()
    nn.CrossEntropyLoss()(model(x), y).backward()
    J = Jacobian(model, x, y, of="loss", loss_fn=nn.CrossEntropyLoss())
    gradient = J.vectors.named(J.T @ torch.full((5,), 0.2, dtype=torch.float64))
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, **CLOSE)


def test_sequences_of_logits() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4)).double()
    x, y = torch.randint(7, (3, 5)), torch.randint(4, (3, 5))
    J = Jacobian(model, x, y, of="log_probabilities")
    expected = oracle(lambda i: torch.log_softmax(model(x[i]), -1).gather(1, y[i][:, None]).sum(), 3, trainable(model))
    torch.testing.assert_close(J.dense(), expected, **CLOSE)
    assert Jacobian(model, x).shape == (3 * 5 * 4, 37)
    wide = nn.Sequential(nn.Conv1d(2, 4, 1)).double()  # classes along axis 1
    x = torch.randn(3, 2, 5).double()
    J = Jacobian(wide, x, y, of="log_probabilities", class_dim=1)
    expected = oracle(lambda i: -F.cross_entropy(wide(x[i : i + 1]), y[i : i + 1], reduction="sum"), 3, trainable(wide))
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


# Properties


@given(st.sampled_from(HEADS), st.integers(1, 6), st.integers(2, 4), st.integers(1, 3), st.integers(0, 99))
def test_products_are_adjoint(of: str, n: int, classes: int, k: int, seed: int) -> None:
    model = small_mlp(seed, inputs=2, outputs=classes)
    x, y = data(n, 2, classes, seed)
    J = Jacobian(model, x, **head_arguments(of, y), batch_size=1 + seed % 4)
    v, u = torch.randn(J.shape[1], k).double(), torch.randn(J.shape[0], k).double()
    torch.testing.assert_close((J @ v).T @ u, v.T @ (J.T @ u), **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close((J @ v).T @ u, -v.T @ (J.T @ u), **CLOSE)


def test_permuting_samples_permutes_rows() -> None:
    model, (x, _) = small_mlp(), data(6)
    order = torch.randperm(6)
    rows, permuted = Jacobian(model, x).dense(), Jacobian(model, x[order]).dense()
    torch.testing.assert_close(permuted, rows.reshape(6, 3, -1)[order].reshape(18, -1), **CLOSE)


def test_chosen_parameters_are_columns() -> None:
    model, (x, _) = small_mlp(), data()
    model[2].weight.requires_grad_(False)
    rows = Jacobian(model, x, parameters=lambda name, p: True).dense()
    assert Jacobian(model, x).shape == (15, 19)
    torch.testing.assert_close(Jacobian(model, x, parameters=["2.weight"]).dense(), rows[:, 16:28], **CLOSE)
    tied = next(c for c in ZOO if c.name == "tied_linear").model()
    x = torch.randn(3, 5).double()
    alias = Jacobian(tied, x, parameters=["second.weight"])
    torch.testing.assert_close(alias.dense(), Jacobian(tied, x, parameters=["first.weight"]).dense(), rtol=0, atol=0)


def test_vectors_by_name() -> None:
    model, (x, _) = small_mlp(), data()
    J = Jacobian(model, x)
    several = torch.randn(J.shape[1], 3).double()
    for v in (several, several[:, 0]):
        named = J.vectors.named(v)
        assert named["0.weight"].shape[:2] == (4, 3)
        torch.testing.assert_close(J.vectors.flat(named), v, rtol=0, atol=0)
        torch.testing.assert_close(J @ named, J @ v, rtol=0, atol=0)


def test_follows_the_weights() -> None:
    model, (x, _) = small_mlp(), data()
    J = Jacobian(model, x)
    before = J.gram()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.equal(J.gram(), before)
    torch.testing.assert_close(J.gram(), Jacobian(model, x).gram(), rtol=0, atol=0)


def test_double_precision_on_request() -> None:
    model, (x, _) = small_mlp(), data()
    single = copy.deepcopy(model).float()
    exact = Jacobian(copy.deepcopy(single).double(), x.float().double()).gram()
    J = Jacobian(single, x.float(), dtype=torch.float64)
    torch.testing.assert_close(J.gram(), exact, **CLOSE)
    torch.testing.assert_close(Jacobian(single, x.float()).gram(), exact.float(), **tolerance(torch.float32, 10))
    assert {p.dtype for p in single.parameters()} == {torch.float32}


# Bad input


NAN = torch.full((5, 3), math.nan).double()
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("unknown head", {"of": "logits"}, ValueError, "must be one of 'outputs'"),
    ("no loss", {"of": "loss"}, ValueError, "loss_fn belongs to of='loss'"),
    ("stray loss", {"loss_fn": nn.MSELoss()}, ValueError, "loss_fn belongs to of='loss'"),
    ("no targets", {"of": "log_probabilities"}, ValueError, "need a tensor of them"),
    ("batch size", {"batch_size": 0}, ValueError, "at least 1"),
    ("memory limit", {"memory_limit": math.nan}, ValueError, "must be positive"),
    ("integer type", {"dtype": torch.int64}, ValueError, "floating-point"),
    ("unknown name", {"parameters": ["nose"]}, ValueError, r"\['nose'\] are none of the model's"),
    ("nothing chosen", {"parameters": []}, ValueError, "no parameter is chosen"),
    ("nan", {"data": NAN}, ValueError, "not finite"),
    ("empty", {"data": torch.ones(0, 3).double()}, ValueError, "no sample"),
    ("empty list", {"data": []}, ValueError, "no sample"),
    ("generator", {"data": (b for b in [NAN])}, TypeError, "gone through"),
    ("number", {"data": 3}, TypeError, "gone through"),
    ("three parts", {"data": [(NAN, NAN, NAN)]}, ValueError, "3 parts"),
    ("shuffled", {"data": DataLoader(torch.ones(5, 3).double(), shuffle=True)}, ValueError, "shuffle"),
    ("lengths", {"data": (torch.ones(5, 3), torch.ones(4))}, ValueError, r"\[5, 4\]"),
    ("beside", {"data": [torch.ones(5, 3)], "targets": torch.ones(5)}, ValueError, "come with them"),
    ("labels", {"targets": torch.ones(5, 2).long(), "of": "log_probabilities"}, ValueError, "labels of shape"),
    ("classes", {"of": "sqrt_probabilities", "class_dim": 0}, ValueError, "no class axis"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given_data = arguments.pop("data", torch.ones(5, 3).double()) if "data" in arguments else torch.ones(5, 3).double()
    with pytest.raises(error, match=message):
        Jacobian(small_mlp(), given_data, **arguments)


def test_models_without_a_jacobian_are_refused() -> None:
    x, y = data()
    frozen = small_mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is chosen"):
        Jacobian(frozen, x)
    assert Jacobian(frozen, x, parameters=["0.weight"]).shape == (15, 12)
    with pytest.raises(ValueError, match="no parameter is chosen of the model's 0"):
        Jacobian(nn.Tanh(), x)
    norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2)).double()
    with pytest.raises(ValueError, match=r"other samples|more than 1 value"):
        Jacobian(norm, x)
    dropout = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).double().train()
    with pytest.raises(ValueError, match="drew random numbers"):
        Jacobian(dropout, x, keep_modes=True)
    with pytest.raises(TypeError, match="returned tuple"):
        Jacobian(nn.LSTM(3, 2).double(), x[:, None])
    with pytest.raises(ValueError, match="one class"):
        Jacobian(small_mlp(outputs=1), x, of="sqrt_probabilities")
    with pytest.raises(ValueError, match="one number is needed"):
        Jacobian(small_mlp(), x, y, of="loss", loss_fn=lambda out, t: out)
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        Jacobian(nn.Embedding(3, 2, scale_grad_by_freq=True), torch.zeros(2, 1).long())
    with pytest.raises(ValueError, match="use_reentrant=False"):
        Jacobian(Rounded("reentrant").double(), x)
    infinite = small_mlp()
    nn.init.constant_(infinite[2].bias, math.inf)
    with pytest.raises(ValueError, match="not finite"):
        Jacobian(infinite, x)


def test_batch_norm_in_training_mode_is_refused_when_modes_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten()).double().train()
    with pytest.raises(ValueError, match="depend on the other samples"):
        Jacobian(model, torch.randn(4, 1, 3, 3).double(), keep_modes=True)


def test_bad_vectors_are_refused() -> None:
    J = Jacobian(small_mlp(), data()[0])
    P, rows = J.shape[1], J.shape[0]
    for product, length in ((J.product, P), (J.transposed_product, rows)):
        with pytest.raises(ValueError, match=f"= {length} is needed"):
            product(torch.ones(length + 1).double())
        with pytest.raises(ValueError, match="is needed"):
            product(torch.ones(length, 0).double())
        with pytest.raises(TypeError, match="floating-point"):
            product(torch.ones(length).long())
        with pytest.raises(ValueError, match="not finite"):
            product(torch.full((length,), math.nan).double())
    with pytest.raises(ValueError, match="on one side only"):
        J @ {"0.weight": torch.ones(4, 3).double()}
    with pytest.raises(ValueError, match="must be one of"):
        J.predicted_bytes("inverse")
