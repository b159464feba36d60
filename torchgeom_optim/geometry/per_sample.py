"""Per-sample gradients one by one, for parameters that no layer rule knows: exact for any module, only slower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_optim.geometry.private_evaluation import private_evaluation, with_weights

__all__ = ["Batch", "parameter_portions", "per_sample_gradients", "tensors_of"]


def tensors_of(tree: Any) -> list[Any]:
    """The leaves of nested tuples and dicts."""
    return [tree] if isinstance(tree, Tensor) else tree_leaves(tree)


@dataclass(frozen=True)
class Batch:
    """What a model and its loss function are called with; every tensor has the samples along axis 0.

    Args:
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        targets: what the loss function takes besides the model's output; nothing if None.
    """

    inputs: Any
    targets: Any = None

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the model."""
        if isinstance(self.inputs, dict):
            return ()
        return tuple(self.inputs) if isinstance(self.inputs, tuple | list) else (self.inputs,)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        return self.inputs if isinstance(self.inputs, dict) else {}

    @property
    def num_samples(self) -> int:
        """N.

        Raises:
            TypeError: something among the inputs is not a tensor.
            ValueError: the tensors do not all have the same number of samples, at least one.
        """
        leaves = [*tensors_of(self.inputs), *(() if self.targets is None else tensors_of(self.targets))]
        wrong = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]  # None may be one
        if wrong:
            raise TypeError(
                f"the batch holds a {type(wrong[0]).__name__}: inputs and targets must be tensors, or tuples or dicts "
                f"of tensors; bind other arguments in a module of your own."
            )
        lengths = {leaf.shape[0] if leaf.dim() > 0 else 0 for leaf in leaves}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"the batch's tensors have shapes {[list(leaf.shape) for leaf in leaves]}: all need the same number of "
                f"samples, one or more, along axis 0; expand what the samples share."
            )
        return int(lengths.pop())

    def outputs(self, model: nn.Module) -> Any:
        """What the model returns for it."""
        return model(*self.args, **self.kwargs)

    def loss(self, loss_fn: Callable[..., Tensor], outputs: Any) -> Tensor:
        """What the loss function returns for it."""
        return loss_fn(outputs) if self.targets is None else loss_fn(outputs, self.targets)

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any = None) -> Batch:
        """The batch that a model was called with."""
        return cls(kwargs if kwargs and not args else args, targets)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""
        return Batch(tree_map(change, self.inputs), None if self.targets is None else tree_map(change, self.targets))


def per_sample_gradients(
    model: nn.Module, names: Iterable[str], loss_fn: Callable[..., Tensor], batch: Batch
) -> tuple[dict[str, Tensor], Tensor, str]:
    """Gradients of every sample's own loss, the sample being evaluated as a batch of one.

    ``torch.func.vmap`` over the samples, or a loop where vmap refuses the model (a layer without a batching rule,
    control flow that depends on data). The model must not draw random numbers nor couple its samples.

    Args:
        model: the module, evaluated in the modes that it is in; it is left as it was.
        names: the parameters.
        loss_fn: loss of a batch of one; summed if not a scalar.
        batch: N samples.

    Returns:
        name -> gradients [N, *shape] without 1/N; the losses [N]; which way it took, ``"vmap"`` or ``"loop"``.

    Raises:
        RuntimeError: whatever the model raises on a batch of one.
    """
    named = dict(model.named_parameters())
    parameters = {name: named[name].detach() for name in names}
    with private_evaluation(model, keep_modes=True):
        try:
            gradients, losses = _by_vmap(model, parameters, loss_fn, batch)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # What vmap raises when it refuses: no batching rule, in-place writes to tensors that are not batched,
            # .item(), data-dependent shapes, random draws. A fault of the model's own is raised anew by the loop.
            gradients, losses = _by_loop(model, parameters, loss_fn, batch)
            return gradients, losses, "loop"
    return gradients, losses, "vmap"


def parameter_portions(sizes: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """Names in portions whose sizes sum to the budget at most, where a single one does not exceed it already."""
    portion: list[str] = []
    total = 0
    for name, size in sizes.items():
        if portion and total + size > budget:
            yield portion
            portion, total = [], 0
        portion.append(name)
        total += size
    if portion:
        yield portion


def _by_vmap(
    model: nn.Module, parameters: dict[str, Tensor], loss_fn: Callable[..., Tensor], batch: Batch
) -> tuple[dict[str, Tensor], Tensor]:
    constants = {name: p.detach() for name, p in model.named_parameters() if name not in parameters}
    constants |= {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss_of_one(values: dict[str, Tensor], inputs: Any, targets: tuple[Any, ...]) -> Tensor:
        one = Batch(inputs, *targets).map(lambda x: x.unsqueeze(0))
        outputs = functional_call(model, {**constants, **values}, one.args, one.kwargs)
        return one.loss(loss_fn, outputs).sum()

    targets = () if batch.targets is None else (batch.targets,)
    gradients, losses = vmap(grad_and_value(loss_of_one), (None, 0, 0))(parameters, batch.inputs, targets)
    return gradients, losses


def _by_loop(
    model: nn.Module, parameters: dict[str, Tensor], loss_fn: Callable[..., Tensor], batch: Batch
) -> tuple[dict[str, Tensor], Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    rows: list[Sequence[Tensor]] = []
    losses: list[Tensor] = []

    def work(model: nn.Module) -> None:
        for i in range(batch.num_samples):
            one = batch.map(lambda x, i=i: x[i : i + 1])  # type: ignore[misc]
            loss = one.loss(loss_fn, one.outputs(model)).sum()
            rows.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
            losses.append(loss.detach())

    with_weights(model, leaves, dict(model.named_buffers()), work)
    gradients = {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(leaves)}
    return gradients, torch.stack(losses)
