"""Units and filters that training has switched off, really taken out of the network."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_optim.geometry.deprecations import without_own_deprecations
from torchgeom_optim.geometry.private_evaluation import private_evaluation
from torchgeom_optim.models.channel_flow import ChannelFlow, Layer, is_depthwise
from torchgeom_optim.models.channel_removal import Removal, plan_removal
from torchgeom_optim.models.fewer_heads import FewerHeadsAttention, idle_heads, why_heads_must_stay
from torchgeom_optim.models.traced_graph import trace

__all__ = ["Compaction", "CompactionError", "CompactionReport", "ModelCost", "compact"]


class CompactionError(RuntimeError):
    """A network cannot be compacted as asked; the original is untouched."""


@dataclass(frozen=True)
class ModelCost:
    """What a network takes.

    Attributes:
        parameters: numbers in its parameters; tied ones count once.
        num_bytes: of parameters and buffers.
        multiply_adds: of one sample's forward pass: matrix products and convolutions, as torch's ``FlopCounterMode``
            counts them (which gives two operations for each).
        latency_s: median seconds of a forward pass of the example inputs; None if not asked for.
    """

    parameters: int
    num_bytes: int
    multiply_adds: int
    latency_s: float | None = None


@dataclass(frozen=True)
class CompactionReport:
    """What :func:`compact` did.

    Attributes:
        before: cost of the network given.
        after: cost of the one returned.
        widths: layer -> units before and after, for layers that lost some; of attentions, heads.
        kept: layer -> reason -> how many units with constant outputs, or idle heads, had to stay for it.
        not_followed: submodules whose inside could not be followed, so that nothing in them was removed.
    """

    before: ModelCost
    after: ModelCost
    widths: dict[str, tuple[int, int]]
    kept: dict[str, dict[str, int]]
    not_followed: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            ("parameters", self.before.parameters, self.after.parameters),
            ("bytes", self.before.num_bytes, self.after.num_bytes),
            ("multiply-adds", self.before.multiply_adds, self.after.multiply_adds),
        ]
        lines = [f"{name:<15}{old:>14,} -> {new:>14,}  ({new / max(old, 1):.1%})" for name, old, new in rows]
        if self.before.latency_s is not None and self.after.latency_s is not None:
            old_ms, new_ms = 1e3 * self.before.latency_s, 1e3 * self.after.latency_s
            lines.append(f"{'latency in ms':<15}{old_ms:>14.3f} -> {new_ms:>14.3f}  ({new_ms / old_ms:.1%})")
        lines += [f"{name}: {old} -> {new} units" for name, (old, new) in self.widths.items()]
        lines += [
            f"{name}: {n} idle units stay: {why}" for name, reasons in self.kept.items() for why, n in reasons.items()
        ]
        lines += [f"{name}: not followed" for name in self.not_followed]
        return "\n".join(lines)


class Compaction(NamedTuple):
    """A smaller network, and what became of it."""

    model: nn.Module
    report: CompactionReport


def compact(model: nn.Module, example_inputs: Any, *, latency_rounds: int = 0, strict: bool = False) -> Compaction:
    r"""A copy of a network without the units and filters that contribute nothing but a constant.

    A unit goes if, wherever its output is used, it is either a constant (its weights are zero on every input that
    varies, or a batch norm scales it by zero) or multiplied by zeros alone; others that fed nothing but it go with it.
    Removing unit k with constant c_k from the inputs of a layer leaves, for its outputs j,

        b_j <- b_j + \sum_k w_jk c_k                    (a convolution: w_jk summed over the kernel)

    with c_k what activations, pooling and batch norms make of the bias. Where a convolution pads with zeros, a constant
    other than 0 is none at the border: then one such channel stays for all, and takes over the others' weights times
    c_k / c. In **evaluation mode** the outputs are the original's to rounding, which is checked on the example
    inputs. (In training mode dropout and batch statistics treat a constant unit otherwise than a bias.)

    Followed are Linear, Conv1d-3d (plain or depthwise), batch norms, elementwise functions, dropout, pooling, means
    over positions, flatten and reshape, sums, products and concatenations. Of an ``nn.MultiheadAttention``, inside of
    torch's transformer layers too, those heads go whose values are zero or multiplied by zeros alone; what is left is a
    :class:`~torchgeom_optim.models.fewer_heads.FewerHeadsAttention`, around which an ``nn.TransformerEncoder`` takes no
    nested tensors: at padded positions it then returns what it does with gradients, not zeros. Units that lead into
    anything else (an attention written with linear layers, layer norm, slicing, a layer used twice, tied weights, a
    reshape to a fixed size, the network's outputs), and units of a sum that are constant in one term alone, stay and
    are named in ``report.kept``.

    The copy's class and names are the original's, its layers are narrower; it has no gradients, and masks of
    ``torch.nn.utils.prune`` and parametrizations are made permanent in it. Its forward is the original's code: a branch
    that the example inputs do not take may expect the old sizes.

    Args:
        model: any module that ``torch.fx`` can follow, with the sample along the first axis; left as it is.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on the model's device.
        latency_rounds: how many forward passes of each network are timed, in turns; 0 for none.
        strict: refuse, instead of keeping them, units that are constant and cannot go.

    Returns:
        The copy, in the original's mode, and the report.

    Raises:
        ValueError: the forward cannot be followed.
        CompactionError: with ``strict``, some units must stay; or the copy did not reproduce the outputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:5].zero_()
        >>> smaller, report = compact(model, torch.randn(3, 4))
        >>> report.widths, smaller
        ({'0': (8, 3)}, Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        ))
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("got a compiled model: the module itself is needed. Try model._orig_mod, and compile again.")
    if latency_rounds < 0:
        raise ValueError(f"latency_rounds={latency_rounds}: must be 0 or more; 20 is a common start.")
    args, kwargs = _call_arguments(example_inputs)
    smaller = _plain_copy(model)
    heads, heads_kept = _heads(smaller)
    _without_nested_tensors(smaller, heads)
    with private_evaluation(smaller), torch.no_grad():
        expected = smaller(*_own(args), **_own(kwargs))
        traced = trace(smaller, _own(args), _own(kwargs))
        flow = ChannelFlow(smaller, traced)
        removal = plan_removal(flow)
        kept = {name: Counter(reasons) for name, reasons in (removal.kept | heads_kept).items()}
        if strict and kept:
            name, counts = next(iter(kept.items()))
            raise CompactionError(
                f"{counts.total()} units of {name!r} are constant and cannot go: {next(iter(counts))}. (Layers "
                f"concerned: {', '.join(kept)}.) Try strict=False, which keeps these."
            )
    widths = {}
    for layer in flow.layers.values():  # outside of the private evaluation, which undoes changes of attributes
        _narrow(layer, removal)
        rows = ~removal.removed[layer.outputs.ids]
        if not bool(rows.all()):
            widths[layer.name] = (len(rows), int(rows.sum()))
    for name, stay in heads.items():
        parent, _, own = name.rpartition(".")
        attention = smaller.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        widths[name] = (attention.num_heads, len(stay))
        setattr(smaller.get_submodule(parent), own, FewerHeadsAttention(attention, stay))
    with private_evaluation(smaller), torch.no_grad():
        _check_same(expected, smaller(*_own(args), **_own(kwargs)))
    costs = _costs((_plain_copy(model), smaller), args, kwargs, latency_rounds)
    reasons = {name: dict(counts) for name, counts in kept.items()}
    return Compaction(smaller, CompactionReport(*costs, widths, reasons, tuple(sorted(traced.leaves))))


