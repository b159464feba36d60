"""The ways by which products with a Jacobian and its rows can be computed, and the comparison that admits a way.

A function here is called ``function(weights, then)``: it evaluates the network at these weights and returns
then(values [b, C]), with the weights in place until ``then`` has returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torchgeom_optim.geometry.deprecations import without_own_deprecations
from torchgeom_optim.geometry.mini_batches import MiniBatch, map_tensors, tensors_of

__all__ = [
    "Function",
    "Switches",
    "Weights",
    "batched_gradients",
    "forward_mode_agrees",
    "pull_back",
    "push_forward",
    "push_through_backward",
    "row_gradients",
    "rows_agree",
    "rows_match",
    "saved_bytes",
]

Weights: TypeAlias = dict[str, Tensor]
Function: TypeAlias = Callable[[Weights, Callable[[Tensor], Any]], Any]


@dataclass
class Switches:
    """What has been found to work for a model; None where it has not been tried yet."""

    forward: bool | None = None
    rows: bool | None = None
    batched_forward: bool = True
    batched_backward: bool = True


def pull_back(function: Function, values: Weights, cotangents: Tensor, switches: Switches) -> Weights:
    """J'u for each of the cotangents u [k, b, C] by the backward pass: name to [k, *shape]."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    result: Weights = function(leaves, lambda f: _gradients(f, leaves, cotangents, switches))
    return result


def _gradients(f: Tensor, leaves: Weights, cotangents: Tensor, switches: Switches) -> Weights:
    if not f.requires_grad:
        k = len(cotangents)
        return {name: torch.zeros(k, *x.shape, dtype=x.dtype, device=x.device) for name, x in leaves.items()}
    gradients = batched_gradients(f, list(leaves.values()), cotangents, switches)
    return {
        name: x.new_zeros(len(cotangents), *x.shape) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), gradients, strict=True)
    }


def batched_gradients(
    f: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge], cotangents: Tensor, switches: Switches
) -> list[Tensor | None]:
    """Gradients of sum(u f) for each of the cotangents u [k, b, C]: one [k, *shape] for each input.

    Args:
        f: values [b, C] with their graph, which is used up.
        inputs: leaves, or places in the graph.
        cotangents: [k, b, C].
        switches: told whether cotangents can be batched by vmap.

    Returns:
        In the order of the inputs; None for those that f does not depend on.
    """
    k, cotangents = len(cotangents), cotangents.to(f.dtype)
    if not inputs:
        return []
    if k > 1 and switches.batched_backward:
        try:
            return list(
                torch.autograd.grad(f, inputs, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True)
            )
        except RuntimeError as error:  # vmap cannot follow; whatever else is wrong, the loop raises again
            _unless_out_of_memory(error)
            switches.batched_backward = False
    one_by_one = [
        torch.autograd.grad(f, inputs, u, retain_graph=i < k - 1, allow_unused=True) for i, u in enumerate(cotangents)
    ]
    columns = zip(*one_by_one, strict=True)
    return [None if column[0] is None else torch.stack([_dense(g) for g in column]) for column in columns]


def push_forward(function: Function, values: Weights, tangents: Weights, switches: Switches) -> Tensor:
    """J v for each of the tangents v, name to [k, *shape], by forward mode: [k, b, C]."""

    def push(tangent: Weights) -> Tensor:
        with without_own_deprecations():
            result: Tensor = torch.func.jvp(lambda weights: function(weights, _same), (values,), (tangent,))[1]
        return result

    k = len(next(iter(tangents.values())))
    if k > 1 and switches.batched_forward:
        try:
            batched: Tensor = torch.vmap(push)(tangents)
            return batched
        except RuntimeError as error:
            _unless_out_of_memory(error)
            switches.batched_forward = False
    return torch.stack([push({name: t[i] for name, t in tangents.items()}) for i in range(k)])


