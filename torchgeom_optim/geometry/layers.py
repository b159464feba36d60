r"""What a layer's parameter gradient is made of: one rule per type of layer.

A rule turns a layer's input and the gradient at its output, both of which the user's own pass computes, into the
factors (:mod:`torchgeom_optim.geometry.factors`) of its parameters' per-sample gradients. A rule speaks for a class
only while the class computes what the rule's class computes: a subclass with a ``forward`` of its own has no rule.

    layer            weight                                              bias
    Linear           \sum_t g_t a_t^T                                    \sum_t g_t
    Conv1d/2d/3d     the same over the patches a_t of the padded input,  \sum_t g_t
                     per group
    Embedding        \sum_t e_{token t} g_t^T
    norm layers      \sum_t g_t * x_t, x the normalized input            \sum_t g_t
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from torchgeom_optim.geometry.convolution_factor import ConvolutionFactor
from torchgeom_optim.geometry.factors import Factor, OuterFactor, RowFactor, TokenFactor

__all__ = ["LayerRule", "factors_of_call", "plain_arithmetic", "register_rule", "rule_for", "uses_batch_statistics"]

FactorsOfCall = Callable[[Any, Tensor, Tensor, Collection[str]], Mapping[str, Factor]]


def _has_two_axes(module: nn.Module, layer_input: Tensor) -> bool:
    return layer_input.dim() >= 2


@dataclass(frozen=True)
class LayerRule:
    """How per-sample gradients of a layer's parameters follow from its input and its output gradients.

    Args:
        factors: called with the module, its input [N, ...], the gradients at its output [N, C, ...] (C of them per
            sample) and the names of the parameters asked for; returns the factor of each. The precision is
            already the one to accumulate in. The input is a floating point tensor or, for embeddings, tokens.
        parameters: the attributes that the layer's forward reads; ``None`` is allowed as their value.
        applies: whether this layer, on this input, is one that ``factors`` knows.
        methods: what a subclass must not override for the rule to speak for it.
    """

    factors: FactorsOfCall
    parameters: tuple[str, ...] = ("weight", "bias")
    applies: Callable[[Any, Tensor], bool] = _has_two_axes
    methods: tuple[str, ...] = ("forward",)


_rules: dict[type[nn.Module] | str, LayerRule] = {}


def register_rule(module_type: type[nn.Module] | str, rule: LayerRule) -> None:
    """Let a rule speak for a type of layer, in place of any that did.

    Args:
        module_type: the class, or its qualified name ``"package.module.Class"``, which imports nothing.
        rule: the rule, which must be exact: nothing checks its mathematics.

    Raises:
        TypeError: ``module_type`` is neither a module class nor a name.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(3))
        ...
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> register_rule(Scale, LayerRule(lambda m, x, g, names: {"weight": RowFactor(g * x[:, None])}, ("weight",)))
        >>> rule_for(Scale()) is not None
        True
    """
    known = isinstance(module_type, str) or (isinstance(module_type, type) and issubclass(module_type, nn.Module))
    if not known:
        raise TypeError(
            f"module_type={module_type!r}: must be a subclass of torch.nn.Module or its qualified name; "
            f"pass the class of the layer, not a layer."
        )
    _rules[module_type] = rule


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that speaks for this layer, if one does."""
    cls = type(module)
    for known in cls.__mro__:
        rule = _rules.get(known) or _rules.get(f"{known.__module__}.{known.__qualname__}")
        if rule is not None:
            same = all(
                getattr(cls, method) is getattr(known, method) and method not in module.__dict__
                for method in rule.methods
            )
            return rule if same else None
    return None


def factors_of_call(
    rule: LayerRule, module: nn.Module, layer_input: Tensor, output_grads: Tensor, names: Collection[str]
) -> Mapping[str, Factor]:
    """Factors of the per-sample gradients that one call of a layer contributes, in at least float32.

    Args:
        rule: from :func:`rule_for`.
        module: the layer.
        layer_input: what it was called with, shape [N, ...].
        output_grads: C gradients per sample at its output, shape [N, C, ...].
        names: the layer's own names of the parameters that are asked for.

    Returns:
        name -> factor.
    """
    if not names:
        return {}
    wide = torch.promote_types(output_grads.dtype, torch.float32)
    layer_input = layer_input.detach()
    if layer_input.is_floating_point():
        layer_input = layer_input.to(wide)
    with plain_arithmetic(output_grads.device.type):
        return rule.factors(module, layer_input, output_grads.detach().to(wide), names)


