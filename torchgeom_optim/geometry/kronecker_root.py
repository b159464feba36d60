r"""The layers' Kronecker metric as the square of an operator, as solvers of least squares take it.

    M = blockdiag_layers s (B (x) A) = R'R,    R d = sqrt(s) L_B' D L_A,   A = L_A L_A', B = L_B L_B'

with A and B of :mod:`torchgeom_optim.geometry.kronecker`, and D the layer's part of d as a matrix. The scale s gives
the layer the trace that it has in J'J: A and B both sum over positions, so that B (x) A alone counts them twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchgeom_optim.geometry.kronecker import KroneckerFactors, ParameterMatrix
from torchgeom_optim.geometry.matrix_metric import relative_split
from torchgeom_optim.geometry.parameter_vectors import ParameterVectors

__all__ = ["FactorMemory", "KroneckerRoot", "averaged_factors"]


@dataclass(frozen=True, eq=False)
class _Layer:
    layout: ParameterMatrix
    inputs: Tensor  # damped A, [G, n, n]
    output_grads: Tensor  # damped B, [G, m, m]
    input_root: Tensor  # L_A
    output_root: Tensor  # sqrt(s) L_B
    scale: Tensor


class KroneckerRoot:
    """R, [P, P], with R'R the Kronecker metric of the layers; what has no factors is left out, and R is 0 there.

    Args:
        vectors: the space of the parameters.
        factors: A and B of layers. One that is missing (a side beyond the limit, tokens) leaves its layer out.
        diagonal: diag(J'J) / N, or an estimate: the layers' traces are taken from it; [P].
        damping: as a share of each layer's mean diagonal, in (0, inf): its root, relative to their own mean
            diagonals, is added to the diagonals of A and B.

    Raises:
        ValueError: the damping is out of its range.

    Example:
        >>> from torchgeom_optim.geometry.function_metric import FunctionMetric
        >>> from torchgeom_optim.geometry.kronecker import kronecker_factors
        >>> J = FunctionMetric(torch.nn.Linear(3, 2), torch.randn(50, 3))
        >>> root = KroneckerRoot(J.vectors, kronecker_factors(J), J.estimated_diagonal(64) / 50, 1e-6)
        >>> d = torch.randn(8)  # one linear layer: the metric is exact up to the estimated trace
        >>> bool((root.product(d).norm() / (J @ d).norm() * 50**0.5 - 1).abs() < 0.2)
        True
    """

    def __init__(
        self, vectors: ParameterVectors, factors: Iterable[KroneckerFactors], diagonal: Tensor, damping: float
    ) -> None:
        if not 0.0 < damping < math.inf:
            raise ValueError(f"damping={damping}: must be in (0, inf), a share of the mean diagonal; 1e-3 is a start.")
        self.vectors = vectors
        self._layers: list[_Layer] = []
        named = vectors.named(diagonal)
        for layer in factors:
            if layer.inputs is None or layer.output_grads is None:
                continue
            A, B, layout = layer.inputs, layer.output_grads, layer.layout
            trace = sum(named[name].double().sum() for name in layout.names)
            of_product = (_trace(A) * _trace(B)).sum()
            if not bool(of_product > 0):  # no sample reaches this layer
                continue
            for_inputs, for_outputs = relative_split(A, B, damping)
            A, B = _plus(A, for_inputs), _plus(B, for_outputs)
            # A group without any input or gradient has factors 0; a unit diagonal keeps the roots finite.
            scale = torch.as_tensor(trace / of_product, dtype=A.dtype, device=A.device)
            output_root = torch.linalg.cholesky(B) * scale.sqrt()
            parts = (x.to(vectors.dtype) for x in (A, B, torch.linalg.cholesky(A), output_root, scale))
            self._layers.append(_Layer(layout, *parts))

    def product(self, vector: Tensor) -> Tensor:
        """R d.

        Args:
            vector: d, [P].

        Returns:
            [P]; its squared length is d'M d.
        """
        return self._each(vector, lambda layer, D: layer.output_root.mT @ D @ layer.input_root)

    def transposed_product(self, vector: Tensor) -> Tensor:
        """R'u.

        Args:
            vector: u, [P].

        Returns:
            [P].
        """
        return self._each(vector, lambda layer, U: layer.output_root @ U @ layer.input_root.mT)

    def diagonal(self) -> Tensor:
        """diag(M), [P]; 0 where there is no factor."""
        return self._each(
            None,
            lambda layer, _: layer.scale * _diagonal(layer.output_grads)[:, :, None] * _diagonal(layer.inputs)[:, None],
        )

    def cost_of_weights(self, weights: Tensor) -> Tensor:
        r"""What it costs to take each weight away by itself, all others compensating: w_p^2 / (M^-1)_pp.

        Source: Hassibi and Stork 1993, "Second order derivatives for network pruning: optimal brain surgeon", Eq. (5)
        without its 1/2, with M in the Hessian's place. Where there is no factor: w_p^2 times the mean of diag(M).

        Args:
            weights: w, [P].

        Returns:
            [P], in units of the squared function.
        """

        def cost(layer: _Layer, W: Tensor) -> Tensor:
            of_outputs = _diagonal(torch.cholesky_inverse(layer.output_root))  # 1 / s is in it
            of_inputs = _diagonal(torch.cholesky_inverse(layer.input_root))
            return W.square() / (of_outputs[:, :, None] * of_inputs[:, None])

        return self._with_others(weights, cost)

    def cost_of_units(self, weights: Tensor) -> Tensor:
        r"""The same for whole units, as a sum over their weights: W A W' / (B^-1), whose diagonal is the cost.

        Summed over the row of unit j it is w_j' A w_j s / (B^-1)_jj, the cost of taking the whole row away.

        Args:
            weights: w, [P].

        Returns:
            [P]; single entries may be negative, sums over whole units are not.
        """

        def cost(layer: _Layer, W: Tensor) -> Tensor:
            of_outputs = _diagonal(torch.cholesky_inverse(layer.output_root))
            return W * (W @ layer.inputs) / of_outputs[:, :, None]

        return self._with_others(weights, cost)

    def _with_others(self, weights: Tensor, cost: Callable[[_Layer, Tensor], Tensor]) -> Tensor:
        diagonal = self.diagonal()
        known = diagonal > 0
        elsewhere = diagonal.sum() / known.sum() if self._layers else diagonal.new_ones(())
        return torch.where(known, self._each(weights, cost), weights.square() * elsewhere)

    def _each(self, vector: Tensor | None, function: Callable[[_Layer, Tensor], Tensor]) -> Tensor:
        there = {} if vector is None else self.vectors.named(vector)
        like = self._zeros if vector is None else vector
        result = {name: torch.zeros_like(x) for name, x in self.vectors.named(like).items()}
        for layer in self._layers:
            D = layer.inputs if vector is None else layer.layout.matrix(there)
            result.update(layer.layout.named(function(layer, D)))
        return self.vectors.flat(result)

    @property
    def _zeros(self) -> Tensor:
        return torch.zeros(self.vectors.size, dtype=self.vectors.dtype, device=self.vectors.device)


FactorMemory = dict[str, tuple[Tensor | None, Tensor | None, float]]


def averaged_factors(
    past: FactorMemory, new: Sequence[KroneckerFactors], decay: float
) -> tuple[list[KroneckerFactors], FactorMemory]:
    """Running averages of the factors, weighted by samples: what was seen before counts ``decay`` times.

    Args:
        past: by the name of the layer's weight A, B and the weight that they have in the average; empty at first.
        new: of the samples at hand.
        decay: weight of the past, in [0, 1].

    Returns:
        The averages, in the order of ``new``; and the same as the next step's past.
    """
    averages, memory = [], FactorMemory()
    for factors in new:
        name, n = factors.layout.weight, factors.num_samples
        A, B, weight = past.get(name, (None, None, 0.0))
        weight = decay * weight
        if not (_alike(A, factors.inputs) and _alike(B, factors.output_grads)):
            A, B, weight = factors.inputs, factors.output_grads, 0.0
        share = n / (weight + n)
        A = None if A is None or factors.inputs is None else torch.lerp(A, factors.inputs, share)
        B = None if B is None or factors.output_grads is None else torch.lerp(B, factors.output_grads, share)
        averages.append(replace(factors, inputs=A, output_grads=B))
        memory[name] = A, B, weight + n
    return averages, memory


def _alike(before: Tensor | None, now: Tensor | None) -> bool:
    return before is not None and now is not None and before.shape == now.shape


def _diagonal(factor: Tensor) -> Tensor:
    return torch.diagonal(factor, dim1=-2, dim2=-1)


def _trace(factor: Tensor) -> Tensor:
    return _diagonal(factor).sum(-1)


def _plus(factor: Tensor, damping: Tensor) -> Tensor:
    factor = factor.clone()
    _diagonal(factor).add_(torch.where(damping > 0, damping, 1.0)[:, None])
    return factor
