"""The sum of what the parameters contribute to a Gram matrix, taken as their gradients come by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.factors import Factor, OuterFactor, RowFactor, inner_products, with_bias
from torchgeom_optim.geometry.layer_calls import LayerCall, ParameterUses
from torchgeom_optim.geometry.layers import plain_arithmetic
from torchgeom_optim.geometry.per_sample import Batch, parameter_portions, per_sample_gradients

__all__ = ["GramAccumulator", "GramResult", "layer_of"]

_MAX_POSTPONED = 16  # calls without positions: their tensors are small
_PORTION_BYTES = 2**27  # explicit per-sample gradients at a time, where there is no rule


@dataclass(frozen=True)
class GramResult:
    """Inner products of per-sample gradients; nothing is divided by N.

    Args:
        weights: of the gradients with respect to all trainable parameters, [N, N], units (loss / parameter)^2.
        inputs: of the gradients with respect to the inputs, [N, N], if they were asked for.
        parameters: name -> [N, N], which sum to ``weights``, if they were asked for.
        routes: name -> ``"rule"`` (factors of its layer), ``"vmap"`` or ``"loop"`` (per-sample gradients formed), or
            ``"unused"`` (the loss does not depend on it). Frozen parameters are not listed.
        statistics: ``"none"`` if no layer could normalize over the batch, ``"frozen"`` if each took its running
            statistics, ``"batch"`` if some took the batch's: gradients are then contributions to the batch gradient.
        layers: layer (:func:`layer_of` its parameters) -> [N, N], which sum to ``weights``, if they were asked for.
    """

    weights: Tensor
    inputs: Tensor | None
    parameters: dict[str, Tensor] | None
    routes: dict[str, str]
    statistics: str
    layers: dict[str, Tensor] | None = None


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: its name without the last part; a bare parameter is its own layer."""
    return parameter.rpartition(".")[0] or parameter


