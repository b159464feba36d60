"""Batch normalization folded into the layer before it, so that training can go on without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

__all__ = ["FoldedBatchNorm", "fold_batch_norm"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class FoldedBatchNorm:
    """A normalization that is gone, and the layer that now does its work."""

    norm_name: str
    norm: nn.Module
    layer_name: str
    layer: nn.Module
    created_bias: bool


def fold_batch_norm(model: nn.Module) -> list[FoldedBatchNorm]:
    r"""Fold every batch normalization of a model into the linear layer or convolution before it, in place.

        y = gamma (W x + b - m) / sqrt(v + eps) + beta  =  W' x + b',
        W' = diag(c) W,    b' = c (b - m) + beta,    c = gamma / sqrt(v + eps)

    with the running mean m and variance v: in evaluation mode the outputs stay as they are (up to rounding), and each
    normalization becomes an ``nn.Identity``. A layer without a bias gets one. Parameters keep their identity.
    A norm after a linear layer is taken to normalize the layer's outputs: a trace has no shapes to tell it from one
    over the positions of a sequence.
    Source: the switch of Lafond, Vasilache and Bottou 2017, App. E, which does not say how the scales are kept.

    Args:
        model: any module that ``torch.fx`` can trace.

    Returns:
        What was folded, in the order of the forward pass.

    Raises:
        ValueError: the model cannot be traced, or a normalization does not directly follow a layer of its own;
            the message names all of these, and nothing has been changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> before = model(x)
        >>> [folded.norm_name for folded in fold_batch_norm(model)]
        ['1']
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """
    modules = dict(model.named_modules())
    if not any(isinstance(m, _NORMS) for m in modules.values()):
        return []
    try:
        graph = fx.Tracer().trace(model)
    except (TraceError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        # what tracing meets depends on the user's forward: control flow on values, shapes unpacked, …
        raise ValueError(
            f"got a model whose forward pass torch.fx cannot trace ({type(error).__name__}: {error}); need one without "
            "control flow on values, to see which layer each batch norm follows. Try folding its parts one by one."
        ) from error
    plan, refused = _plan(graph, modules)
    if refused:
        raise ValueError(
            "cannot fold batch norm: "
            + "; ".join(f"{name} {why}" for name, why in refused.items())
            + ". Need each one directly after a Linear or Conv layer that nothing else uses; nothing was changed. "
            "Try folding the submodules for which that holds."
        )
    for folded in plan:
        _fold(folded.layer, folded.norm)
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is folded.norm]
        for parent, _, child in (name.rpartition(".") for name in names):
            setattr(model.get_submodule(parent), child, nn.Identity())
    return plan


def _plan(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[list[FoldedBatchNorm], dict[str, str]]:
    calls: dict[nn.Module, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            calls[module] = calls.get(module, 0) + 1
    weight_uses: dict[Tensor, int] = {}
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            weight_uses[parameter] = weight_uses.get(parameter, 0) + 1
    plan: list[FoldedBatchNorm] = []
    refused: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(norm := modules[str(node.target)], _NORMS):
            continue
        before = node.args[0] if node.args else next(iter(node.kwargs.values()))
        layer = modules[str(before.target)] if isinstance(before, fx.Node) and before.op == "call_module" else None
        if not isinstance(layer, _LAYERS):
            refused[str(node.target)] = "does not follow a layer"
        elif len(before.users) > 1 or calls[layer] > 1 or calls[norm] > 1:
            refused[str(node.target)] = f"or the layer {before.target} before it is used more than once"
        elif norm.running_mean is None:
            refused[str(node.target)] = "keeps no running statistics"
        elif layer.weight.shape[0] != norm.num_features:
            refused[str(node.target)] = f"normalizes another axis than the outputs of {before.target}"
        elif any(weight_uses[p] > 1 for p in layer.parameters(recurse=False)):
            refused[str(node.target)] = f"follows {before.target}, which shares its parameters"
        elif "weight" not in layer._parameters:
            refused[str(node.target)] = f"follows {before.target}, whose weight is parametrized"
        else:
            plan.append(FoldedBatchNorm(str(node.target), norm, str(before.target), layer, layer.bias is None))
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for name, module in modules.items():
        if isinstance(module, _NORMS) and name not in called:
            refused.setdefault(name, "is not called in the traced forward pass")
    return plan, refused


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert isinstance(weight, Tensor)
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    scale = (variance.double() + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    if (gamma := norm._parameters["weight"]) is not None:
        scale = scale * gamma.double()
    shift = shift * scale
    if (beta := norm._parameters["bias"]) is not None:
        shift = shift + beta.double()
    weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype))
    else:
        bias.copy_(shift)
