"""Evaluation of the user's model that neither disturbs it nor is disturbed by what surrounds the call."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.pure_call import pure_call, without_trace

__all__ = ["Attributes", "attributes_kept", "private_evaluation", "with_weights"]

T = TypeVar("T")


class _Frame(nn.Module):
    """Runs a piece of work on the model inside one functional call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)


def with_weights(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], work: Callable[[nn.Module], T]
) -> T:
    """work(model) with these parameters and buffers in place until it is done.

    A backward pass belongs inside: segments under activation checkpointing then run again at the same weights.
    Buffers are copied, so what the model writes to them is lost; parameters left out keep their values and are
    constants.

    Args:
        model: the module.
        parameters: name to value.
        buffers: name to value.
        work: what to do with the model.

    Returns:
        What the work returns.
    """
    frame = _Frame(model)
    frame.training = model.training
    named = {f"model.{name}": p for name, p in parameters.items()}
    copies = {f"model.{name}": buffer.clone() for name, buffer in buffers.items()}
    result: T = pure_call(frame, named, (work,), copies)
    return result


@contextmanager
def private_evaluation(model: nn.Module, keep_modes: bool = False, *captures: Capture) -> Iterator[None]:
    """Inside, the model computes as in evaluation mode, differentiably, and nothing is left changed outside.

    Grad mode is on and autocast off, whatever the caller's; captures do not see the pass but for those
    given; draws of random numbers are undone, and so is what modules note in their attributes (an old-style spectral
    norm its weight). Kernels that cannot be differentiated twice, or forward, or under vmap are left aside: fused
    attention, the transformer's inference path, cuDNN's and oneDNN's recurrent layers. A compiled model runs
    uncompiled.

    Args:
        model: the module. Its ``training`` flags are put back as they were, also after an exception.
        keep_modes: leave the flags as they are instead.
        *captures: the captures that may see the pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    attributes = Attributes(module for module, _ in modes)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    device = next((p.device.type for p in model.parameters()), "cpu")
    with ExitStack() as stack:
        stack.enter_context(without_trace(model, *captures))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module, _ in modes):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # Not torch.backends.mkldnn.flags, which warns where there is no Intel GPU.
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m, _ in modes):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(attributes.put_back)
        if not keep_modes:
            for module, mode in modes:
                stack.callback(setattr, module, "training", mode)
                module.training = False
        yield


class Attributes:
    """What modules hold in their attributes, and in the lists, dicts and sets there, to be put back later.

    Tensors that are overwritten in place and objects of the user's classes are not covered. Parameters, buffers and
    hooks stay what they are: who changes these puts them back.

    Args:
        modules: the modules.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._values: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: dict[int, tuple[Any, Any]] = {}
        for module in modules:
            self.add(module)

    def add(self, module: nn.Module) -> None:
        """Keep those of another module."""
        values = vars(module)
        self._values.append((values, dict(values)))
        for name, value in values.items():
            if name not in _OF_EVERY_MODULE and type(value) in _CONTAINERS:
                self._keep(value)

    def put_back(self) -> None:
        """Undo what has been set, appended or removed since."""
        for present, kept in self._values:
            present.clear()
            present.update(kept)
        for container, kept in self._containers.values():
            container.clear()
            container.extend(kept) if isinstance(container, list | deque) else container.update(kept)

    def _keep(self, value: Any) -> None:
        if id(value) not in self._containers:
            self._containers[id(value)] = (value, copy.copy(value))
            for inner in value.values() if isinstance(value, dict) else value:
                if type(inner) in _CONTAINERS:
                    self._keep(inner)


_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards the modules' attributes are what they were before."""
    attributes = Attributes(modules)
    try:
        yield
    finally:
        attributes.put_back()
