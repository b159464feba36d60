"""Watches a training loop with hooks, which neither change it nor are felt by it.

Which batch went through the model, which loss came of it, and when the backward pass was over.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from torchgeom_optim.diagnostics.processes import wrapped_by
from torchgeom_optim.geometry.capture import _in_functional_transform, _private_captures
from torchgeom_optim.geometry.per_sample import Batch

__all__ = ["CriterionCall", "LoopWatch", "ObservedPass", "innermost", "own_loss", "reduction_of"]


# Arguments that tell a model of several batches at once, and belong to no sample: in Hugging Face's trainer the sum of
# the tokens' losses is divided by their number in all batches that are accumulated. Without it models take the mean.
OF_SEVERAL_BATCHES = frozenset({"num_items_in_batch"})


def own_loss(outputs: Any) -> Tensor:
    """The loss that a model returns by itself: ``outputs.loss``, ``outputs["loss"]``, a number in a tuple, or all.

    Args:
        outputs: what the model returned.

    Returns:
        The loss.

    Raises:
        TypeError: there is no such tensor.
    """
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("loss")
    elif not isinstance(outputs, Tensor) and hasattr(outputs, "loss"):
        found = outputs.loss
    elif isinstance(outputs, tuple | list) and outputs:
        found = next((x for x in outputs if isinstance(x, Tensor) and x.dim() == 0), outputs[0])
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returned a {type(outputs).__name__} without a loss: without a criterion it must return its "
            f"loss, as .loss, ['loss'], a number in a tuple, or alone; give Diagnostics the criterion."
        )
    return found


class CriterionCall:
    """``loss_fn(outputs, targets)`` of a criterion that the loop calls with one tensor of the model's outputs.

    Args:
        criterion: the loop's; None for models that return their loss.
        index: which tensor among the leaves of the model's outputs it takes.
    """

    def __init__(self, criterion: Callable[..., Tensor] | None, index: int = 0) -> None:
        self._criterion = criterion
        self._index = index

    @property
    def reduction(self) -> str | None:
        """The criterion's."""
        return getattr(self._criterion, "reduction", None)

    @property
    def has_criterion(self) -> bool:
        """Whether there is one: without, ``select`` means nothing."""
        return self._criterion is not None

    def select(self, outputs: Any) -> Tensor:
        """What the criterion takes of the model's outputs."""
        return _tensors(outputs)[self._index]

    def __call__(self, outputs: Any, targets: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})) -> Tensor:
        """The loss; targets are the criterion's further arguments and keyword arguments."""
        if self._criterion is None:
            return own_loss(outputs)
        return self._criterion(self.select(outputs), *targets[0], **targets[1])


@dataclass
class ObservedPass:
    """One forward pass of the loop, and the loss that was computed from it.

    Args:
        args: the model's arguments; kept only where the pass is to be measured.
        kwargs: its keyword arguments.
        loss: as the criterion returned it, detached.
        scale: the gradient that the backward pass began with at the loss: loss scale, 1 / accumulation steps.
        loss_fn: computes the loss anew from the model's outputs and ``targets``; None if that cannot be told.
        targets: what the criterion got besides.
        num_losses: how often the criterion was called on this pass.
        signature: of the model's forward.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Tensor | None = None
    scale: Tensor | None = None
    loss_fn: CriterionCall | None = None
    targets: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    num_losses: int = 0
    signature: inspect.Signature | None = None
    outputs: list[weakref.ref[Tensor]] = field(default_factory=list)  # weakly: they hold the loop's graph
    is_queued: bool = False

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the arguments that :meth:`batch` goes without."""
        return tuple(name for name in self.kwargs if name in OF_SEVERAL_BATCHES)

    def batch(self) -> Batch:
        """Inputs and targets; where some arguments came by position and some by name, or as None, all go by name.

        Arguments that are None by default as well (``mask=None``) are left out: samples have no share in them.

        Returns:
            The batch.

        Raises:
            TypeError: they cannot, since the model takes ``*args``.
        """
        kwargs = {name: value for name, value in self.kwargs.items() if name not in OF_SEVERAL_BATCHES}
        has_none = any(value is None for value in (*self.args, *kwargs.values()))
        if self.signature is None or not (has_none or (self.args and kwargs)):
            return Batch.of_call(self.args, kwargs, self.targets)
        named: dict[str, Any] = {}
        for name, value in self.signature.bind(*self.args, **kwargs).arguments.items():
            parameter = self.signature.parameters[name]
            kind = parameter.kind
            if value is None and parameter.default is None:
                continue
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise TypeError(f"the model takes *{name}: it must be called by position alone, or by name alone.")
            named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        return Batch(named, self.targets)


