"""The Jacobian operator against one ``autograd.grad`` per row, over networks of every kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.oracles import jacobian as oracle
from tests.oracles import tolerance
from tests.zoo import ZOO, Case
from torchgeom_optim.geometry import factors
from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.jacobian import Jacobian, JacobianMemoryError
from torchgeom_optim.geometry.jacobian_gram import carried_to_outputs, coordinates_of_outputs, sphere_basis

HEADS = ["outputs", "loss", "log_probabilities", "sqrt_probabilities"]
CLOSE = tolerance(condition=1e3)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def head_arguments(of: str, targets: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {"of": of}
    if of in ("loss", "log_probabilities"):
        arguments["targets"] = targets
    if of == "loss":
        arguments["loss_fn"] = nn.CrossEntropyLoss(label_smoothing=0.1)
    return arguments


def head_of_sample(of: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], Tensor]:
    def values(i: int) -> Tensor:
        z = model(x[i : i + 1])
        if of == "outputs":
            return z
        if of == "loss":
            return F.cross_entropy(z, y[i : i + 1], label_smoothing=0.1)
        p = z.exp() / z.exp().sum()
        return p[0, y[i]].log() if of == "log_probabilities" else 2 * p.sqrt()

    return values


def small_mlp(seed: int = 0, inputs: int = 3, outputs: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def data(n: int = 5, inputs: int = 3, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


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


@pytest.mark.parametrize("classes", [2, 5])
def test_the_directions_of_square_roots_of_probabilities(classes: int) -> None:
    f = 2 * torch.softmax(torch.randn(4, classes).double() * 20, 1).sqrt()
    R = sphere_basis(f)
    torch.testing.assert_close(R.mT @ R, torch.eye(classes - 1).double().expand(4, -1, -1), **CLOSE)
    torch.testing.assert_close(f[:, None] @ R, torch.zeros(4, 1, classes - 1).double(), **CLOSE)


def test_gram_in_a_basis_of_the_outputs_is_that_of_the_rows_in_it() -> None:
    model, (x, _) = small_mlp(), data()
    J = Jacobian(model, x, of="sqrt_probabilities", batch_size=2)
    rows = J.dense()
    gram, R = J.gram_in_basis()
    assert (gram.shape, R.shape) == ((10, 10), (5, 3, 2))
    wide = torch.block_diag(*R)
    torch.testing.assert_close(gram, wide.T @ rows @ rows.T @ wide, **CLOSE)
    torch.testing.assert_close(wide @ gram @ wide.T, rows @ rows.T, **CLOSE)
    u, v = torch.randn(15, 2).double(), torch.randn(10, 2).double()
    torch.testing.assert_close(coordinates_of_outputs(u, R), wide.T @ u, **CLOSE)
    torch.testing.assert_close(carried_to_outputs(v, R), wide @ v, **CLOSE)
    every, one = Jacobian(model, x).gram_in_basis()
    torch.testing.assert_close(one, torch.eye(3).double().expand(5, -1, -1), rtol=0, atol=0)
    torch.testing.assert_close(every, Jacobian(model, x).gram(), rtol=0, atol=0)


@pytest.mark.parametrize("num_samples", [41, 60])
def test_gram_of_many_samples(num_samples: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    model, x = model.double(), torch.randn(num_samples, 1, 4, 4).double()
    expected = oracle(lambda i: model(x[i : i + 1]), len(x), trainable(model))
    gram = Jacobian(model, x, batch_size=25).gram()
    torch.testing.assert_close(gram, expected @ expected.T, **CLOSE)
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=0)


def test_a_bias_whose_layer_has_another_weight_keeps_its_own_products() -> None:
    class Apart(nn.Module):
        """The bias sees other gradients than the weight of the layer that it is named after."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(3, 4), nn.Linear(4, 4)
            self.other.bias = self.layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.tanh(self.layer(x)))

    model, (x, _) = Apart().double(), data()
    expected = oracle(lambda i: model(x[i : i + 1]), len(x), trainable(model))
    J = Jacobian(model, x, batch_size=2)
    torch.testing.assert_close(J.gram(), expected @ expected.T, **CLOSE)
    assert J.ways["gram"] == "layers' factors for 3 of 3 parameters"


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


