r"""Inner products of all per-sample gradients of a model, without forming the gradients.

For samples i and j with losses l_i and l_j, weights w and inputs x

    weights[i, j] = <dl_i/dw, dl_j/dw>          inputs[i, j] = <dl_i/dx_i, dl_j/dx_j>

neither divided by N. :func:`per_sample_gram` makes a pass of its own;
:class:`~torchgeom_optim.geometry.gram_recorder.GramRecorder` rides on a pass that the training loop makes anyway.

Layers that normalize by batch statistics couple the samples, and a gradient per sample does not exist. What stands in
its place is each sample's *contribution to the batch gradient*, sum_t g_it a_it^T with g the gradient of all losses'
sum; the contributions add up to the gradient of that sum. :attr:`GramResult.statistics` says which a number is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.factors import Factor, OuterFactor, RowFactor, inner_products, with_bias
from torchgeom_optim.geometry.layer_calls import LayerCall, LayerCalls, ParameterUses, watched_layers
from torchgeom_optim.geometry.layers import plain_arithmetic, uses_batch_statistics
from torchgeom_optim.geometry.per_sample import Batch, parameter_portions, per_sample_gradients, tensors_of
from torchgeom_optim.geometry.private_evaluation import with_weights
from torchgeom_optim.geometry.pure_call import without_trace

__all__ = ["GramAccumulator", "GramResult", "is_advanced", "per_sample_gram", "random_state", "statistics_of"]

_PORTION_BYTES = 2**27  # explicit per-sample gradients at a time, where there is no rule


@dataclass(frozen=True)
class GramResult:
    """Inner products of per-sample gradients; nothing is divided by N.

    Args:
        weights: of the gradients with respect to all trainable parameters, [N, N], units (loss / parameter)^2.
        inputs: of the gradients with respect to the inputs, [N, N], if they were asked for.
        parameters: name -> [N, N], which sum to ``weights``, if they were asked for.
        routes: name -> ``"rule"`` (factors of its layer), ``"vmap"`` or ``"loop"`` (per-sample gradients formed), or
            ``"unused"`` (the loss does not depend on it). Frozen parameters are not listed.
        statistics: ``"none"`` if no layer could normalize over the batch, ``"frozen"`` if each took its running
            statistics, ``"batch"`` if some took the batch's: gradients are then contributions to the batch gradient.
    """

    weights: Tensor
    inputs: Tensor | None
    parameters: dict[str, Tensor] | None
    routes: dict[str, str]
    statistics: str


def per_sample_gram(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any = None,
    *,
    reduction: Literal["mean", "sum"] | None = None,
    of_inputs: bool = False,
    per_parameter: bool = False,
    freeze_statistics: bool = False,
) -> GramResult:
    r"""Gram matrix of the per-sample gradients, from one pass that leaves no trace in the model.

    The pass computes no weight gradients. Each layer's share is computed when the gradient at its output arrives,
    for a linear layer as (A A^T) * (G G^T), and the tensors are dropped; only parameters that are used several times
    are collected until their last use. The uses add up before the product is taken.

    Parameters that a layer rule does not cover in full are found by inspection, not by type
    (:mod:`torchgeom_optim.geometry.layer_calls`); their gradients are formed by ``torch.func``, or in a loop over the
    samples where vmap refuses or the model draws random numbers (the loop then runs through the one random pass).

    Args:
        model: the module, evaluated in the modes that it is in.
        loss_fn: ``loss_fn(outputs, targets)``, or ``loss_fn(outputs)`` without targets; returns N losses (further axes
            are summed) or a scalar.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, samples along axis 0.
        targets: tensors with samples along axis 0.
        reduction: how a scalar loss came from the samples' losses; ``loss_fn.reduction`` where it has one. Under
            ``"mean"`` a sample's loss is N times its share of the mean: with class weights or ignored targets, whose
            mean has another denominator, return unreduced losses to say what is meant.
        of_inputs: also for the gradients with respect to the inputs (all floating point ones).
        per_parameter: also keep one matrix per parameter.
        freeze_statistics: let batch normalization use its running statistics, whatever its mode.

    Returns:
        the matrices, in at least float32, and the way every parameter took.

    Raises:
        ValueError: the loss is a scalar of unknown reduction; a gradient of integer inputs is asked for; statistics to
            freeze do not exist; a parameter without a rule meets batch statistics or a loss that does not split
            into losses of single samples.

    Example:
        >>> model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> gram = per_sample_gram(model, nn.CrossEntropyLoss(), x, y)
        >>> loss = 4 * nn.CrossEntropyLoss()(model(x), y)
        >>> total = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters())))
        >>> torch.testing.assert_close(gram.weights.sum(), total)
    """
    batch = Batch(inputs, targets)
    num_samples = batch.num_samples
    floating = [x for x in tensors_of(inputs) if x.is_floating_point()]
    if of_inputs and not floating:
        dtypes = [str(x.dtype) for x in tree_leaves(inputs)]
        raise ValueError(
            f"of_inputs=True with inputs of {', '.join(dtypes)}: gradients need floating point inputs; "
            f"pass what the tokens are embedded to, or of_inputs=False."
        )
    modules = list(model.modules())
    buffers = dict(model.named_buffers())
    leaves, are_aliases = _leaves(model)
    if of_inputs:
        batch = Batch(tree_map(_differentiable, inputs), targets)
    accumulator = GramAccumulator(per_parameter)
    record = LayerCalls({id(p): name for name, p in leaves.items()}, accumulator.on_output_grad)
    capture = Capture(watched_layers(modules), lambda *call: record.on_call(*call))

    devices = {p.device for p in leaves.values()} | {x.device for x in tensors_of(inputs)}

    def work(model_with_leaves: nn.Module) -> _Pass:
        before = random_state(devices)
        outputs = batch.outputs(model_with_leaves)
        record.recording = False
        record.keep_sample_first(model, batch.args, batch.kwargs, num_samples)
        losses = batch.loss(loss_fn, outputs)
        scale = _scale(losses, loss_fn, reduction, num_samples)
        uses = record.resolve([losses], leaves)
        accumulator.uses = uses
        is_random = bool(uses.other) and is_advanced(before, devices)
        if statistics == "batch":
            _refuse_coupled(uses.other)
        ends: list[Any] = [call.output_edge for call in uses.last]
        if of_inputs:
            ends += [x for x in tree_leaves(batch.inputs) if x.requires_grad]
        input_grads: list[Tensor] = []
        if ends:
            seed = torch.full_like(losses, scale)
            grads = torch.autograd.grad(losses, ends, seed, retain_graph=is_random, allow_unused=True)
            # Where the pass ends, autograd hands the gradients over without running the node that a hook is set on.
            with torch.no_grad():
                for call, grad in zip(uses.last, grads, strict=False):
                    if grad is not None:
                        accumulator.on_output_grad(call, grad)
            input_grads = [
                torch.zeros_like(x) if g is None else g
                for x, g in zip(ends[len(uses.last) :], grads[len(uses.last) :], strict=True)
            ]
        accumulator.finish()
        if is_random:
            own = {name: leaves[name] for name in leaves if name in uses.other}
            accumulator.add_rows(_through_one_graph(own, loss_fn, batch, outputs, losses), "loop")
        return _Pass(uses, losses.detach() * scale, is_random, input_grads)

    with ExitStack() as stack:
        stack.enter_context(_attributes_kept(modules))
        stack.enter_context(capture)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_trace(model, capture))
        if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
            # Compiled code would not call hooks that were set after it was compiled.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if freeze_statistics:
            stack.enter_context(_frozen_statistics(model))
        statistics = statistics_of(modules)
        done = with_weights(model, leaves, buffers, work) if buffers or are_aliases else work(model)
        if done.uses.other and not done.is_random:
            accumulator.add_formed(model, done.uses.other, loss_fn, Batch(inputs, targets), done.losses)
    reference = floating[0] if floating else next(model.parameters(), torch.empty(0))
    return accumulator.result(
        num_samples, reference, leaves, done.uses, statistics, done.input_grads if of_inputs else None
    )


@dataclass(frozen=True)
class _Pass:
    uses: ParameterUses
    losses: Tensor  # of the samples, or their sum
    is_random: bool
    input_grads: list[Tensor]


@dataclass
class GramAccumulator:
    """Sums what the parameters contribute to the matrix as their gradients come by.

    Args:
        per_parameter: keep one matrix per parameter too.
        uses: must be set before the backward pass.
    """

    per_parameter: bool = False
    uses: ParameterUses | None = None
    routes: dict[str, str] = field(default_factory=dict)
    _total: Tensor | None = None
    _parts: dict[str, Tensor] = field(default_factory=dict)
    _collected: dict[str, list[Factor]] = field(default_factory=dict)
    _is_finished: bool = False

    def on_output_grad(self, call: LayerCall, output_grad: Tensor) -> None:
        """Take in one call of a layer."""
        if self.uses is None or self._is_finished or call.is_released:
            return
        calls = self.uses.calls
        names = [own for own, name in call.parameters.items() if name in calls]
        factors = dict(call.factors(output_grad.unsqueeze(1), names))
        weight, bias = factors.get("weight"), factors.get("bias")
        if (
            isinstance(weight, OuterFactor)
            and isinstance(bias, RowFactor)
            and weight.num_positions == 1
            and not self.per_parameter
            and all(len(calls[call.parameters[own]]) == 1 for own in ("weight", "bias"))
        ):
            # One product of the output gradients serves both.
            with plain_arithmetic(weight.device_type):
                self._add_share(call.parameters["weight"], with_bias(weight), "rule")
            self.routes[call.parameters["bias"]] = "rule"
            factors = {}
        for own, factor in factors.items():
            name = call.parameters[own]
            collected = self._collected.setdefault(name, [])
            collected.append(factor)
            if len(collected) == len(self.uses.calls[name]):
                self._add(name, self._collected.pop(name), "rule")
        call.release()

    def finish(self, scale: float = 1.0) -> None:
        """Take no more calls, those that no gradient came to adding nothing; take every gradient times ``scale``."""
        self._is_finished = True
        for name, factors in self._collected.items():
            self._add(name, factors, "rule")
        self._collected.clear()
        if self._total is not None:
            self._total *= scale**2
        self._parts = {name: part * scale**2 for name, part in self._parts.items()}

    def add_rows(self, gradients: Mapping[str, Tensor], route: str) -> None:
        """Take in explicit gradients, name -> [N, *shape]."""
        for name, rows in gradients.items():
            rows = rows.detach().reshape(len(rows), 1, -1)
            self._add(name, [RowFactor(rows.to(torch.promote_types(rows.dtype, torch.float32)))], route)

    def add_formed(
        self,
        model: nn.Module,
        names: frozenset[str],
        loss_fn: Callable[..., Tensor],
        batch: Batch,
        losses: Tensor | None = None,
    ) -> None:
        """Form the gradients of some parameters and take them in.

        Args:
            model: the module.
            names: the parameters.
            loss_fn: as for :func:`per_sample_gram`.
            batch: N samples.
            losses: the samples' losses in the batch, or their sum, to be compared with those of the samples alone.

        Raises:
            ValueError: the losses differ.
        """
        named = dict(model.named_parameters())
        bytes_each = {
            name: batch.num_samples * p.numel() * max(p.element_size(), 4) for name, p in named.items() if name in names
        }
        alone = torch.empty(0)
        for portion in parameter_portions(bytes_each, _PORTION_BYTES):
            gradients, alone, route = per_sample_gradients(model, portion, loss_fn, batch)
            self.add_rows(gradients, route)
        if losses is None or not names:
            return
        if losses.dim() == 0:
            alone = alone.sum()
        losses = losses.reshape(*alone.shape, -1).sum(-1)
        error = (losses - alone).abs().max()
        scale = alone.abs().max() + 1
        allowed = min(1000 * torch.finfo(losses.dtype).eps, 0.05)
        if not error <= allowed * scale:
            raise ValueError(
                f"the batch's losses differ from those of its samples alone by {error:.3g}, and {sorted(names)} have "
                f"no layer rule: their gradients are taken sample by sample; return unreduced losses where there are "
                f"class weights or ignored targets, and set layers that couple samples to evaluation mode."
            )

    def result(
        self,
        num_samples: int,
        reference: Tensor,
        names: Iterable[str],
        uses: ParameterUses,
        statistics: str,
        input_grads: list[Tensor] | None = None,
    ) -> GramResult:
        """All of it, by the trainable parameters' ``names``; an empty sum has the device and dtype of ``reference``."""
        routes = {name: "unused" if name in uses.unused else self.routes.get(name, "rule") for name in names}
        if self._total is not None and input_grads is None and not self.per_parameter:
            return GramResult(self._total, None, None, routes, statistics)
        wide = torch.promote_types(reference.dtype if reference.is_floating_point() else torch.float32, torch.float32)
        zero = torch.zeros(num_samples, num_samples, dtype=wide, device=reference.device)
        of_inputs: Tensor | None = None
        if input_grads is not None:
            rows = [g.detach().to(torch.promote_types(g.dtype, torch.float32)).flatten(1) for g in input_grads]
            of_inputs = sum((r @ r.T for r in rows), zero)
        total = zero if self._total is None else self._total
        parts = None
        if self.per_parameter:
            parts = {name: self._parts.get(name, zero) for name in routes}
        return GramResult(total, of_inputs, parts, routes, statistics)

    def _add(self, name: str, factors: list[Factor], route: str) -> None:
        with plain_arithmetic(factors[0].device_type):
            self._add_share(name, inner_products(factors), route)

    def _add_share(self, name: str, share: Tensor, route: str) -> None:
        share = share[:, 0, :, 0]
        if self.per_parameter:
            self._parts[name] = share.clone()
        self._total = share if self._total is None else self._total.add_(share.to(self._total.device))
        self.routes[name] = route