class LoopWatch:
    """Reports each backward pass through a loss of the model, when it is over.

    The gradient that arrives at the loss begins the report, and a callback that the engine makes at the end of the
    backward pass ends it: weights are then still those of the pass, and ``p.grad`` is complete.

    Args:
        model: the module that the loop calls.
        criterion: the module that the loop computes its loss with; None if the model returns it.
        on_backward: what to call with the pass. A bound method is held weakly, and the hooks go with its owner.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module | None, on_backward: Callable[[ObservedPass], None]
    ) -> None:
        self.wanted = False  # whether the next pass is to be measured
        self.counting = False  # whether to report the others too, without their batch
        self._criterion = criterion
        self._signature = inspect.signature(innermost(model).forward)
        self._on_backward = weakref.WeakMethod(on_backward)
        self._pass: ObservedPass | None = None
        hook = _Hook(weakref.ref(self))
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(hook.before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(hook.after_forward),
        ]
        if criterion is not None:
            self._handles.append(criterion.register_forward_hook(hook.after_criterion, with_kwargs=True))
        weakref.finalize(self, _remove, self._handles).atexit = False

    def close(self) -> None:
        """Remove every hook and forget the pass. Calling it twice is fine."""
        self._pass = None
        _remove(self._handles)

    def why_nothing_was_seen(self) -> str:
        """Where a pass was wanted and none was reported: which of the loop's calls is missing."""
        if self._pass is None:
            return (
                "the model was not called, or without gradients; give the very module that the loop calls, such as "
                "what torch.compile(model) returned"
            )
        if self._pass.num_losses:
            return "no backward pass went through the loss"
        if self._criterion is None:
            return "the model returned no loss; give the criterion that the loop computes it with"
        kind = type(self._criterion).__name__
        return (
            f"the criterion was not called; let the loop compute its loss with the very {kind} module that Diagnostics "
            "was given, in place of a function or of another module"
        )

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins; an earlier one that no backward pass has reached is given up."""
        if not (self.wanted or self.counting) or not torch.is_grad_enabled():
            return
        self._pass = ObservedPass(args, kwargs, signature=self._signature) if self.wanted else ObservedPass()

    def after_forward(self, outputs: Any) -> None:
        """The model has returned."""
        if self._pass is None or not torch.is_grad_enabled():
            return
        self._pass.outputs = [weakref.ref(x) for x in _tensors(outputs)]
        if self._criterion is None and any(x.requires_grad for x in _tensors(outputs)):
            self._take_loss(self._pass, own_loss(outputs))
            self._pass.loss_fn = CriterionCall(None)

    def after_criterion(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        """The criterion has returned."""
        if self._pass is None or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        self._take_loss(self._pass, loss)
        places = [k for k, ref in enumerate(self._pass.outputs) if args and ref() is args[0]]
        if self.wanted and places:
            self._pass.loss_fn = CriterionCall(self._criterion, places[0])
            self._pass.targets = (args[1:], kwargs) if len(args) > 1 or kwargs else None

    def _take_loss(self, observed: ObservedPass, loss: Tensor) -> None:
        if loss.dim() > 0 and self._criterion is None:
            raise ValueError(
                f"the model returned a tensor of shape {list(loss.shape)}: without a criterion it must return its "
                "loss; give what the loop computes the loss with, as in Diagnostics(model, nn.CrossEntropyLoss())."
            )
        if loss.dim() > 0:
            raise ValueError(
                f"the criterion returned a loss of shape {list(loss.shape)}: it must be a scalar, or it is not known "
                f"how the samples' losses are put together; let it take the mean (reduction='mean')."
            )
        observed.num_losses += 1
        observed.loss = loss.detach()
        loss.register_hook(_GradHook(weakref.ref(self), observed))  # type: ignore[no-untyped-call]

    def gradient_arrives(self, observed: ObservedPass, grad: Tensor) -> None:
        """The backward pass has begun."""
        if observed is not self._pass or observed.is_queued:
            return
        observed.scale = grad.detach()
        observed.is_queued = True
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_is_over)

    def _backward_is_over(self) -> None:
        observed, self._pass = self._pass, None
        on_backward = self._on_backward()
        if observed is not None and on_backward is not None:
            on_backward(observed)


def innermost(model: nn.Module) -> nn.Module:
    """The module itself, without wrappers that compile or synchronise.

    Args:
        model: what the loop calls.

    Returns:
        The module whose parameters are measured.

    Raises:
        TypeError: it is no module.
        ValueError: its parameters are spread over processes, or nothing in it is trained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: a torch.nn.Module is needed.")
    *_, inner = wrapped_by(model)
    parameters = [p for p in inner.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires grad: nothing has a gradient to look at; unfreeze "
            f"some of them."
        )
    if any(hasattr(p, "placements") for p in parameters) or any(
        hasattr(module, "_fsdp_wrapped_module") for module in inner.modules()
    ):
        raise ValueError(
            "the parameters are sharded over processes, by fully_shard, FullyShardedDataParallel or tensor "
            "parallelism: only whole ones can be measured; train with DistributedDataParallel, or measure(x, y) a "
            "whole copy."
        )
    return inner


