"""How the units of each layer run through a network as channels, and which carry nothing but a constant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from torchgeom_optim.models.traced_graph import TracedGraph

__all__ = ["ChannelFlow", "Channels", "Layer", "is_depthwise", "weight_matrix"]

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLINGS: dict[Any, int] = {
    **{getattr(nn, f"{kind}Pool{d}d"): d for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)},
    **{
        getattr(F, f"{kind}_pool{d}d"): d
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
        for d in (1, 2, 3)
    },
    torch.max_pool1d: 1,
    torch.max_pool2d: 2,
    torch.max_pool3d: 3,
    torch.adaptive_avg_pool1d: 1,
}  # fmt: skip
# Functions of one number, entry by entry (dropout as it is in evaluation mode).
_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink,
    nn.Softshrink, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
_ELEMENTWISE_NAMES = frozenset(
    "relu relu_ relu6 leaky_relu elu celu selu gelu silu mish softplus softsign tanh tanh_ tanhshrink sigmoid sigmoid_ "
    "logsigmoid hardtanh hardswish hardsigmoid hardshrink softshrink threshold neg abs square exp sqrt clamp clamp_min "
    "clamp_max clamp_ clip contiguous clone detach float double half to".split()
)
_BINARY_NAMES = frozenset("add add_ iadd sub sub_ isub mul mul_ imul multiply truediv div maximum minimum".split())
_DROPOUT_NAMES = frozenset("dropout dropout_ dropout1d dropout2d dropout3d".split())
_QUESTION_NAMES = frozenset("size dim numel is_floating_point getattr".split())  # about a tensor, not its numbers


@dataclass(frozen=True, eq=False)
class Channels:
    """What is known about a tensor along its axis of channels.

    Attributes:
        axis: the axis, from the left.
        ids: int64 [size]: which channel of a layer stands where. Positions with one id must go together.
        constants: float64 [size]: the value of a channel that is the same everywhere, nan of the others.
    """

    axis: int
    ids: Tensor
    constants: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a layer with weights.

    Attributes:
        name: of the module.
        module: Linear, convolution or batch norm.
        inputs: its input's channels; None if nothing is known about them, and all stay.
        outputs: its output's channels.
        pads: whether zeros are put around its input.
    """

    name: str
    module: nn.Module
    inputs: Channels | None
    outputs: Channels
    pads: bool = False

    @property
    def mixes(self) -> bool:
        """Whether outputs are sums over inputs: not so in batch norms and depthwise convolutions."""
        return isinstance(self.module, nn.Linear | _ConvNd) and not is_depthwise(self.module)