def plain_arithmetic(device_type: str) -> AbstractContextManager[object]:
    """Precision as the tensors have it and no graph, whatever surrounds the backward pass that a hook runs in."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the layer, in its present mode, normalizes by statistics over the batch and so couples the samples."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _linear(module: nn.Linear, x: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Factor]:
    g = g.flatten(2, -2).unsqueeze(2) if g.dim() > 3 else g[:, :, None, None]  # [N, C, 1, T, m]
    factors: dict[str, Factor] = {}
    if "weight" in names:
        factors["weight"] = OuterFactor(x.reshape(x.shape[0], 1, -1, x.shape[-1]), g)
    if "bias" in names:
        factors["bias"] = RowFactor(g[:, :, 0, 0] if g.shape[3] == 1 else g.sum((2, 3)))
    return factors


def _transposed_linear(module: nn.Module, x: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Factor]:
    """Hugging Face's Conv1D: y = x W + b with W of shape [inputs, outputs]."""
    factors = _linear(module, x, g, names)  # type: ignore[arg-type]
    weight = factors.get("weight")
    if isinstance(weight, OuterFactor):
        factors["weight"] = OuterFactor(weight.inputs, weight.output_grads, transposed=True)
    return factors


def _convolution(module: _ConvNd, x: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Factor]:
    factors: dict[str, Factor] = {}
    if "weight" in names:
        padding = module._reversed_padding_repeated_twice  # last axis first, two numbers each, for "same" too
        before, after = padding[::2][::-1], padding[1::2][::-1]
        if module.padding_mode != "zeros":
            x = F.pad(x, padding, mode=module.padding_mode)
            before = [0] * len(before)
        elif isinstance(module.padding, str):
            if before != after:
                x = F.pad(x, padding)
                before = [0] * len(before)
        else:
            before = list(module.padding)
        factors["weight"] = ConvolutionFactor(
            x, g, module.kernel_size, module.stride, tuple(before), module.dilation, module.groups
        )
    if "bias" in names:
        factors["bias"] = RowFactor(g.flatten(3).sum(3))
    return factors


def _embedding(module: nn.Embedding, tokens: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Factor]:
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])
    tokens = tokens.reshape(tokens.shape[0], -1).long().contiguous()
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx)[:, None, :, None]
    return {"weight": TokenFactor(tokens, g, module.num_embeddings)}


def _norm(normalized: Callable[[Any, Tensor], Tensor], parameter_axes: Callable[[Any], int]) -> FactorsOfCall:
    """Rule of a layer that multiplies normalized inputs by a weight and adds a bias."""
    # parameter_axes says how many of the last axes the parameters span; -1 is axis 1 alone, the channels.

    def factors(module: nn.Module, x: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Factor]:
        axes = parameter_axes(module)
        summed = tuple(range(3, g.dim())) if axes == -1 else tuple(range(2, g.dim() - axes))

        def row(values: Tensor) -> RowFactor:
            values = values.sum(summed) if summed else values
            return RowFactor(values.flatten(2), values[0, 0, 0].numel())

        found: dict[str, Factor] = {}
        if "weight" in names:
            found["weight"] = row(g * normalized(module, x)[:, None])
        if "bias" in names:
            found["bias"] = row(g)
        return found

    return factors


def _layer_normalized(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def _rms_normalized(module: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, list(module.normalized_shape), eps=module.eps)


def _group_normalized(module: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, module.num_groups, eps=module.eps)


def _batch_normalized(module: _BatchNorm, x: Tensor) -> Tensor:
    if uses_batch_statistics(module):
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    mean, variance = module.running_mean, module.running_var
    assert mean is not None
    assert variance is not None
    return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), eps=module.eps)


def _is_convolution_batch(module: _ConvNd, layer_input: Tensor) -> bool:
    return layer_input.dim() == len(module.kernel_size) + 2


def _is_plain_embedding(module: nn.Embedding, layer_input: Tensor) -> bool:
    # max_norm rewrites the weight in the forward pass; frequencies over the batch couple the samples.
    return module.max_norm is None and not module.scale_grad_by_freq and layer_input.dim() >= 1


def _has_sample_axis(module: nn.LayerNorm | nn.RMSNorm, layer_input: Tensor) -> bool:
    return layer_input.dim() > len(module.normalized_shape)


register_rule(nn.Linear, LayerRule(_linear))
register_rule("transformers.pytorch_utils.Conv1D", LayerRule(_transposed_linear))
for _convolution_type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_rule(
        _convolution_type,
        LayerRule(_convolution, applies=_is_convolution_batch, methods=("forward", "_conv_forward")),
    )
register_rule(nn.Embedding, LayerRule(_embedding, ("weight",), _is_plain_embedding))
register_rule(
    nn.LayerNorm,
    LayerRule(_norm(_layer_normalized, lambda module: len(module.normalized_shape)), applies=_has_sample_axis),
)
register_rule(
    nn.RMSNorm,
    LayerRule(_norm(_rms_normalized, lambda module: len(module.normalized_shape)), ("weight",), _has_sample_axis),
)
register_rule(nn.GroupNorm, LayerRule(_norm(_group_normalized, lambda module: -1)))
for _batch_norm_type in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register_rule(_batch_norm_type, LayerRule(_norm(_batch_normalized, lambda module: -1)))
register_rule(  # its batch statistics are those of all processes, which a rule does not see
    nn.SyncBatchNorm,
    LayerRule(_norm(_batch_normalized, lambda module: -1), applies=lambda module, _: not uses_batch_statistics(module)),
)