def reduction_of(criterion: object, reduction: str | None = None) -> Literal["mean", "sum"]:
    """How a criterion puts the samples' losses together; the mean where it does not tell.

    Args:
        criterion: with an attribute ``reduction``, or without.
        reduction: what is to be taken in any case.

    Returns:
        "mean" or "sum".

    Raises:
        ValueError: it leaves them apart.
    """
    found = reduction or getattr(criterion, "reduction", None) or "mean"
    if found in ("mean", "batchmean"):
        return "mean"
    if found == "sum":
        return "sum"
    raise ValueError(
        f"reduction={found!r}: the criterion must give one loss for the batch, the 'mean' or the 'sum' over its "
        f"samples; nn.CrossEntropyLoss() does."
    )


class _Hook:
    """The hooks of the modules. A copy or a pickle of them (with the model that carries them) does nothing."""

    def __init__(self, watch: Callable[[], LoopWatch | None]) -> None:
        self._watch = watch

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(_nothing)

    def __reduce__(self) -> tuple[type[_Hook], tuple[Callable[[], None]]]:
        return _Hook, (_nothing,)

    def _present(self) -> LoopWatch | None:
        if torch.compiler.is_compiling() or _private_captures.get() is not None or _in_functional_transform():
            return None
        return self._watch()

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (watch := self._present()) is not None:
            watch.before_forward(args, kwargs)

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if (watch := self._present()) is not None:
            watch.after_forward(outputs)

    def after_criterion(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if (watch := self._present()) is not None:
            watch.after_criterion(args, kwargs, loss)


class _GradHook:
    """On the loss: the backward pass of an observed pass has begun."""

    def __init__(self, watch: Callable[[], LoopWatch | None], observed: ObservedPass) -> None:
        self._watch = watch
        self._observed = weakref.ref(observed)

    def __call__(self, grad: Tensor) -> None:
        watch, observed = self._watch(), self._observed()
        if watch is not None and observed is not None:
            watch.gradient_arrives(observed, grad)


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def _nothing() -> None:
    return None


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
