"""J J' from layers' factors, in parts, and in the directions that square roots of probabilities span."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.geometry.oracles_jacobian import (
    CLOSE,
    Rounded,
    data,
    small_mlp,
    trainable,
)
from tests.oracles import jacobian as oracle
from torchgeom_optim.geometry import factors
from torchgeom_optim.geometry.jacobian import Jacobian, JacobianMemoryError
from torchgeom_optim.geometry.jacobian_gram import carried_to_outputs, coordinates_of_outputs, sphere_basis


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


def test_factors_are_checked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3)).double()
    x = torch.randn(4, 4, 3, 3).double()
    whole = Jacobian(model, x).gram()
    monkeypatch.setattr(factors, "WORKSPACE_BYTES", 1)
    J = Jacobian(model, x)
    torch.testing.assert_close(J.gram(), whole, **CLOSE)
    assert J.ways["gram"] == "layers' factors for 4 of 4 parameters"


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