def statistics_of(modules: Iterable[nn.Module]) -> str:
    """``"none"``, ``"frozen"`` or ``"batch"``: what the layers that can normalize over the batch do at present."""
    layers = [module for module in modules if isinstance(module, _BatchNorm)]
    if any(uses_batch_statistics(layer) for layer in layers):
        return "batch"
    return "frozen" if layers else "none"


def random_state(devices: Iterable[torch.device]) -> dict[str, Tensor]:
    """State of the generators of some devices, and of the CPU's."""
    states = {"cpu": torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            states[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return states


def is_advanced(before: Mapping[str, Tensor], devices: Iterable[torch.device]) -> bool:
    """Whether one of the generators has been drawn from since."""
    return any(not torch.equal(state, before[name]) for name, state in random_state(devices).items())


def _leaves(model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """The trainable parameters; aliases of them where the user's hooks would feel that they are differentiated."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in trainable.values()):
        return {name: p.detach().requires_grad_() for name, p in trainable.items()}, True
    return dict(trainable), False


def _differentiable(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _scale(losses: Tensor, loss_fn: object, reduction: str | None, num_samples: int) -> float:
    """What to multiply the loss by to have the sum of the samples' losses."""
    if losses.dim() > 0:
        if losses.shape[0] != num_samples:
            raise ValueError(
                f"loss_fn returned shape {list(losses.shape)} for {num_samples} samples: it must return a scalar or "
                f"one loss per sample along axis 0; reshape it to [N, ...]."
            )
        return 1.0
    reduction = reduction or getattr(loss_fn, "reduction", None)
    if reduction in ("mean", "batchmean"):
        return float(num_samples)
    if reduction == "sum" or num_samples == 1:
        return 1.0
    raise ValueError(
        f"loss_fn returned a scalar and reduction={reduction!r}: it must be known whether that is the mean or the sum "
        f"over the samples; pass reduction='mean' or 'sum', or let loss_fn return one loss per sample."
    )


def _refuse_coupled(without_rule: frozenset[str]) -> None:
    if without_rule:
        raise ValueError(
            f"{sorted(without_rule)} have no layer rule, and batch normalization uses the batch's statistics: a "
            f"sample's gradient does not exist; pass freeze_statistics=True, or set those layers to evaluation mode."
        )


def _through_one_graph(
    leaves: Mapping[str, Tensor], loss_fn: Callable[..., Tensor], batch: Batch, outputs: Any, losses: Tensor
) -> dict[str, Tensor]:
    """Gradients of every sample's loss through one pass over the batch, so that all saw the same random draws."""
    rows = []
    for i in range(batch.num_samples):
        if losses.dim() > 0:
            loss = losses[i].sum()
        else:
            one = batch.map(lambda x, i=i: x[i : i + 1])  # type: ignore[misc]
            loss = one.loss(loss_fn, tree_map(lambda x, i=i: x[i : i + 1], outputs))
        rows.append(
            torch.autograd.grad(
                loss, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(leaves)}


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    coupling = {name: module for name, module in model.named_modules() if uses_batch_statistics(module)}
    missing = [name for name, module in coupling.items() if getattr(module, "running_mean", None) is None]
    if missing:
        raise ValueError(
            f"freeze_statistics=True, but {missing} keep no running statistics: there is nothing to freeze them at; "
            f"build them with track_running_stats=True, or leave freeze_statistics out."
        )
    modes = [(module, module.training) for module in coupling.values()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What modules note in their attributes (an old-style weight norm its weight, with our graph) is put back."""
    attributes = [
        (vars(module), dict(vars(module)))
        for module in modules
        if module._forward_pre_hooks or module._forward_hooks or not type(module).__module__.startswith("torch.nn.")
    ]
    try:
        yield
    finally:
        for present, kept in attributes:
            present.clear()
            present.update(kept)
