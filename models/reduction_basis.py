r"""Directions in weight space that a network is written in: bases of its layers, or the Fisher matrix's eigenvectors.

    w = center + \sum_i c_i e_i,      c_i = <w - center, e_i>,      lam_i = e_i' (J'J / N) e_i

================  ====================================================  =============================================
name              e_i                                                   what a file has to hold
================  ====================================================  =============================================
``"exact"``       eigenvectors of J'J / N: at most N (C - 1)            k vectors of the network's own size
``"kronecker"``   u_a v_b' of each layer, eigenvectors of both factors  the u and v in use, or what regenerates the v
``"pca"``         v_b' of each layer: its inputs' principal components  the v in use, likewise
``"dct"``         cosines over the pixels that a layer sees             nothing
``"pixels"``      single weights: ordinary pruning                      nothing
================  ====================================================  =============================================

All but the first are complete: nothing is lost before directions are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.kronecker import (
    KroneckerBasis,
    ParameterMatrix,
    diagonal_in,
    kronecker_factors,
    parameter_matrices,
)

__all__ = ["BasisName", "DenseDirections", "Directions", "LayerDirections", "cosine_basis", "layer_directions"]

BasisName = Literal["kronecker", "exact", "dct", "pca", "pixels"]


class Directions(nn.Module):
    """Orthonormal directions e_i in the space of some named parameters; tensors that move with ``.to()``.

    Attributes:
        kind: the basis's name.
        num_directions: R.
        num_weights: P.
    """

    kind: str
    num_directions: int
    num_weights: int

    def forward(self, coordinates: Tensor) -> dict[str, Tensor]:
        """Named parameters of sum_i c_i e_i, for c [R]."""
        raise NotImplementedError

    def coordinates(self, named: Mapping[str, Tensor]) -> Tensor:
        """c_i = <named, e_i>: [R]."""
        raise NotImplementedError

    def diagonal(self, jacobian: Jacobian) -> Tensor:
        """lam_i = |J e_i|^2 / N in float64: [R]."""
        raise NotImplementedError

    def kept(self, positions: Tensor) -> tuple[Directions, Tensor]:
        """Directions that have at least those at ``positions``, and where these are in them, in the same order."""
        raise NotImplementedError


class DenseDirections(Directions):
    """Directions that are vectors in the space of all weights.

    Args:
        vectors: [P, R], orthonormal columns.
        shapes: name to shape, in the order of the rows.
        kind: the basis's name.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, shapes: Mapping[str, torch.Size], kind: str = "exact") -> None:
        super().__init__()
        self.kind = kind
        self.num_weights, self.num_directions = vectors.shape
        self.shapes = dict(shapes)
        self.register_buffer("vectors", vectors)

    def forward(self, coordinates: Tensor) -> dict[str, Tensor]:  # noqa: D102
        parts = torch.split(
            self.vectors @ coordinates.to(self.vectors), [shape.numel() for shape in self.shapes.values()]
        )
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def coordinates(self, named: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return self.vectors.T @ torch.cat([named[name].reshape(-1) for name in self.shapes]).to(self.vectors)

    def diagonal(self, jacobian: Jacobian) -> Tensor:  # noqa: D102
        return (jacobian @ self.vectors.to(jacobian.dtype)).double().square().sum(0) / jacobian.num_samples

    def kept(self, positions: Tensor) -> tuple[DenseDirections, Tensor]:  # noqa: D102
        directions = DenseDirections(self.vectors[:, positions], self.shapes, self.kind)
        return directions, torch.arange(len(positions), device=positions.device)


class LayerDirections(Directions):
    """Directions u_a v_b' of each layer; position (g r + a) s + b of a layer, one layer after the other.

    Args:
        kind: the basis's name.
        bases: of the layers.
        used: for each layer the columns of its whole U and V that are there; None for all of them.
        sample_shape: of the network's input, which "dct" depends on.
    """

    def __init__(
        self,
        kind: str,
        bases: Sequence[KroneckerBasis],
        used: Sequence[tuple[Tensor | None, Tensor | None]] | None = None,
        sample_shape: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.kind = kind
        self.sample_shape = tuple(sample_shape)
        self.layouts = [basis.layout for basis in bases]
        self.sizes = [math.prod(basis.shape) for basis in bases]
        self.num_directions = sum(self.sizes)
        self.num_weights = sum(layout.numel for layout in self.layouts)
        used = [(None, None)] * len(bases) if used is None else used
        for i, (basis, (rows, columns)) in enumerate(zip(bases, used, strict=True)):
            for name, value in (("left", basis.left), ("right", basis.right), ("rows", rows), ("columns", columns)):
                self.register_buffer(f"{name}_{i}", value)

    @property
    def bases(self) -> list[KroneckerBasis]:
        """Of the layers, where the tensors are now."""
        return [
            KroneckerBasis(layout, self._part("left", i), self._part("right", i))
            for i, layout in enumerate(self.layouts)
        ]

    def forward(self, coordinates: Tensor) -> dict[str, Tensor]:  # noqa: D102
        named: dict[str, Tensor] = {}
        for basis, part in zip(self.bases, torch.split(coordinates, self.sizes), strict=True):
            named.update(basis.parameters(part.view(basis.shape)))
        return named

    def coordinates(self, named: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return torch.cat([basis.coordinates(named).reshape(-1) for basis in self.bases])

    def diagonal(self, jacobian: Jacobian) -> Tensor:  # noqa: D102
        # A layer of which nothing is left has no coordinates to ask for.
        bases = [basis for basis, size in zip(self.bases, self.sizes, strict=True) if size]
        return torch.cat([lam.reshape(-1) for lam in diagonal_in(jacobian, bases)])

    def kept(self, positions: Tensor) -> tuple[LayerDirections, Tensor]:
        """The same without the columns of U and V that no direction at ``positions`` uses."""
        mask = torch.zeros(self.num_directions, dtype=torch.bool, device=positions.device)
        mask[positions] = True
        places = torch.full_like(mask, -1, dtype=torch.long)  # old position to new
        bases, used, start, new_start = [], [], 0, 0
        for i, (basis, part) in enumerate(zip(self.bases, torch.split(mask, self.sizes), strict=True)):
            part = part.view(basis.shape)
            rows = None if basis.left is None else part.any(2).any(0).nonzero()[:, 0]
            columns = None if basis.right is None else part.any(1).any(0).nonzero()[:, 0]
            old = torch.arange(start, start + part.numel(), device=mask.device).view(basis.shape)
            old = old if rows is None else old[:, rows]
            old = old if columns is None else old[:, :, columns]
            places[old.reshape(-1)] = torch.arange(new_start, new_start + old.numel(), device=mask.device)
            left = None if basis.left is None or rows is None else basis.left[:, :, rows]
            right = None if basis.right is None or columns is None else basis.right[:, :, columns]
            bases.append(replace(basis, left=left, right=right))
            used.append((self._chosen("rows", i, rows), self._chosen("columns", i, columns)))
            start, new_start = start + part.numel(), new_start + old.numel()
        return LayerDirections(self.kind, bases, used, self.sample_shape), places[positions]

    def whole_positions(self, positions: Tensor) -> Tensor:
        """Where directions are in the whole basis, all columns of U and V counted; it has P positions."""
        start = whole_start = 0
        result = torch.empty_like(positions)
        for i, (layout, basis) in enumerate(zip(self.layouts, self.bases, strict=True)):
            _, r, s = basis.shape
            inside = (positions >= start) & (positions < start + self.sizes[i])
            at = positions[inside] - start
            row, column = at // max(s, 1) % max(r, 1), at % max(s, 1)
            rows, columns = self._part("rows", i), self._part("columns", i)
            row = row if rows is None else rows[row]
            column = column if columns is None else columns[column]
            group = at // max(r * s, 1)
            result[inside] = whole_start + (group * layout.outputs + row) * layout.inputs + column
            start, whole_start = start + self.sizes[i], whole_start + layout.numel
        return result

    def _chosen(self, name: str, i: int, positions: Tensor | None) -> Tensor | None:
        before = self._part(name, i)
        return positions if before is None or positions is None else before[positions]

    def _part(self, name: str, i: int) -> Tensor | None:
        return cast("Tensor | None", getattr(self, f"{name}_{i}"))


def layer_directions(
    jacobian: Jacobian, kind: BasisName, sample_shape: torch.Size, largest_side: int
) -> LayerDirections:
    """A complete basis, layer by layer.

    Args:
        jacobian: J, for the layers and their factors.
        kind: "kronecker", "pca", "dct" or "pixels".
        sample_shape: of the network's input, for "dct".
        largest_side: eigenvectors of larger matrices are not taken; that side keeps its single weights.

    Returns:
        The directions, in J's type.
    """
    dtype = jacobian.dtype
    if kind in ("kronecker", "pca"):
        bases = []
        for factors in kronecker_factors(jacobian, largest_side=largest_side):
            basis = factors.eigenbasis()
            # What has no inputs of its own (norm layers, bare parameters) keeps its single weights.
            right = None if kind == "pca" and factors.layout.kind != "outer" else basis.right
            bases.append(replace(basis, left=None if kind == "pca" else basis.left, right=right))
    else:
        layouts = parameter_matrices(jacobian)
        right_of = cosine_basis if kind == "dct" else lambda layout, shape: None
        bases = [KroneckerBasis(layout, None, _to(right_of(layout, sample_shape), jacobian)) for layout in layouts]
    bases = [
        replace(
            basis,
            left=None if basis.left is None else basis.left.to(dtype),
            right=None if basis.right is None else basis.right.to(dtype),
        )
        for basis in bases
    ]
    return LayerDirections(kind, bases, sample_shape=sample_shape)


def cosine_basis(layout: ParameterMatrix, sample_shape: torch.Size) -> Tensor | None:
    """Products of cosines (DCT-II) over the pixels that a layer's inputs are: an image, or a convolution's kernel.

    Args:
        layout: the layer.
        sample_shape: of the network's input: an image [..., H, W] that a linear layer takes flattened.

    Returns:
        V [1, n, n] or for each group; None where inputs are no pixels.
    """
    inputs = layout.inputs - (layout.bias is not None)
    if layout.kind != "outer":
        return None
    if len(layout.shape) > 2:  # a convolution
        axes = layout.shape[2:]
    elif len(sample_shape) >= 2 and inputs == sample_shape.numel():
        axes = sample_shape[-2:]
    else:
        return None
    V = torch.ones(1, 1, dtype=torch.float64)
    for length in axes:
        V = torch.kron(V, _cosines(length))
    V = torch.kron(torch.eye(inputs // len(V), dtype=torch.float64), V)
    if layout.bias is not None:
        V = torch.nn.functional.pad(V, (0, 1, 0, 1))
        V[-1, -1] = 1
    return V.expand(layout.groups, -1, -1)


def _cosines(length: int) -> Tensor:
    """Orthonormal columns cos(pi k (i + 1/2) / n): [n, n]."""
    i = torch.arange(length, dtype=torch.float64)
    D = torch.cos(math.pi / length * torch.outer(i + 0.5, i)) * math.sqrt(2 / length)
    D[:, 0] /= math.sqrt(2)
    return D


def _to(x: Tensor | None, jacobian: Jacobian) -> Tensor | None:
    return None if x is None else x.to(jacobian.vectors.device, jacobian.dtype)
