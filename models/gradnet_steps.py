"""The steps of a piecewise linear network: what every node of its graph is, and how it is computed.

A step is a layer with weights, a gate (ReLU, leaky ReLU, max pooling) or a linear function. A gate is computed in one
of two ways: on the network it chooses, and its choices are kept; on a companion the choices are given. The fast path of
CPUs is taken throughout: images with their channels innermost, choices as 16-bit places, gates as bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "SUMS",
    "Layer",
    "Record",
    "Step",
    "UnsupportedBaseError",
    "applied",
    "channels_last",
    "nodes_of",
    "normalized",
    "own_weights",
    "read_steps",
    "run_step",
]

Record = dict[str, Tensor]


class UnsupportedBaseError(ValueError):
    """The network has a part that this method has no rule for; the message names it."""


@dataclass(frozen=True)
class Layer:
    """One call of a layer with weights.

    Attributes:
        node: name of the call.
        name: name of the module.
        module: the layer.
        weight: name of its weight in ``model.named_parameters()``, which a tied one has once; None without.
        bias: that of its bias.
    """

    node: str
    name: str
    module: nn.Module
    weight: str | None
    bias: str | None


@dataclass(frozen=True)
class Step:
    """One call: of a layer with weights, of a pooling, of a linear function, or else of a ReLU."""

    node: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    layer: Layer | None = None
    function: Callable[..., Any] | None = None
    pool: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    size: tuple[Any, ...] = ()  # of the pooling's windows
    gated: bool = False  # by a ReLU, after the pooling if there is one
    slope: float = 0.0  # of the closed ReLU


def read_steps(graph: fx.Graph, model: nn.Module) -> tuple[str, list[Step], str]:
    """A network's graph as steps.

    Args:
        graph: of the model, from ``torch.fx``.
        model: the network.

    Returns:
        Name of the input's node; the steps; name of the output's node.

    Raises:
        UnsupportedBaseError: something bends and is no gate, or there is not one input and one output.
    """
    modules = dict(model.named_modules())
    steps: list[Step] = []
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(output, fx.Node):
        raise UnsupportedBaseError(
            f"the network uses {len(inputs)} inputs and returns {output}: one tensor in and one tensor of logits "
            "out are needed. Wrap it in such a module, or use method='linearised'."
        )
    names = {id(p): name for name, p in model.named_parameters()}
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and (node.users or node.op != "get_attr"):
            steps.append(_named(_step_of(node, modules), names))
    return inputs[0].name, _fused(steps), output.name


def run_step(step: Step, given: Any, kwargs: Any, made: Record | None, kept: Mapping[str, Tensor]) -> Any:
    """One step without weights, on the base or on a companion.

    Args:
        step: the step.
        given: its arguments.
        kwargs: likewise, by name.
        made: on the base, what takes its gate; on a companion None.
        kept: on a companion, what has the gate.

    Returns:
        Its value.
    """
    if step.function is not None:
        return step.function(*given, **kwargs)
    x: Tensor = given[0]
    if step.pool is not None:
        x = channels_last(x)  # a convolution of one channel forgets it
        if made is not None:
            y, at = step.pool(x)
            made[f"{step.node}.at"] = at.to(torch.int16) if x[0, 0].numel() <= 2**15 else at  # a quarter to keep
        else:
            at = kept[f"{step.node}.at"]
            if x.dim() == 4:
                y = _Pick.apply(x, at, step.size)
            else:
                y = x.flatten(2).gather(2, at.flatten(2).long()).view(at.shape)
        if not step.gated:
            return y
        x = y
    if made is not None:
        positive = torch.relu(x)
        made[step.node] = positive.bool()  # nine times as fast as x > 0
        return F.leaky_relu(x, step.slope) if step.slope else positive
    gate = kept[step.node]
    if step.slope:
        return torch.where(gate, x, step.slope * x)
    return x * gate.view(torch.uint8).to(x.dtype)  # as bytes they become numbers six times as fast


def applied(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The layer with other weights, on an input that is normalized where the layer is a batch norm.

    Args:
        module: linear layer, convolution or batch norm.
        x: [N, ...], from :func:`normalized`.
        weight: in the place of the layer's own; None leaves a batch norm's out.
        bias: likewise, None for none.

    Returns:
        Its output.
    """
    if isinstance(module, nn.Linear):
        assert weight is not None
        return F.linear(x, weight, bias)
    if isinstance(module, _ConvNd):
        assert weight is not None
        result: Tensor = module._conv_forward(x, channels_last(weight), bias)  # pads as the layer does
        return result
    shape = (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def normalized(module: nn.Module, x: Tensor, *, centred: bool = True) -> Tensor:
    """What the layer's weights multiply: its input, for a batch norm less the running mean and by the deviation.

    Args:
        module: the layer.
        x: its input.
        centred: subtract the mean; a derivative has none.

    Returns:
        [N, ...].
    """
    if not isinstance(module, _BatchNorm):
        return x
    mean, variance = module.running_mean, module.running_var
    assert mean is not None
    assert variance is not None
    shape = (-1, *[1] * (x.dim() - 2))
    x = x - mean.view(shape) if centred else x
    return x * (variance + module.eps).rsqrt().view(shape)


class _Pick(torch.autograd.Function):
    """The chosen entry of each window of images with their channels innermost.

    Backwards by torch's own kernel, several times as fast as that of gather.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, size: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(at)
        ctx.size, ctx.shape = size, x.shape
        if x.numel() >= 2**31:
            return x.flatten(2).gather(2, at.flatten(2).long()).view(at.shape)
        # In the order of memory, where a selection is several times as fast as a gather; 64 bits cost as much again.
        (n, c), windows = x.shape[:2], at.permute(0, 2, 3, 1)
        first = torch.arange(0, x.numel(), x[0].numel(), dtype=torch.int32, device=x.device).view(n, 1, 1, 1)
        places = windows.to(torch.int32, copy=True).mul_(c).add_(first + torch.arange(c, device=x.device).int())
        chosen = x.permute(0, 2, 3, 1).reshape(-1).index_select(0, places.reshape(-1))
        return chosen.view(windows.shape).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        last = torch.channels_last
        like = torch.empty(ctx.shape, dtype=grads[0].dtype, device=grads[0].device, memory_format=last)
        grad, at = grads[0].contiguous(memory_format=last), at.long().contiguous(memory_format=last)
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *ctx.size, at), None, None


def _step_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    """What a node of the graph is, or the refusal that names it."""
    name = node.name
    if node.op == "call_module":
        module = modules[str(node.target)]
        kind = type(module)
        if kind in _LAYERS and not (isinstance(module, _BatchNorm) and module.running_mean is None):
            return Step(name, node.args, layer=Layer(name, str(node.target), module, None, None))
        if kind in _LINEAR_MODULES:
            return Step(name, node.args, function=_frozen(module))
        if kind is nn.ReLU:
            return Step(name, node.args, gated=True)
        if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
            return Step(name, node.args, gated=True, slope=module.negative_slope)
        if kind in _POOLS:
            return _pool_step(name, node.args, _POOLS[kind], {key: getattr(module, key) for key in _POOL_KEYS})
        what = f"layer {node.target!r} of type {kind.__name__}"
    elif node.op == "call_function":
        function: Any = node.target
        if function in (torch.relu, F.relu, torch.relu_):
            return Step(name, node.args[:1], gated=True)
        if function is F.max_pool2d:
            options: dict[str, Any] = dict(zip(_POOL_KEYS, (None, None, 0, 1, False), strict=True))
            options.update(zip(_POOL_KEYS, node.args[1:], strict=False))
            options.update(node.kwargs)
            return _pool_step(name, node.args[:1], F.max_pool2d, options)
        if function is F.dropout:
            return Step(name, node.args[:1], function=_same)
        if function in _LINEAR_FUNCTIONS or (function in _SCALINGS and not isinstance(node.args[1], fx.Node)):
            return Step(name, node.args, dict(node.kwargs), function=function)
        what = f"function {getattr(function, '__name__', function)!r}"
    elif node.op == "call_method":
        method = str(node.target)
        if method in ("relu", "relu_"):
            return Step(name, node.args, gated=True)
        if method in _LINEAR_METHODS:
            return Step(name, node.args, dict(node.kwargs), function=_method(method))
        what = f"method {method!r} of a tensor"
    else:
        what = f"bare parameter or buffer {node.target!r}"
    raise UnsupportedBaseError(
        f"{what} is nothing that the gates are known of: linear layers, convolutions, batch norm with running "
        "statistics, ReLU, max pooling and linear maps between them are. Use method='linearised' or 'paper', which "
        "take any network."
    )


def _named(step: Step, names: Mapping[int, str]) -> Step:
    if step.layer is None:
        return step
    weight, bias = (names.get(id(getattr(step.layer.module, own, None))) for own in ("weight", "bias"))
    return replace(step, layer=replace(step.layer, weight=weight, bias=bias))


def _fused(steps: list[Step]) -> list[Step]:
    """ReLUs whose output goes to a max pooling alone are taken after it: that is the same, and smaller."""
    users: dict[str, list[Step]] = {}
    for step in steps:
        for node in nodes_of(step):
            users.setdefault(node.name, []).append(step)
    moved: dict[str, fx.Node] = {}
    result = []
    for step in steps:
        after = users.get(step.node, [])
        if step.pool is None and step.gated and not step.slope and len(after) == 1 and after[0].pool is not None:
            moved[step.node] = step.args[0]
        elif step.pool is not None and step.args[0].name in moved:
            result.append(replace(step, args=(moved[step.args[0].name],), gated=True))
        else:
            result.append(step)
    return result


def _pool_step(node: str, args: tuple[Any, ...], function: Callable[..., Any], options: Mapping[str, Any]) -> Step:
    size, stride, padding, dilation, ceil_mode = (options[key] for key in _POOL_KEYS)

    def pool(x: Tensor) -> tuple[Tensor, Tensor]:
        y, at = function(x, size, stride, padding, dilation, ceil_mode, return_indices=True)
        return y, at

    pairs = [list(v) if isinstance(v, tuple | list) else [v, v] for v in (size, stride or size, padding, dilation)]
    return Step(node, args, pool=pool, size=(*pairs, ceil_mode))


def nodes_of(step: Step) -> list[fx.Node]:
    """The nodes whose values a step is given."""
    found: list[fx.Node] = []
    map_arg((step.args, step.kwargs), found.append)
    return found


def own_weights(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """A layer's weight and bias, without a graph; None for what it has not."""
    own = [getattr(module, name) for name in ("weight", "bias")]
    weight, bias = (None if p is None else p.detach() for p in own)
    return weight, bias


def _frozen(module: nn.Module) -> Callable[..., Any]:
    return _same if isinstance(module, nn.modules.dropout._DropoutNd) else module.forward


def _same(x: Tensor) -> Tensor:
    return x


def _method(name: str) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    return call


def channels_last(x: Tensor) -> Tensor:
    """Images with their channels innermost: max pooling is some six times as fast on CPU that way."""
    # Not contiguous(), which leaves the strides of a single channel as they are, and so a convolution's output.
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


# Exact types: a subclass may compute something else.
_LAYERS = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
_LINEAR_MODULES = {
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d,
}  # fmt: skip
_POOLS = {nn.MaxPool1d: F.max_pool1d, nn.MaxPool2d: F.max_pool2d, nn.MaxPool3d: F.max_pool3d}
_POOL_KEYS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
# Linear in tensors; a number that they are given is none, and has no derivative.
SUMS = {operator.add, operator.iadd, operator.sub, torch.add}
_LINEAR_FUNCTIONS = {
    *SUMS, operator.getitem, torch.flatten, torch.mean, torch.cat, torch.reshape, torch.permute, torch.transpose,
    torch.squeeze, torch.unsqueeze, F.avg_pool2d, F.adaptive_avg_pool2d, getattr,
}  # fmt: skip
_SCALINGS = {operator.mul, operator.truediv}
_LINEAR_METHODS = {
    "view", "reshape", "flatten", "mean", "sum", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "size",
}  # fmt: skip
