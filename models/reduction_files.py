"""Reduced networks as safetensors files, with the directions or with what regenerates them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry.kronecker import KroneckerBasis, ParameterMatrix
from torchgeom_optim.geometry.mini_batches import tensors_of
from torchgeom_optim.models.reduced_model import ReducedModel
from torchgeom_optim.models.reduction_basis import DenseDirections, Directions, LayerDirections, cosine_basis
from torchgeom_optim.models.reduction_report import take_samples

__all__ = ["load_reduced", "save_reduced", "stored_bytes"]

_FORMAT = "torchgeom_optim.reduced_model.1"
_AGREEMENT = 1e-3


def save_reduced(reduced: ReducedModel, path: str | Path, *, regenerate_from: Any = None) -> int:
    r"""Write what a reduced network is made of, but the network's code.

    Coefficients; their positions, as gaps or as one bit per weight, whichever is shorter; the columns of U and V in use
    (nothing for "dct" and "pixels"); buffers and frozen parameters; the center unless it is the origin.

    Args:
        reduced: the network.
        path: of the file.
        regenerate_from: the inputs of the calibration, and no others, in any form that ``reduce_model`` takes. Layers
            that see them directly (flattened, in a linear layer) then store a fingerprint of V in V's place, and
            loading needs the same inputs again. V of deeper layers depends on the dense network and is stored.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: ``regenerate_from`` does not give the directions of any layer.
        ImportError: safetensors is not installed.
    """
    safetensors = optional_import("safetensors.torch", "saving a reduced network")
    tensors, description = _contents(reduced, regenerate_from)
    safetensors.save_file(tensors, str(path), metadata={"format": _FORMAT, "description": json.dumps(description)})
    return Path(path).stat().st_size


def load_reduced(path: str | Path, model: nn.Module, *, regenerate_from: Any = None) -> ReducedModel:
    """Read a file that :func:`save_reduced` wrote.

    Args:
        path: of the file.
        model: a network of the same class and shapes, whose modes and device are taken over and whose weights do not
            matter; left as it is.
        regenerate_from: the inputs of the calibration, where the file was written with them.

    Returns:
        The reduced network, without a report.

    Raises:
        ValueError: no such file format; another network; inputs missing, or not those of the calibration.
        ImportError: safetensors is not installed.
    """
    safetensors = optional_import("safetensors", "loading a reduced network")
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is of format {metadata.get('format')!r}: {_FORMAT!r} is needed. Was it written by "
                "ReducedModel.save?"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    description = json.loads(metadata["description"])
    own = {name: p.shape for name, p in model.named_parameters()}
    shapes = {name: torch.Size(shape) for name, shape in description["shapes"].items()}
    if wrong := [name for name, shape in shapes.items() if own.get(name) != shape]:
        raise ValueError(
            f"{wrong}: the model lacks them, or has them in another shape. Give the network that was reduced."
        )
    inputs = None if regenerate_from is None else _flattened(regenerate_from, description["num_samples"])
    coefficients = tensors["coefficients"]
    whole = _unpacked(tensors["positions"], description["num_weights"])
    directions: Directions
    if description["kind"] == "exact":
        directions, positions = DenseDirections(tensors["vectors"], shapes), torch.arange(len(coefficients))
    else:
        directions, positions = _layers(description, tensors, whole, inputs)
    center = {name: tensors[f"center.{name}"] for name in shapes} if description["center"] else None
    reduced = ReducedModel(model, directions, positions, coefficients, center)
    state = {key.removeprefix("model."): x for key, x in tensors.items() if key.startswith("model.")}
    reduced.model.load_state_dict(state)
    return reduced.to(next(model.parameters()).device)


def stored_bytes(reduced: ReducedModel, inputs: Any) -> tuple[int, int]:
    """Bytes of all tensors that a file holds, its header (names) aside.

    Args:
        reduced: the network.
        inputs: of the calibration.

    Returns:
        With all directions; where those that the inputs give back are regenerated, if there are such.
    """
    whole, _ = _contents(reduced, None)
    less, _ = _contents(reduced, inputs, required=False)
    bytes_whole, bytes_less = (sum(x.numel() * x.element_size() for x in found.values()) for found in (whole, less))
    return bytes_whole, bytes_less


def _contents(
    reduced: ReducedModel, regenerate_from: Any, required: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    directions = reduced.directions
    tensors = {"coefficients": reduced.coefficients.detach()}
    description: dict[str, Any] = {
        "kind": directions.kind,
        "num_weights": directions.num_weights,
        "shapes": {name: list(w.shape) for name, w in reduced.weights().items()},
        "center": bool(reduced.center),
    }
    if isinstance(directions, LayerDirections):
        whole, order = directions.whole_positions(reduced.positions).sort()
        tensors["coefficients"] = tensors["coefficients"][order]
        tensors["positions"] = _packed(whole, directions.num_weights)
        inputs = None if regenerate_from is None else _flattened(regenerate_from, None)
        description |= {"layers": [asdict(layout) for layout in directions.layouts], "regenerated": []}
        description["num_samples"] = None if inputs is None else len(inputs)
        stored = directions.kind in ("kronecker", "pca")
        for i, basis in enumerate(directions.bases if stored else ()):
            if basis.left is not None:
                tensors[f"left.{i}"] = basis.left
            if basis.right is not None and basis.right.shape[2]:
                if inputs is not None and _regenerates(inputs, directions, i):
                    description["regenerated"].append(i)
                    tensors[f"fingerprint.{i}"] = _fingerprint(basis.right)
                else:
                    tensors[f"right.{i}"] = basis.right
        if required and inputs is not None and not description["regenerated"]:
            raise ValueError(
                "regenerate_from does not give the directions of any layer: it must be the inputs of the calibration, "
                "in a network whose first layer is linear, basis 'kronecker' or 'pca'. Leave it out."
            )
        description["sample_shape"] = list(directions.sample_shape)
    elif isinstance(directions, DenseDirections):
        tensors["positions"] = torch.empty(0, dtype=torch.uint8)
        tensors["vectors"] = directions.vectors
    tensors |= {f"center.{name}": value for name, value in reduced.center.items()}
    tensors |= {f"model.{name}": value for name, value in reduced.model.state_dict().items()}
    return {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}, description


def _layers(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], whole: Tensor, inputs: Tensor | None
) -> tuple[LayerDirections, Tensor]:
    layouts = [ParameterMatrix(**{**layer, "shape": torch.Size(layer["shape"])}) for layer in description["layers"]]
    kind, dtype = description["kind"], tensors["coefficients"].dtype
    bases, start = [], 0
    for i, layout in enumerate(layouts):
        inside = whole[(whole >= start) & (whole < start + layout.numel)] - start
        rows, columns = inside // layout.inputs % layout.outputs, inside % layout.inputs
        start += layout.numel
        if kind == "dct":
            V = cosine_basis(layout, torch.Size(description["sample_shape"]))
            bases.append(KroneckerBasis(layout, None, None if V is None else V.to(dtype)))
            continue
        left, right = tensors.get(f"left.{i}"), tensors.get(f"right.{i}")
        if i in description["regenerated"]:
            if inputs is None:
                raise ValueError(
                    f"the directions of {layout.weight} are not in the file: the inputs of the calibration, "
                    f"{description['num_samples']} samples, must be given again as regenerate_from=..."
                )
            right = _regenerated(layout, inputs, torch.unique(columns), tensors[f"fingerprint.{i}"]).to(dtype)
        bases.append(KroneckerBasis(layout, _all_columns(left, rows), _all_columns(right, columns)))
    return LayerDirections(kind, bases, sample_shape=torch.Size(description["sample_shape"])), whole


def _all_columns(used: Tensor | None, positions: Tensor) -> Tensor | None:
    """U or V with zeros in the columns that are not in use."""
    if used is None:
        return None
    groups, length, _ = used.shape
    result = used.new_zeros(groups, length, length)
    result[:, :, torch.unique(positions)] = used
    return result


def _packed(positions: Tensor, size: int) -> Tensor:
    """Ascending positions below ``size`` as gaps of one, two or four bytes, or as one bit each."""
    positions = positions.cpu()
    assert bool((positions.diff() > 0).all())
    gaps = positions.diff(prepend=torch.tensor([-1])) - 1
    dtype = next(
        d for d, most in ((torch.uint8, 255), (torch.uint16, 65535), (torch.int32, 2**31)) if gaps.max() <= most
    )
    if len(gaps) * dtype.itemsize <= -(-size // 8):
        return torch.cat([torch.tensor([dtype.itemsize], dtype=torch.uint8), gaps.to(dtype).view(torch.uint8)])
    bits = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8)
    bits[positions] = 1
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    return torch.cat([torch.zeros(1, dtype=torch.uint8), (bits.view(-1, 8) * weights).sum(1).to(torch.uint8)])


def _unpacked(packed: Tensor, size: int) -> Tensor:
    if len(packed) == 0:
        return torch.empty(0, dtype=torch.long)
    item, rest = int(packed[0]), packed[1:].clone()
    if item:
        dtype = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}[item]
        return (rest.view(dtype).long() + 1).cumsum(0) - 1
    bits = (rest[:, None] // 2 ** torch.arange(8, dtype=torch.uint8)) % 2
    return bits.reshape(-1)[:size].nonzero()[:, 0]


def _flattened(data: Any, num_samples: int | None) -> Tensor:
    """The calibration's inputs with a 1: [N, D + 1], float64."""
    samples = take_samples(data, None, num_samples, None)
    x = tensors_of(samples.inputs)[0]
    x = x.reshape(len(x), -1).double().cpu()
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _input_vectors(layout: ParameterMatrix, inputs: Tensor) -> Tensor | None:
    """All V of a layer that sees the inputs themselves, if it can: [n, n]."""
    x = inputs if layout.bias is not None else inputs[:, :-1]
    if layout.kind != "outer" or layout.groups > 1 or len(layout.shape) != 2 or x.shape[1] != layout.inputs:
        return None
    vectors: Tensor = torch.linalg.eigh(x.T @ x)[1].flip(1)
    return vectors