class Pooled(nn.Module):
    """Tokens with learned positions, then a mean over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(7, 3), nn.Embedding(6, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        return self.head(torch.tanh(self.tokens(tokens) + self.positions(places))).mean(1)


class TwoInputs(nn.Module):
    """Two arguments and a constant one; the second may come in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, extra: Any, scale: float = 1.0) -> dict[str, Tensor]:
        extra = extra["z"] if isinstance(extra, dict) else extra
        return {"logits": scale * self.b(torch.tanh(self.a(x)) * extra)}


def test_inputs_in_tuples_and_mappings() -> None:
    model = TwoInputs().double()
    x, z = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    expected = oracle(lambda i: model(x[i : i + 1], z[i : i + 1])["logits"], 4, trainable(model))
    pairs = [((x[:3], z[:3]), None), ((x[3:], z[3:]), None)]
    for inputs in ((x, z), {"x": x, "extra": z}, (x, {"z": z}), {"x": x, "extra": {"z": z}, "scale": 1.0}, pairs):
        J = Jacobian(model, inputs, select=lambda out: out["logits"], batch_size=2)
        torch.testing.assert_close(J.dense(), expected, **CLOSE)
        torch.testing.assert_close(J.T @ torch.ones(8).double(), expected.sum(0), **CLOSE)


def test_mini_batches_of_several_lengths() -> None:
    model = Pooled().double()
    batches = [torch.randint(7, (2, 4)), torch.randint(7, (3, 5)), torch.randint(7, (5, 5))]
    samples = [x[i : i + 1] for x in batches for i in range(len(x))]
    expected = oracle(lambda i: model(samples[i]), 10, trainable(model))
    J = Jacobian(model, batches)
    torch.testing.assert_close(J.gram(), expected @ expected.T, **CLOSE)
    torch.testing.assert_close(J.dense(), expected, **CLOSE)
    assert "3 of 4" in J.ways["gram"]  # as many positions as samples do not deceive it


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


@pytest.mark.parametrize("of", HEADS)
def test_mini_batches_change_nothing(of: str) -> None:
    model, (x, y) = small_mlp(), data(7)
    whole = Jacobian(model, x, **head_arguments(of, y))
    arguments = head_arguments(of, y)
    arguments.pop("targets", None)
    v, u = torch.randn(whole.shape[1]).double(), torch.randn(whole.shape[0]).double()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for J in (
        Jacobian(model, x, **head_arguments(of, y), batch_size=2),
        Jacobian(model, loader, **arguments),
        Jacobian(model, list(loader), batch_size=2, **arguments),
    ):
        torch.testing.assert_close(J.dense(), whole.dense(), **CLOSE)
        torch.testing.assert_close(J @ v, whole @ v, **CLOSE)
        torch.testing.assert_close(J.T @ u, whole.T @ u, **CLOSE)
        torch.testing.assert_close(J.gram(), whole.gram(), **CLOSE)


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


# Which way it goes


