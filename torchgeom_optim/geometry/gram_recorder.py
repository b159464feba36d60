"""Gram matrices of per-sample gradients from the pass that a training loop makes anyway."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from torchgeom_optim.geometry.capture import Capture, _in_functional_transform, _private_captures
from torchgeom_optim.geometry.gram import is_advanced, random_state, statistics_of
from torchgeom_optim.geometry.gram_accumulator import GramAccumulator, GramResult
from torchgeom_optim.geometry.layer_calls import LayerCall, LayerCalls, ParameterUses, watched_layers
from torchgeom_optim.geometry.per_sample import Batch

__all__ = ["GramRecorder"]


class GramRecorder:
    r"""Takes Gram matrices from forward and backward passes that the user makes, and changes nothing in them.

    After the backward pass, :meth:`result` gives what :func:`~torchgeom_optim.geometry.gram.per_sample_gram` would have
    given for the last batch. Only products of what the pass computed are added to its cost. Hooks deliver the gradients
    as the loop's loss has them, divided by N under mean reduction and times a loss scale; both are undone.

    Args:
        model: the module that the loop calls. Calls of its parts alone are not seen, nor calls of compiled code.
        reduction: how the loop's loss comes from the samples' losses; ``"mean"`` is undone by N.
        of_inputs: also for the gradients with respect to those inputs that require grad.
        per_parameter: also keep one matrix per parameter.
        per_layer: also keep one matrix per layer, for less.

    Raises:
        ValueError: the reduction is none of the two.

    Example:
        >>> model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> with GramRecorder(model, reduction="mean") as recorder:
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     gram = recorder.result()
        >>> total = sum(p.grad.square().sum() for p in model.parameters())
        >>> torch.testing.assert_close(gram.weights.sum() / 4**2, total)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        of_inputs: bool = False,
        per_parameter: bool = False,
        per_layer: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"reduction={reduction!r}: must be 'mean' or 'sum', as the loop's loss is; for another, sum "
                f"unreduced losses."
            )
        self.enabled = True  # set to False to let passes go by
        self._model = model
        self._reduction = reduction
        self._of_inputs = of_inputs
        self._per_parameter = per_parameter
        self._per_layer = per_layer
        self._pass: _RecordedPass | None = None
        self._count = 0
        self._overlapping: set[int] = set()
        self._layers = watched_layers(model.modules())
        self._capture = Capture(self._layers, self._on_call)
        hook = _ModelHook(weakref.ref(self))
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(hook.before, prepend=True, with_kwargs=True),
            model.register_forward_hook(hook.after),
        ]
        weakref.finalize(self, _remove, self._handles).atexit = False

    def close(self) -> None:
        """Remove every hook and forget the last pass. Calling it twice is fine."""
        self.reset()
        self._capture.close()
        _remove(self._handles)

    def __enter__(self) -> GramRecorder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget the last pass."""
        if self._pass is not None:
            self._pass.release()
        self._pass = None

    def result(
        self,
        *,
        loss_scale: float = 1.0,
        loss: Tensor | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        targets: Any = None,
    ) -> GramResult:
        """The matrices of the last forward and backward pass, which is then forgotten.

        Args:
            loss_scale: what the loss was multiplied by before ``backward()``, as ``GradScaler.get_scale()`` tells.
            loss: the loss itself. Given that, weights that the loss takes from the model outside of the model's own
                forward are found; without, the loss is taken to depend on the weights through the outputs alone.
            loss_fn: needed where parameters have no layer rule: their gradients are formed sample by sample.
            targets: what ``loss_fn`` takes besides the outputs.

        Returns:
            the matrices; nothing is divided by N.

        Raises:
            RuntimeError: no forward and backward pass has been seen, or one that cannot be taken apart; the weights
                have changed since; a parameter without a rule lacks a loss function.
            ValueError: the loss scale is not in (0, inf).
        """
        if not 0.0 < loss_scale < math.inf:
            raise ValueError(
                f"loss_scale={loss_scale}: must be in (0, inf); leave it out for a loss that is not scaled."
            )
        last = self._pass
        if last is None or last.uses is None or not last.has_gradient:
            seen = "no forward pass" if last is None or last.uses is None else "a forward pass but no backward pass"
            raise RuntimeError(
                f"{seen} through the {type(self._model).__name__} has been seen: both must go by, with grad enabled "
                f"and not compiled, before the result is asked for; call the model itself, or use per_sample_gram."
            )
        if last.number in self._overlapping or last.problem is not None:
            problem = last.problem or "several forward passes went into one backward pass"
            raise RuntimeError(f"{problem}: per-sample gradients cannot be read off this pass; use per_sample_gram.")
        if last.arrived_unused:
            raise RuntimeError(
                f"gradients came to {sorted(last.arrived_unused)} by a way that the model's graph does not show "
                f"(reentrant checkpointing, use outside of the model): it must show all; use per_sample_gram, or "
                f"use_reentrant=False."
            )
        if loss is not None:
            self._refuse_use_outside(last, loss)
        scale = (last.num_samples if self._reduction == "mean" else 1) / loss_scale
        last.accumulator.finish(scale)
        if last.uses.other:
            self._add_without_rule(last, loss_fn, targets)
        input_grads = [grad * scale for grad in last.input_grads] if self._of_inputs else None
        reference = next(self._model.parameters(), torch.empty(0))
        result = last.accumulator.result(
            last.num_samples, reference, last.names, last.uses, last.statistics, input_grads
        )
        self.reset()
        return result

    def _on_call(self, module: nn.Module, layer_input: Tensor, output: Tensor) -> Callable[[Tensor], None] | None:
        return None if self._pass is None else self._pass.record.on_call(module, layer_input, output)

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or _private_captures.get() is not None or _in_functional_transform():
            return
        self._watch_layers()
        if not self.enabled:
            return
        self.reset()
        self._count += 1
        self._pass = _RecordedPass(self._model, self._count, args, kwargs, self._of_inputs)
        self._pass.accumulator.per_parameter = self._per_parameter
        self._pass.accumulator.per_layer = self._per_layer

    def _watch_layers(self) -> None:
        """Passes that go by need no hooks on the layers, which cost 5 µs each; compiled code sees none set later."""
        if self.enabled and not self._capture.is_watching:
            self._capture.add(self._layers)
        elif not self.enabled and self._capture.is_watching and not any(map(_is_compiled, self._model.modules())):
            self._capture.close()

    def _after_forward(self, output: Any) -> None:
        last = self._pass
        if last is None or last.uses is not None or not last.record.recording or _private_captures.get() is not None:
            return
        last.after_forward(self._model, output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(_ArrivalHook(weakref.ref(self), last.number))  # type: ignore[no-untyped-call]

    def _gradient_arrives(self, number: int) -> None:
        if self._pass is not None and self._pass.number == number:
            self._pass.has_gradient = True
        else:
            self._overlapping.add(self._count)

    def _refuse_use_outside(self, last: _RecordedPass, loss: Tensor) -> None:
        assert last.uses is not None
        outside = last.record.resolve([loss], last.names).other - last.uses.other
        if outside:
            raise RuntimeError(
                f"the loss takes {sorted(outside)} outside of the model's forward: all uses must lie within it; move "
                f"the use into the model, or use per_sample_gram with it in the model."
            )

    def _add_without_rule(self, last: _RecordedPass, loss_fn: Callable[..., Tensor] | None, targets: Any) -> None:
        assert last.uses is not None
        names = sorted(last.uses.other)
        if loss_fn is None:
            raise RuntimeError(
                f"{names} have no layer rule: their gradients must be formed sample by sample, which needs the loss; "
                f"pass loss_fn and targets to result(), or register_rule() for their layers."
            )
        if last.statistics == "batch" or last.is_random:
            how = "normalized by batch statistics" if last.statistics == "batch" else "drew random numbers"
            raise RuntimeError(
                f"{names} have no layer rule, and the pass {how}, so that single samples cannot repeat it; use "
                f"per_sample_gram, or set the model to evaluation mode."
            )
        named = dict(self._model.named_parameters())
        if any(named[name]._version != version for name, version in last.versions.items()):
            raise RuntimeError(
                f"the weights have changed since the pass, and {names} have no layer rule: their gradients must be "
                f"formed at the weights of the pass; ask for the result before optimizer.step()."
            )
        batch = Batch.of_call(last.args, last.kwargs, targets)
        last.accumulator.add_formed(self._model, last.uses.other, loss_fn, batch)


class _RecordedPass:
    """One forward pass of the user's, and what its backward pass brings. Whatever goes wrong is told at the end."""

    def __init__(self, model: nn.Module, number: int, args: Any, kwargs: Any, of_inputs: bool) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.number = number
        self.args = args
        self.kwargs = kwargs
        self.names = list(trainable)
        self.versions = {name: p._version for name, p in trainable.items()}
        self.accumulator = GramAccumulator()
        self.record = LayerCalls({id(p): name for name, p in trainable.items()}, self._on_output_grad)
        self.uses: ParameterUses | None = None
        self.num_samples = 0
        self.statistics = statistics_of(model.modules())
        self.is_random = False
        self.has_gradient = False
        self.problem: str | None = None
        self.arrived_unused: set[str] = set()
        self.input_grads: list[Tensor] = []
        self.handles: list[RemovableHandle] = []
        self._devices = {p.device for p in trainable.values()}
        self._random_state = random_state(self._devices)
        if of_inputs:
            inputs = [x for x in tree_leaves((args, kwargs)) if _is_floating(x) and x.requires_grad]
            self.handles += [x.register_hook(self.input_grads.append) for x in inputs]
            if not inputs:
                self.problem = "of_inputs=True, but no input requires grad"

    def after_forward(self, model: nn.Module, output: Any) -> None:
        self.record.recording = False
        first = next((x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)), None)
        if first is None or first.dim() == 0:
            self.problem = "the model was called without a tensor whose axis 0 is the samples"
            return
        self.num_samples = len(first)
        self.is_random = is_advanced(self._random_state, self._devices)
        try:
            self.record.keep_sample_first(model, self.args, self.kwargs, self.num_samples)
        except RuntimeError as error:  # of the model, on a batch of another size; the user's own pass must go on
            self.problem = str(error)
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.uses = self.accumulator.uses = self.record.resolve(outputs, self.names, outputs)
        parameters = dict(model.named_parameters())
        for name in self.uses.unused:
            hook = functools.partial(_note, self.arrived_unused, name)
            self.handles.append(parameters[name].register_hook(hook))  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Let go of the user's graph at once, not when garbage is collected."""
        _remove(self.handles)
        self.record.forget()
        self.uses = self.accumulator.uses = None

    def _on_output_grad(self, call: LayerCall, output_grad: Tensor) -> None:
        if call.is_released:
            self.problem = "two backward passes went through the same forward pass"
            return
        try:
            self.accumulator.on_output_grad(call, output_grad)
        except RuntimeError as error:  # inputs overwritten; the user's backward pass must go on
            self.problem = str(error)


class _ModelHook:
    """Forward hooks of the model. A copy or a pickle of them (with the model that carries them) does nothing."""

    def __init__(self, recorder: Callable[[], GramRecorder | None]) -> None:
        self._recorder = recorder

    def __deepcopy__(self, memo: dict[int, Any]) -> _ModelHook:
        return _ModelHook(_nothing)

    def __reduce__(self) -> tuple[type[_ModelHook], tuple[Callable[[], None]]]:
        return _ModelHook, (_nothing,)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and (recorder := self._recorder()) is not None:
            recorder._before_forward(args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and (recorder := self._recorder()) is not None:
            recorder._after_forward(output)


class _ArrivalHook:
    """Tells the recorder that the backward pass of a forward pass has begun."""

    def __init__(self, recorder: Callable[[], GramRecorder | None], number: int) -> None:
        self._recorder = recorder
        self._number = number

    def __call__(self, grad: Tensor) -> None:
        if (recorder := self._recorder()) is not None:
            recorder._gradient_arrives(self._number)


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return module._compiled_call_impl is not None or "_orig_mod" in own or "forward" in own


def _note(names: set[str], name: str, grad: Tensor) -> None:
    names.add(name)


def _nothing() -> None:
    return None


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
