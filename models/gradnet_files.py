"""Tensors with a line of text in one file, as safetensors or in torch's own format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry.kronecker import KroneckerBasis, ParameterMatrix

__all__ = ["layouts_as_text", "layouts_from_text", "read_tensors", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: str) -> None:
    """Write a file, replacing one that is there only when it is whole.

    Args:
        path: ``*.safetensors`` needs the extra ``files``.
        tensors: by name.
        about: the text.
    """
    owned = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    partial = path.with_name(path.name + ".tmp")
    if path.suffix == ".safetensors":
        optional_import("safetensors.torch", "a .safetensors file").save_file(owned, partial, {"about": about})
    else:
        torch.save({"about": about, "tensors": owned}, partial)
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read such a file, on the CPU.

    Args:
        path: of :func:`write_tensors`.

    Returns:
        Tensors by name; the text.

    Raises:
        ValueError: it is another kind of file.
    """
    if path.suffix == ".safetensors":
        safe_open = optional_import("safetensors", "a .safetensors file").safe_open
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("about")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    else:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        about, tensors = contents.get("about"), contents.get("tensors", {})
    if not isinstance(about, str):
        raise ValueError(
            f"{path.name} is no file of GradNet.save: its description is missing. Give a file written by it."
        )
    return tensors, about


def layouts_as_text(layouts: Sequence[ParameterMatrix]) -> str:
    """Layouts as JSON."""
    return json.dumps([{**dataclasses.asdict(layout), "shape": list(layout.shape)} for layout in layouts])


def layouts_from_text(text: str, tensors: Mapping[str, Tensor]) -> tuple[list[KroneckerBasis], list[Tensor]]:
    """Bases and scales of a linearised network from its layouts and its state.

    Args:
        text: of :func:`layouts_as_text`.
        tensors: the state, "left0", "right0", "scale0" and so on.

    Returns:
        Bases, and scales.
    """
    layouts = [ParameterMatrix(**{**of, "shape": torch.Size(of["shape"])}) for of in json.loads(text)]
    bases = [KroneckerBasis(of, tensors.get(f"left{i}"), tensors.get(f"right{i}")) for i, of in enumerate(layouts)]
    return bases, [tensors[f"scale{i}"] for i in range(len(layouts))]
