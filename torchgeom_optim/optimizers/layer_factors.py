r"""What a step's calls of a layer say about its Fisher matrix, ready to be taken into running averages.

A call is looked at when a backward pass reaches it. Matrices are made there and then, except that a linear layer with
fewer samples than inputs or outputs keeps both as rows until the step: its factors then go into the averages in one
product each, and where ``p.grad`` is the very product of these rows, G^-1 p.grad = (B^-1 g^T)(a A^-1) costs less.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from torchgeom_optim.geometry.layers import plain_arithmetic
from torchgeom_optim.geometry.metric import LayerVector
from torchgeom_optim.geometry.moments import at_least_float32
from torchgeom_optim.optimizers.layer_rows import Rows, fisher, input_rows, moments, output_rows, token_frequencies
from torchgeom_optim.optimizers.layers import AffineLayer, LayerCall, SeenCall

__all__ = [
    "CapturedProduct",
    "FactorCall",
    "FactorKind",
    "PassCounter",
    "SeenFactors",
    "averaged",
    "captured_product",
    "factors_with_counts",
    "pooled_factors",
    "with_factors",
]

FactorKind = Literal["kronecker", "kronecker_diagonal", "exact", "moments", "moments_with_row"]

Term = tuple[Tensor | Rows, float | Tensor]
Pooled = tuple[list[Term], ...]  # of every factor, the weighted terms whose sum it is


class SeenFactors(SeenCall):
    """A call with its factors.

    Attributes:
        factors: A and B (or their diagonals), F, or moments; of the gradients as autograd scaled them.
        is_kronecker: whether they are A and B, of which A has no gradients in it.
        number_of_pass: which backward pass reached it; calls of one pass share its mean over samples.
        product: the gradients that the call left, as a product, if it can be told.
    """

    factors: tuple[Tensor | Rows, ...]
    is_kronecker: bool
    number_of_pass: int
    product: CapturedProduct | None


@dataclass
class CapturedProduct:
    """The parameters' gradients g^T [a, 1] as autograd made them, in the memory in which it put them.

    Attributes:
        inputs: [a, 1] (a without a bias), shape [n, q].
        output_grads: g, shape [n, m].
        made: of weight and bias, the memory that the products were written to.
    """

    inputs: Tensor
    output_grads: Tensor
    made: list[StorageWeakRef]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy would be of parameters whose gradients lie elsewhere: there the product is not known."""
        return type(None), ()

    def is_gradient_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether p.grad holds the products still; told by structure, without looking at a number.

        Autograd hands the tensor that a product was written to on to ``p.grad`` if nothing else contributed. A second
        use of the weight, a penalty on it, accumulation into an earlier gradient, a hook or a clipped gradient that
        takes its place leave ``p.grad`` in another memory; changes in place raise its version. What neither tells (a
        change through ``.data``, or by ``GradScaler.unscale_``) is found by :meth:`agrees_with`.

        Args:
            parameters: weight, and bias if it has a gradient.

        Returns:
            Whether they do.
        """
        grads = [p.grad for p in parameters]
        return len(grads) == len(self.made) and all(
            type(grad) is Tensor and grad._version == 0 and _memory_of(grad) == made
            for grad, made in zip(grads, self.made, strict=True)
        )

    def agrees_with(self, weight_grad: Tensor) -> bool:
        """Whether the sums of the gradient's rows are those of the product; waits for the device."""
        columns = self.inputs[:, : weight_grad.shape[1]]
        expected = self.output_grads.t() @ columns.sum(1)
        difference = torch.linalg.vector_norm(weight_grad.sum(1) - expected)
        return bool(difference <= 1e-2 * torch.linalg.vector_norm(expected))

    def is_cheaper(self, output_inverse: Tensor, input_inverse: Tensor) -> bool:
        """Whether going through the samples takes fewer multiplications than through the gradient."""
        (n, q), m = self.inputs.shape, self.output_grads.shape[1]
        of_inputs, of_outputs = (
            1 if inverse.dim() == 2 else inverse.shape[-1] for inverse in (input_inverse, output_inverse)
        )
        return n * (q * of_inputs + m * of_outputs + q * m) < q * m * (of_inputs + of_outputs)

    def between(self, output_inverse: Tensor, input_inverse: Tensor, like: LayerVector) -> LayerVector:
        """(B^-1 g^T)([a, 1] A^-1), from inverses that are matrices or diagonals."""
        left, right = (
            rows @ inverse if inverse.dim() == 2 else rows * inverse
            for rows, inverse in ((self.output_grads, output_inverse), (self.inputs, input_inverse))
        )
        q = like.weight.shape[1]
        return LayerVector(left.t() @ right[:, :q], None if like.bias is None else left.t() @ right[:, q])


class PassCounter:
    """Numbers the backward passes; one that a reentrant checkpoint starts inside another is part of that one."""

    def __init__(self) -> None:
        self._number = -1
        self._is_open = False

    def current(self) -> int:
        """Number of the pass that is under way, unique in this process."""
        if not self._is_open:
            self._is_open, self._number = True, next(_numbers)
            torch.autograd.Variable._execution_engine.queue_callback(self.close)
        return self._number

    def close(self) -> None:
        """What comes next is another pass."""
        self._is_open = False