class ChannelFlow:
    """Follows channels and their constants through a traced network, in evaluation mode.

    Args:
        model: the module that was traced.
        traced: its calls.

    Attributes:
        layers: every layer with weights that could be followed, by name, in the order of the calls.
        blocked: ids of channels that have to stay, with the reason.
    """

    def __init__(self, model: nn.Module, traced: TracedGraph) -> None:
        self.layers: dict[str, Layer] = {}
        self._modules = dict(model.named_modules())
        self._traced = traced
        self._parent: list[int] = []
        self.blocked: dict[int, str] = {}
        self._channels: dict[fx.Node, Channels | None] = {}
        self._not_followed = _layers_not_to_touch(model, traced)
        for node in traced.graph.nodes:
            self._channels[node] = self._follow(node)
            if self._in_place(node):
                self._channels[node.all_input_nodes[0]] = self._channels[node]

    def roots(self) -> Tensor:
        """For each id one that stands for all that can only go together: int64 [number of ids]."""
        return torch.tensor([self._root(i) for i in range(len(self._parent))], dtype=torch.int64)

    def _follow(self, node: fx.Node) -> Channels | None:
        if node.op == "output":
            return self._block(node, "it is an output of the network")
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "call_module":
            return self._follow_module(node, str(node.target), self._modules[str(node.target)])
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        sources = node.all_input_nodes
        x = self._channels[sources[0]] if sources else None
        if not any(self._channels[source] is not None for source in sources):
            return None
        if name in _QUESTION_NAMES and not isinstance(self._traced.value(node), Tensor):
            return None
        if name in ("cat", "concat"):
            return self._concatenate(node)
        if name in _BINARY_NAMES and len(sources) == 2:
            return self._combine(node, is_product=name.startswith(("mul", "imul")))
        if x is None or node.args[0] is not sources[0]:
            return self._block(node)
        if name in ("flatten", "view", "reshape"):
            return self._flatten(node, x, literal=name != "flatten")
        if len(sources) > 1:
            return self._block(node)
        if name in _BINARY_NAMES | _ELEMENTWISE_NAMES:
            return self._apply(node, x, _call_of(node))
        if name in _DROPOUT_NAMES:
            return self._apply(node, x, _dropped if _drops(node) else torch.Tensor.clone)
        if node.target in _POOLINGS:
            return self._pool(node, x, _POOLINGS[node.target], _settings_of_pooling(node))
        if name == "mean":
            return self._mean(node, x)
        return self._block(node)

    def _in_place(self, node: fx.Node) -> bool:
        """Whether the call overwrites its first argument."""
        if not node.all_input_nodes or node.op in ("output", "placeholder", "get_attr"):
            return False
        if node.op == "call_module":
            return bool(getattr(self._modules[str(node.target)], "inplace", False))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        augmented = name in ("iadd", "isub", "imul", "itruediv")
        return augmented or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True

    def _follow_module(self, node: fx.Node, name: str, module: nn.Module) -> Channels | None:
        if len(node.all_input_nodes) != 1 or not isinstance(node.args[0] if node.args else None, fx.Node):
            return self._block(node)
        x, kind = self._channels[node.all_input_nodes[0]], type(module)
        if kind in (nn.Linear, *_CONVOLUTIONS, *_NORMS):
            reason = self._not_followed.get(name) or self._misplaced(node, x, module)
            if reason is None:
                return self._weighted(node, name, module, x)
            return self._block(node, reason)
        if x is None:
            return None
        if kind in _ELEMENTWISE_MODULES:
            return self._apply(node, x, module)
        if kind in _POOLINGS:
            return self._pool(node, x, _POOLINGS[kind], vars(module))
        if kind is nn.Flatten:
            return self._flatten(node, x, literal=False)
        return self._block(node)

    def _misplaced(self, node: fx.Node, x: Channels | None, module: nn.Module) -> str | None:
        """Why the layer cannot be followed on this input."""
        dims = len(self._traced.shape(node.all_input_nodes[0]))
        if isinstance(module, nn.Linear):
            axis = dims - 1
        else:
            axis = 1
            if isinstance(module, _ConvNd) and dims != len(module.kernel_size) + 2:
                return f"{node.target!r} is called without an axis of samples"
        if x is not None and x.axis != axis:
            return f"{node.target!r} takes it along another axis"
        if isinstance(module, _ConvNd) and module.groups > 1 and (not is_depthwise(module) or x is None):
            return f"{node.target!r} is a convolution in {module.groups} groups"
        if isinstance(module, _NORMS) and x is None:
            return f"{node.target!r} follows no layer whose units are known"
        return None

    def _weighted(self, node: fx.Node, name: str, module: Any, x: Channels | None) -> Channels:
        if isinstance(module, _NORMS):
            assert x is not None
            out = Channels(x.axis, x.ids, _normalized(module, x.constants))
            self.layers[name] = Layer(name, module, x, out)
            return out
        pads = isinstance(module, _ConvNd) and module.padding_mode == "zeros" and _pads(module)
        matrix = weight_matrix(module)
        bias = matrix.new_zeros(len(matrix)) if module.bias is None else module.bias.detach().cpu().double()
        if is_depthwise(module):
            assert x is not None
            known = ~x.constants.isnan() & ((x.constants == 0) | (not pads))
            value = bias + torch.where(known, x.constants, 0.0) * matrix.sum((1, 2))
            known = known | (matrix == 0).all(2).all(1)
            out = Channels(1, x.ids, torch.where(known, value, math.nan))
        else:
            axis = len(self._traced.shape(node)) - 1 if isinstance(module, nn.Linear) else 1
            constants = matrix.new_full((matrix.shape[1],), math.nan) if x is None else x.constants
            known = (constants == 0) if pads else ~constants.isnan()
            is_constant = (matrix[:, ~known] == 0).all(2).all(1)
            value = bias + matrix.sum(2)[:, known] @ constants[known]
            out = Channels(axis, self._fresh(len(matrix)), torch.where(is_constant, value, math.nan))
        self.layers[name] = Layer(name, module, x, out, pads)
        return out

    def _apply(self, node: fx.Node, x: Channels, function: Callable[[Tensor], Any]) -> Channels | None:
        if self._traced.shape(node) != self._traced.shape(node.all_input_nodes[0]):
            return self._block(node)
        with torch.no_grad():
            result = function(x.constants.clone())
        return Channels(x.axis, x.ids, _known(result.double().masked_fill(x.constants.isnan(), math.nan)))

    def _combine(self, node: fx.Node, is_product: bool) -> Channels | None:
        left, right = node.args[:2]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        a, b = self._channels[left], self._channels[right]
        if a is None or b is None or a.axis != b.axis or len(a.ids) != len(b.ids):
            return self._block(node)
        if not len(self._traced.shape(left)) == len(self._traced.shape(right)) == len(self._traced.shape(node)):
            return self._block(node)
        for i, j in zip(a.ids.tolist(), b.ids.tolist(), strict=True):
            self._parent[self._root(i)] = self._root(j)
        result = _known(_call_of(node)(a.constants.clone(), b.constants))
        if is_product:
            result = torch.where((a.constants == 0) | (b.constants == 0), 0.0, result)
        return Channels(a.axis, a.ids, result)

    def _pool(self, node: fx.Node, x: Channels, dims: int, settings: dict[str, Any]) -> Channels | None:
        if x.axis != 1 or len(self._traced.shape(node.all_input_nodes[0])) != dims + 2:
            return self._block(node)
        if not isinstance(self._traced.value(node), Tensor):
            return self._block(node)  # with indices
        padding, averages = settings.get("padding", 0), "count_include_pad" in settings
        padded = any(padding) if isinstance(padding, tuple | list) else padding
        if averages and ((padded and settings["count_include_pad"]) or settings.get("divisor_override") is not None):
            return Channels(1, x.ids, torch.where(x.constants == 0, 0.0, math.nan))
        return Channels(1, x.ids, x.constants)

    def _mean(self, node: fx.Node, x: Channels) -> Channels | None:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = [dims] if isinstance(dims, int) else dims
        size = len(self._traced.shape(node.all_input_nodes[0]))
        if not isinstance(axes, tuple | list) or not all(isinstance(a, int) for a in axes):
            return self._block(node)
        reduced = {a % size for a in axes if isinstance(a, int)}
        if x.axis in reduced:
            return self._block(node)
        gone = 0 if len(self._traced.shape(node)) == size else sum(a < x.axis for a in reduced)
        return Channels(x.axis - gone, x.ids, x.constants)

    def _flatten(self, node: fx.Node, x: Channels, literal: bool) -> Channels | None:
        before, after = self._traced.shape(node.all_input_nodes[0]), self._traced.shape(node)
        joined = len(before) - len(after) + 1  # axes that became one
        for start in range(1, len(after)):
            end = start + joined
            if joined >= 1 and after == (*before[:start], math.prod(before[start:end]), *before[end:]):
                break
        else:
            return self._block(node)
        # The samples' axis, which may be 1 long, is never joined: start is at least 1.
        axis = x.axis if x.axis < start else max(start, x.axis - joined + 1)
        if literal and not _is_open(node, axis):
            return self._block(node, f"{node.name!r} reshapes to a fixed size; -1 or flatten adapts itself")
        if not start <= x.axis < end:
            return Channels(axis, x.ids, x.constants)
        view = [-1 if k == x.axis else 1 for k in range(start, end)]
        ids, constants = (t.view(view).expand(before[start:end]).reshape(-1) for t in (x.ids, x.constants))
        return Channels(start, ids, constants)

    def _concatenate(self, node: fx.Node) -> Channels | None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(parts, tuple | list) or not isinstance(axis, int):
            return self._block(node)
        axis %= len(self._traced.shape(node))
        found: list[Channels] = []
        for part in parts:
            x = self._channels[part] if isinstance(part, fx.Node) else None
            if x is None and isinstance(part, fx.Node):
                size = self._traced.shape(part)[axis]
                ids = self._fresh(size)
                self.blocked |= dict.fromkeys(ids.tolist(), f"{part.name!r} is no layer's output")
                x = Channels(axis, ids, torch.full((size,), math.nan, dtype=torch.float64))
            if x is None or x.axis != axis:
                return self._block(node)
            found.append(x)
        return Channels(axis, torch.cat([x.ids for x in found]), torch.cat([x.constants for x in found]))

    def _block(self, node: fx.Node, reason: str | None = None) -> Channels | None:
        """Nothing is known of what comes out, None, and what goes in must stay."""
        if node.op == "call_module":
            what = f"{node.target!r} ({type(self._modules[str(node.target)]).__name__})"
        else:
            inside = next(reversed(node.meta.get("nn_module_stack") or {}), "")
            what = f"{node.name!r} in {inside!r}" if inside else repr(node.name)
        reason = reason or f"{what} takes it, and is not among the operations that are followed"
        for source in node.all_input_nodes:
            x = self._channels[source]
            if x is not None:
                self.blocked |= {i: self.blocked.get(i, reason) for i in x.ids.tolist()}
        return None

    def _fresh(self, count: int) -> Tensor:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output channel of a convolution sees one input channel, its own."""
    return (
        isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels == len(module.weight)
    )


def _layers_not_to_touch(model: nn.Module, traced: TracedGraph) -> dict[str, str]:
    """Layers whose weights something else uses too, by name, with the reason."""
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    owners: Counter[int] = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}
    reasons = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        first = names.setdefault(id(module), name)
        if calls[name] > 1 or first != name:
            reasons[name] = reasons[first] = f"{name!r} is used more than once"
        elif any(owners[id(p)] > 1 for p in own.values()):
            reasons[name] = f"{name!r} shares its weights with another layer"
        elif any(f"{name}.{key}" in read for key in own):
            reasons[name] = f"the weights of {name!r} are read outside of it"
        elif getattr(module, "weight", None) is not None and "weight" not in own:
            reasons[name] = f"the weight of {name!r} is computed anew at each call"
    return reasons


def weight_matrix(module: Any) -> Tensor:
    """Weights as [outputs, inputs, kernel positions], in float64 on the CPU."""
    weight: Tensor = module.weight.detach().cpu().double()
    return weight.reshape(*weight.shape[:2], -1)


def _normalized(module: Any, constants: Tensor) -> Tensor:
    """What a batch norm makes of constants; a channel whose scale is zero is one."""
    one = torch.ones_like(constants)
    weight = one if module.weight is None else module.weight.detach().cpu().double()
    bias = 0 * one if module.bias is None else module.bias.detach().cpu().double()
    if module.running_mean is None:  # by the batch's own statistics: a constant becomes 0
        scaled = torch.where(constants.isnan(), constants, 0.0)
    else:
        scaled = (constants - module.running_mean.cpu().double()) / (
            module.running_var.cpu().double() + module.eps
        ).sqrt()
    return torch.where(weight == 0, bias, scaled * weight + bias)


def _pads(module: _ConvNd) -> bool:
    return any(module._reversed_padding_repeated_twice)


def _call_of(node: fx.Node) -> Callable[..., Any]:
    """The call with other tensors in the places of those that it took."""

    def call(*tensors: Tensor) -> Any:
        values = dict(zip(node.all_input_nodes, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    return call


def _known(constants: Tensor) -> Tensor:
    return torch.where(constants.isfinite(), constants, math.nan)


def _drops(node: fx.Node) -> bool:
    """Whether a dropout function drops in evaluation mode too."""
    return bool(node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True))


def _dropped(constants: Tensor) -> Tensor:
    return torch.where(constants == 0, 0.0, math.nan)


def _settings_of_pooling(node: fx.Node) -> dict[str, Any]:
    if getattr(node.target, "__name__", "").startswith("avg"):
        names = ["input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"]
        return {"count_include_pad": True, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {}


def _is_open(node: fx.Node, axis: int) -> bool:
    """Whether a reshape leaves this axis to be computed."""
    shape = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], tuple | list) else node.args[1:]
    return len(shape) > axis and (isinstance(shape[axis], fx.Node) or bool(shape[axis] == -1))