@dataclass
class GramAccumulator:
    """Sums what the parameters contribute to the matrix as their gradients come by.

    Args:
        per_parameter: keep one matrix per parameter too.
        per_layer: keep one matrix per layer too, for less.
        may_postpone: leave small calls for the end, all in one go, which is faster. Their inputs must stay till then.
        uses: must be set before the backward pass.
    """

    per_parameter: bool = False
    may_postpone: bool = False
    uses: ParameterUses | None = None
    per_layer: bool = False
    routes: dict[str, str] = field(default_factory=dict)
    _total: Tensor | None = None
    _parts: dict[str, Tensor] = field(default_factory=dict)
    _layers: dict[str, Tensor] = field(default_factory=dict)
    _collected: dict[str, list[Factor]] = field(default_factory=dict)
    _postponed: dict[LayerCall, Tensor] = field(default_factory=dict)
    _is_finished: bool = False

    def on_output_grad(self, call: LayerCall, output_grad: Tensor) -> None:
        """Take in one call of a layer."""
        if self.uses is None or self._is_finished or call.is_released or call in self._postponed:
            return
        if self.may_postpone and output_grad.dim() == 2 and len(self._postponed) < _MAX_POSTPONED:
            self._postponed[call] = output_grad
        else:
            self._take(call, output_grad, self.uses)

    def _take(self, call: LayerCall, output_grad: Tensor, uses: ParameterUses) -> None:
        calls = uses.calls
        names = [own for own, name in call.parameters.items() if name in calls]
        factors = dict(call.factors(output_grad.unsqueeze(1), names))
        weight, bias = factors.get("weight"), factors.get("bias")
        if (
            isinstance(weight, OuterFactor)
            and isinstance(bias, RowFactor)
            and weight.num_positions == 1
            and not self.per_parameter
            and (not self.per_layer or len({layer_of(call.parameters[own]) for own in ("weight", "bias")}) == 1)
            and all(len(calls[call.parameters[own]]) == 1 for own in ("weight", "bias"))
        ):
            # One product of the output gradients serves both.
            with plain_arithmetic(weight.device_type):
                self._add_share(call.parameters["weight"], with_bias(weight), "rule")
            self.routes[call.parameters["bias"]] = "rule"
            factors = {}
        for own, factor in factors.items():
            name = call.parameters[own]
            collected = self._collected.setdefault(name, [])
            collected.append(factor)
            if len(collected) == len(calls[name]):
                self._add(name, self._collected.pop(name), "rule")
        call.release()

    def finish(self, scale: float = 1.0) -> None:
        """Take no more calls, those that no gradient came to adding nothing; take every gradient times ``scale``."""
        self._is_finished = True
        if self.uses is not None:
            with torch.no_grad():
                for call, output_grad in self._postponed.items():
                    self._take(call, output_grad, self.uses)
        self._postponed.clear()
        for name, factors in self._collected.items():
            self._add(name, factors, "rule")
        self._collected.clear()
        if self._total is not None and scale != 1.0:
            self._total *= scale**2
            for share in (*self._parts.values(), *self._layers.values()):
                share *= scale**2

    def add_rows(self, gradients: Mapping[str, Tensor], route: str) -> None:
        """Take in explicit gradients, name -> [N, *shape]."""
        for name, rows in gradients.items():
            rows = rows.detach().reshape(len(rows), 1, -1)
            self._add(name, [RowFactor(rows.to(torch.promote_types(rows.dtype, torch.float32)))], route)

    def add_formed(
        self,
        model: nn.Module,
        names: frozenset[str],
        loss_fn: Callable[..., Tensor],
        batch: Batch,
        losses: Tensor | None = None,
    ) -> None:
        """Form the gradients of some parameters and take them in.

        Args:
            model: the module.
            names: the parameters.
            loss_fn: as for :func:`per_sample_gram`.
            batch: N samples.
            losses: the samples' losses in the batch, or their sum, to be compared with those of the samples alone.

        Raises:
            ValueError: the losses differ.
        """
        named = dict(model.named_parameters())
        bytes_each = {
            name: batch.num_samples * p.numel() * max(p.element_size(), 4) for name, p in named.items() if name in names
        }
        alone = torch.empty(0)
        for portion in parameter_portions(bytes_each, _PORTION_BYTES):
            gradients, alone, route = per_sample_gradients(model, portion, loss_fn, batch)
            self.add_rows(gradients, route)
        if losses is None or not names:
            return
        if losses.dim() == 0:
            alone = alone.sum()
        losses = losses.reshape(*alone.shape, -1).sum(-1)
        error = (losses - alone).abs().max()
        scale = alone.abs().max() + 1
        allowed = min(1000 * torch.finfo(losses.dtype).eps, 0.05)
        if not error <= allowed * scale:
            raise ValueError(
                f"the batch's losses differ from those of its samples alone by {error:.3g}, and {sorted(names)} have "
                f"no layer rule: their gradients are taken sample by sample; return unreduced losses where there are "
                f"class weights or ignored targets, and set layers that couple samples to evaluation mode."
            )

    def result(
        self,
        num_samples: int,
        reference: Tensor,
        names: Iterable[str],
        uses: ParameterUses,
        statistics: str,
        input_grads: list[Tensor] | None = None,
    ) -> GramResult:
        """All of it, by the trainable parameters' ``names``; an empty sum has the device and dtype of ``reference``."""
        routes = {name: "unused" if name in uses.unused else self.routes.get(name, "rule") for name in names}
        if self._total is not None and input_grads is None and not (self.per_parameter or self.per_layer):
            return GramResult(self._total, None, None, routes, statistics)
        wide = torch.promote_types(reference.dtype if reference.is_floating_point() else torch.float32, torch.float32)
        zero = torch.zeros(num_samples, num_samples, dtype=wide, device=reference.device)
        of_inputs: Tensor | None = None
        if input_grads is not None:
            rows = [g.detach().to(torch.promote_types(g.dtype, torch.float32)).flatten(1) for g in input_grads]
            of_inputs = sum((r @ r.T for r in rows), zero)
        total = zero if self._total is None else self._total
        parts = None
        if self.per_parameter:
            parts = {name: self._parts.get(name, zero) for name in routes}
        layers = None
        if self.per_layer:
            layers = {layer: self._layers.get(layer, zero) for layer in map(layer_of, routes)}
        return GramResult(total, of_inputs, parts, routes, statistics, layers)

    def _add(self, name: str, factors: list[Factor], route: str) -> None:
        with plain_arithmetic(factors[0].device_type):
            self._add_share(name, inner_products(factors), route)

    def _add_share(self, name: str, share: Tensor, route: str) -> None:
        share = share[:, 0, :, 0]
        if self.per_parameter:
            self._parts[name] = share.clone()
        if self.per_layer:
            layer = layer_of(name)
            own = self._layers.get(layer)
            self._layers[layer] = share.clone() if own is None else own.add_(share.to(own.device))
        self._total = share if self._total is None else self._total.add_(share.to(self._total.device))
        self.routes[name] = route
