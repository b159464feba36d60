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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_optim.geometry.capture import Capture, private_pass
from torchgeom_optim.geometry.gram_accumulator import GramAccumulator, GramResult
from torchgeom_optim.geometry.layer_calls import LayerCalls, ParameterUses
from torchgeom_optim.geometry.layers import rule_for, uses_batch_statistics
from torchgeom_optim.geometry.per_sample import Batch, tensors_of
from torchgeom_optim.geometry.private_evaluation import Attributes, with_weights
from torchgeom_optim.geometry.sample_losses import sample_gradients

__all__ = ["GramResult", "is_advanced", "per_sample_gram", "random_state", "set_random_state", "statistics_of"]


def per_sample_gram(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any = None,
    *,
    reduction: Literal["mean", "sum"] | None = None,
    of_inputs: bool = False,
    per_parameter: bool = False,
    per_layer: bool = False,
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
        per_layer: also keep one matrix per layer, for less.
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
    survey = _survey(model)
    leaves, are_aliases = survey.trainable, False
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in leaves.values()):
        # The user's hooks on parameters must not feel that these are differentiated.
        leaves, are_aliases = {name: p.detach().requires_grad_() for name, p in leaves.items()}, True
    if of_inputs:
        batch = Batch(tree_map(_differentiable, inputs), targets)
    accumulator = GramAccumulator(per_parameter, may_postpone=True, per_layer=per_layer)
    record = LayerCalls({id(p): name for name, p in leaves.items()}, accumulator.on_output_grad)
    capture = Capture(survey.watched, lambda *call: record.on_call(*call))

    devices = {p.device for p in leaves.values()} | {x.device for x in tensors_of(inputs)}
    before = random_state(devices)

    def work(model_with_leaves: nn.Module) -> _Pass:
        outputs = batch.outputs(model_with_leaves)
        record.recording = False
        record.keep_sample_first(model, batch.args, batch.kwargs, num_samples)
        losses = batch.loss(loss_fn, outputs)
        scale = _scale(losses, loss_fn, reduction, num_samples)
        uses = record.resolve([losses], leaves, [x for x in tree_leaves(outputs) if isinstance(x, Tensor)])
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
            own = [name for name in leaves if name in uses.other]
            which = range(num_samples)
            rows = sample_gradients([leaves[n] for n in own], which, loss_fn, batch, outputs, losses, scale)
            stacked = (torch.stack(column) for column in zip(*rows, strict=True))
            accumulator.add_rows(dict(zip(own, stacked, strict=True)), "loop")
        return _Pass(uses, losses.detach() * scale, is_random, input_grads)

    try:
        # Compiled code would not call hooks that were set after it was compiled.
        with (
            capture,
            torch.enable_grad(),
            private_pass(capture),
            torch.compiler.set_stance("force_eager") if survey.is_compiled else nullcontext(),
            _frozen_statistics(model) if freeze_statistics else nullcontext(),
        ):
            statistics = statistics_of(survey.batch_norms)
            needs_copies = survey.has_buffers or are_aliases
            done = with_weights(model, leaves, dict(model.named_buffers()), work) if needs_copies else work(model)
            if done.uses.other and not done.is_random:
                accumulator.add_formed(model, done.uses.other, loss_fn, Batch(inputs, targets), done.losses)
    finally:
        set_random_state(before)
        survey.attributes.put_back()
    reference = floating[0] if floating else next(model.parameters(), torch.empty(0))
    return accumulator.result(
        num_samples, reference, leaves, done.uses, statistics, done.input_grads if of_inputs else None
    )


@dataclass
class _Survey:
    """What has to be known of the modules, from one walk over them."""

    trainable: dict[str, Tensor]
    watched: list[nn.Module]
    batch_norms: list[nn.Module]
    has_buffers: bool
    is_compiled: bool
    attributes: Attributes  # an old-style weight norm notes its weight there, with our graph


def _survey(model: nn.Module) -> _Survey:
    found = _Survey({}, [], [], False, False, Attributes())
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        is_trained = False
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                is_trained = True
                if id(p) not in seen:
                    seen.add(id(p))
                    found.trainable[f"{prefix}.{name}" if prefix else name] = p
        if is_trained and rule_for(module) is not None:
            found.watched.append(module)
        if isinstance(module, _BatchNorm):
            found.batch_norms.append(module)
        if module._buffers:
            found.has_buffers = True
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            found.is_compiled = True
        if module._forward_pre_hooks or module._forward_hooks or not type(module).__module__.startswith("torch.nn."):
            found.attributes.add(module)
    return found


@dataclass(frozen=True)
class _Pass:
    uses: ParameterUses
    losses: Tensor  # of the samples, or their sum
    is_random: bool
    input_grads: list[Tensor]


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


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put generators back to where :func:`random_state` found them."""
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(torch.device(name)).set_rng_state(state, torch.device(name))


def is_advanced(before: Mapping[str, Tensor], devices: Iterable[torch.device]) -> bool:
    """Whether one of the generators has been drawn from since."""
    return any(not torch.equal(state, before[name]) for name, state in random_state(devices).items())


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
