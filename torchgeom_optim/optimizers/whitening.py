"""WhiteningSGD: stochastic gradient descent on weights whose inputs look centred and of unit variance."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.moments import Moments, running_moments
from torchgeom_optim.geometry.reparametrization import fan_in_scale, guarded_second_moment, precision
from torchgeom_optim.optimizers.batch_norm import FoldedBatchNorm, fold_batch_norm
from torchgeom_optim.optimizers.hyperparameters import check_choice, check_flags, check_range
from torchgeom_optim.optimizers.layers import AffineLayer
from torchgeom_optim.optimizers.layerwise import LayerwiseOptimizer

__all__ = ["Rule", "WhiteningSGD"]

Rule = Literal["whitening", "whitening_second_order", "fan_in", "sgd"]
_WHITENED = ("whitening", "whitening_second_order")


class WhiteningSGD(LayerwiseOptimizer):
    r"""SGD in coordinates in which every layer's inputs are centred and have unit variance.

    A layer y_j = w_0j + sum_i x_i w_ij is stepped as if it were y_j = beta_j (v_0j + sum_i alpha_i (x_i - mu_i) v_ij).
    In the place of the gradients W (weight) and b (bias), :class:`torch.optim.SGD` is given

        dW[j,i] = beta_j^2 alpha_i^2 (W[j,i] - mu_i b[j]),    db[j] = beta_j^2 b[j] - sum_i mu_i dW[j,i]

    so that momentum, dampening, Nesterov, weight decay and ``maximize`` do what they do in SGD on v (weight decay too:
    decaying v by a factor is decaying w by it). mu_i and 1/alpha_i^2 are running mean and variance of the inputs.

    Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", Eqs. (3), (5), (12), App. B and E.
    What we changed: alpha_i^2 is bounded by the present batch too (drift guard) and floored by ``damping``, see
    :func:`~torchgeom_optim.geometry.reparametrization.input_precision`; without a trainable bias mu = 0 and
    alpha_i^2 = 1/E[x_i^2]; sums over the samples of several calls are pooled.

    Learning rate: {LEARNING_RATE}

    Three ways in: ``WhiteningSGD(model, lr)``; ``WhiteningSGD(groups, lr, model=model)`` with whatever parameter groups a
    training script has; ``WhiteningSGD(params, lr)`` without a model, which is ``torch.optim.SGD`` exactly.

    Rules (``rule``, also a key of a parameter group; the group of a layer's weight decides for the layer):

    ============================  =======================================================
    ``"whitening"``               beta_j^2 = 1/sqrt(n s), Eq. (12): the default
    ``"whitening_second_order"``  beta_j^2 = 1/(s E[g_j^2]), Eq. (5) and App. B: less robust (§4)
    ``"fan_in"``                  beta_j^2 = 1/sqrt(n s) and no whitening (§3.5, Fig. 2 left)
    ``"sgd"``                     plain SGD
    ============================  =======================================================

    n is the fan-in (convolution: channels of a group times kernel positions), s the number of positions at which a
    convolution applies its kernel, 1 for linear layers (positions of a sequence count as samples). Linear layers,
    convolutions (1d to 3d, groups) and embeddings have a rule; everything else takes a plain SGD step. :meth:`report` says which.

    Memory: two vectors of the length of a layer's input per layer (``"whitening_second_order"``: and one of its output),
    in float32 or better, in ``state`` beside the weight.

    A call of a layer counts if a backward pass reaches its output, whatever ``training`` says. With a
    ``GradScaler`` a skipped step leaves the statistics as they were. Under ``torch.compile`` build the optimizer before
    the first call of the compiled model, so that its hooks are compiled in.

    Args:
        params: a model, or parameters or groups of them as for any optimizer (named ones too).
        lr: learning rate, a number or a tensor of one element, in [0, inf).
        momentum: in [0, inf).
        dampening: finite.
        weight_decay: in [0, inf), per unit of lr, added after whitening.
        nesterov: as in SGD; needs momentum and zero dampening.
        model: the module that the parameters belong to; without it, everything takes a plain SGD step.
        rule: see above.
        decay: weight of the past in the running statistics, in [0, 1); the paper's lambda of §2.3.
        damping: floor of the variances (and of E[g^2]) as a share of their mean over the layer, in [0, inf).
        loss_reduction: "mean" or "sum": how the loss treats samples; used by ``"whitening_second_order"`` alone.
        loss_scale: a number, or a function such as ``scaler.get_scale``, by which the loss was multiplied; same use.
        maximize: ascend.
        foreach: as in SGD.

    Raises:
        ValueError: a hyper-parameter out of its range, or parameters that the model does not own.
        TypeError: a value of the wrong type.
        RuntimeError: at :meth:`step`, when no pass with gradients went through a layer that has a gradient.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = WhiteningSGD(model, lr=0.3, momentum=0.9)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [row.rule for row in optimizer.report()]
        ['whitening', 'whitening', 'whitening', 'whitening']
    """

    _input_statistics = ("input_mean", "input_variance")
    _statistics = (*_input_statistics, "output_grad_sq")

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        model: nn.Module | None = None,
        rule: Rule = "whitening",
        decay: float = 0.95,
        damping: float = 0.01,
        loss_reduction: Literal["mean", "sum"] = "mean",
        loss_scale: float | Tensor | Callable[[], float | Tensor] = 1.0,
        maximize: bool = False,
        foreach: bool | None = None,
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
            "decay": decay,
            "damping": damping,
        }
        super().__init__(params, defaults, model)

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_range(group, "lr", where, hint="0.1 is a common start, with whitening as well.")
        check_range(group, "momentum", where, hint="0.9 is common, 0 switches it off.")
        check_range(group, "dampening", where, low=-math.inf, hint="0 is the default.")
        check_range(group, "weight_decay", where, hint="0 switches it off.")
        check_range(group, "decay", where, high=1.0, hint="0.95 averages over about 20 steps.")
        check_range(group, "damping", where, hint="0.01 is the default.")
        check_flags(group, ("nesterov", "maximize"), where)
        check_choice(group, "rule", (*_WHITENED, "fan_in", "sgd"), where)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']}, dampening={group['dampening']} ({where}): "
                "needs a momentum and zero dampening. Try momentum=0.9, dampening=0."
            )

    def _wants(self, rule: str) -> tuple[bool, bool]:
        return rule in _WHITENED, rule == "whitening_second_order"

    def _directions(self, layers: list[AffineLayer]) -> dict[Tensor, Tensor]:
        directions: dict[Tensor, Tensor] = {}
        second_moments = self._update_input_statistics(layers)
        for layer in layers:
            group, state = self._group_of[layer], self.state[layer.weight]
            mean = alpha_sq = None
            if layer in second_moments:
                alpha_sq = precision(second_moments[layer], group["damping"])
                mean = state["input_mean"] if _is_centred(layer) else None
            beta_sq = self._output_scale(layer, group)
            pair = (layer.weight, layer.bias)
            # Momentum of a run with torch.optim.SGD averages gradients; from the first step on it is in our coordinates.
            before = [None if p is None else self.state[p].pop("gradient_momentum", None) for p in pair]
            for p, buffer in zip(pair, layer.reparametrize(*before, mean, alpha_sq, beta_sq), strict=True):
                if p is not None and buffer is not None:
                    self.state[p]["momentum_buffer"] = buffer
            grads = [None if p is None else p.grad for p in pair]
            for p, step in zip(pair, layer.reparametrize(*grads, mean, alpha_sq, beta_sq), strict=True):
                if p is not None and step is not None:
                    directions[p] = step
            for bias in layer.free_biases:
                if bias.grad is not None:
                    directions[bias] = (bias.grad * beta_sq).to(bias.dtype)
        return directions

    def _update_input_statistics(self, layers: list[AffineLayer]) -> dict[AffineLayer, Tensor]:
        """Take this step into the running averages; returns each layer's guarded second moments q.

        The vectors of all layers are joined, so that the number of operations does not grow with that of the layers.
        """
        alike: dict[tuple[Any, ...], list[tuple[AffineLayer, Moments, Moments]]] = defaultdict(list)
        for layer in layers:
            group, state = self._group_of[layer], self.state[layer.weight]
            if group["rule"] not in _WHITENED:
                continue
            centred = _is_centred(layer)
            past = None
            if "input_mean" in state:
                past = Moments(0, state["input_mean"], state["input_variance"])
                past = past if centred else past.about_zero()
            batch = layer.batch_moments(centred=centred) if layer.calls else past  # or it sat this step out
            assert batch is not None  # the step was refused
            key = (group["decay"], batch.mean.dtype, batch.mean.device)
            alike[key].append((layer, batch if past is None else past, batch))
        second_moments: dict[AffineLayer, Tensor] = {}
        for (decay, *_), rows in alike.items():
            past, batch = (
                Moments(0, torch.cat([row[k].mean for row in rows]), torch.cat([row[k].variance for row in rows]))
                for k in (1, 2)
            )
            running = running_moments(past, batch, decay)
            q = guarded_second_moment(running, batch)
            sizes = [layer.num_inputs for layer, *_ in rows]
            for (layer, *_), *vectors in zip(
                rows, running.mean.split(sizes), running.variance.split(sizes), q.split(sizes), strict=True
            ):
                state = self.state[layer.weight]
                state["input_mean"], state["input_variance"], second_moments[layer] = vectors
        return second_moments

    def _output_scale(self, layer: AffineLayer, group: dict[str, Any]) -> float | Tensor:
        """beta^2, by Eq. (12) or Eq. (5)."""
        state = self.state[layer.weight]
        if layer.calls:
            state["sharing"] = layer.sharing()
        if group["rule"] != "whitening_second_order":
            return fan_in_scale(layer.fan_in, state["sharing"])
        if layer.calls:
            scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
            now = layer.output_grad_sq(mean_reduction=self._loss_reduction == "mean") / scale**2
            past = state.get("output_grad_sq", now)
            state["output_grad_sq"] = torch.lerp(past, now, 1 - group["decay"])
        return precision(state["output_grad_sq"], group["damping"]) / state["sharing"]

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy or a pickle needs."""
        return {**super().__getstate__(), "_loss_reduction": self._loss_reduction, "_loss_scale": self._loss_scale}

    def fold_batch_norm(self, lr: float | Tensor | None = None, rule: Rule = "whitening") -> list[FoldedBatchNorm]:
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
        for f in folded:
            if f.created_bias:
                group = self._group_of_parameter[f.layer._parameters["weight"]]
                group["params"].append(f.layer._parameters["bias"])
                if "param_names" in group:
                    group["param_names"].append(f"{f.layer_name}.bias")
        self._watch_layers()
        return folded


def _is_centred(layer: AffineLayer) -> bool:
    """Whether there is a bias to move the inputs' mean into."""
    return layer.bias is not None and layer.bias.grad is not None and layer.weight.grad is not None
