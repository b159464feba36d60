"""The view for SciPy's solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.numpy_operator import NumpyOperator

CLOSE = tolerance(condition=1e3)


def jacobian(dtype: torch.dtype = torch.float64) -> Jacobian:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return Jacobian(model, torch.randn(5, 3, dtype=dtype))


@pytest.mark.parametrize("of", ["J", "JJ'", "J'J"])
def test_products_are_those_of_the_dense_matrix(of: str) -> None:
    J = jacobian()
    D = J.dense()
    matrix = 0.2 * {"J": D, "JJ'": D @ D.T, "J'J": D.T @ D}[of]
    view = NumpyOperator(J, of, scale=0.2)  # type: ignore[arg-type]
    assert view.shape == tuple(matrix.shape)
    v, u = torch.randn(view.shape[1], 3).double(), torch.randn(view.shape[0], 3).double()
    torch.testing.assert_close(torch.from_numpy(view.matmat(v.numpy())), matrix @ v, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(view.matvec(v[:, 0].numpy())), matrix @ v[:, 0], **CLOSE)
    torch.testing.assert_close(torch.from_numpy(view.matvec(v[:, :1].numpy())), matrix @ v[:, :1], **CLOSE)
    torch.testing.assert_close(torch.from_numpy(view.rmatmat(u.numpy())), matrix.T @ u, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(view.rmatvec(u[:, 0].numpy())), matrix.T @ u[:, 0], **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.from_numpy(view.matmat(v.numpy())), 5 * matrix @ v, **CLOSE)


def test_scipy_takes_it_as_it_is() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="scipy comes with scikit-learn, an extra")
    J = jacobian()
    singular = torch.linalg.svdvals(J.dense())
    values = linalg.eigsh(NumpyOperator(J, "J'J", scale=1 / 5), k=3, return_eigenvectors=False)
    expected = singular[:3].flip(0).square() / 5
    torch.testing.assert_close(torch.from_numpy(np.sort(values)), expected, **CLOSE)
    values = linalg.svds(NumpyOperator(J, "J"), k=2, return_singular_vectors=False)
    torch.testing.assert_close(torch.from_numpy(np.sort(values)), singular[:2].flip(0), **CLOSE)
    shifted = linalg.LinearOperator(**NumpyOperator(J, "JJ'").arguments()) + linalg.aslinearoperator(np.eye(10))
    K = J.gram() + torch.eye(10).double()
    torch.testing.assert_close(torch.from_numpy(shifted @ np.eye(10)), K, **CLOSE)


def test_types() -> None:
    assert NumpyOperator(jacobian(torch.float32)).dtype == np.float32
    view = NumpyOperator(jacobian(torch.float32))
    assert view.matvec(np.ones(26)).dtype == np.float32
    assert NumpyOperator(jacobian()).matvec(np.ones(26, dtype=np.float32)).dtype == np.float64


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="of='F'"):
        NumpyOperator(jacobian(), "F")  # type: ignore[arg-type]
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"scale={scale}"):
            NumpyOperator(jacobian(), scale=scale)
    with pytest.raises(ValueError, match="shape"):
        NumpyOperator(jacobian()).matvec(np.ones(3))
