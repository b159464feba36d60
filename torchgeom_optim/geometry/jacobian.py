"""The Jacobian of what a network computes with respect to its weights, sample by sample, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry import jacobian_routes as routes
from torchgeom_optim.geometry.factors import RowFactor
from torchgeom_optim.geometry.heads import HeadName, LossFunction, head_values, needs_targets
from torchgeom_optim.geometry.jacobian_gram import (
    FactorStore,
    Uses,
    factor_bytes,
    factors_agree,
    gram_of_outputs,
    gram_of_row_blocks,
    layer_factors,
    layers_with_rule,
    sphere_basis,
    sum_of_rows,
    unit_basis,
)
from torchgeom_optim.geometry.jacobian_memory import JacobianMemoryError, MemoryPlan
from torchgeom_optim.geometry.jacobian_routes import Weights
from torchgeom_optim.geometry.mini_batches import MiniBatch, MiniBatches
from torchgeom_optim.geometry.parameter_vectors import ParameterVectors, checked_columns
from torchgeom_optim.geometry.sample_function import SampleFunction

__all__ = ["Jacobian", "JacobianMemoryError", "TransposedJacobian"]


class Jacobian:
    r"""J, one row per sample and output, one column per weight; never formed unless asked for.

        J[i C + c, :] = d f_c(x_i; w) / d w          shape [N C, P]

    f is what ``of`` names: the model's ``"outputs"`` (flattened to C per sample); the ``"loss"`` of each sample by
    itself (C = 1); the ``"log_probabilities"`` of given labels (C = 1); or ``"sqrt_probabilities"``, 2 sqrt(softmax),
    whose J'J is the Fisher matrix summed over samples. **J carries no 1/N**: J'u with u = 1/N is the gradient of the
    mean loss, J'J / N the mean Fisher matrix. Columns follow ``model.named_parameters()``; units are [f] / [weight].

    - ``J @ v`` and ``J.T @ u``, for one vector or for the k columns of a matrix; ``J.rows()``, ``J.dense()``,
      ``J.gram()``. ``J.vectors`` turns vectors into named tensors and back.
    - A derivative is what the backward pass computes (so ``no_grad`` and tensor hooks inside the model count). Products
      by J use forward mode once a comparison has shown it to agree, and otherwise the backward pass of the backward
      pass. Rows are batched over samples by vmap, or taken one sample at a time where vmap cannot follow or does not
      agree. All are exact; ``ways`` tells which was used for what.
    - J is that of the weights and buffers that the model has when a product is asked for, in evaluation behaviour: no
      dropout, norm layers with their running statistics. Otherwise there is no such matrix: in training mode batch norm
      makes a row depend on the other samples, and dropout makes every pass another J.
    - The model is left as it was: ``p.grad``, buffers, modes and the random state; captures see nothing of it.

    Args:
        model: any module, with the sample along the first axis of its inputs and of its output.
        data: a tensor [N, ...], a tuple of the model's arguments or a mapping of its keyword arguments (tensors nested
            in them to any depth), or an iterable of mini-batches that gives the same ones each time, each an input or a
            pair (inputs, targets), such as a DataLoader that does not shuffle. See :class:`MiniBatches`.
        targets: what "loss" and "log_probabilities" need, where they do not come with the mini-batches.
        of: what is differentiated.
        loss_fn: the loss for ``of="loss"``, called as ``loss_fn(outputs[i:i+1], targets[i:i+1])``.
        parameters: names, or a predicate of name and parameter; by default those with ``requires_grad``.
        batch_size: most samples in one pass; by default as many as 256 MiB (or ``memory_limit``) have room for.
        dtype: of the computation; float64 evaluates a float64 copy of weights, buffers and inputs. By default the
            model's own.
        memory_limit: bytes that one call may take by prediction, result included; ``math.inf`` for no limit.
        select: picks the tensor out of the model's output where that is a tuple, a mapping or an object.
        class_dim: axis of the classes in the outputs, for the two heads of probabilities.
        keep_modes: leave every module in the mode it is in, instead of evaluation mode. Refused with a ValueError if
            samples then depend on one another or the model draws random numbers.

    Raises:
        ValueError: unknown head; missing or misplaced targets or loss; no parameter; no data; non-finite data or
            outputs; random or coupled outputs; reentrant checkpoints; shapes that do not fit.
        TypeError: the data can be gone through only once; the model's output is no tensor.
        JacobianMemoryError: raised by an operation, before it starts, that would need more than ``memory_limit``.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> J = Jacobian(model, torch.randn(5, 3))
        >>> J.shape, (J @ torch.ones(8)).shape, J.gram().shape
        ((10, 8), torch.Size([10]), torch.Size([10, 10]))
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        targets: Tensor | None = None,
        *,
        of: HeadName = "outputs",
        loss_fn: LossFunction | None = None,
        parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        memory_limit: float = 2**32,
        select: Callable[[Any], Tensor] | None = None,
        class_dim: int = -1,
        keep_modes: bool = False,
    ) -> None:
        if batch_size is not None and not batch_size >= 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1, or None to fit the memory; 64 is common.")
        if not memory_limit > 0:
            raise ValueError(f"memory_limit={memory_limit}: must be positive, in bytes; 2**32 is the default.")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}: derivatives need a real floating-point type. Try torch.float64.")
        self.model = model
        self.of = of
        self.ways: dict[str, str] = {}
        self.vectors = vectors = ParameterVectors(model, parameters, dtype)
        self._switches = routes.Switches(forward=False if _pads(model) else None)
        self._f = SampleFunction(
            model,
            lambda: MiniBatches(data, targets, needs_targets(of), vectors.device, dtype),
            vectors,
            head_values(of, loss_fn, class_dim),
            select,
            keep_modes,
        )
        self.num_samples = self._f.data.num_samples
        self.num_outputs = self._f.num_outputs
        # Square roots of one distribution have length 2, of T positions 2 sqrt(T).
        one_sphere = of == "sqrt_probabilities" and bool(self._f.first_values.norm() < 2.1)
        self._basis = sphere_basis if one_sphere else unit_basis
        self._by_rule: frozenset[str] | None = None
        self._layers: list[nn.Module] = []
        self._plan = MemoryPlan(
            self.num_samples,
            self.num_outputs,
            self.vectors.size,
            self.dtype.itemsize,
            self._f.saved_per_sample,
            memory_limit,
            batch_size,
            self._f.data.largest,
            twice_backward=True,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N C, P)."""
        return self.num_samples * self.num_outputs, self.vectors.size

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors and results."""
        return self.vectors.dtype

    @property
    def T(self) -> TransposedJacobian:
        """J', for products ``J.T @ u``."""
        return TransposedJacobian(self)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        return self.product(v)

    @torch.inference_mode(False)
    def product(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """J v, the change of f to first order as the weights move by v.

        Args:
            v: [P] or, for k vectors, [P, k]; or a mapping from names to [*shape] or [*shape, k].

        Returns:
            [N C], or [N C, k].

        Raises:
            TypeError: v is not real floating-point.
            ValueError: shape or values of v do not fit.
            JacobianMemoryError: see ``memory_limit``.
        """
        v = self.vectors.flat(v) if isinstance(v, Mapping) else v
        columns = checked_columns(v, self.shape[1], "P", self.dtype, self.vectors.device)
        self._plan.allow("product", columns.shape[1])
        result = columns.new_empty(self.shape[0], columns.shape[1])
        for part in _slices(columns.shape[1], self._plan.vectors_at_once(columns.shape[1])):
            tangents = self.vectors.split(columns[:, part].T)
            k, row = part.stop - part.start, 0
            for batch in self._f.parts(self._plan.samples_per_pass("product", k)):
                with self._f.private():
                    block = self._push(batch, tangents)  # [k, b, C]
                n = batch.size * self.num_outputs
                result[row : row + n, part] = block.reshape(k, n).T
                row += n
        return result if v.dim() == 2 else result[:, 0]

    @torch.inference_mode(False)
    def transposed_product(self, u: Tensor) -> Tensor:
        """J'u, the gradient with respect to the weights of sum(u f).

        Args:
            u: [N C] or, for k vectors, [N C, k]; entry i C + c belongs to output c of sample i.

        Returns:
            [P], or [P, k]. ``vectors.named(...)`` gives it as named tensors.

        Raises:
            TypeError: u is not real floating-point.
            ValueError: shape or values of u do not fit.
            JacobianMemoryError: see ``memory_limit``.
        """
        columns = checked_columns(u, self.shape[0], "N C", self.dtype, self.vectors.device)
        self._plan.allow("transposed_product", columns.shape[1])
        result = columns.new_zeros(columns.shape[1], self.vectors.size)
        for part in _slices(columns.shape[1], self._plan.vectors_at_once(columns.shape[1])):
            k, row = part.stop - part.start, 0
            for batch in self._f.parts(self._plan.samples_per_pass("transposed_product", k)):
                n = batch.size * self.num_outputs
                cotangents = columns[row : row + n, part].T.reshape(k, batch.size, self.num_outputs)
                with self._f.private():
                    values, function = self.vectors.values(), self._f.on(batch)
                    gradients = routes.pull_back(function, values, cotangents, self._switches)
                    self.vectors.write(gradients, result[part], add=True)
                row += n
        self.ways["transposed_product"] = "backward pass" + _at_a_time(self._switches.batched_backward)
        return result.T if u.dim() == 2 else result[0]

    def rows(self) -> Iterator[Tensor]:
        """The rows in blocks [b C, P], mini-batch by mini-batch, in the order of the samples.

        Returns:
            An iterator; each block is computed when it is asked for.

        Raises:
            JacobianMemoryError: see ``memory_limit``.
        """
        self._plan.allow("rows")
        return self._row_blocks()

    @torch.inference_mode(False)
    def dense(self) -> Tensor:
        """J as a matrix.

        Returns:
            [N C, P].

        Raises:
            JacobianMemoryError: see ``memory_limit``.
        """
        self._plan.allow("dense")
        result = torch.empty(self.shape, dtype=self.dtype, device=self.vectors.device)
        row = 0
        for block in self._row_blocks():
            result[row : row + len(block)] = block
            row += len(block)
        return result

    @torch.inference_mode(False)
    def gram(self) -> Tensor:
        """J J', which has the nonzero eigenvalues of J'J. In units of f^2 / weight^2, without 1/N.

        Parameters that only layers with a rule use go through the layers' factors, which C backward passes over the
        batch give for all samples; the others through rows. Where ``memory_limit`` has no room for the factors of all
        samples, all go through rows, held for as many samples as there is room for and computed again for the others.

        Returns:
            [N C, N C], exactly symmetric.

        Raises:
            JacobianMemoryError: see ``memory_limit``.
        """
        return gram_of_outputs(*self.gram_in_basis()).to(self.dtype)

    @torch.inference_mode(False)
    def gram_in_basis(self) -> tuple[Tensor, Tensor]:
        r"""R'J J'R with the basis R of :meth:`layer_rows`; J J' = R (R'J J'R) R', and they share nonzero eigenvalues.

        Returns:
            R'J J'R [N K, N K], exactly symmetric, and R [N, C, K].

        Raises:
            JacobianMemoryError: see ``memory_limit``.
        """
        self._learn_rules()
        self._plan.allow("gram")
        if self._plan.gram_by_factors():
            return self._gram_by_factors()
        basis = self._bases()
        num_directions = basis.shape[2]
        held = self._plan.samples_held()
        gram = gram_of_row_blocks(
            lambda start: self._row_blocks(start, self._basis),
            self.num_samples * num_directions,
            held * num_directions,
            lambda *shape: torch.empty(shape, dtype=self.dtype, device=self.vectors.device),
        )
        in_parts = held < self.num_samples
        self.ways["gram"] = "rows, " + ("held in part and computed again" if in_parts else "held")
        return gram, basis

    @torch.inference_mode(False)
    def layer_rows(self) -> Iterator[Uses]:
        r"""What the rows are made of, mini-batch by mini-batch: for each parameter one factor per use.

        The rows are those of R'J with an orthonormal basis R of each sample's outputs, K of them per sample: all C, or
        for 2 sqrt(p) C - 1, at right angles to it, where J has no part. So sums over a sample's rows of anything
        quadratic in them are those of J; single rows are not.

        Yields:
            Name to the factors [b, K, ...] of its uses, whose rows add up.
        """
        self._learn_rules()
        for batch in self._f.parts(self._plan.samples_per_pass("factors" if self._by_rule else "rows")):
            yield self._factors(batch, self._basis)[0]

    def predicted_bytes(self, operation: str, num_vectors: int = 1) -> int:
        """Bytes that an operation will take at its peak.

        From the shapes and from what the forward pass of one sample kept when the operator was made. It is meant as an
        upper bound, and is none where a layer works with more memory than it keeps.

        Args:
            operation: "product", "transposed_product", "rows" (one block), "dense" or "gram".
            num_vectors: k, for products.

        Returns:
            Bytes, result included, weights and data excluded.

        Raises:
            ValueError: unknown operation.
        """
        if operation == "gram":
            self._learn_rules()
        return self._plan.predicted(operation, num_vectors)

    def __repr__(self) -> str:
        return f"Jacobian(of={self.of!r}, shape={self.shape}, dtype={self.dtype}, ways={self.ways})"

    # How it is computed

    def _push(self, batch: MiniBatch, tangents: Weights) -> Tensor:
        values, function = self.vectors.values(), self._f.on(batch)
        if self._switches.forward is None:
            few = self._f.on(batch.part(0, min(2, batch.size)))
            self._switches.forward = routes.forward_mode_agrees(few, values, self._switches)
            self._plan.twice_backward = not self._switches.forward
        if self._switches.forward:
            result = routes.push_forward(function, values, tangents, self._switches)
            self.ways["product"] = "forward mode" + _at_a_time(self._switches.batched_forward)
            return result
        try:
            result = routes.push_through_backward(function, values, tangents, self._switches)
            self.ways["product"] = "backward pass of the backward pass" + _at_a_time(self._switches.batched_forward)
            return result
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation without a second derivative: rows need only the first
            self.ways["product"] = "rows, sample by sample"
        k = len(next(iter(tangents.values())))
        columns = torch.empty(k, self.vectors.size, dtype=self.dtype, device=self.vectors.device)
        self.vectors.write(tangents, columns)
        blocks = [self._block(batch.part(i, i + 1)) @ columns.T for i in range(batch.size)]
        return torch.stack(blocks).permute(2, 0, 1)

    def _row_blocks(self, from_row: int = 0, basis: Callable[[Tensor], Tensor] = unit_basis) -> Iterator[Tensor]:
        row, per_sample = 0, self.num_outputs - (basis is sphere_basis)
        for batch in self._f.parts(self._plan.samples_per_pass("rows")):
            if row >= from_row:
                yield self._block(batch, basis)
            row += batch.size * per_sample

    @torch.inference_mode(False)
    def _block(self, batch: MiniBatch, basis: Callable[[Tensor], Tensor] = unit_basis) -> Tensor:
        """Rows [b K, P] of a mini-batch in a basis of its outputs."""
        self._learn_rules()
        uses, directions = self._factors(batch, basis)
        num_rows = batch.size * directions.shape[2]
        block = torch.empty(num_rows, self.vectors.size, dtype=self.dtype, device=self.vectors.device)
        with self._f.private(), torch.no_grad():
            self.vectors.write({name: sum_of_rows(factors) for name, factors in uses.items()}, block)
        return block

    def _factors(self, batch: MiniBatch, basis: Callable[[Tensor], Tensor]) -> tuple[Uses, Tensor]:
        """The rows of a mini-batch in a basis of its outputs: the layers' factors, and rows where there are none."""
        values, function = self.vectors.values(), self._f.on(batch)
        known: Uses = {}
        if self._by_rule:
            found, directions = layer_factors(
                function, values, self._layers, self._f.private, basis, batch.size, self._switches
            )
            known = {name: factors for name, factors in found.items() if name in self._by_rule}
            if len(known) == len(values):
                return {name: known[name] for name in values}, directions
        rest = {name: value for name, value in values.items() if name not in known}
        with self._f.private():
            directions = basis(self._f.on(batch)(values, lambda f: f.detach()))
            if self._switches.rows is None:
                few = batch.part(0, min(2, batch.size))
                self._switches.rows = routes.rows_agree(self._f.on, few, rest)
            rows = routes.row_gradients(self._f.on, batch, rest, self.num_outputs, self._switches)
            across = directions.transpose(1, 2)
            for name, row in rows.items():
                row = row.reshape(batch.size, self.num_outputs, -1)
                row = row if basis is unit_basis else torch.bmm(across.to(row.dtype), row)
                known[name] = [RowFactor(row, self.vectors.shapes[name][1:].numel())]
        self.ways["rows"] = "samples batched by vmap" if self._switches.rows else "samples one by one"
        return {name: known[name] for name in values}, directions

    def _learn_rules(self) -> None:
        """Find out which parameters only layers with a rule use, by comparison with a plain backward pass."""
        if self._by_rule is not None:
            return
        self._layers = layers_with_rule(self.model, self.vectors.shapes)
        self._by_rule = frozenset()
        if not self._layers:
            return
        batch = next(self._f.parts(min(2, self._f.data.largest)))
        values, function = self.vectors.values(), self._f.on(batch)
        uses, _ = layer_factors(function, values, self._layers, self._f.private, unit_basis, batch.size, self._switches)
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(1, batch.size, self.num_outputs, generator=generator).to(self.vectors.device, self.dtype)
        with self._f.private():
            gradients = routes.pull_back(function, values, u, self._switches)
        self._by_rule = frozenset(factors_agree(uses, gradients, u[0]))
        if self._by_rule:
            known = {name: factors for name, factors in uses.items() if name in self._by_rule}
            rest = sum(shape.numel() for name, shape in self.vectors.shapes.items() if name not in known)
            held, patches = factor_bytes(known, batch.size)
            self._plan.factors = held + rest * self.num_outputs * self.dtype.itemsize, patches

    def _bases(self) -> Tensor:
        """R [N, C, K] of all samples."""
        bases = []
        for batch in self._f.parts(self._plan.samples_per_pass("rows")):
            with self._f.private(), torch.no_grad():
                bases.append(self._basis(self._f.on(batch)(self.vectors.values(), lambda f: f.detach())))
        return torch.cat(bases)

    def _gram_by_factors(self) -> tuple[Tensor, Tensor]:
        store = FactorStore()
        for batch in self._f.parts(self._plan.samples_per_pass("factors")):
            store.add(*self._factors(batch, self._basis))
        with self._f.private(), torch.no_grad():
            gram, basis = store.gram()
        by_rule, number = len(self._by_rule or ()), len(self.vectors.shapes)
        others = ", rows for the others" if by_rule < number else ""
        self.ways["gram"] = f"layers' factors for {by_rule} of {number} parameters{others}"
        return gram, basis


class TransposedJacobian:
    """J', shape [P, N C]: products ``J.T @ u``."""

    def __init__(self, jacobian: Jacobian) -> None:
        self.T = jacobian
        self.shape = jacobian.shape[::-1]

    def __matmul__(self, u: Tensor) -> Tensor:
        return self.T.transposed_product(u)


def _pads(model: nn.Module) -> bool:
    """Whether the backward pass leaves out tokens that forward mode would count, which one batch may not show."""
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if any(m.scale_grad_by_freq for m in embeddings):
        raise ValueError(
            "an embedding has scale_grad_by_freq=True: what it gives as its gradient is no derivative and depends on "
            "the other samples. Set the flag to False on the module."
        )
    return any(m.padding_idx is not None for m in embeddings)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def _at_a_time(batched: bool) -> str:
    return ", vectors batched by vmap" if batched else ", one vector at a time"
