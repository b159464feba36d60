"""Data in mini-batches of every form, the same in every pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.geometry.oracles_jacobian import (
    CLOSE,
    HEADS,
    data,
    head_arguments,
    small_mlp,
    trainable,
)
from tests.oracles import jacobian as oracle
from torchgeom_optim.geometry.jacobian import Jacobian


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


class Stream(IterableDataset[Tensor]):
    """Gives its batches once."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[Tensor]:
        self.passes -= 1
        return iter([torch.ones(2, 3).double()] if self.passes >= 0 else [])


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
