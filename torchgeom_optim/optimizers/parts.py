"""Parameters that are stepped together, in the form that the metrics take, with the running averages that they keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchgeom_optim.geometry.metric import LayerVector
from torchgeom_optim.geometry.moments import at_least_float32
from torchgeom_optim.optimizers.distributed import is_sharded, part_like, whole
from torchgeom_optim.optimizers.layers import AffineLayer

__all__ = ["Part", "parts_with_gradients"]


@dataclass(eq=False)
class Part:
    """Parameters that are stepped together: a layer's weight and bias, or one parameter without a layer.

    Attributes:
        weight: or the one parameter; has a gradient.
        bias: has a gradient, or None.
        layer: None for a parameter without one.
        group: the hyper-parameters.
        past: state of the weight and of the bias; not modified.
        new: what is to be written into these.
    """

    weight: Tensor
    bias: Tensor | None
    layer: AffineLayer | None
    group: dict[str, Any]
    past: tuple[dict[str, Any], dict[str, Any]]
    new: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))

    def __post_init__(self) -> None:
        assert self.weight.grad is not None
        self.gradient = self.vector(self.weight.grad, None if self.bias is None else self.bias.grad)

    @property
    def parameters(self) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Weight, and bias if there is one, each with its past and its new state."""
        both = zip((self.weight, self.bias), self.past, self.new, strict=True)
        return [(p, past, new) for p, past, new in both if p is not None]

    @property
    def is_transposed(self) -> bool:
        """Whether units are the columns of the weight."""
        return self.layer is not None and self.layer.is_embedding

    def vector(self, weight: Tensor, bias: Tensor | None) -> LayerVector:
        """Tensors shaped like the parameters, in the form that the metrics take."""
        weight, bias = whole(weight), None if bias is None else whole(bias)
        weight = torch.view_as_real(weight) if weight.is_complex() else weight
        weight = at_least_float32(weight.t() if self.is_transposed else weight)
        weight = weight.reshape(1) if weight.dim() == 0 else weight
        return LayerVector(weight, None if bias is None else at_least_float32(bias))

    @property
    def in_place(self) -> LayerVector | None:
        """The parameters in the form of :meth:`vector`, as views; None if they cannot be had without a copy."""
        if any(is_sharded(p) or torch.finfo(p.dtype).bits < 32 for p, _, _ in self.parameters):
            return None
        return self.vector(self.weight, self.bias)

    def write(self, vector: LayerVector, into: dict[int, Tensor]) -> None:
        """The reverse, by the ids of the parameters; of sharded ones this process's part."""
        weight = vector.weight.t() if self.is_transposed else vector.weight
        if self.weight.is_complex():
            weight = torch.view_as_complex(weight.contiguous())
        weight = weight.reshape(self.weight.shape).to(self.weight.dtype)
        into[id(self.weight)] = part_like(weight, self.weight)
        if self.bias is not None and vector.bias is not None:
            into[id(self.bias)] = part_like(vector.bias.to(self.bias.dtype), self.bias)

    def kept(self, which: int, key: str, shape: Sequence[int]) -> tuple[Tensor, bool]:
        """An average of the weight (0) or the bias (1), to be changed in place once the step is certain to be taken.

        Returns:
            The average, and whether it has no value yet.
        """
        like, past = self.gradient.weight, self.past[which].get(key)
        self.new[which][key] = now = like.new_empty(shape) if past is None else past.to(like.dtype)
        return now, past is None

    def average_product(self, which: int, key: str, x: Tensor, y: Tensor, decay: float) -> Tensor:
        """Take x * y into a running average, likewise in place."""
        past = self.past[which].get(key)
        now = x * y if past is None else past.to(x.dtype).mul_(decay).addcmul_(x, y, value=1 - decay)
        self.new[which][key] = now
        return now


def parts_with_gradients(
    layers: Iterable[AffineLayer],
    group_of: Mapping[AffineLayer, dict[str, Any]],
    groups: Iterable[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
) -> list[Part]:
    """Everything that has a gradient and is not left to SGD.

    Args:
        layers: a weight and its bias are stepped together.
        group_of: the hyper-parameters of each.
        groups: of parameters.
        state: of parameters; not modified.

    Returns:
        Layers first, then parameters without one.
    """
    parts, taken = list[Part](), set[int]()
    for layer in layers:
        if layer.weight.grad is None or layer.weight.grad.is_sparse:
            continue
        bias = layer.bias if layer.is_centred else None
        past = state.get(layer.weight, {}), {} if bias is None else state.get(bias, {})
        parts.append(Part(layer.weight, bias, layer, group_of[layer], past))
        taken |= {id(p) for p in (layer.weight, bias) if p is not None}
    for group in groups:
        for p in group["params"] if group["rule"] != "sgd" else ():
            if id(p) not in taken and p.grad is not None and not p.grad.is_sparse:
                parts.append(Part(p, None, None, group, (state.get(p, {}), {})))
    return parts
