"""A module's forward pass as a graph of calls, recorded while it runs on example inputs."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["TracedGraph", "trace"]


class TracedGraph:
    """The calls that one forward pass makes, with the values that they gave.

    Args:
        graph: nodes in the order of the calls; ``node.meta["value"]`` is what came out.
        leaves: names of modules that were taken as one call since what they do inside could not be followed.
    """

    def __init__(self, graph: fx.Graph, leaves: frozenset[str]) -> None:
        self.graph = graph
        self.leaves = leaves

    @staticmethod
    def value(node: fx.Node) -> Any:
        """What a call returned."""
        return node.meta["value"]

    @staticmethod
    def shape(node: fx.Node) -> tuple[int, ...]:
        """The shape of the tensor that a call returned."""
        value = node.meta["value"]
        if not isinstance(value, Tensor):
            raise TypeError(f"{node.format_node()} returned {type(value).__name__}: a tensor is needed here.")
        return tuple(value.shape)


@torch.no_grad()
def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedGraph:
    """Follow a forward pass with ``torch.fx``.

    Values are computed alongside, so branches, loops and lengths that depend on them go the way that the example
    inputs take. A submodule that cannot be followed becomes a single call.

    Args:
        model: in evaluation mode; what it writes to itself stays written.
        args: example positional arguments.
        kwargs: example keyword arguments.

    Returns:
        The graph.

    Raises:
        ValueError: the forward of the model itself cannot be followed.
    """
    given = inspect.signature(model.forward).bind(*args, **kwargs)
    given.apply_defaults()
    left_out = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty and given.arguments[name] is parameter.default
    }
    leaves: set[str] = set()
    while True:
        tracer = _Tracer(dict(given.arguments), frozenset(leaves))
        try:
            return TracedGraph(tracer.trace(model, left_out), frozenset(leaves))
        except _CannotFollowError as error:
            leaves.add(error.path)
        except Exception as error:  # whatever a forward makes of a stand-in for a tensor
            raise ValueError(
                f"the forward of {type(model).__name__} cannot be followed by torch.fx: {error} A forward of tensor "
                "operations on its arguments is needed; try to move what else it does into a submodule of its own."
            ) from error


class _CannotFollowError(Exception):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _Valued(fx.Proxy):
    """A proxy that knows its value where Python asks for one."""

    def __len__(self) -> int:
        return len(self.node.meta["value"])

    def __index__(self) -> int:
        return operator.index(self.node.meta["value"])

    def __int__(self) -> int:
        return int(self.node.meta["value"])

    def __float__(self) -> float:
        return float(self.node.meta["value"])


class _Tracer(fx.Tracer):
    def __init__(self, arguments: dict[str, Any], leaves: frozenset[str]) -> None:
        super().__init__()
        self._arguments, self._leaves = arguments, leaves
        self._evaluating = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:  # every module's call leads here while tracing
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _CannotFollowError:
            raise
        except Exception as error:
            path = self.path_of_module(m)
            if path in self._leaves:
                raise
            raise _CannotFollowError(path) from error

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Valued(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        self._evaluating = True
        try:
            proxy.node.meta["value"] = self._evaluated(proxy.node)
        finally:
            self._evaluating = False
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(obj.node.meta["value"])

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(len(obj.node.meta["value"]))])

    def _evaluated(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")  # fx numbers those that keep their defaults
            return self._arguments[name if name in self._arguments else name.rpartition("_")[0]]
        if node.op == "output":
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
