"""Layer inputs and output gradients, seen with hooks from a pass that happens anyway.

A layer's per-sample gradient is an outer product of its input and the gradient at its output, and the
user's own forward and backward pass computes both. :class:`Capture` hands them over as they come by.
It sets one forward hook per layer and one hook on the graph node of each output, since module backward hooks
fail where an in-place activation follows the layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

__all__ = ["Capture", "activations_are_not_kept", "private_pass"]

OutputGradObserver = Callable[[Tensor], None]
CallObserver = Callable[[nn.Module, Tensor, Tensor], "OutputGradObserver | None"]

_private_captures: ContextVar[tuple[Capture, ...] | None] = ContextVar("private_captures", default=None)


class Capture:
    """Reports every differentiated call of some layers to an observer, and changes nothing.

    After each call of a layer whose output takes part in differentiation, ``on_call(module, input, output)``
    is called. It may return a function, which then receives the gradient of the loss with respect to that
    output once per backward pass that reaches it, as autograd has it: under mean reduction divided by the
    number of samples, and times any loss scale. Calls under ``no_grad``, inside a ``torch.func`` transform, and
    in passes that this package makes for itself (:func:`private_pass`) are not reported.

    A bound method is held weakly: when its owner is gone the hooks go too, and a capture never keeps an
    optimizer or a record alive. Copies and pickles of a model carry an inert hook in place of ours.

    Args:
        modules: the layers to watch; each call of them must return one tensor.
        on_call: the observer. It runs in the caller's grad mode and must not modify what it is given.

    Example:
        >>> layer, seen = nn.Linear(3, 2), []
        >>> with Capture([layer], lambda module, x, y: seen.append):
        ...     layer(torch.ones(4, 3)).sum().backward()
        >>> [tuple(output_grad.shape) for output_grad in seen]
        [(4, 2)]
    """

    def __init__(self, modules: Iterable[nn.Module], on_call: CallObserver) -> None:
        self._handles: list[RemovableHandle] = []
        owner = getattr(on_call, "__self__", None)
        if owner is None:
            self._hook = _CallHook(lambda: on_call, weakref.ref(self))
        else:
            self._hook = _CallHook(weakref.WeakMethod(on_call), weakref.ref(self))
        for holder in (self, owner):
            if holder is not None:
                weakref.finalize(holder, _remove, self._handles).atexit = False
        self.add(modules)

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Watch further layers."""
        for module in modules:
            # First of all hooks, so that the output is what the layer itself returned.
            handle = module.register_forward_hook(self._hook, prepend=True, with_kwargs=True)
            self._handles.append(handle)

    def close(self) -> None:
        """Remove every hook; :meth:`add` may set new ones. Calling it twice is fine."""
        _remove(self._handles)

    @property
    def is_watching(self) -> bool:
        """Whether there are hooks."""
        return bool(self._handles)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextmanager
def private_pass(*captures: Capture) -> Iterator[None]:
    """Inside, calls are reported to these captures alone: no other one notices the pass."""
    token = _private_captures.set(captures)
    try:
        yield
    finally:
        _private_captures.reset(token)


def activations_are_not_kept() -> bool:
    """Whether autograd packs what it saves at the moment (checkpointing, offloading): then nobody should keep it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    return hooks is not None


class _CallHook:
    """The forward hook. A copy or a pickle of it (with the model that carries it) does nothing."""

    def __init__(self, on_call: Callable[[], CallObserver | None], capture: Callable[[], Capture | None]) -> None:
        self._on_call = on_call
        self._capture = capture

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallHook:
        return _inert_hook()

    def __reduce__(self) -> tuple[Callable[[], _CallHook], tuple[()]]:
        return _inert_hook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if torch.compiler.is_compiling():  # the observer works on the tensors of the moment, not on a graph
            _outside_of_graph(self._report, module, args, kwargs, output)
        else:
            self._report(module, args, kwargs, output)

    def _report(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad or (on_call := self._on_call()) is None or _in_functional_transform():
            return
        captures = _private_captures.get()
        if captures is not None and self._capture() not in captures:
            return
        layer_input = args[0] if args else next(iter(kwargs.values()))
        on_output_grad = on_call(module, layer_input, output)
        if on_output_grad is not None:
            # Of the node that made the output: cheaper than a tensor hook, and later in-place changes do not matter.
            # An in-place change of a view cuts the view's own node out of the graph: there it is that of its base.
            source, shape = _unviewed(output), output.shape
            node, place = source.grad_fn, source.output_nr
            if node is None:
                output.register_hook(on_output_grad)  # type: ignore[no-untyped-call]
            else:

                def before_node(grads: tuple[Tensor | None, ...]) -> None:
                    if (grad := grads[place]) is not None:
                        on_output_grad(grad.reshape(shape))

                node.register_prehook(before_node)


# torch.compiler.disable would import the compiler here and now, which takes seconds; this waits for the first call.
@_disable_dynamo
def _outside_of_graph(report: Callable[..., None], *args: Any) -> None:
    report(*args)


def _unviewed(output: Tensor) -> Tensor:
    """What the output is another shape of: linear layers fold leading axes, unbatched convolutions add one."""
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _nothing() -> None:
    return None


def _inert_hook() -> _CallHook:
    return _CallHook(_nothing, _nothing)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _in_functional_transform() -> bool:
    # No public function tells; tensors of a transform must not leak into an observer's state.
    interpreter = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return interpreter is not None
