"""J, J J' and J'J for those who bring their own solver: products on NumPy arrays, as SciPy's solvers ask for them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchgeom_optim.geometry.jacobian import Jacobian

__all__ = ["NumpyOperator"]

Array = npt.NDArray[Any]


class NumpyOperator:
    """J, J J' or J'J as ``scipy.sparse.linalg`` takes operators, without SciPy being needed here.

    SciPy's solvers (``eigsh``, ``svds``, ``cg``, ``lsqr``, ...) and ``aslinearoperator`` accept any object with a
    shape, a dtype and these products. It hands on columns one by one; ``LinearOperator(**operator.arguments())``
    takes several at once, and can be added to and multiplied with others.

    Args:
        jacobian: J.
        of: "J", "JJ'" [N C, N C] or "J'J" [P, P].
        scale: a factor; ``1 / jacobian.num_samples`` makes J'J the mean Fisher matrix. J itself carries no 1/N.

    Attributes:
        shape: of the matrix.
        dtype: NumPy's name for J's; float32 where NumPy has none (bfloat16).

    Raises:
        ValueError: ``of`` is unknown, or the scale is not finite.

    Example:
        >>> J = Jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> NumpyOperator(J, "J'J").matvec(np.ones(8)).shape
        (8,)
    """

    def __init__(self, jacobian: Jacobian, of: Literal["J", "JJ'", "J'J"] = "J'J", *, scale: float = 1.0) -> None:
        if of not in ("J", "JJ'", "J'J"):
            raise ValueError(f"of={of!r}: must be one of 'J', \"JJ'\", \"J'J\".")
        if not -float("inf") < scale < float("inf"):
            raise ValueError(f"scale={scale}: must be finite; 1 / jacobian.num_samples makes J'J a mean over samples.")
        self._jacobian, self._of, self._scale = jacobian, of, scale
        rows, columns = jacobian.shape
        self.shape = {"J": (rows, columns), "JJ'": (rows, rows), "J'J": (columns, columns)}[of]
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if jacobian.dtype == torch.float64 else np.float32)

    def matvec(self, v: npt.ArrayLike) -> Array:
        """The matrix times a vector [n] or [n, 1]."""
        return self._times(v, transposed=False)

    def matmat(self, v: npt.ArrayLike) -> Array:
        """The matrix times columns [n, k], which share the passes."""
        return self._times(v, transposed=False)

    def rmatvec(self, u: npt.ArrayLike) -> Array:
        """The transposed matrix times a vector."""
        return self._times(u, transposed=True)

    def rmatmat(self, u: npt.ArrayLike) -> Array:
        """The transposed matrix times columns."""
        return self._times(u, transposed=True)

    def arguments(self) -> dict[str, Any]:
        """What ``scipy.sparse.linalg.LinearOperator`` is made from."""
        products = {name: getattr(self, name) for name in ("matvec", "rmatvec", "matmat", "rmatmat")}
        return {"shape": self.shape, "dtype": self.dtype, **products}

    def _times(self, v: npt.ArrayLike, transposed: bool) -> Array:
        J = self._jacobian
        x = torch.tensor(np.asarray(v), dtype=J.dtype)
        if self._of == "JJ'" or (self._of == "J" and transposed):
            x = J.T @ x
        else:
            x = J @ x
        if self._of != "J":
            x = J @ x if self._of == "JJ'" else J.T @ x
        return self._array(x * self._scale)

    def _array(self, x: Tensor) -> Array:
        array: Array = x.cpu().to(torch.float64 if self.dtype == np.float64 else torch.float32).numpy()
        return array
