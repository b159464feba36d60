"""The memory that operations of a Jacobian take, foretold and refused."""

from __future__ import annotations

import math

import pytest
import torch

from tests.geometry.oracles_jacobian import (
    data,
    small_mlp,
)
from torchgeom_optim.geometry.jacobian import Jacobian, JacobianMemoryError


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
    assert ("num_eigenvalues=50" in str(caught.value)) == (operation == "gram")  # what a spectrum asks for
    Jacobian(model, x, memory_limit=math.inf).gram()
