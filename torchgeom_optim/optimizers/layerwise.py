"""What optimizers that look at layers have in common: who owns which parameter, what was seen, saving and copying."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from torchgeom_optim.geometry.capture import Capture, activations_are_not_kept
from torchgeom_optim.optimizers.checkpoints import (
    STATE_VERSION,
    back_on_error,
    require_shapes,
    require_version,
    seen_by_hooks,
)
from torchgeom_optim.optimizers.distributed import Ranks, process_group_of, require_whole_layers
from torchgeom_optim.optimizers.finite_gradients import require_finite_gradients
from torchgeom_optim.optimizers.layers import AffineLayer, LayerCall, SeenCall, find_affine_layers
from torchgeom_optim.optimizers.pooled_calls import Quantity, Wanted, calls_of_all_ranks
from torchgeom_optim.optimizers.report import ParameterRule, RuleReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LayerwiseOptimizer"]


class LayerwiseOptimizer(Optimizer):
    """SGD along directions that are computed layer by layer from gradients and from what the layers saw.

    A subclass says what it wants to see of a call (:meth:`_wants`), how hyper-parameters are checked
    (:meth:`_check_group`), and computes directions (:meth:`_directions`). Its ``defaults`` hold the
    hyper-parameters of ``torch.optim.SGD`` and ``rule``, where "sgd" leaves a parameter to plain SGD.

    Several processes: before a step, what all of them have seen of a layer takes the place of the layer's own calls
    (:meth:`_together`), so that a subclass that goes by these has statistics of the whole batch, equal in
    all processes. Whatever else it measures on its part of the batch goes through :meth:`Ranks.means`. As a process may
    be lost there, :meth:`_directions` changes no tensor of the state in place before the last such call of a step.

    Args:
        params: a model, or parameters or groups of them.
        defaults: hyper-parameters of groups that do not say otherwise.
        model: the module that owns the parameters; None makes every parameter one without a layer, and warns.
        process_group: the processes that train the model together; None takes those of DistributedDataParallel or
            ``fully_shard`` if the model is in one, else the default group.
        error_if_nonfinite: whether a step looks at whether its gradients are finite; None does so on the CPU, where
            nobody has to wait for it.
    """

    # Tensors in the state that stay in their own dtype and have the length of a layer's input.
    _input_statistics: tuple[str, ...] = ()
    _output_statistics: tuple[str, ...] = ()  # the same, of the length of its output
    _statistics: tuple[str, ...] = ()

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        model: nn.Module | None,
        process_group: ProcessGroup | None = None,
        error_if_nonfinite: bool | None = None,
    ) -> None:
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError("got two models; need one: give it once, as the first argument or as model=.")
            model, params = params, list(params.parameters())
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"model: got {type(model).__name__}, need a torch.nn.Module: give the network that is trained."
            )
        self._model = model
        self._ranks = Ranks(process_group or process_group_of(model))
        self._error_if_nonfinite = error_if_nonfinite
        self._layers: list[AffineLayer] = []
        self._has_foreign_momentum = False
        self._check_group(defaults, "default")
        super().__init__(params, {**defaults, "state_version": STATE_VERSION})
        self._watch_layers()
        if model is None and self._needs_model and any(group["rule"] != "sgd" for group in self.param_groups):
            name = type(self).__name__
            warnings.warn(
                f"{name} was given no model, so that it sees no layers and steps every parameter as torch.optim.SGD "
                f"does: give it the model, {name}(model) or {name}(groups, model=model); rule='sgd' says that SGD is "
                "what you want.",
                stacklevel=3,
            )

    @abstractmethod
    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Raise if a hyper-parameter is out of its range."""

    @abstractmethod
    def _wants(self, rule: str) -> tuple[bool, bool]:
        """Whether the moments of a layer's inputs, and of its output gradients, are needed."""

    def _wants_outputs(self, layer: AffineLayer) -> bool:
        """Whether the moments of a layer's outputs are needed; where they are, so must those of its inputs be."""
        return False

    def _probes(self, layer: AffineLayer) -> bool:
        """Whether a few inputs of a layer are needed; likewise."""
        return False

    @abstractmethod
    def _directions(self, layers: list[AffineLayer]) -> dict[int, Tensor]:
        """By the id of a parameter, what SGD is given in place of its gradient; updates the statistics."""

    @property
    def _needs_model(self) -> bool:
        """Whether there is nothing but plain SGD without a model."""
        return True

    # -- parameter groups and layers ----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; layers of the model whose parameters it brings are watched from now on.

        Args:
            param_group: parameters and the hyper-parameters that are their own.

        Raises:
            ValueError: parameters that the model does not own, or a value out of its range; no group was added.
        """
        if isinstance(param_group, dict):  # else torch says what is wrong
            self._check_group({**self.defaults, **param_group}, f"group {len(self.param_groups)}")
        super().add_param_group(param_group)
        owned = None if self._model is None else set(self._model.parameters())
        foreign = [tuple(p.shape) for p in self.param_groups[-1]["params"] if owned is not None and p not in owned]
        if foreign:
            self.param_groups.pop()
            raise ValueError(
                f"got {len(foreign)} parameters that the model does not own (shapes {foreign[:4]}); "
                "need a model that contains them all: try an nn.ModuleList of everything that is trained."
            )
        if hasattr(self, "_capture"):  # not while the constructor adds its groups
            try:
                self._watch_layers()
            except ValueError:
                self.param_groups.pop()
                self._watch_layers()
                raise

    def _watch_layers(self) -> None:
        """Find the layers of the model anew, keep what is known of them, and hook them."""
        calls = {layer.weight: layer.calls for layer in self._layers}
        self._follow_groups()
        layers, refused = list[AffineLayer](), dict[Tensor, str]()
        if self._model is not None:
            if any(group["rule"] != "sgd" for group in self.param_groups):
                require_whole_layers(self._model, self._has_rule)
            layers, refused = find_affine_layers(self._model, self._has_rule)
        self._layers, self._refused = layers, refused
        self._watched_rules = [group["rule"] for group in self.param_groups]
        for layer in self._layers:
            layer.calls = calls.get(layer.weight, layer.calls)
        self._layer_of = {module: layer for layer in self._layers for module in layer.modules}
        self._follow_groups()
        self._open_calls: list[weakref.ref[LayerCall]] = []
        if (capture := getattr(self, "_capture", None)) is not None:
            capture.close()
        self._capture: Capture = Capture(self._layer_of, self._on_call)

    def _follow_groups(self) -> None:
        """Note which group each parameter is in; the group of its weight decides for a layer."""
        self._group_of_parameter = {p: group for group in self.param_groups for p in group["params"]}
        known = [layer for layer in self._layers if layer.weight in self._group_of_parameter]
        self._group_of = {layer: self._group_of_parameter[layer.weight] for layer in known}

    def _has_rule(self, parameter: Tensor) -> bool:
        group = self._group_of_parameter.get(parameter)
        return group is not None and group["rule"] != "sgd"

    def report(self) -> RuleReport:
        """Name every parameter with the rule that it gets, in the order of the groups.

        Returns:
            Rows (name, shape, rule, note); ``print`` shows them as a table.
        """
        names = self._names()
        known: dict[Tensor, tuple[str, str]] = {}
        for layer in self._layers:
            rule = self._group_of[layer]["rule"]
            known[layer.weight] = (rule, "" if layer.bias is not None else "without bias: inputs scaled, not centred")
            for bias in layer.parameters[1:]:
                known[bias] = (rule, "" if bias is layer.bias else "of a shared weight: scaled alone")
        rows = []
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if not p.requires_grad:
                    rule, note = "none", "frozen"
                elif group["rule"] == "sgd":
                    rule, note = "sgd", "asked for by its group"
                elif self._model is None:
                    rule, note = "sgd", "no model was given"
                else:
                    reason = self._refused.get(p, "its module has no rule")
                    rule, note = known.get(p) or self._rule_without_layer(p, group, reason)
                rows.append(ParameterRule(names.get(p, f"groups[{number}][{index}]"), tuple(p.shape), rule, note))
        return RuleReport(rows)

    def _names(self) -> dict[Tensor, str]:
        """Of the model's parameters."""
        named = () if self._model is None else self._model.named_parameters()
        return {p: name.replace("_orig_mod.", "") for name, p in named}

    def _rule_without_layer(self, parameter: Tensor, group: Mapping[str, Any], reason: str) -> tuple[str, str]:
        """Rule and note of a parameter that belongs to no layer with a rule of its own, for this reason."""
        return "sgd", reason

    # -- what the passes tell ------------------------------------------------------------------------------------

    def _on_call(self, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
        layer = self._layer_of.get(module)
        if layer is None or y.numel() == 0:
            return None  # a shallow copy of a layer, which carries its hooks; or an empty batch, which has no moments
        moments, output_grads = self._wants(self._group_of[layer]["rule"])
        if len(self._open_calls) > 8 * len(self._layers) + 64:  # passes with gradients that were never differentiated
            self._open_calls[:] = [reference for reference in self._open_calls if reference() is not None]
        call = LayerCall(
            layer,
            module,
            x,
            y,
            self._open_calls,
            with_moments=moments,
            with_output_grads=output_grads,
            with_outputs=self._wants_outputs(layer),
            probing=self._ranks.number if self._probes(layer) else 0,
        )
        # Under checkpointing autograd keeps no input, under autocast a copy: then nobody else keeps this one alive.
        if activations_are_not_kept() or torch.is_autocast_enabled(x.device.type):
            call.summarise()
        return call.on_output_grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget the calls that led to them.

        Args:
            set_to_none: as in torch.
        """
        self._follow_rules()
        self._forget_calls()
        super().zero_grad(set_to_none)

    def _follow_rules(self) -> None:
        """Watch the layers anew where the rule of a group has been changed by hand."""
        if self._watched_rules != [group["rule"] for group in self.param_groups]:
            for index, group in enumerate(self.param_groups):
                self._check_group(group, f"group {index}")
            self._watch_layers()

    def _forget_calls(self) -> None:
        for layer in self._layers:
            layer.calls.clear()
            layer.num_probed = 0

    # -- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients that the parameters hold.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: a layer has a gradient, but no pass with gradients went through it; or another process is
                lost; nothing was changed.
            FloatingPointError: gradients are not finite, and this is looked at; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_rules()
        active = [layer for layer in self._layers if any(p.grad is not None for p in layer.parameters)]
        device_type = next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")
        in_autocast = torch.is_autocast_enabled(device_type)  # entering the context costs as much as a layer
        with torch.no_grad():
            with (
                torch.autocast(device_type, enabled=False) if in_autocast else nullcontext(),
                self._together(active) if self._ranks.number > 1 else nullcontext(),
            ):
                self._check_calls(active)
                if active and self._error_if_nonfinite is not False:  # which would spoil the statistics for good
                    params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
                    always = self._error_if_nonfinite is True
                    require_finite_gradients(params, self._names, self._ranks, always=always)
                directions = self._directions(active)
            for group in self.param_groups:
                self._descend(group, directions)
        self._forget_calls()
        return loss

    # -- several processes ---------------------------------------------------------------------------------------

    @contextmanager
    def _together(self, active: list[AffineLayer]) -> Iterator[None]:
        """Inside, the calls of a layer are one: what all processes have seen. An error brings everything back."""
        calls = [(layer, layer.calls) for layer in self._layers]
        try:
            with back_on_error(self):
                layers = self._pool_calls(active)
                yield
                for layer in layers:
                    # Of a layer that is not stepped only the processes that called it know them; states have to agree.
                    if layer in active and (moments := layer.output_moments()) is not None:
                        state = self.state[layer.weight]
                        past = state.get("output_mean", torch.zeros_like(moments.mean))
                        # A mean of outputs that overflow would be no point to take the next variance about.
                        state["output_mean"] = torch.where(moments.variance.isfinite(), moments.mean, past)
        except BaseException:
            for layer, own in calls:
                layer.calls = own
            raise

    def _pool_calls(self, active: list[AffineLayer]) -> list[AffineLayer]:
        """Put what all processes have seen in the place of each layer's own calls.

        One collective for all layers; two more in the first step of a process, to compare and to find means.

        Returns:
            The layers that the processes spoke of.
        """
        # Not only layers with a gradient here: the processes have to speak of the same ones.
        layers = [layer for layer in self._layers if self._is_seen(layer)]
        pooled = calls_of_all_ranks(self._ranks, [self._wanted(layer) for layer in layers]) if layers else []
        for layer, (call, extras) in zip(layers, pooled, strict=True):
            # Whether a layer that this process did not call was called at all: only then wait for the device.
            if layer.calls or (layer in active and float(call.num_samples) > 0):
                layer.calls = [self._with_extras(call, extras)]
        return layers

    def _is_seen(self, layer: AffineLayer) -> bool:
        """Whether the calls of a layer matter; the same in all processes."""
        return any(p.requires_grad for p in layer.parameters)

    def _wanted(self, layer: AffineLayer) -> Wanted:
        moments, output_grads = self._wants(self._group_of[layer]["rule"])
        known = self.state[layer.weight] if layer.weight in self.state else {}
        return Wanted(
            layer,
            moments,
            output_grads,
            self._wants_outputs(layer),
            known.get("input_mean"),
            known.get("output_mean"),
            self._extra_means(layer),
        )

    def _extra_means(self, layer: AffineLayer) -> list[Quantity]:
        """Further means over the calls of a layer that go over the processes; of the same shapes in all of them."""
        return []

    def _with_extras(self, call: SeenCall, means: list[Tensor]) -> SeenCall:
        """The call of all processes with these means in it."""
        return call

    def _check_calls(self, active: list[AffineLayer]) -> None:
        """Refuse the step before anything has changed, where statistics are missing."""
        if not active:
            return
        heard = any(layer.calls for layer in active)
        for layer in active:
            if layer.calls or (heard and self._is_known(layer)):  # one that sat out goes by what is known
                continue
            names = {module: name for name, module in self._model.named_modules()} if self._model is not None else {}
            raise RuntimeError(
                f"layer {names.get(layer.modules[0])!r} has a gradient, but no pass with gradients went through it "
                "since the last step, so its inputs are not known; need a forward and a backward pass per step. "
                "If the model is compiled, build the optimizer before the compiled model's first call, or call "
                "torch.compiler.reset() after building it. If the weight is used without calling its layer, "
                "put its parameters into a group with rule='sgd'. Nothing was changed."
            )

    def _is_known(self, layer: AffineLayer) -> bool:
        """Whether a layer that was not called can be stepped by what earlier calls have told."""
        return bool(self.state.get(layer.weight))

    def _descend(self, group: dict[str, Any], directions: Mapping[int, Tensor]) -> None:
        """Let torch's own SGD take the step, along the directions in place of the gradients."""
        params = [p for p in group["params"] if p.grad is not None]
        grads = [directions.get(id(p), p.grad) for p in params]
        momentum = group["momentum"]
        states = [self.state[p] for p in params] if momentum else []
        buffers: list[Tensor | None] = [state.get("momentum_buffer") for state in states] or [None] * len(params)
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(g.is_sparse for g in grads),
            foreach=group["foreach"],
            lr=group["lr"],
            momentum=momentum,
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for state, buffer in zip(states, buffers, strict=False):
            state["momentum_buffer"] = buffer

    # -- saving and copying --------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint of this class, or of ``torch.optim.SGD``.

        Of SGD only the momentum is taken over, and put into our coordinates at the first step; the hyper-parameters
        stay as constructed, since an SGD learning rate has another scale. The given dict is not modified. A forward
        pass whose backward pass is still to come is not forgotten, unless the checkpoint's groups have other rules.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: a checkpoint of a newer version, or tensors that do not fit the parameters; nothing was changed.
        """
        before = [partial(hook, self) for hook in self._optimizer_load_state_dict_pre_hooks.values()]
        state_dict = self._adapted(seen_by_hooks(before, state_dict))
        saved = state_dict["param_groups"]
        versions = require_version(saved)
        parameters = list(chain.from_iterable(group["params"] for group in self.param_groups))
        indices = list(chain.from_iterable(group["params"] for group in saved))
        owner = dict(zip(indices, parameters, strict=False))  # torch says what is wrong if there are more or less
        state = {index: dict(values) for index, values in state_dict["state"].items()}
        for index, values in state.items():
            if index in owner:
                require_shapes(owner[index], values, self._needed_shapes(owner[index], values))
        in_layers = {p for layer in self._layers for p in layer.parameters}
        groups = []
        for group, version, own in zip(saved, versions, self.param_groups, strict=False):
            present = {key: value for key, value in own.items() if key != "params"}
            groups.append({**present, "params": group["params"]} if version == 0 else {**present, **group})
            for index in group["params"] if version == 0 else ():
                for key in state.get(index, {}).keys() - {"momentum_buffer", "gradient_momentum"}:
                    del state[index][key]  # what Adam knows of a parameter is nothing to us
                if owner.get(index) in in_layers and "momentum_buffer" in state.get(index, {}):
                    state[index]["gradient_momentum"] = state[index].pop("momentum_buffer")
        for index, group in enumerate(groups):
            self._check_group(group, f"group {index} of the checkpoint")
        groups += saved[len(groups) :]
        hooks = self._optimizer_load_state_dict_pre_hooks
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        try:
            super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks
        for index, p in owner.items():  # torch casts to the parameter's dtype, which is too coarse for these
            for key in self._statistics:
                if isinstance(state.get(index, {}).get(key), Tensor):
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    self.state[p][key] = state[index][key].to(p.device, dtype, copy=True)

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint as this class would have written it, without changing what was given; raises if it cannot."""
        return state_dict

    def _needed_shapes(self, parameter: Tensor, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Of a parameter's state, whether it has these or not."""
        needs: dict[str, tuple[int, ...]] = {}
        needs |= dict.fromkeys(("momentum_buffer", "gradient_momentum"), tuple(parameter.shape))
        if (layer := self._layer_with(parameter)) is not None:
            needs |= dict.fromkeys(self._input_statistics, (layer.num_inputs,))
            needs |= dict.fromkeys(self._output_statistics, (layer.num_units,))
        return needs

    def _layer_with(self, weight: Tensor) -> AffineLayer | None:
        return next((layer for layer in self._layers if layer.weight is weight), None)

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy or a pickle needs; the model goes with it, as the parameters do."""
        seen = [(layer.weight, layer.calls) for layer in self._layers]
        own = {name: getattr(self, name) for name in ("_model", "_ranks", "_error_if_nonfinite")}
        return {**super().__getstate__(), **own, "_seen": seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or (called by torch) what a checkpoint holds, and watch the layers anew."""
        seen = dict(state.get("_seen", ()))
        super().__setstate__({key: value for key, value in state.items() if key != "_seen"})
        if not hasattr(self, "_layers"):
            self._layers = []
        if hasattr(self, "_capture") and self._watched_rules == [group["rule"] for group in self.param_groups]:
            self._follow_groups()  # and a pass that is under way is not forgotten
        else:
            self._watch_layers()
        self._has_foreign_momentum = any("gradient_momentum" in values for values in self.state.values())
        for layer in self._layers:
            layer.calls = list(seen.get(layer.weight, layer.calls))