def _regenerates(inputs: Tensor, directions: LayerDirections, i: int) -> bool:
    right, columns = directions.bases[i].right, directions._part("columns", i)
    V = _input_vectors(directions.layouts[i], inputs)
    if V is None or right is None:
        return False
    V = V if columns is None else V[:, columns.cpu()]
    agreement = (V * right[0].cpu().double()).sum(0).abs()
    return bool((agreement >= 1 - _AGREEMENT).all())


def _regenerated(layout: ParameterMatrix, inputs: Tensor, columns: Tensor, fingerprint: Tensor) -> Tensor:
    V = _input_vectors(layout, inputs)
    if V is not None:
        V = V[:, columns][None]
        found = _fingerprint(V)
        V = V * torch.where(found * fingerprint < 0, -1.0, 1.0)  # the sign of an eigenvector is not determined
        if bool(((found.abs() - fingerprint.abs()).abs() <= 10 * _AGREEMENT).all()):
            return V
    raise ValueError(
        f"the inputs do not give the directions of {layout.weight} that were saved: they must be those of the "
        "calibration, as many and in the same precision. Save without regenerate_from to store the directions."
    )


def _fingerprint(V: Tensor) -> Tensor:
    """One number for each column: its product with a fixed vector."""
    z = torch.cos(torch.arange(V.shape[1], dtype=torch.float64).square())
    return (z @ V[0].cpu().double()).float()
