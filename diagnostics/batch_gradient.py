"""The gradient of a batch's mean loss as a function of the weights: at, near, and to second order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_optim.geometry.gram import _frozen_statistics, _scale
from torchgeom_optim.geometry.per_sample import Batch
from torchgeom_optim.geometry.private_evaluation import private_evaluation, with_weights
from torchgeom_optim.geometry.sample_losses import sample_gradients

__all__ = ["BatchGradient"]

T = TypeVar("T")
_Read = Callable[[dict[str, Tensor], Any, Tensor], T]  # weights, outputs, losses


class BatchGradient:
    r"""h(w) = 1/b sum_i d l_i / dw of one batch, wherever it is asked for; the model is left as it was.

    Every evaluation is in full precision (no autocast), in the modes that the modules are in, on copies of the buffers,
    and sees the same random numbers: dropout masks do not change between two evaluations at the same state of the
    generators. Hooks on parameters, captures and ``p.grad`` do not notice any of it.

    Args:
        model: the module.
        loss_fn: ``loss_fn(outputs, targets)``, or ``loss_fn(outputs)`` without targets: b losses, or a scalar.
        batch: b samples.
        reduction: how a scalar loss came from the samples' losses; ``loss_fn.reduction`` where it has one.
        freeze_statistics: let batch normalization use its running statistics, whatever its mode.

    Raises:
        ValueError: raised by an evaluation: a scalar loss of unknown reduction, statistics that do not exist.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.ones(4, 2)
        >>> gradient = BatchGradient(model, nn.MSELoss(), Batch(x, torch.zeros(4, 1)))
        >>> h, moved = gradient(), gradient({"weight": torch.ones(1, 2)})
        >>> torch.testing.assert_close(moved["weight"] - h["weight"], torch.tensor([[4.0, 4.0]]))  # H times the shift
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Batch,
        *,
        reduction: Literal["mean", "sum"] | None = None,
        freeze_statistics: bool = False,
    ) -> None:
        self.model = model
        self.batch = batch
        self.num_samples = batch.num_samples
        self._loss_fn = loss_fn
        self._reduction: Literal["mean", "sum"] | None = reduction
        self._freeze = freeze_statistics

    def on(self, batch: Batch) -> BatchGradient:
        """The same for another batch."""
        return BatchGradient(
            self.model, self._loss_fn, batch, reduction=self._reduction, freeze_statistics=self._freeze
        )

    def __call__(self, shift: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """h(w + shift).

        Args:
            shift: name -> change of each trainable parameter; none by default.

        Returns:
            name -> gradient, zeros where the loss does not depend on the parameter.
        """
        return self._evaluate(lambda weights, outputs, losses: _named(weights, self._mean(losses)), shift)

    def of_samples(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Gradients of single samples' losses, all through one pass over the batch.

        Args:
            indices: of the samples.

        Returns:
            One named gradient for each.
        """

        def read(weights: dict[str, Tensor], outputs: Any, losses: Tensor) -> list[dict[str, Tensor]]:
            scale = _scale(losses, self._loss_fn, self._reduction, self.num_samples)
            leaves = list(weights.values())
            rows = sample_gradients(leaves, indices, self._loss_fn, self.batch, outputs, losses, scale)
            return [dict(zip(weights, row, strict=True)) for row in rows]

        return self._evaluate(read)

    def of_inputs(self) -> list[Tensor]:
        """Gradients of the sum of the samples' losses with respect to the inputs.

        Returns:
            One tensor for each floating point input, in the order of ``tree_leaves(batch.inputs)``: row i belongs to
            sample i, and is its own loss's gradient unless batch statistics couple the samples.

        Raises:
            ValueError: no input is floating point.
        """
        inputs = tree_map(_differentiable, self.batch.inputs)
        wanted = [x for x in tree_leaves(inputs) if x.requires_grad]
        if not wanted:
            dtypes = sorted({str(x.dtype) for x in tree_leaves(inputs)})
            raise ValueError(
                f"inputs of {', '.join(dtypes)}: a gradient needs floating point inputs; leave out the metrics of "
                f"inputs, or give the model what the tokens are embedded to."
            )

        def read(weights: dict[str, Tensor], outputs: Any, losses: Tensor) -> list[Tensor]:
            total = self._mean(losses) * self.num_samples
            return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))

        return self._evaluate(read, batch=Batch(inputs, self.batch.targets), frozen_weights=True)

    def with_hessian(self, work: Callable[[Callable[[Tensor], Tensor], Tensor], T]) -> T:
        """work(product, h) with product(v) = H v, the Hessian of the mean loss, and h its gradient, both [P].

        One forward and one backward pass are kept for all products. The parameters follow one another as in
        ``model.named_parameters()``. Kinks (ReLU) contribute nothing, as autograd has it.

        Args:
            work: what to do with them; the product is valid until it returns.

        Returns:
            What the work returns.
        """

        def read(weights: dict[str, Tensor], outputs: Any, losses: Tensor) -> T:
            leaves = list(weights.values())
            gradients = torch.autograd.grad(
                self._mean(losses), leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            sizes = [leaf.numel() for leaf in leaves]
            moving = [k for k, g in enumerate(gradients) if g.requires_grad]

            def product(v: Tensor) -> Tensor:
                if not moving:
                    return torch.zeros_like(v)
                parts = [x.reshape(leaf.shape).to(leaf) for x, leaf in zip(torch.split(v, sizes), leaves, strict=True)]
                result = torch.autograd.grad(
                    [gradients[k] for k in moving],
                    leaves,
                    [parts[k] for k in moving],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                return torch.cat([x.reshape(-1) for x in result])

            return work(product, torch.cat([g.detach().reshape(-1) for g in gradients]))

        return self._evaluate(read)

    def mean_loss(self) -> Tensor:
        """The mean loss at w."""
        return self._evaluate(lambda weights, outputs, losses: self._mean(losses).detach(), frozen_weights=True)

    def num_outputs(self) -> int:
        """Numbers per sample in the largest tensor that the model returns."""

        def read(weights: dict[str, Tensor], outputs: Any, losses: Tensor) -> int:
            return max(x.numel() for x in tree_leaves(outputs) if isinstance(x, Tensor)) // self.num_samples

        return self._evaluate(read, frozen_weights=True)

    def _mean(self, losses: Tensor) -> Tensor:
        return losses.sum() * (_scale(losses, self._loss_fn, self._reduction, self.num_samples) / self.num_samples)

    def _evaluate(
        self,
        read: _Read[T],
        shift: Mapping[str, Tensor] | None = None,
        *,
        batch: Batch | None = None,
        frozen_weights: bool = False,
    ) -> T:
        model, batch = self.model, batch or self.batch
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if shift is not None:
            weights = {name: w + shift[name] for name, w in weights.items()}
        if not frozen_weights:
            weights = {name: w.detach().requires_grad_() for name, w in weights.items()}

        def work(model: nn.Module) -> T:
            outputs = batch.outputs(model)
            return read(weights, outputs, batch.loss(self._loss_fn, outputs))

        with (
            private_evaluation(model, keep_modes=True),
            _frozen_statistics(model) if self._freeze else nullcontext(),
        ):
            return with_weights(model, weights, dict(model.named_buffers()), work)


def _named(weights: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, gradients, strict=True))


def _differentiable(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x