def _call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _own(inputs: Any) -> Any:
    """Copies, since a forward may write to its inputs."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)


def _plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose masks and parametrizations have become plain parameters, without gradients."""
    # A masked weight is the outcome of a product with a gradient of its own, which deepcopy refuses.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    twin = copy.deepcopy(model, computed)
    for module in twin.modules():
        if parametrize.is_parametrized(module):
            # Not remove_parametrizations: it takes the property off the class, which the original shares.
            values = {name: getattr(module, name) for name in cast(nn.ModuleDict, module.parametrizations)}
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                setattr(module, name, nn.Parameter(value.detach(), requires_grad=value.requires_grad))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    return twin


def _heads(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Which heads stay, of attentions that can lose some; and why idle ones stay, one reason for each."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for part in (module, module.out_proj) if isinstance(module, nn.MultiheadAttention) else (module,):
            for p in part._parameters.values():
                owners.setdefault(id(p), set()).add(id(module))
    stay: dict[str, Tensor] = {}
    kept: dict[str, list[str]] = {}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        idle = idle_heads(module)
        # Its output layer is a module of its own, which nothing else calls.
        others = {id(module), id(module.out_proj)}
        shared = len(names[id(module)]) > 1 or any(not owners[id(p)] <= others for p in module.parameters())
        reason = "it is the network itself" if not name else why_heads_must_stay(module, shared)
        if reason is None and bool(idle.all()):
            idle[0] = False
            kept[name] = ["an attention keeps at least one head"]
        if bool(idle.any()) and reason is None:
            stay[name] = torch.nonzero(~idle).flatten()
        elif bool(idle.any()):
            kept[name] = [reason or ""] * int(idle.sum())
    return stay, kept


def _without_nested_tensors(model: nn.Module, heads: Iterable[str]) -> None:
    """Switch torch's own way off for padded batches, around attentions that are about to be replaced."""
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            own.startswith(f"{name}." if name else "") for own in heads
        ):
            module.use_nested_tensor = False