_numbers = itertools.count()


class FactorCall(LayerCall):
    """A call whose factors are taken when a backward pass reaches it."""

    def __init__(
        self,
        layer: AffineLayer,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        kind: FactorKind,
        passes: PassCounter,
        *,
        with_moments: bool = False,
        with_outputs: bool = False,
    ) -> None:
        super().__init__(
            layer, module, x, y, [], with_moments=with_moments, with_output_grads=False, with_outputs=with_outputs
        )
        self._inputs: Tensor | None = x.detach()
        self._kind = kind
        self._passes = passes
        self._input_factor: Tensor | Rows | None = None
        self._output_shape = y.shape
        self._may_change = x.grad_fn is None or (x._base is not None and x._base.grad_fn is None)
        self._keeps_rows = kind.startswith("kronecker") and _may_keep_rows(layer, self._num_applications)
        if self._keeps_rows and len(layer.modules) == 1 and (node := _product_node(y)) is not None:
            node.register_hook(self._on_product)
        self._seen: SeenFactors | None = None

    def summarise(self) -> None:
        """Reduce the input to its factor, and let go of it; the others cannot be had from the input alone."""
        super().summarise()
        if self._inputs is None or not self._kind.startswith("kronecker"):
            return
        layer, x, self._inputs = self._layer, self._inputs, None
        with plain_arithmetic(x.device.type):
            if layer.is_embedding:
                self._input_factor = token_frequencies(layer, x)
                return
            rows = input_rows(layer, x, self._output_shape)
            if not self._keeps_rows:
                self._input_factor = rows.second_moment()
            elif self._may_change and layer.bias is None:  # the user's, before the step, or another weight, in it
                self._input_factor = rows._replace(values=rows.values.clone())
            else:
                self._input_factor = rows

    def on_output_grad(self, output_grad: Tensor) -> None:
        """Count the call, once."""
        is_first = not self._counted
        super().on_output_grad(output_grad)
        if not is_first:
            return
        self.summarise()
        layer, g = self._layer, output_grad.detach()
        g = g.clone() if self._num_applications == 1 else g  # else it may share its memory with the bias gradient
        with plain_arithmetic(g.device.type):
            if self._input_factor is not None:
                rows = output_rows(layer, g)
                of_outputs: Tensor | Rows = rows
                if self._kind == "kronecker_diagonal":
                    of_outputs = rows.mean_squares()
                elif not self._keeps_rows:
                    of_outputs = rows.second_moment()
                factors: tuple[Tensor | Rows, ...] = (self._input_factor, of_outputs)
            else:
                assert self._inputs is not None
                x, self._inputs = self._inputs, None
                if self._kind == "exact":
                    factors = (fisher(layer, x, g),)
                else:
                    found = moments(layer, x, g, with_row=self._kind == "moments_with_row")
                    factors = tuple(part for part in found if part is not None)
        self._seen = seen = SeenFactors(*layer.calls[-1])
        seen.factors, seen.is_kronecker = factors, self._input_factor is not None
        seen.number_of_pass, seen.product = self._passes.current(), None
        layer.calls[-1] = seen

    def _on_product(self, input_grads: tuple[Tensor | None, ...], output_grads: tuple[Tensor, ...]) -> None:
        """Note where the node of the product, which runs right after :meth:`on_output_grad`, has put its results."""
        seen = self._seen
        made = [input_grads[-1], *([] if self._layer.bias is None else [input_grads[0]])]
        if seen is None or any(grad is None for grad in made):
            return
        of_inputs = seen.factors[0]
        assert isinstance(of_inputs, Rows)
        memory = [_memory_of(grad) for grad in made if grad is not None]
        seen.product = CapturedProduct(of_inputs.values[0], at_least_float32(output_grads[0].detach()), memory)


def _may_keep_rows(layer: AffineLayer, num_rows: int) -> bool:
    return not layer.spatial_axes and not layer.is_embedding and num_rows <= max(layer.weight.shape)


def _product_node(y: Tensor) -> Any:
    """The node that makes the gradients of a linear layer's weight and bias, if there is just one."""
    node: Any = y.grad_fn
    for _ in range(2):  # leading axes are folded before, and unfolded after the product
        if type(node).__name__ in ("AddmmBackward0", "MmBackward0"):
            return node
        node = node.next_functions[0][0] if type(node).__name__ in ("ViewBackward0", "UnsafeViewBackward0") else None
    return None


def captured_product(calls: Sequence[SeenCall], parameters: Sequence[Tensor]) -> CapturedProduct | None:
    """The parameters' gradients as a product, if one call made them and nothing else has a part in them.

    Args:
        calls: of their layer, since the last step.
        parameters: weight, and bias if it has a gradient.

    Returns:
        The product, or None.
    """
    product = calls[0].product if len(calls) == 1 and isinstance(calls[0], SeenFactors) else None
    return product if product is not None and product.is_gradient_of(parameters) else None