def push_through_backward(function: Function, values: Weights, tangents: Weights, switches: Switches) -> Tensor:
    """J v as the derivative of u -> v'J'u, which is linear in u: the backward pass of the backward pass. [k, b, C]."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    k = len(next(iter(tangents.values())))

    def twice(f: Tensor) -> Tensor:
        u = torch.zeros_like(f, requires_grad=True)
        if not f.requires_grad:
            return torch.zeros(k, *f.shape, dtype=f.dtype, device=f.device)
        grads = torch.autograd.grad(f, list(leaves.values()), u, create_graph=True, allow_unused=True)
        used = [(name, g) for name, g in zip(leaves, grads, strict=True) if g is not None and g.requires_grad]
        if not used:
            return torch.zeros(k, *f.shape, dtype=f.dtype, device=f.device)
        pulled = dict(used)
        directions = {name: tangents[name].to(g.dtype) for name, g in used}
        if k > 1 and switches.batched_forward:
            try:
                (batched,) = torch.autograd.grad(
                    list(pulled.values()), u, list(directions.values()), retain_graph=True, is_grads_batched=True
                )
                return batched
            except RuntimeError as error:
                _unless_out_of_memory(error)
                switches.batched_forward = False
        outputs = list(pulled.values())
        return torch.stack(
            [
                torch.autograd.grad(outputs, u, [d[i] for d in directions.values()], retain_graph=True)[0]
                for i in range(k)
            ]
        )

    result: Tensor = function(leaves, lambda f: twice(f).detach())
    return result


def row_gradients(
    function_of: Callable[[MiniBatch], Function],
    batch: MiniBatch,
    values: Weights,
    num_outputs: int,
    switches: Switches,
) -> Weights:
    """Every row of J for these samples: name to [b, C, *shape]."""
    if switches.rows:
        try:
            return _rows_by_vmap(function_of, batch, values)
        except RuntimeError as error:
            _unless_out_of_memory(error)
            switches.rows = False
    value = next(iter(values.values()))
    every = torch.eye(num_outputs, dtype=value.dtype, device=value.device).unsqueeze(1)
    samples = [pull_back(function_of(batch.part(i, i + 1)), values, every, switches) for i in range(batch.size)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in values}


def _rows_by_vmap(function_of: Callable[[MiniBatch], Function], batch: MiniBatch, values: Weights) -> Weights:
    tensors = tensors_of(batch.inputs)
    num_inputs = len(tensors)
    if batch.targets is not None:
        tensors.append(batch.targets)

    def rows_of_one(*sample: Tensor) -> Weights:
        parts = iter(sample[:num_inputs])
        inputs = map_tensors(lambda _: next(parts).unsqueeze(0), batch.inputs)
        targets = sample[-1].unsqueeze(0) if batch.targets is not None else None
        function = function_of(MiniBatch(inputs, targets, 1))
        rows: Weights = torch.func.jacrev(lambda weights: function(weights, _same)[0])(values)
        return rows

    result: Weights = torch.vmap(rows_of_one)(*tensors)
    return result


def forward_mode_agrees(function: Function, values: Weights, switches: Switches) -> bool:
    """Whether forward mode works here and computes what the backward pass does.

    They part ways where the model tells the backward pass something of its own: no_grad, gradient hooks, padding
    tokens. Compared on a random v: <J v, J v> against <v, J'(J v)>.

    Args:
        function: evaluates a few samples.
        values: the weights.
        switches: told whether vectors can be batched.

    Returns:
        False also where forward mode cannot follow the model.
    """
    generator = torch.Generator().manual_seed(0)
    v = {n: torch.randn(1, *x.shape, generator=generator).to(x.device, x.dtype) for n, x in values.items()}
    try:
        pushed = push_forward(function, values, v, switches).detach()
    except RuntimeError as error:  # an operation without a forward derivative
        _unless_out_of_memory(error)
        return False
    scale = pushed.abs().max().clamp_min(torch.finfo(pushed.dtype).tiny)
    pulled = pull_back(function, values, pushed / scale, switches)
    there = (pushed / scale).double().pow(2).sum() * scale
    back = torch.stack([(pulled[n].double() * v[n].double()).sum() for n in values]).sum()
    return bool((there - back).abs() <= _agreement(pushed.dtype) * there)


def rows_agree(function_of: Callable[[MiniBatch], Function], batch: MiniBatch, values: Weights) -> bool:
    """Whether vmap over samples works here and its rows add up to what one plain backward pass computes."""
    try:
        rows = _rows_by_vmap(function_of, batch, values)
    except RuntimeError as error:
        _unless_out_of_memory(error)
        return False
    first = next(iter(rows.values()))
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, *first.shape[:2], generator=generator).to(first.device, first.dtype)
    pulled = pull_back(function_of(batch), values, u, Switches())
    return all(
        rows_match(torch.tensordot(u[0].to(row.dtype), row, 2), pulled[name][0], row) for name, row in rows.items()
    )


def rows_match(combined: Tensor, expected: Tensor, rows: Tensor) -> bool:
    """Whether a combination of rows is the expected one, up to rounding relative to the rows."""
    difference = (combined - _dense(expected)).double().norm()
    return bool(difference <= _agreement(expected.dtype) * rows.double().norm())


def saved_bytes(function: Function, values: Weights) -> tuple[int, Tensor]:
    """Bytes that one differentiated pass keeps for its backward pass beside the weights, and the values it gave.

    Args:
        function: evaluates the network.
        values: the weights.

    Returns:
        Bytes; f.

    Raises:
        ValueError: the pass hides weights from autograd.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    weights = {value.untyped_storage().data_ptr() for value in values.values()}
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            # A view counts for itself: a mini-batch is a part of all the data.
            seen[x.data_ptr()] = max(seen.get(x.data_ptr(), 0), min(storage.nbytes(), x.numel() * x.element_size()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, _same):
        f: Tensor = function(leaves, _same)
    _refuse_reentrant_checkpoints(f)
    return sum(seen.values()), f.detach()


def _refuse_reentrant_checkpoints(f: Tensor) -> None:
    # They hide their weights from autograd.grad, which would take them for unused.
    waiting, seen = [f.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "the model uses activation checkpointing with use_reentrant=True, whose weights only backward() finds: "
                "a Jacobian needs torch.autograd.grad. Call checkpoint(..., use_reentrant=False)."
            )
        waiting.extend(below for below, _ in node.next_functions)


def _agreement(dtype: torch.dtype) -> float:
    # Another derivative is off by its own size; rounding over a deep network stays far below this.
    return 10 * math.sqrt(torch.finfo(dtype).eps)


def _same(x: Tensor) -> Tensor:
    return x


def _dense(x: Tensor) -> Tensor:
    return x if x.layout == torch.strided else x.to_dense()


def _unless_out_of_memory(error: RuntimeError) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
