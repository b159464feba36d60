"""WhiteningSGD: stochastic gradient descent on weights whose inputs look centred and of unit variance."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.moments import Moments, running_moments
from torchgeom_optim.geometry.reparametrization import guarded_second_moment, precision
from torchgeom_optim.geometry.segments import Segments, constants
from torchgeom_optim.optimizers.batch_norm import FoldedBatchNorm, fold_batch_norm
from torchgeom_optim.optimizers.chain_length import ChainLength
from torchgeom_optim.optimizers.hyperparameters import check_choice, check_range, check_sgd_settings
from torchgeom_optim.optimizers.layers import AffineLayer
from torchgeom_optim.optimizers.layerwise import LayerwiseOptimizer
from torchgeom_optim.optimizers.trust_region_rule import TrustRegionRule, can_be_scaled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Rule", "WhiteningSGD"]

Rule = Literal["trust_region", "whitening", "paper", "whitening_second_order", "fan_in", "sgd"]
_WHITENED = ("trust_region", "whitening", "paper", "whitening_second_order")
_LR = 0.1  # of rules that need one


class WhiteningSGD(LayerwiseOptimizer):
    r"""SGD in coordinates in which every layer's inputs are centred and have unit variance.

    A layer y_j = w_0j + sum_i x_i w_ij is stepped as if it were y_j = beta_j (v_0j + sum_i alpha_i (x_i - mu_i) v_ij).
    In the place of the gradients W (weight) and b (bias), :class:`torch.optim.SGD` is given

        dW[j,i] = beta_j^2 alpha_i^2 (W[j,i] - mu_i b[j]),    db[j] = beta_j^2 b[j] - sum_i mu_i dW[j,i]

    so that momentum, dampening, Nesterov, weight decay and ``maximize`` do what they do in SGD on v (weight decay too:
    decaying v by a factor is decaying w by it). mu_i and 1/alpha_i^2 are running mean and variance of the inputs.

    By default no unit may move further than a share rho of its own spread in one step, growth that is taken back (see
    below) apart; no rescaling of units or inputs affects that (:mod:`torchgeom_optim.geometry.unit_trust`). Then no
    learning rate is needed:

        sigma_j^2 = var[y_j],   r_j^2 = E[(dW_j . x + db_j)^2] on a few samples,   t_j = sigma_j r_j
        step = lr c_j (dW_j, db_j),     c_j = sigma_j^2 / (L sqrt(max(t_j^2, E[t_j^2])))        lr is rho, 1 at first
        or, where lr is given,          c_j = min(1, kappa sigma_j^2 / ...) with kappa = rho / (lr at the start)

    with beta_j = 1, as the bound does what Eq. (12) is for: from lr = 0.1 on it hardly matters which lr it is.
    L shares the radius among moves that add up, as autograd's graph shows them: twice the number of layers in a row, or
    1.5 times the root of the number of layers where there are skip connections, 4 at least; times the number of factors
    where outputs of layers are multiplied (3 for queries, keys and values), see
    :class:`~torchgeom_optim.optimizers.chain_length.ChainLength`. From one step to the next sigma_j is taken for 16
    times as large at most, lest a single sample set the step. Units turn more than they grow: half of the spread that
    steps of noise add is taken back with the step, as a decay of the unit about its mean by theta_j^2 / 4 for a move by
    theta_j sigma_j (:func:`~torchgeom_optim.geometry.unit_trust.turned_back`; not of embeddings). Any scheduler of lr
    moves the bound with it, a warm-up too; let lr decay to 0 over the run. Momentum m and Nesterov's lie inside the
    bound and make it sqrt((1 - m) / (1 + m)) times as large, so that steps of noise lead as far as without; none is
    needed. Weight decay lies outside.
    Channels of normalisations (a tenth of rho) and other parameters (as a whole) move by a share of their own size.

    Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", Eqs. (3), (5), (11), (12),
    App. B, E. What we changed: the bound, a layer's change being *measured*, since the formula that takes inputs for
    uncorrelated is too small by up to nine times; alpha_i^2 is bounded by the present batch too (drift guard) and
    floored by ``damping``, see :mod:`torchgeom_optim.geometry.reparametrization`; without a trainable bias mu = 0 and
    alpha_i^2 = 1/E[x_i^2]; several calls of a layer in one step are pooled; of large inputs every k-th position is
    looked at. Why: the paper's rule diverges where its statistics are wrong by orders of magnitude (§4.4), as after a
    ReLU unit's incoming weights were multiplied and its outgoing ones divided by a number.

    Four ways in: ``WhiteningSGD(model)``, without a learning rate; ``WhiteningSGD(model, lr)``;
    ``WhiteningSGD(groups, lr, model=model)`` with whatever parameter groups a training script has;
    ``WhiteningSGD(params, lr)`` without a model, which is ``torch.optim.SGD`` exactly and warns unless ``rule="sgd"``.

    Rules (``rule``, also a key of a parameter group; the group of a layer's weight decides for the layer):

    ============================  =======================================================
    ``"trust_region"``            whitening inside the bound: the default
    ``"whitening"``               beta_j^2 = 1/sqrt(n s), Eq. (12), without the bound: the cheapest. Take lr 0.3, with
                                  momentum 0.03; the next half-decade can diverge
    ``"paper"``                   the same without drift guard; "in a suitable range" (§2.3) is what ``damping`` says
    ``"whitening_second_order"``  beta_j^2 = 1/(s E[g_j^2]), Eq. (5) and App. B: less robust (§4)
    ``"fan_in"``                  beta_j^2 = 1/sqrt(n s) and no whitening (§3.5, Fig. 2 left)
    ``"sgd"``                     plain SGD
    ============================  =======================================================

    n is the fan-in (convolution: channels of a group times kernel positions), s the number of positions at which a
    convolution applies its kernel, 1 for linear layers (positions of a sequence count as samples). Linear layers,
    convolutions (1d to 3d, groups) and embeddings are whitened; under other rules than the default everything else
    takes a plain SGD step. :meth:`report` says which parameter gets which.

    The bias of a layer belongs into a group with the learning rate of its weight: db moves the inputs' mean out of dW.

    Memory: two vectors of the length of a layer's input per layer (``"whitening_second_order"``: and one of its
    output, ``"trust_region"``: three), in float32 or better, in ``state`` beside the weight; until the step, copies of
    16 of a layer's inputs, or of 2 images, and until the backward pass one of its outputs (of an image's, some
    positions).

    A call of a layer counts if a backward pass reaches its output, whatever ``training`` says. With a
    ``GradScaler`` a skipped step leaves the statistics as they were; ``"whitening_second_order"`` has to be told its
    scale. Under ``torch.compile`` build the optimizer before the first call of the compiled model, so that it sees the
    layers; each one then ends a compiled graph.

    Several processes (DistributedDataParallel, ``fully_shard`` of FSDP2): the statistics are those of all processes'
    batches, averaged in one collective per step before anything else is done with them, so that the trajectory is that
    of one process with the whole batch. Of weights sharded by rows each process computes its own rows; a grouped
    convolution's gradient is brought together. Build the optimizer after ``fully_shard``. Where batches differ in size,
    let each process weigh its loss by its share of the samples times the number of processes.

    Args:
        params: a model, or parameters or groups of them as for any optimizer (named ones too).
        lr: learning rate, a number or a tensor of one element, in [0, inf); None for the trust region alone (0.1 for
            groups with another rule, or without a model).
        momentum: in [0, inf), below 1 for the trust region, which trains as well without.
        dampening: finite.
        weight_decay: in [0, inf), per unit of lr (which begins with ``trust_radius``, 1, if it is None), added after
            whitening. Of AdamW's or SGD's take lr * weight_decay.
        nesterov: as in SGD; needs momentum and zero dampening.
        model: the module that the parameters belong to; without it, everything takes a plain SGD step.
        rule: see above.
        trust_radius: rho, in [0, inf), for the rule of that name: by how much the network as a whole may move in one
            step, in units of its own spread. Where no lr is given, lr begins with it and counts from then on.
        chain_length: L, factors aside; None to find both in the first step, and after one with more layers than any
            before it. Give it where reentrant checkpointing hides layers.
        decay: weight of the past in the running statistics, in [0, 1); the paper's lambda of §2.3.
        damping: floor of the variances (and of E[g^2]) as a share of their mean over the layer, in [0, inf); None takes
            0.001 inside the bound and 0.01 without, where less would let the next half-decade of lr diverge sooner.
        loss_reduction: "mean" or "sum": how the loss treats samples; used by ``"whitening_second_order"`` alone.
        loss_scale: a number, or a function such as ``scaler.get_scale``, by which the loss was multiplied; same use.
        maximize: ascend.
        foreach: as in SGD.
        process_group: the processes that train the model together; None takes those of DistributedDataParallel or
            ``fully_shard`` if the model is in one, else the default group.
        error_if_nonfinite: whether a step refuses gradients that are NaN or infinite, which waits for the device; None
            does so on the CPU. Else they end in weights and statistics, as in torch.optim; a GradScaler skips them.

    Raises:
        ValueError: a hyper-parameter out of its range, or parameters that the model does not own.
        TypeError: a value of the wrong type.
        RuntimeError: at :meth:`step`, when no pass with gradients went through a layer that has a gradient, or when one
            of several processes is lost; nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = WhiteningSGD(model)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [row.rule for row in optimizer.report()]
        ['trust_region', 'trust_region', 'trust_region', 'trust_region']
    """

    _input_statistics = ("input_mean", "input_variance")
    _output_statistics = ("output_grad_sq", "spread_sq", "output_mean")
    _statistics = (*_input_statistics, *_output_statistics, "sharing", "slope_sq", "change_sq", "trusted_sq")
    _num_bounded = 0  # the most layers of a step so far
    _found: tuple[dict[str, Any], ...] = ()  # groups whose chain's length was found, not given

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        model: nn.Module | None = None,
        rule: Rule = "trust_region",
        trust_radius: float = 1.0,
        decay: float = 0.95,
        damping: float | None = None,
        chain_length: int | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        loss_scale: float | Tensor | Callable[[], float | Tensor] = 1.0,
        maximize: bool = False,
        foreach: bool | None = None,
        process_group: ProcessGroup | None = None,
        error_if_nonfinite: bool | None = None,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: must be 'mean' or 'sum', as the loss treats samples.")
        if not callable(loss_scale) and not 0.0 < float(loss_scale) < math.inf:
            raise ValueError(
                f"loss_scale={loss_scale}: must be in (0, inf). Try scaler.get_scale, or 1 without a scaler."
            )
        self._loss_reduction = loss_reduction
        self._loss_scale = loss_scale
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "rule": rule,
            "trust_radius": trust_radius,
            "decay": decay,
            "damping": damping,
            "chain_length": chain_length,
        }
        super().__init__(params, defaults, model, process_group, error_if_nonfinite)

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_choice(group, "rule", (*_WHITENED, "fan_in", "sgd"), where)
        if group["lr"] is not None:
            check_range(group, "lr", where, hint="0.1 is a common start, 0.03 with momentum 0.9.")
        check_sgd_settings(group, where)
        if group["rule"] == "trust_region" and self._model is not None:  # whose bound it makes smaller
            check_range(group, "momentum", where, high=1.0, hint="0 is the default; none is needed.")
        check_range(group, "decay", where, high=1.0, hint="0.95 averages over about 20 steps.")
        if group["damping"] is not None:
            check_range(group, "damping", where, hint="None is the default; 0.01 is a common start.")
        check_range(group, "trust_radius", where, hint="1 is the default; 0.3 is careful.")
        if (length := group["chain_length"]) is not None and (type(length) is not int or length < 1):
            raise ValueError(f"chain_length={length!r} ({where}): need a whole number from 1, or None to find it.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in :class:`LayerwiseOptimizer`; a group without a learning rate goes by the trust radius, or by 0.1."""
        if isinstance(param_group, dict):  # else torch says what is wrong
            group = {**self.defaults, **param_group}
            self._check_group(group, f"group {len(self.param_groups)}")
            lr = group["lr"]
            by_radius = lr is None and group["rule"] == "trust_region" and self._model is not None
            if lr is None:
                lr = group["trust_radius"] if by_radius else _LR
            param_group = {"reference_lr": None if by_radius else _reference(lr), **param_group, "lr": lr}
        super().add_param_group(param_group)

    def _watch_layers(self) -> None:
        super()._watch_layers()
        self._chain: ChainLength = getattr(self, "_chain", None) or ChainLength()  # outlives a new look at the model
        self._bound = TrustRegionRule(self._model, self._chain)

    def _wants(self, rule: str) -> tuple[bool, bool]:
        return rule in _WHITENED, rule == "whitening_second_order"

    def _probes(self, layer: AffineLayer) -> bool:
        return bool(self._group_of[layer]["rule"] == "trust_region")

    def _wants_outputs(self, layer: AffineLayer) -> bool:
        return self._probes(layer)

    def _is_known(self, layer: AffineLayer) -> bool:
        rule, known = self._group_of[layer]["rule"], self.state.get(layer.weight, {})
        needs = {
            "input_mean": rule in _WHITENED,
            "sharing": rule != "trust_region",
            "output_grad_sq": rule == "whitening_second_order",
        }
        return all(key in known for key, is_needed in needs.items() if is_needed)

    def _on_call(self, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
        on_output_grad = super()._on_call(module, x, y)
        in_backward = torch._C._current_graph_task_id() != -1  # of a checkpointed segment, run for the second time
        if on_output_grad is not None and not in_backward:
            if any(group["chain_length"] is None and group["params"] for group in self._bounded_groups()):
                self._bound.chain.see(self._layer_of[module].weight, x, y)
        return on_output_grad

    def _bounded_groups(self) -> list[dict[str, Any]]:
        groups = self.param_groups if self._model is not None else ()
        return [group for group in groups if group["rule"] == "trust_region"]

    def _directions(self, layers: list[AffineLayer]) -> dict[int, Tensor]:
        directions: dict[int, Tensor] = {}
        beta_sq = {layer: self._output_scale(layer, self.state[layer.weight]) for layer in layers}
        scales, input_sq = self._update_input_statistics(layers, beta_sq)
        for layer in layers:
            weight, bias, output_scale = layer.weight, layer.bias, beta_sq[layer]
            scale, mean = scales.get(layer, 1.0 if isinstance(output_scale, Tensor) else output_scale), None
            if layer in scales and layer.is_centred:
                mean = self.state[weight]["input_mean"]
            if self._has_foreign_momentum:
                self._take_over_momentum(layer, mean, scale, output_scale)
            bias_grad = None if bias is None else bias.grad
            weight_step, bias_step = layer.reparametrize(weight.grad, bias_grad, mean, scale, output_scale)
            if weight_step is not None:
                directions[id(weight)] = weight_step
            if bias_step is not None:
                directions[id(bias)] = bias_step
            for free in layer.free_biases:
                if free.grad is not None:
                    directions[id(free)] = layer.scale_bias(free.grad, output_scale)
        if groups := self._bounded_groups():
            bounded = [layer for layer in layers if self._probes(layer)]
            unknown = [group for group in groups if group["chain_length"] is None]
            self._bound.scale(groups, bounded, directions, input_sq, self.state, self._group_of_parameter, self._ranks)
            if len(bounded) > self._num_bounded:  # more than lengths were found for, as after unfreezing: look anew
                self._num_bounded = len(bounded)
                for group in self._found:
                    group["chain_length"] = None
            known = set(map(id, self._found))
            self._found += tuple(g for g in unknown if g["chain_length"] is not None and id(g) not in known)
        if len(layers) == len(self._layers):  # else a layer that sat this step out still has its own
            self._has_foreign_momentum = False
        return directions

    def _update_input_statistics(
        self, layers: list[AffineLayer], beta_sq: Mapping[AffineLayer, float | Tensor]
    ) -> tuple[dict[AffineLayer, Tensor], dict[AffineLayer, Tensor]]:
        """Take this step into the running averages.

        Returns:
            Of whitened layers alpha^2 (times beta^2, if a number), and the mean over the inputs of 1 / alpha_i^2.
        """
        # The vectors of all layers are joined, so that the number of operations hardly grows with that of the layers.
        alike: dict[tuple[Any, ...], list[tuple[AffineLayer, Moments, Moments]]] = defaultdict(list)
        for layer in layers:
            group, state = self._group_of[layer], self.state[layer.weight]
            if group["rule"] not in _WHITENED:
                continue
            past = None
            if "input_mean" in state:
                past = Moments(0, state["input_mean"], state["input_variance"])
            batch = layer.batch_moments() if layer.calls else past  # or it sat this step out
            assert batch is not None  # else the step was refused
            if past is not None and past.mean.dtype != batch.mean.dtype:  # the model was put into another precision
                past = Moments(0, past.mean.to(batch.mean.dtype), past.variance.to(batch.mean.dtype))
            guarded = group["rule"] != "paper"
            key = (group["decay"], _damping(group), guarded, layer.is_centred, batch.mean.dtype, batch.mean.device)
            alike[key].append((layer, past or batch, batch))
        scales: dict[AffineLayer, Tensor] = {}
        input_sq: dict[AffineLayer, Tensor] = {}
        for (decay, damping, guarded, is_centred, dtype, device), rows in alike.items():
            joined, pasts, batches = zip(*rows, strict=True)
            sizes = tuple(layer.num_inputs for layer in joined)
            batch = _joined(batches)
            segments = Segments(sizes, batch.mean)
            running = running_moments(_joined(pasts), batch, decay)
            about = tuple(m if is_centred else m.about_zero() for m in (running, batch if guarded else running))
            q = guarded_second_moment(*about)
            means = segments.means(q)
            input_sq.update(zip(joined, means.unbind(), strict=True))
            scale = precision(q, segments.spread(means * damping))
            factors = tuple(1.0 if isinstance(beta_sq[layer], Tensor) else beta_sq[layer] for layer in joined)
            if any(factor != 1.0 for factor in factors):
                scale *= segments.spread(constants(factors, dtype, device))
            parts = (segments.split(vector) for vector in (running.mean, running.variance, scale))
            for layer, mean, variance, part in zip(joined, *parts, strict=True):
                state = self.state[layer.weight]
                state["input_mean"], state["input_variance"], scales[layer] = mean, variance, part
        return scales, input_sq

    def _descend(self, group: dict[str, Any], directions: Mapping[int, Tensor]) -> None:
        if group["rule"] != "trust_region" or self._model is None:
            super()._descend(group, directions)
            return
        # Momentum is in the scaled directions already.
        scaled = [p for p in group["params"] if can_be_scaled(p)]
        others = [p for p in group["params"] if p.grad is not None and not can_be_scaled(p)]
        super()._descend({**group, "params": scaled, "momentum": 0.0, "nesterov": False, "dampening": 0.0}, directions)
        if others:
            super()._descend({**group, "params": others}, directions)

    def _rule_without_layer(self, parameter: Tensor, group: Mapping[str, Any], reason: str) -> tuple[str, str]:
        if group["rule"] != "trust_region":
            return "sgd", reason
        if any(parameter is p for pair in self._bound.norms.items() for p in pair):
            return "trust_region", "normalisation: moves by a share of its own size"
        return "trust_region", f"{reason}: moves as a whole by a share of its own size"

    def _output_scale(self, layer: AffineLayer, state: dict[str, Any]) -> float | Tensor:
        """beta^2: 1 inside the trust region, else by Eq. (12) or Eq. (5)."""
        group = self._group_of[layer]
        if group["rule"] == "trust_region":
            return 1.0
        if layer.calls:
            state["sharing"] = layer.sharing()
        if group["rule"] != "whitening_second_order":
            return layer.fan_in_scale(state["sharing"])
        if layer.calls:
            scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
            now = layer.output_grad_sq(mean_reduction=self._loss_reduction == "mean") / scale**2
            state["output_grad_sq"] = torch.lerp(state.get("output_grad_sq", now), now, 1 - group["decay"])
        mean_sq = state["output_grad_sq"]
        beta_sq: Tensor = precision(mean_sq, mean_sq.mean() * _damping(group)) / state["sharing"]
        return beta_sq

    def _take_over_momentum(
        self, layer: AffineLayer, mean: Tensor | None, scale: Tensor | float, output_scale: float | Tensor
    ) -> None:
        """Put momentum of a run with torch.optim.SGD, which averages gradients, into our coordinates."""
        weight, bias = (None if p is None else self.state[p] for p in (layer.weight, layer.bias))
        before = [None if state is None else state.pop("gradient_momentum", None) for state in (weight, bias)]
        buffers = layer.reparametrize(before[0], before[1], mean, scale, output_scale)
        for state, buffer in zip((weight, bias), buffers, strict=True):
            if state is not None and buffer is not None:
                state["momentum_buffer"] = buffer
        for free in layer.free_biases:
            if (buffer := self.state[free].pop("gradient_momentum", None)) is not None:
                self.state[free]["momentum_buffer"] = layer.scale_bias(buffer, output_scale)

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Chains of checkpoints of the rule before this one were shorter, and of factors it knew none: look anew."""
        by_changes = {index for index, values in state_dict["state"].items() if "change_sq" in values}
        groups = [
            {key: value for key, value in group.items() if key != "chain_length"}
            if by_changes.intersection(group["params"])
            else group
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy or a pickle needs."""
        names = ("_loss_reduction", "_loss_scale", "_chain", "_num_bounded", "_found")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def fold_batch_norm(self, lr: float | Tensor | None = None, rule: Rule = "trust_region") -> list[FoldedBatchNorm]:
        """Switch from batch normalization and SGD to whitening (App. E): fold, then whiten from here on.

        Build the optimizer with ``rule="sgd"``, train the network with its batch normalization for an epoch, call
        this. The parameters of the normalizations leave the groups, biases that were created join the group of
        their layer's weight, and momentum of the changed layers is dropped, as it belongs to other coordinates.

        Args:
            lr: learning rate of every group from now on; None keeps each group's. A scheduler that was built before
                goes on from the learning rate that it remembers.
            rule: that every group gets.

        Returns:
            What was folded, see :func:`~torchgeom_optim.optimizers.batch_norm.fold_batch_norm`.

        Raises:
            RuntimeError: the optimizer was built without a model.
        """
        if self._model is None:
            raise RuntimeError(
                "got an optimizer without a model; need WhiteningSGD(model, ...) to fold its batch norm."
            )
        new = {"rule": rule} if lr is None else {"rule": rule, "lr": lr}
        for index, group in enumerate(self.param_groups):
            self._check_group({**group, **new}, f"group {index}")
        folded = fold_batch_norm(self._model)
        gone = {p for f in folded for p in f.norm.parameters()}
        changed = {p for f in folded for p in f.layer.parameters()} | gone
        for p in changed:
            self.state.pop(p, None)
        for group in self.param_groups:
            keep = [k for k, p in enumerate(group["params"]) if p not in gone]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][k] for k in keep]
            group.update(new)
            if lr is not None:
                group.update(lr=lr.clone() if isinstance(lr, Tensor) else lr, reference_lr=_reference(lr))
        for f in folded:
            of_weight = self._group_of_parameter.get(f.layer._parameters["weight"])
            if f.created_bias and of_weight is not None:
                of_weight["params"].append(f.layer._parameters["bias"])
                if "param_names" in of_weight:
                    of_weight["param_names"].append(f"{f.layer_name}.bias")
        self._watch_layers()
        return folded


def _reference(lr: float | Tensor) -> float | Tensor | None:
    """The learning rate at the start, in a memory of its own; 0 is no scale to go by."""
    if float(lr) == 0.0:
        return None
    return lr.clone() if isinstance(lr, Tensor) else lr


def _damping(group: Mapping[str, Any]) -> float | Tensor:
    given: float | Tensor | None = group["damping"]
    if given is not None:
        return given
    return 0.001 if group["rule"] == "trust_region" else 0.01


def _joined(parts: Sequence[Moments]) -> Moments:
    return Moments(0, torch.cat([part.mean for part in parts]), torch.cat([part.variance for part in parts]))