class Rounded(nn.Module):
    """Tells the backward pass something of its own, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.kind == "no_grad":
            with torch.no_grad():
                scale = self.fc.weight.norm()
            return y * scale
        if self.kind == "function":
            return Straight.apply(y)
        if self.kind == "branch":
            return y if float(y.detach().sum()) > 0 else 2 * y
        if self.kind == "tensor hook" and y.requires_grad:
            y.register_hook(lambda g: 3 * g)
        if self.kind == "custom":
            return y * self.fc.bias
        if self.kind == "checkpoint":
            return checkpoint(self.fc, torch.tanh(x), use_reentrant=False)
        if self.kind == "reentrant":
            return checkpoint(self.fc, torch.tanh(x).requires_grad_(), use_reentrant=True)
        return y


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient on as it is; nothing that a transform could use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


@pytest.mark.parametrize("kind", ["no_grad", "function", "branch", "tensor hook", "checkpoint"])
def test_is_what_the_backward_pass_computes(kind: str) -> None:
    model, (x, _) = Rounded(kind).double(), data(4)
    expected = oracle(lambda i: model(x[i : i + 1]), 4, trainable(model))
    for dtype in (None, torch.float64):
        J = Jacobian(model, x, dtype=dtype, batch_size=1 if kind == "branch" else None)
        v, u = torch.randn(J.shape[1], 2).double(), torch.randn(J.shape[0], 2).double()
        torch.testing.assert_close(J @ v, expected @ v, **CLOSE)
        torch.testing.assert_close(J.T @ u, expected.T @ u, **CLOSE)
        torch.testing.assert_close(J.gram(), expected @ expected.T, **CLOSE)
    if kind == "no_grad":
        assert J.ways["product"].startswith("backward")


def test_padding_tokens_that_the_first_samples_do_not_show() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten(), nn.Linear(4, 2)).double()
    tokens = torch.tensor([[1, 2], [3, 4], [0, 0], [0, 1]])
    J = Jacobian(model, tokens)
    v = torch.randn(J.shape[1]).double()
    torch.testing.assert_close(J @ v, J.dense() @ v, **CLOSE)


def test_factors_are_checked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3)).double()
    x = torch.randn(4, 4, 3, 3).double()
    whole = Jacobian(model, x).gram()
    monkeypatch.setattr(factors, "WORKSPACE_BYTES", 1)
    J = Jacobian(model, x)
    torch.testing.assert_close(J.gram(), whole, **CLOSE)
    assert J.ways["gram"] == "layers' factors for 4 of 4 parameters"


def test_ways_are_told() -> None:
    J = Jacobian(small_mlp(), data()[0])
    assert J.ways == {}
    J @ torch.ones(J.shape[1]).double()
    J.gram()
    assert J.ways["product"].startswith("forward mode")
    assert J.ways["gram"] == "layers' factors for 4 of 4 parameters"
    custom = Jacobian(Rounded("custom").double(), data()[0])
    custom.gram()
    assert custom.ways["gram"] == "layers' factors for 1 of 2 parameters, rows for the others"
    assert custom.ways["rows"] == "samples batched by vmap"


# Memory


@pytest.mark.parametrize("of", ["outputs", "sqrt_probabilities"])
@pytest.mark.parametrize("kind", ["rule", "no rule"])
def test_gram_in_parts_is_the_same(kind: str, of: str) -> None:
    model, (x, _) = small_mlp() if kind == "rule" else Rounded("custom").double(), data(9)
    whole = Jacobian(model, x, of=of, batch_size=2)
    expected = whole.gram()
    ways = set()
    for percent in range(20, 101, 4):
        limit = percent * whole.predicted_bytes("gram") // 100
        J = Jacobian(model, x, of=of, batch_size=2, memory_limit=limit)
        try:
            torch.testing.assert_close(J.gram(), expected, **CLOSE)
        except JacobianMemoryError:
            continue
        torch.testing.assert_close(J.gram(), J.gram().T, rtol=0, atol=0)
        ways.add(J.ways["gram"])
    assert "rows, held in part and computed again" in ways
    assert len(ways) > 1


@pytest.mark.parametrize("operation", ["product", "transposed_product", "rows", "dense", "gram"])
def test_memory_is_predicted_and_refused(operation: str) -> None:
    model, (x, _) = small_mlp(), data(8)
    J = Jacobian(model, x)
    needed = J.predicted_bytes(operation, 1)
    results = {"product": 24, "transposed_product": 31, "rows": 0, "dense": 24 * 31, "gram": 24 * 24}
    assert needed >= 8 * results[operation]
    small = Jacobian(model, x, memory_limit=100)
    calls = {
        "product": lambda: small @ torch.ones(31).double(),
        "transposed_product": lambda: small.T @ torch.ones(24).double(),
        "rows": small.rows,
        "dense": small.dense,
        "gram": small.gram,
    }
    with pytest.raises(JacobianMemoryError, match=f"{operation} would take .*memory_limit allows") as caught:
        calls[operation]()
    assert caught.value.needed > caught.value.allowed == 100
    Jacobian(model, x, memory_limit=math.inf).gram()


# A guest in the user's program


def test_leaves_no_trace() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    model = nn.utils.spectral_norm(model[5]) and model
    x = torch.randn(4, 1, 4, 4).double()
    model.train()
    model[3].eval()
    model(x).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    attribute = model[5].weight
    modes = [m.training for m in model.modules()]
    seen: list[Tensor] = []
    random = torch.get_rng_state()
    with Capture([model[0]], lambda module, x, y: seen.append), torch.no_grad():
        J = Jacobian(model, DataLoader(x, batch_size=2), of="sqrt_probabilities")
        J.gram()
        J @ torch.ones(J.shape[1]).double()
        J.T @ torch.ones(J.shape[0]).double()
        assert not torch.is_grad_enabled()
    assert seen == []
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [m.training for m in model.modules()]
    assert model[5].weight is attribute
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_training_modes_are_evaluated_as_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, _ = data()
    training = Jacobian(model.train(), x).dense()
    torch.testing.assert_close(training, Jacobian(model.eval(), x).dense(), rtol=0, atol=0)
    torch.testing.assert_close(training, Jacobian(model, x, keep_modes=True).dense(), rtol=0, atol=0)


def test_modes_are_put_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().train()
    with pytest.raises(RuntimeError):
        Jacobian(model, torch.randn(4, 7).double())
    assert all(m.training for m in model.modules())


def test_autocast_of_the_caller_is_not_felt() -> None:
    model, (x, _) = small_mlp().float(), data()
    expected = Jacobian(model, x.float()).gram()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(Jacobian(model, x.float()).gram(), expected, **tolerance(torch.float32, 10))


def test_inference_mode_of_the_caller_is_not_felt() -> None:
    model = small_mlp()
    expected = Jacobian(model, data()[0]).dense()
    with torch.inference_mode():
        J = Jacobian(model, data()[0])
        v, u = torch.randn(J.shape[1], 2).double(), torch.randn(J.shape[0], 2).double()
        results = J @ v, J.T @ u, J.gram()
    for got, wanted in zip(results, (expected @ v, expected.T @ u, expected @ expected.T), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_compiled_model_runs_uncompiled() -> None:
    model, (x, _) = small_mlp(), data()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(Jacobian(compiled, x).dense(), Jacobian(model, x).dense(), rtol=0, atol=0)


# Bad input


class Stream(IterableDataset[Tensor]):
    """Gives its batches once."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[Tensor]:
        self.passes -= 1
        return iter([torch.ones(2, 3).double()] if self.passes >= 0 else [])


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


def test_data_that_changes_between_passes_is_noticed() -> None:
    model = small_mlp()
    dry = Jacobian(model, DataLoader(Stream(3), batch_size=None))
    with pytest.raises(RuntimeError, match="ran dry after 0"):
        [dry.gram() for _ in range(3)]
    x, _ = data(4)
    batches = [x[:2], x[2:]]
    J = Jacobian(model, batches)
    batches.reverse()
    with pytest.raises(RuntimeError, match="mini-batch 0 differs"):
        J.gram()
    batches[:] = [x[[1, 0]], x[2:]]
    with pytest.raises(RuntimeError, match="mini-batch 0 differs"):
        J.gram()


def test_outputs_of_changing_number_are_refused() -> None:
    model = nn.Linear(3, 2).double()
    J = Jacobian(model, [torch.randn(2, 4, 3).double(), torch.randn(2, 5, 3).double()])
    with pytest.raises(ValueError, match="Pad sequences"):
        J.gram()
