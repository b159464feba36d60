"""J J' from layers' factors, in parts, and in the directions that square roots of probabilities span."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.geometry.oracles_jacobian import (
    CLOSE,
    Rounded,
    data,
    small_mlp,
)
from torchgeom_optim.geometry import factors
from torchgeom_optim.geometry.jacobian import Jacobian, JacobianMemoryError
from torchgeom_optim.geometry.jacobian_gram import sphere_basis


@pytest.mark.parametrize("classes", [2, 5])
def test_the_directions_of_square_roots_of_probabilities(classes: int) -> None:
    f = 2 * torch.softmax(torch.randn(4, classes).double() * 20, 1).sqrt()
    R = sphere_basis(f)
    torch.testing.assert_close(R.mT @ R, torch.eye(classes - 1).double().expand(4, -1, -1), **CLOSE)
    torch.testing.assert_close(f[:, None] @ R, torch.zeros(4, 1, classes - 1).double(), **CLOSE)


def test_factors_are_checked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3)).double()
    x = torch.randn(4, 4, 3, 3).double()
    whole = Jacobian(model, x).gram()
    monkeypatch.setattr(factors, "WORKSPACE_BYTES", 1)
    J = Jacobian(model, x)
    torch.testing.assert_close(J.gram(), whole, **CLOSE)
    assert J.ways["gram"] == "layers' factors for 4 of 4 parameters"


@pytest.mark.parametrize("kind", ["rule", "no rule"])
def test_gram_in_parts_is_the_same(kind: str) -> None:
    model, (x, _) = small_mlp() if kind == "rule" else Rounded("custom").double(), data(9)
    whole = Jacobian(model, x, batch_size=2)
    expected = whole.gram()
    ways = set()
    for percent in range(20, 101, 4):
        limit = percent * whole.predicted_bytes("gram") // 100
        J = Jacobian(model, x, batch_size=2, memory_limit=limit)
        try:
            torch.testing.assert_close(J.gram(), expected, **CLOSE)
        except JacobianMemoryError:
            continue
        torch.testing.assert_close(J.gram(), J.gram().T, rtol=0, atol=0)
        ways.add(J.ways["gram"])
    assert "rows, held in part and computed again" in ways
    assert len(ways) > 1