def _narrow(layer: Layer, removal: Removal) -> None:
    """Take the removed channels out of a layer's own tensors, and put their constants into its bias."""
    module: Any = layer.module
    rows = ~removal.removed[layer.outputs.ids]
    if isinstance(module, _BatchNorm):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _replace(module, name, rows)
        module.num_features = int(rows.sum())
        return
    if layer.mixes and layer.inputs is not None:
        _drop_inputs(layer, ~removal.removed[layer.inputs.ids], removal)
    depthwise = is_depthwise(module)
    for name in ("weight", "bias"):
        _replace(module, name, rows)
    num_outputs, num_inputs = module.weight.shape[:2]
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = num_inputs, num_outputs
    elif depthwise:
        module.in_channels = module.out_channels = module.groups = num_outputs
    else:
        module.in_channels, module.out_channels = num_inputs, num_outputs


def _drop_inputs(layer: Layer, columns: Tensor, removal: Removal) -> None:
    module, inputs = layer.module, layer.inputs
    assert isinstance(module, nn.Linear | _ConvNd)
    assert inputs is not None
    if bool(columns.all()):
        return
    weight = module.weight.detach()
    wide = weight.cpu().double()
    merged = {k: taken for k, taken in removal.merged.get(layer.name, {}).items() if not columns[k]}
    for position, (into, factor) in merged.items():
        wide[:, into] += factor * wide[:, position]
    constants = torch.where(columns, 0.0, inputs.constants.nan_to_num(nan=0.0))
    constants[list(merged)] = 0.0
    shift = wide.reshape(*wide.shape[:2], -1).sum(2) @ constants
    if bool((shift != 0).any()):
        bias = shift if module.bias is None else module.bias.detach().cpu().double() + shift
        trainable = module.weight.requires_grad if module.bias is None else module.bias.requires_grad
        module.bias = nn.Parameter(bias.to(weight), requires_grad=trainable)
    narrow = wide[:, columns].contiguous().to(weight)
    module.weight = nn.Parameter(narrow, requires_grad=module.weight.requires_grad)


def _replace(module: nn.Module, name: str, rows: Tensor) -> None:
    """Keep these rows of a parameter or buffer, where there is one."""
    old = getattr(module, name, None)
    if isinstance(old, Tensor) and not bool(rows.all()):
        new = old.detach()[rows.to(old.device)].clone()
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if name in module._parameters else new)


def _check_same(expected: Any, found: Any) -> None:
    for old, new in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if not isinstance(old, Tensor) or not old.is_floating_point():
            continue
        error = float((new.double() - old.double()).norm() / old.double().norm().clamp(min=torch.finfo(old.dtype).tiny))
        limit = torch.finfo(old.dtype).eps ** 0.5
        if old.shape != new.shape or not (error <= limit or torch.equal(old, new)):
            raise CompactionError(
                f"the compacted network's outputs differ by {error:.2g} of their norm: at most {limit:.2g} is rounding"
                ". Something in the forward is not what it seems, such as a number of channels used in arithmetic. Try "
                "the model in float64 to see whether it is rounding after all."
            )


def _costs(
    networks: tuple[nn.Module, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], rounds: int
) -> tuple[ModelCost, ModelCost]:
    with without_own_deprecations():
        from torch.utils.flop_counter import FlopCounterMode  # brings more libraries along than an import of ours may

    first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    costs = []
    seconds: tuple[list[float], list[float]] = ([], [])
    with private_evaluation(networks[0]), private_evaluation(networks[1]), torch.no_grad():
        for _ in range(rounds + 1 if rounds else 0):  # the first round warms up
            for network, times in zip(networks, seconds, strict=True):
                inputs = _own(args), _own(kwargs)
                _wait_for(first.device)
                start = time.perf_counter()
                network(*inputs[0], **inputs[1])
                _wait_for(first.device)
                times.append(time.perf_counter() - start)
        for network, times in zip(networks, seconds, strict=True):
            with _every_product_seen(), FlopCounterMode(display=False) as counter:
                network(*_own(args), **_own(kwargs))
            tensors = [*network.parameters(), *network.buffers()]
            costs.append(
                ModelCost(
                    sum(p.numel() for p in network.parameters()),
                    sum(t.numel() * t.element_size() for t in tensors),
                    counter.get_total_flops() // (2 * max(1, len(first))),
                    statistics.median(times[1:]) if times else None,
                )
            )
    return costs[0], costs[1]


@contextlib.contextmanager
def _every_product_seen() -> Iterator[None]:
    """Without torch's fused attention and encoder layers, inside of which nothing is counted."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