def pooled_factors(calls: Sequence[SeenCall], *, mean_reduction: bool, loss_scale: float | Tensor = 1.0) -> Pooled:
    """Factors of the union of a step's calls, or none.

    Args:
        calls: of one layer, since the last step.
        mean_reduction: whether hooks deliver g / N, N the samples of the whole step, which is undone.
        loss_scale: by which they are multiplied, which is undone too.

    Returns:
        Of A and B, F, or the moments, the terms whose sum they are; () if no call was looked at.
    """
    seen = [call for call in calls if isinstance(call, SeenFactors)]
    if not seen:
        return ()
    samples, applications = sum(c.num_samples for c in seen), sum(c.num_applications for c in seen)
    undone = (_batch_size(seen) if mean_reduction else 1.0) ** 2 / loss_scale**2
    pooled, is_kronecker = [], seen[0].is_kronecker
    for k in range(len(seen[0].factors)):
        of_outputs = is_kronecker and k == 1
        terms = list[Term]()
        for call in seen:
            share = call.num_applications / applications if of_outputs else call.num_samples / samples
            terms.append((call.factors[k], share * (undone if of_outputs or not is_kronecker else 1.0)))
        pooled.append(terms)
    return tuple(pooled)


def _batch_size(seen: Sequence[SeenFactors]) -> float | Tensor:
    """N of the whole step: each pass brings the samples of its largest call; k of them share one mean."""
    if len(seen) == 1:  # a tensor if it stands for all processes
        return seen[0].num_samples
    passes: dict[int, int] = {}
    for call in seen:
        assert isinstance(call.num_samples, int)
        passes[call.number_of_pass] = max(call.num_samples, passes.get(call.number_of_pass, 0))
    return float(sum(passes.values()))


def factors_with_counts(layer: AffineLayer, kind: FactorKind) -> list[tuple[Tensor, float]]:
    """The pooled factors of one process, as matrices, each with the number of observations that it is a mean over.

    Args:
        layer: with its calls, if this process has called it.
        kind: of factors.

    Returns:
        Means that can be taken over processes, of gradients as autograd scaled them; without calls zeros of the same
        shapes, with count 0.
    """
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    pooled = pooled_factors(layer.calls, mean_reduction=False)
    if pooled:
        samples = float(sum(call.num_samples for call in layer.calls))
        counts = [samples] * len(pooled)
        if kind.startswith("kronecker"):
            counts[1] = float(sum(call.num_applications for call in layer.calls))
        return [(averaged(terms, None, 0.0).to(dtype), n) for terms, n in zip(pooled, counts, strict=True)]
    groups, units, inputs = layer.groups, layer.num_units // layer.groups, layer.fan_in + (layer.bias is not None)
    shapes: list[tuple[int, ...]]
    if kind == "exact":
        shapes = [(1, layer.num_units * inputs, layer.num_units * inputs)]
    elif kind.startswith("kronecker"):
        of_outputs = (groups, units) if kind == "kronecker_diagonal" else (groups, units, units)
        shapes = [(1, inputs) if layer.is_embedding else (groups, inputs, inputs), of_outputs]
    else:
        weight = tuple(layer.weight.shape[::-1] if layer.is_embedding else layer.weight.shape)
        shapes = [weight] * (2 if kind == "moments_with_row" else 1)
        shapes = [weight] if layer.bias is None else [*shapes, (layer.num_units,)]
    return [(torch.zeros(shape, dtype=dtype, device=layer.weight.device), 0.0) for shape in shapes]


def with_factors(call: SeenCall, kind: FactorKind, factors: Sequence[Tensor]) -> SeenFactors:
    """A call, of all processes, with what these have found together."""
    seen = SeenFactors(*call)
    seen.factors, seen.is_kronecker = tuple(factors), kind.startswith("kronecker")
    seen.number_of_pass, seen.product = -1, None
    return seen


def averaged(terms: Sequence[Term], past: Tensor | None, decay: float) -> Tensor:
    """Take a sum of weighted terms into a running average, which the first one initialises.

    Args:
        terms: of one factor, from :func:`pooled_factors`.
        past: the average so far; not modified.
        decay: its weight.

    Returns:
        The new average.
    """
    total = past
    for number, (term, weight) in enumerate(terms):
        keep = 1.0 if number else decay
        weight = weight if past is None else weight * (1 - decay)
        if isinstance(term, Rows) and not isinstance(weight, Tensor):
            rows = term.values
            if total is None:
                total = Rows(rows, term.share * weight).second_moment()
            else:  # product and average in one
                total = total.to(rows.dtype)
                total = torch.baddbmm(total, rows.transpose(1, 2), rows, beta=keep, alpha=weight * term.share)
            continue
        values = term.second_moment() if isinstance(term, Rows) else term
        total = values * weight if total is None else torch.add(values * weight, total.to(values.dtype), alpha=keep)
    assert total is not None
    return total


def _memory_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
