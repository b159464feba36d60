"""Which layers of a model have a rule of their own, and what one sees of each during a step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.moments import (
    Moments,
    at_least_float32,
    channel_moments,
    moments_of,
    one_hot_moments,
    pooled_moments,
    sampled,
)
from torchgeom_optim.geometry.reparametrization import fan_in_scale, reparametrized_gradient
from torchgeom_optim.optimizers.distributed import (
    in_process_group,
    is_sharded,
    is_sharded_by_rows,
    local_part,
    part_like,
    whole,
    with_local,
)

__all__ = ["AffineLayer", "LayerCall", "Probe", "SeenCall", "find_affine_layers"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KNOWN_LAYERS = (nn.Linear, *_CONVOLUTIONS, nn.Embedding)
# Of how many inputs of a step it is measured what a direction does to the outputs: images have many positions each.
_PROBED_ROWS, _PROBED_IMAGES, _PROBED_CALLS = 16, 2, 4


class Probe(NamedTuple):
    """A few inputs of a call, to apply other weights to.

    Attributes:
        module: that was called.
        inputs: samples in axis 0; positions of a sequence count as samples.
    """

    module: nn.Module
    inputs: Tensor


class SeenCall(NamedTuple):
    """What a call that a backward pass has reached leaves behind; or what all processes have seen, as one call.

    Attributes:
        moments: of the layer's inputs; only where asked for, like the next.
        output_grad_sq: mean of g^2 over samples and positions, [m], as autograd scaled it.
        num_samples: in the call; positions of a sequence count as samples. A tensor if it is a mean over processes.
        num_applications: of the weights: samples times positions. Likewise.
        backward_pass: number of the backward pass that reached it.
        output_moments: of the layer's outputs; only where asked for, like the next.
        probes: of the call's inputs.
    """

    moments: Moments | None
    output_grad_sq: Tensor | None
    num_samples: int | Tensor
    num_applications: int | Tensor
    backward_pass: int
    output_moments: Moments | None = None
    probes: tuple[Probe, ...] = ()


class LayerCall:
    """A call that no backward pass has reached yet, if one ever will. It lives in the graph, as a hook on the output.

    The first hook that a backward pass reaches summarises all open calls at once: their inputs are still alive then
    (autograd needs them), and small operations cost a third in one go of what they cost scattered among the layers.
    """

    def __init__(
        self,
        layer: AffineLayer,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        open_calls: list[weakref.ref[LayerCall]],
        *,
        with_moments: bool,
        with_output_grads: bool,
        with_outputs: bool = False,
        probing: int = 0,
    ) -> None:
        batched = layer.spatial_axes == 0 or x.dim() == layer.spatial_axes + 2
        self._num_applications = y.numel() // y.shape[layer.channel_axis]
        self._num_samples = self._num_applications if layer.spatial_axes == 0 else (x.shape[0] if batched else 1)
        self._layer = layer
        self._x = x if with_moments else None
        self._moments: Moments | None = None
        self._with_output_grads = with_output_grads
        self._module = module
        self._probing = probing if layer.num_probed < _PROBED_CALLS else 0
        layer.num_probed += 1
        self._probes: tuple[Probe, ...] = ()
        # A copy of some, as an activation may change the output in place.
        self._outputs = sampled(y, layer.channel_axis).clone() if with_outputs else None
        self._output_moments: Moments | None = None
        self._counted = False
        self._open_calls = open_calls
        open_calls.append(weakref.ref(self))

    def summarise(self) -> None:
        """Reduce the input to its moments, and let go of it."""
        if self._x is None:
            return
        layer, x, self._x = self._layer, self._x, None
        if layer.is_embedding:
            self._moments = one_hot_moments(x, len(layer.weight), layer.weight.dtype)
        else:
            self._moments = channel_moments(x, layer.channel_axis)
        if self._outputs is not None:
            self._output_moments, self._outputs = moments_of(self._outputs), None
        if self._probing:
            self._probes = (Probe(self._module, _some_rows(x, layer, self._probing)),)

    def on_output_grad(self, output_grad: Tensor) -> None:
        """Count the call, once, now that a backward pass has reached its output."""
        for reference in self._open_calls:
            if (call := reference()) is not None:
                call.summarise()
        self._open_calls.clear()
        if self._counted:
            return
        self._counted = True
        output_grad_sq = None
        if self._with_output_grads:
            output_grad_sq = channel_moments(output_grad, self._layer.channel_axis).about_zero().variance
        backward_pass = torch._C._current_graph_task_id()
        self._layer.count(
            SeenCall(
                self._moments,
                output_grad_sq,
                self._num_samples,
                self._num_applications,
                backward_pass,
                self._output_moments,
                self._probes,
            )
        )


def _some_rows(x: Tensor, layer: AffineLayer, num_ranks: int) -> Tensor:
    """A copy of every k-th sample; of several processes each takes its part, together those that one would take."""
    x = x.detach()
    if layer.is_embedding:
        x = x.reshape(-1)
    elif layer.spatial_axes == 0:
        x = x.reshape(-1, x.shape[-1])
    elif x.dim() == layer.spatial_axes + 1:
        x = x.unsqueeze(0)
    number = max((_PROBED_IMAGES if layer.spatial_axes else _PROBED_ROWS) // num_ranks, 1)
    return x[:: max(len(x) // number, 1)][:number].clone()


@dataclass(eq=False)
class AffineLayer:
    """A weight, the bias that can take up its inputs' mean, and the modules that apply it.

    Attributes:
        modules: more than one where modules share the weight.
        weight: shape [m, n / groups, *kernel], or [n, m] for an embedding, whose inputs are one-hot.
        bias: takes part in Eq. (3) only if it belongs to exactly one module and is not left to plain SGD.
        free_biases: biases of modules that share a weight; the inputs' mean cannot be moved into these.
        calls: the calls since the last step that a backward pass has reached.
    """

    modules: list[nn.Module]
    weight: Tensor
    bias: Tensor | None
    free_biases: list[Tensor]
    calls: list[SeenCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        module = self.modules[0]
        self._grad_version: int | None = None
        self.num_probed = 0  # calls, with a backward pass or without, since the last step
        self.parameters = [p for p in (self.weight, self.bias, *self.free_biases) if p is not None]
        self.is_embedding = isinstance(module, nn.Embedding)
        self.spatial_axes = len(module.kernel_size) if isinstance(module, _CONVOLUTIONS) else 0
        self.channel_axis = -self.spatial_axes - 1
        self.groups = module.groups if isinstance(module, _CONVOLUTIONS) else 1
        if self.is_embedding:
            self.num_inputs = self.fan_in = self.weight.shape[0]
            self.num_units = self.weight.shape[1]
        else:
            self.num_inputs = self.weight.shape[1] * self.groups
            self.fan_in = math.prod(self.weight.shape[1:])
            self.num_units = self.weight.shape[0]

    def count(self, call: SeenCall) -> None:
        """Take a call into account; where gradients start anew, those of a step that was skipped are forgotten."""
        # fully_shard adds up what it has not yet reduced in the weight that the module has during the pass.
        holders = (*self.parameters, self.modules[0]._parameters.get("weight"))
        grad = next((p.grad for p in holders if p is not None and p.grad is not None), None)
        version = None if grad is None else grad._version
        if self.calls and self.calls[-1].backward_pass != call.backward_pass:
            # Accumulation leaves a new gradient at version 0 and raises it by one; zeroing raises it in between.
            # With several processes their averaging raises it too, so that only None is a new beginning.
            before = self._grad_version
            follows = (0,) if before is None else (before, before + 1)
            if version is None or not (version in follows or in_process_group()):
                self.calls.clear()
        self._grad_version = version
        self.calls.append(call)

    @property
    def is_centred(self) -> bool:
        """Whether there is a bias now to move the inputs' mean into."""
        return self.bias is not None and self.bias.grad is not None and self.weight.grad is not None

    def batch_moments(self) -> Moments:
        """Moments of this step's inputs, all calls pooled."""
        return pooled_moments([call.moments for call in self.calls if call.moments is not None])

    def sharing(self) -> float | Tensor:
        """At how many positions s a weight is applied, per sample."""
        calls = self.calls
        if self.spatial_axes == 0:
            return 1.0
        if len(calls) == 1:
            return calls[0].num_applications / calls[0].num_samples
        return sum(call.num_applications for call in calls) / sum(call.num_samples for call in calls)

    def fan_in_scale(self, sharing: float | Tensor) -> float | Tensor:
        """beta^2 of Eq. (12); where s is a tensor one of shape [m], as of any beta^2 that is."""
        if isinstance(sharing, Tensor):
            return (sharing * self.fan_in).rsqrt().expand(self.num_units)
        return fan_in_scale(self.fan_in, sharing)

    def scale_bias(self, grad: Tensor, output_scale: float | Tensor) -> Tensor:
        """beta^2 b, the direction of a bias that no inputs' mean can be moved into."""
        step = self.reparametrize(None, grad, None, 1.0, output_scale)[1]
        assert step is not None
        return step

    def num_samples(self) -> int | Tensor:
        """N of the whole step; what k calls in one pass see are the same samples."""
        if len(self.calls) == 1:
            return self.calls[0].num_samples
        samples: dict[int, int] = {}
        for call in self.calls:
            assert isinstance(call.num_samples, int)
            samples[call.backward_pass] = max(call.num_samples, samples.get(call.backward_pass, 0))
        return sum(samples.values())

    def output_grad_sq(self, *, mean_reduction: bool) -> Tensor:
        """E[g_j^2] of this step; under mean reduction hooks deliver g / N, which is undone."""
        # N is that of the whole step, so that k passes with loss / k count like one pass with all samples.
        factor = self.num_samples() ** 2 if mean_reduction else 1
        total = sum(call.num_applications for call in self.calls)
        parts = [(call.output_grad_sq, call.num_applications / total * factor) for call in self.calls]
        return torch.stack([part * weight for part, weight in parts if part is not None]).sum(0)

    def output_moments(self) -> Moments | None:
        """Moments of this step's outputs, all calls pooled; None if they were not asked for, or there are none."""
        moments = [call.output_moments for call in self.calls if call.output_moments is not None]
        return pooled_moments(moments) if moments else None

    def output_spread_sq(self) -> Tensor | None:
        """sigma_j^2, the variance of unit j's outputs over this step, [m]; of a single output its square."""
        if (pooled := self.output_moments()) is None:
            return None
        return pooled.about_zero().variance if isinstance(pooled.count, int) and pooled.count == 1 else pooled.variance

    @property
    def is_called_elsewhere(self) -> bool:
        """Whether the call of this step is that of several processes, if not of this one."""
        return bool(self.calls) and isinstance(self.calls[0].num_samples, Tensor)

    def measured_change(self, directions: Mapping[int, Tensor]) -> Moments | None:
        """Moments of what the layer computes with directions in place of its weights, on the probes.

        Args:
            directions: by the id of a parameter; what is missing does not move.

        Returns:
            Mean and variance of shape [m], and the number of samples; None without a probe.
        """
        parts: list[Moments] = []
        weight = directions.get(id(self.weight))
        for module, x in (probe for call in self.calls for probe in call.probes):
            bias = module._parameters.get("bias")
            bias_step = None if bias is None else directions.get(id(bias))
            if weight is not None:
                change = self._applied(module, x, weight, bias_step)
                moments = moments_of(change.flatten(2) if change.dim() > 2 else change)
                parts.append(moments._replace(count=len(x)))
            elif bias_step is not None:
                change = at_least_float32(bias_step)
                parts.append(Moments(len(x), change, torch.zeros_like(change)))
        return pooled_moments(parts) if parts else None

    def _applied(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.is_embedding:
            return nn.functional.embedding(x, weight)
        x = x.to(weight.dtype)
        if isinstance(module, _CONVOLUTIONS):
            outputs: Tensor = module._conv_forward(x, weight, bias)  # with the padding that the layer has
            return outputs
        return nn.functional.linear(x, weight, bias)

    def reparametrize(
        self,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None,
        input_mean: Tensor | None,
        scale: Tensor | float,
        output_scale: Tensor | float,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Eq. (3) for whichever of weight and bias has a gradient; arguments as of the function used."""
        if is_sharded(weight_grad) or is_sharded(bias_grad):
            return self._reparametrize_sharded(weight_grad, bias_grad, input_mean, scale, output_scale)
        if weight_grad is None:
            return None, None if bias_grad is None else (bias_grad * output_scale).to(bias_grad.dtype)
        if self.is_embedding:  # the inputs stand in the rows, and there is no bias
            step = weight_grad * (scale[:, None] if isinstance(scale, Tensor) else scale)
            step = step * output_scale if isinstance(output_scale, Tensor) else step
            return step.to(weight_grad.dtype), None
        return reparametrized_gradient(weight_grad, bias_grad, input_mean, scale, output_scale, self.groups)

    def _reparametrize_sharded(
        self,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None,
        input_mean: Tensor | None,
        scale: Tensor | float,
        output_scale: Tensor | float,
    ) -> tuple[Tensor | None, Tensor | None]:
        # Each process computes its own rows; gradients that are sharded in another way are brought together.
        grads = [g for g in (weight_grad, bias_grad) if g is not None]
        by_rows = self.groups == 1 and all(is_sharded_by_rows(g) for g in grads)  # else a row's group is not known
        there, back = (local_part, with_local) if by_rows else (whole, part_like)
        if by_rows and self.is_embedding and isinstance(scale, Tensor):
            scale = local_part(part_like(scale, grads[0]))
        elif by_rows and isinstance(output_scale, Tensor) and not self.is_embedding:
            output_scale = local_part(part_like(output_scale, grads[0]))
        steps = None if weight_grad is None else there(weight_grad), None if bias_grad is None else there(bias_grad)
        if not by_rows or local_part(grads[0]).numel() > 0:  # else there are fewer rows than processes
            steps = self.reparametrize(*steps, input_mean, scale, output_scale)
        return (
            None if weight_grad is None or steps[0] is None else back(steps[0], weight_grad),
            None if bias_grad is None or steps[1] is None else back(steps[1], bias_grad),
        )


def find_affine_layers(
    model: nn.Module, takes_part: Callable[[Tensor], bool]
) -> tuple[list[AffineLayer], dict[Tensor, str]]:
    """Find the layers with a rule of their own.

    Args:
        model: looked through once, whole.
        takes_part: whether a parameter is optimized, and not by plain SGD.

    Returns:
        The layers of whose weights this holds; and for parameters of known layers that are left out, why.
    """
    refused: dict[Tensor, str] = {}
    owners: dict[Tensor, list[nn.Module]] = {}
    in_attention = set(_parts_of(m for m in model.modules() if isinstance(m, nn.MultiheadAttention)))
    for module in model.modules():
        weight: Tensor | None = module._parameters.get("weight") if isinstance(module, _KNOWN_LAYERS) else None
        if weight is None:  # unknown, or parametrized: the optimized tensors are not the layer's weight
            held = f"held by {type(module).__name__}, which has no rule"
            refused.update((p, held) for p in module.parameters(recurse=False))
            continue
        reason = _why_not(module)
        if module in in_attention:
            reason = "applied inside MultiheadAttention, without a call of its own"
        if reason is not None:
            refused.update((p, reason) for p in module.parameters(recurse=False))
        owners.setdefault(weight, []).append(module)
    layers = []
    for weight, modules in owners.items():
        if len({type(m) for m in modules}) > 1:
            refused.setdefault(weight, "shared by layers of different types")
        if weight in refused:
            continue
        biases = [b for m in modules if (b := m._parameters.get("bias")) is not None and takes_part(b)]
        if not takes_part(weight):  # Eq. (3) moves the bias against a step of the weight
            refused.update((b, "the weight of its layer has no rule") for b in biases)
            continue
        bias = biases[0] if len(modules) == 1 and biases else None
        layers.append(AffineLayer(modules, weight, bias, [b for b in biases if b is not bias]))
    return layers, refused


def _parts_of(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for module in modules:
        yield from (part for part in module.modules() if part is not module)


def _why_not(module: nn.Module) -> str | None:
    known = next(cls for cls in _KNOWN_LAYERS if isinstance(module, cls))
    if type(module).forward is not known.forward:
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
        return "embedding with sparse or frequency-scaled gradients"
    if module._parameters["weight"].is_complex():  # type: ignore[union-attr]
        return "complex weights"
    return None
