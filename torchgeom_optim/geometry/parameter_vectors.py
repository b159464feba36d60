"""Some of a model's parameters as one vector, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["ParameterVectors", "checked_columns"]


class ParameterVectors:
    """The space of the parameters that are chosen: vectors [P] in the order of ``model.named_parameters()``.

    Args:
        model: their owner; values are read from it anew each time.
        parameters: names, or a predicate of name and parameter; by default those with ``requires_grad``. A tied
            parameter goes by any of its names and is there once.
        dtype: of values and vectors; None for each parameter's own, and for vectors the type that holds them all.

    Raises:
        ValueError: no parameter is chosen, or a name is unknown.
        TypeError: a chosen parameter is not real floating-point.

    Example:
        >>> vectors = ParameterVectors(nn.Linear(3, 2), ["weight"])
        >>> vectors.size, vectors.named(torch.arange(6.0))["weight"].shape
        (6, torch.Size([2, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._dtype = model, dtype
        chosen = _chosen(model, parameters)
        self.shapes = {name: p.shape for name, p in chosen.items()}
        self.size = sum(p.numel() for p in chosen.values())
        self.dtype = dtype or next(iter(chosen.values())).dtype
        for p in chosen.values():
            self.dtype = dtype or torch.promote_types(self.dtype, p.dtype)
        self.device = next(iter(chosen.values())).device
        # An embedding with max_norm writes to its weights in the forward pass.
        self._copy = any(getattr(module, "max_norm", None) is not None for module in model.modules())

    def values(self) -> dict[str, Tensor]:
        """The parameters' present values, detached."""
        return {name: p for name, p in self._parameters().items() if name in self.shapes}

    def constants(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The other parameters, and the buffers, in the type of the computation."""
        others = {name: p for name, p in self._parameters().items() if name not in self.shapes}
        return others, {name: self._cast(b.detach()) for name, b in self._model.named_buffers()}

    def flat(self, named: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as a vector or as several.

        Args:
            named: name to [*shape], or to [*shape, k].

        Returns:
            [P], or [P, k].

        Raises:
            ValueError: names or shapes are not those of the parameters.
        """
        if set(named) != set(self.shapes):
            differing = sorted(set(named) ^ set(self.shapes))
            raise ValueError(
                f"names that are on one side only: {differing}. A vector needs one tensor for each chosen parameter; "
                "zeros where it has no part."
            )
        extra = [tuple(named[name].shape[len(shape) :]) for name, shape in self.shapes.items()]
        for name, shape in self.shapes.items():
            if (
                named[name].shape[: len(shape)] != shape
                or extra[0] != extra[-1]
                or len(set(extra)) > 1
                or len(extra[0]) > 1
            ):
                raise ValueError(
                    f"{name} of shape {list(named[name].shape)}: {list(shape)} is needed, or {[*shape, 'k']} "
                    "with one k "
                    "for all names. Put the vectors along the last axis."
                )
        return torch.cat([named[name].reshape(shape.numel(), *extra[0]) for name, shape in self.shapes.items()])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector, or several, as named tensors.

        Args:
            vector: [P], or [P, k].

        Returns:
            Name to [*shape], or to [*shape, k].

        Raises:
            ValueError: the first axis is not P long.
        """
        if vector.dim() not in (1, 2) or len(vector) != self.size:
            raise ValueError(f"vector of shape {list(vector.shape)}: [P] or [P, k] with P = {self.size} is needed.")
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        return {
            name: part.reshape(*shape, *vector.shape[1:])
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Row vectors [k, P] as named tensors [k, *shape], each in its parameter's type."""
        parts = torch.split(rows, [shape.numel() for shape in self.shapes.values()], dim=1)
        values = self._parameters()
        return {
            name: part.reshape(len(rows), *shape).to(values[name].dtype)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def write(self, named: Mapping[str, Tensor], rows: Tensor, add: bool = False) -> None:
        """Put named tensors [..., *shape] into row vectors [k, P], or add them."""
        start = 0
        for name, shape in self.shapes.items():
            part = rows[:, start : start + shape.numel()]
            value = named[name].reshape(len(rows), shape.numel())
            if add:
                part.add_(value)
            else:
                part.copy_(value)
            start += shape.numel()

    def _parameters(self) -> dict[str, Tensor]:
        return {name: self._cast(p.detach()) for name, p in self._model.named_parameters()}

    def _cast(self, x: Tensor) -> Tensor:
        x = x.clone() if self._copy else x
        return x.to(self._dtype) if self._dtype is not None and x.is_floating_point() else x


def checked_columns(v: Tensor, length: int, letters: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector or matrix as a matrix of that type and place.

    Args:
        v: [length] or [length, k].
        length: what its first axis must be.
        letters: what the length is called, for the error.
        dtype: the result's.
        device: the result's.

    Returns:
        [length, k].

    Raises:
        TypeError: it is no real floating-point tensor.
        ValueError: its shape does not fit, or a value is not finite.
    """
    if not isinstance(v, Tensor) or not v.is_floating_point():
        got = v.dtype if isinstance(v, Tensor) else type(v).__name__
        raise TypeError(f"vector of {got}: a real floating-point tensor is needed, {dtype} here. Try v.to({dtype}).")
    if v.dim() not in (1, 2) or len(v) != length or v.numel() == 0:
        raise ValueError(
            f"vector of shape {list(v.shape)}: [{letters}] or [{letters}, k] with {letters} = {length} is needed. "
            "Several vectors are the columns of a matrix."
        )
    if not bool(torch.isfinite(v).all()):
        raise ValueError("the vector holds values that are not finite: every number must be. Look with torch.isfinite.")
    v = v.clone() if v.is_inference() else v.detach()  # autograd would refuse what was made in inference mode
    return v.to(device=device, dtype=dtype).reshape(length, -1)


def _chosen(
    model: nn.Module, parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None
) -> dict[str, nn.Parameter]:
    own = dict(model.named_parameters())
    if parameters is None:
        chosen = {name: p for name, p in own.items() if p.requires_grad}
    elif callable(parameters):
        chosen = {name: p for name, p in own.items() if parameters(name, p)}
    else:
        aliases = dict(model.named_parameters(remove_duplicate=False))
        names = [parameters] if isinstance(parameters, str) else list(parameters)
        if unknown := [name for name in names if name not in aliases]:
            raise ValueError(
                f"parameters {unknown} are none of the model's: names as in model.named_parameters() are needed, "
                f"such as {next(iter(own), 'none, for it has no parameter')}."
            )
        wanted = {id(aliases[name]) for name in names}
        chosen = {name: p for name, p in own.items() if id(p) in wanted}
    if not chosen:
        raise ValueError(
            f"no parameter is chosen of the model's {len(own)}: at least one is needed. "
            "Is everything frozen? Name frozen ones in parameters= to differentiate with respect to them."
        )
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise TypeError(f"parameter {name} is {p.dtype}: a real floating-point one is needed. Leave it out.")
    return chosen
