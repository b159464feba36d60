"""BlockNaturalGradient: steps whose length, in a metric of one's choice, is the same for every block of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.capture import activations_are_not_kept
from torchgeom_optim.geometry.metric import BLOCKS, Block, BlockValues, block_sums, scale_blocks
from torchgeom_optim.geometry.trust_region import inverse_lengths, network_sum
from torchgeom_optim.optimizers.block_metrics import Part, Solved, solved
from torchgeom_optim.optimizers.hyperparameters import check_choice, check_range, check_sgd_settings
from torchgeom_optim.optimizers.layer_factors import (
    CapturedProduct,
    FactorCall,
    FactorKind,
    PassCounter,
    SeenFactors,
    factors_with_counts,
    pooled_factors,
    with_factors,
)
from torchgeom_optim.optimizers.layers import AffineLayer, SeenCall
from torchgeom_optim.optimizers.layerwise import LayerwiseOptimizer
from torchgeom_optim.optimizers.metric_grid import (
    FINEST_BLOCK,
    FROM_GRADIENTS,
    WITH_MATRICES,
    Metric,
    check_combination,
    kind_of_factors,
)
from torchgeom_optim.optimizers.named_members import NamedMembers
from torchgeom_optim.optimizers.pooled_calls import Quantity
from torchgeom_optim.optimizers.report import RuleReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BlockNaturalGradient", "Interval"]

Interval = int | Callable[[int], int]


class BlockNaturalGradient(NamedMembers, LayerwiseOptimizer):
    r"""Natural gradient whose step has a given length in the metric, in every block of parameters.

        delta w_b = -lr G_b^-1 g_b / sqrt(eps + E[g_b^T G_b^-1 g_b])

    for every block b, with g the gradient in ``p.grad`` and E a running average over steps (``norm_decay``; with
    ``norm_decay=0`` it is this step's value alone, and every block moves by exactly lr in its metric).
    The metric G and the blocks are chosen independently:

    ========================  =======================================================  ================
    ``metric``                G                                                        finest ``block``
    ========================  =======================================================  ================
    ``"identity"``            1                                                        ``"weight"``
    ``"diagonal"``            running average of squared mini-batch gradients          ``"weight"``
    ``"quasi_diagonal"``      the same, and of their products with the bias gradient   ``"unit"``
    ``"whitening"``           mean and variance of the inputs, see WhiteningSGD        ``"unit"``
    ``"kronecker"``           A (x) B, second moments of inputs and output gradients   ``"layer"``
    ``"kronecker_diagonal"``  the same, of B its diagonal                              ``"unit"``
    ``"exact"``               the layer's whole empirical Fisher matrix                ``"layer"``
    ========================  =======================================================  ================

    ``block``: ``"weight"`` (each number), ``"unit"`` (a row of the weight and its bias), ``"layer"`` or ``"network"``.
    Blocks that are finer than G's own are refused, since then g^T G^-1 g of a block would be no length; but
    ``metric="kronecker"`` with ``block="unit"`` is taken for ``"kronecker_diagonal"``. Known members of the family
    have constructors of their own: :meth:`rmsprop`, :meth:`normalized_sgd`, :meth:`fan_in`, :meth:`trpo`, :meth:`kfac`.

    Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", Eq. (9) (one block), Eq. (10)
    (``norm_decay=0``), Eq. (11), §3.4, §3.5. g is the mini-batch's gradient, in E as well; the paper bounds it by the
    per-sample one's. Changed: its mu is called eps; where a block never had a gradient the step is 0, not 0 / 0.

    Statistics: each running average is initialised by its first batch, so that nothing pulls it towards 0;
    ``norm_start="zero"`` lets E start at zero instead, as RMSProp does. G includes the present batch. Factors and
    exact matrices come from the output gradients of the user's own loss (empirical Fisher, samples' gradients: the
    division by N of a mean loss and ``loss_scale`` are undone); of many patches of a convolution every k-th is used.

    Damping: a share of the layer's own mean, so that units do not matter. "diagonal": G + damping mean(G).
    "quasi_diagonal": of each unit's diagonal. "whitening": of the inputs' variances, together with WhiteningSGD's drift
    guard. Kronecker: the pi-split of Martens and Grosse 2015, §6.3, of damping * mean(diag A) mean(diag B). "exact":
    of its mean diagonal. A matrix that is not positive definite even so is an error, before anything has changed. Where
    G is zero to rounding (dead units, a loss that is met) diagonal metrics take no step, matrices are taken for 1.
    Metrics made of gradients measure in units of the loss: as gradients vanish, a step of given length grows in the
    weights, so let lr decay.

    Without a layer of their own (norm layers, bare parameters, attention's packed projection, everything if no model is
    given) parameters take the metric "identity" ("diagonal" if that is asked for), each one as a layer of its own.
    Sparse gradients are left as SGD takes them. :meth:`report` says which parameter gets what.

    Several processes (DistributedDataParallel, ``fully_shard`` of FSDP2): what layers have seen is averaged over all of
    them, in one collective per step before anything else is done with it; the trajectory is that of one process with
    the whole batch. Sharded gradients are brought together, and every process computes all directions and keeps its
    part: statistics are not sharded, momentum is. Build the optimizer after ``fully_shard``. Where batches differ in
    size, let each process weigh its loss by its share of the samples times the number of processes.

    Memory beside momentum: one number per block for E; "diagonal" one per weight, "quasi_diagonal" two; "whitening" two
    vectors per layer; Kronecker 2 (q^2 + m^2) per layer with q inputs of a patch; "exact" 2 (m q)^2.

    Args:
        params: a model, or parameters or groups of them; groups may set everything from lr to maximize, and
            ``rule="sgd"`` for plain SGD.
        lr: eta, the length of the step in the metric, a number or a tensor of one element, in [0, inf). In short trials
            0.03 suited whitening and Kronecker by layers (0.1 a network, 0.003 units), 1e-4 "diagonal", 1e-3 RMSProp.
        metric: see above; the same for all groups.
        block: see above; likewise.
        model: the module that the parameters belong to.
        eps: added to E, in its units, in [0, inf).
        norm_decay: weight of the past in E, in [0, 1). "auto" is 0 for Kronecker and exact metrics, as an average over
            values in the metrics of before misleads when inverses are taken anew, and 0.95 for the others.
        norm_start: "first" or "zero".
        expectation: "average", or "fan_in": with E = sqrt(n s)^2 in its place, as §3.5 finds it for inputs and output
            gradients of unit size (n weights per unit, applied at s positions); blocks must be units then, and
            parameters without a layer take a plain gradient step.
        decay: weight of the past in the averages that make G, in [0, 1).
        damping: see above, in [0, inf); "auto" is 1 for Kronecker and exact metrics, of which training with 0.01
            diverged in trials, and 0.01 for the others.
        factor_interval: Kronecker and exact: on every how many steps a batch is looked at; a number, or a function of
            the step that returns one.
        inverse_interval: likewise, how often their inverses are taken anew.
        momentum: of the directions, in [0, inf).
        dampening: as in SGD.
        nesterov: as in SGD.
        weight_decay: decoupled: weights shrink by lr * weight_decay before each step; in [0, inf).
        loss_reduction: "mean" or "sum": how the loss treats samples; used by Kronecker and exact metrics.
        loss_scale: a number, or a function such as ``scaler.get_scale``, by which the loss was multiplied; same use.
        maximize: ascend.
        foreach: as in SGD.
        process_group: the processes that train the model together; None takes those of DistributedDataParallel or
            ``fully_shard`` if the model is in one, else the default group.

    Raises:
        ValueError: a hyper-parameter out of its range, a metric that couples the wanted blocks, or parameters that
            the model does not own.
        TypeError: a value of the wrong type.
        RuntimeError: at :meth:`step`, when a layer's inputs are needed and no pass with gradients went through it.
        NotPositiveDefiniteError: at :meth:`step`; nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = BlockNaturalGradient(model, lr=0.05, metric="kronecker", block="layer")
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [row.rule for row in optimizer.report()]
        ['kronecker', 'kronecker', 'kronecker', 'kronecker']
    """

    _input_statistics = ("input_mean", "input_variance")
    _statistics = (
        *_input_statistics,
        "norm_sq",
        "grad_sq",
        "bias_row",
        "input_factor",
        "output_factor",
        "input_inverse",
        "output_inverse",
        "fisher",
        "fisher_cholesky",
        "sample_sq",
        "sample_row",
        "sample_bias_sq",
        "dimension",
        "sharing",
    )
    _settings = (
        "metric",
        "block",
        "_norm_start",
        "_expectation",
        "_factor_interval",
        "_inverse_interval",
        "_loss_reduction",
        "_loss_scale",
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.03,
        metric: Metric = "kronecker",
        block: Block | Literal["network"] = "layer",
        *,
        model: nn.Module | None = None,
        eps: float = 1e-16,
        norm_decay: float | Literal["auto"] = "auto",
        norm_start: Literal["first", "zero"] = "first",
        expectation: Literal["average", "per_sample", "fan_in"] = "average",
        decay: float = 0.95,
        damping: float | Literal["auto"] = "auto",
        factor_interval: Interval = 1,
        inverse_interval: Interval = 10,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        loss_reduction: Literal["mean", "sum"] = "mean",
        loss_scale: float | Tensor | Callable[[], float | Tensor] = 1.0,
        maximize: bool = False,
        foreach: bool | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        once = {
            "metric": metric,
            "block": block,
            "norm_start": norm_start,
            "expectation": expectation,
            "loss_reduction": loss_reduction,
        }
        check_choice(once, "metric", tuple(FINEST_BLOCK), "for all groups")
        check_choice(once, "block", (*BLOCKS, "network"), "for all groups")
        check_choice(once, "norm_start", ("first", "zero"), "for all groups")
        check_choice(once, "expectation", ("average", "per_sample", "fan_in"), "for all groups")
        check_choice(once, "loss_reduction", ("mean", "sum"), "as the loss treats samples")
        if metric == "kronecker" and block == "unit":
            metric = "kronecker_diagonal"
        check_combination(metric, block, expectation)
        _check_intervals(factor_interval=factor_interval, inverse_interval=inverse_interval)
        if not callable(loss_scale) and not 0.0 < float(loss_scale) < math.inf:
            raise ValueError(
                f"loss_scale={loss_scale}: must be in (0, inf). Try scaler.get_scale, or 1 without a scaler."
            )
        norm_decay = (0.0 if metric in WITH_MATRICES else 0.95) if norm_decay == "auto" else norm_decay
        damping = (1.0 if metric in WITH_MATRICES else 0.01) if damping == "auto" else damping
        self.metric: Metric = metric
        self.block: Block | Literal["network"] = block
        self._norm_start, self._expectation = norm_start, expectation
        self._factor_interval, self._inverse_interval = factor_interval, inverse_interval
        self._loss_reduction, self._loss_scale = loss_reduction, loss_scale
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "rule": metric,
            "eps": eps,
            "norm_decay": norm_decay,
            "decay": decay,
            "damping": damping,
        }
        super().__init__(params, defaults, model, process_group)

    # -- what LayerwiseOptimizer asks for --------------------------------------------------------------------------

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_range(group, "lr", where, hint="0.03 is a common start.")
        check_sgd_settings(group, where)
        check_range(group, "eps", where, hint="0 gives steps of exactly the wanted length.")
        check_range(group, "norm_decay", where, high=1.0, hint="0.95 averages over about 20 steps, 0 over one.")
        check_range(group, "decay", where, high=1.0, hint="0.95 averages over about 20 steps.")
        check_range(group, "damping", where, hint="1 for Kronecker and exact metrics, 0.01 for others is a start.")
        check_choice(group, "rule", (self.metric, "sgd"), where)
        if self.metric == "quasi_diagonal" and group["damping"] == 0:
            raise ValueError(
                f"damping=0 ({where}): the quasi-diagonal metric of one batch is singular; need damping > 0. "
                "0.01 is the default."
            )

    def _wants(self, rule: str) -> tuple[bool, bool]:
        return rule == "whitening", False

    @property
    def _kind(self) -> FactorKind | None:
        return kind_of_factors(self.metric, self._expectation)

    @property
    def _needs_calls(self) -> bool:
        return self.metric not in FROM_GRADIENTS or self._expectation != "average"

    def _watch_layers(self) -> None:
        self._passes = PassCounter()
        super()._watch_layers()
        if not self._needs_calls:
            self._capture.close()

    def _on_call(self, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
        layer = self._layer_of[module]
        if (kind := self._kind) is None or not self._is_due(layer, self._factor_interval):
            return super()._on_call(module, x, y)
        call = FactorCall(layer, module, x, y, kind, self._passes, with_moments=self.metric == "whitening")
        if activations_are_not_kept():
            call.summarise()
        return call.on_output_grad

    def _is_due(self, layer: AffineLayer, interval: Interval) -> bool:
        step = self.state[layer.weight].get("step", 0) if layer.weight in self.state else 0
        every = interval(step) if callable(interval) else interval
        return every <= 1 or step % every == 0

    def _forget_calls(self) -> None:
        self._passes.close()
        super()._forget_calls()

    def _check_calls(self, active: list[AffineLayer]) -> None:
        if self._needs_calls:
            super()._check_calls(active)

    def _is_seen(self, layer: AffineLayer) -> bool:
        return self._needs_calls and super()._is_seen(layer)

    def _extra_means(self, layer: AffineLayer) -> list[Quantity]:
        if (kind := self._kind) is None or not self._is_due(layer, self._factor_interval):
            return []
        return factors_with_counts(layer, kind)

    def _with_extras(self, layer: AffineLayer, call: SeenCall, means: list[Tensor]) -> SeenCall:
        return with_factors(call, self._kind, means) if means and self._kind is not None else call

    # -- the step ------------------------------------------------------------------------------------------------

    def _directions(self, layers: list[AffineLayer]) -> dict[int, Tensor]:
        kind: Block = "layer" if self.block == "network" else self.block
        parts = self._parts(layers)
        found = [self._solved(part) for part in parts]  # may raise; nothing has changed so far
        norms = [self._norms(part, solution, kind) for part, solution in zip(parts, found, strict=True)]
        if self.block == "network" and norms:
            norms = [network_sum(norms)] * len(parts)
        directions: dict[int, Tensor] = {}
        for part, solution, values in zip(parts, found, norms, strict=True):
            factors = inverse_lengths(values, part.group["eps"] if self._expectation != "fan_in" else 0.0)
            part.write(scale_blocks(solution.direction, factors, kind, in_place=solution.is_new), directions)
            for p, _, new in part.parameters:
                self.state[p].update(new)
            if self._has_foreign_momentum:
                self._take_over_momentum(part, solution, factors, kind)
        if self._has_foreign_momentum:  # of what sat this step out
            self._has_foreign_momentum = any("gradient_momentum" in values for values in self.state.values())
        return directions

    def _parts(self, layers: list[AffineLayer]) -> list[Part]:
        """Everything that has a gradient and is not left to SGD; layers first."""
        parts, taken = list[Part](), set[int]()
        for layer in layers:
            if layer.weight.grad is None or layer.weight.grad.is_sparse:
                continue
            bias = layer.bias if layer.is_centred else None
            past = self.state.get(layer.weight, {}), {} if bias is None else self.state.get(bias, {})
            parts.append(Part(layer.weight, bias, layer, self._group_of[layer], past))
            taken |= {id(p) for p in (layer.weight, bias) if p is not None}
        for group in self.param_groups:
            for p in group["params"] if group["rule"] != "sgd" else ():
                if id(p) not in taken and p.grad is not None and not p.grad.is_sparse:
                    parts.append(Part(p, None, None, group, (self.state.get(p, {}), {})))
        return parts

    def _solved(self, part: Part) -> Solved:
        layer = part.layer
        if layer is None or self._kind is None:
            return solved(part, self.metric, ())
        scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
        factors = pooled_factors(layer.calls, mean_reduction=self._loss_reduction == "mean", loss_scale=scale)
        invert = self.metric in WITH_MATRICES and self._is_due(layer, self._inverse_interval)
        product = self._captured_product(part, invert) if scale is self._loss_scale and scale == 1.0 else None
        part.new[0]["step"] = part.past[0].get("step", 0) + 1
        with_samples = self._expectation == "per_sample"
        return solved(part, self.metric, factors, invert=invert, product=product, with_samples=with_samples)

    def _captured_product(self, part: Part, check: bool) -> CapturedProduct | None:
        """The gradient as a product of what the layer's one call saw, unless something else has a part in it."""
        calls = [] if part.layer is None else part.layer.calls
        if len(calls) != 1 or not isinstance(calls[0], SeenFactors) or part.past[0].get("is_edited"):
            return None
        product = calls[0].product
        if product is None or not product.is_gradient_of([p for p, _, _ in part.parameters]):
            return None
        if check and not product.agrees_with(part.gradient.weight):  # when one waits for the device anyway
            part.new[0]["is_edited"] = True
            return None
        return product

    def _norms(self, part: Part, solution: Solved, kind: Block) -> BlockValues:
        """E of every block."""
        if self._expectation == "fan_in":
            units = part.gradient.weight.new_ones(len(part.gradient.weight))
            if part.layer is None:
                return (units,)
            sharing = part.layer.sharing() if part.layer.calls else part.past[0]["sharing"]
            part.new[0]["sharing"] = sharing
            return (units / part.layer.fan_in_scale(sharing) ** 2,)
        g, u, decay = part.gradient, solution.direction, part.group["norm_decay"]
        if solution.sample_norms is not None:  # a mean over samples is never less than that of their mean gradient
            both = zip(solution.sample_norms(kind), block_sums(g, u, kind), strict=True)
            return tuple(torch.maximum(of_samples, of_batch) for of_samples, of_batch in both)
        start = 1 - decay if self._norm_start == "zero" else 1.0
        if kind == "weight" and decay > 0:
            weight = part.average_product(0, "norm_sq", g.weight, u.weight, decay, start)
            if g.bias is None or u.bias is None:
                return (weight,)
            return weight, part.average_product(1, "norm_sq", g.bias, u.bias, decay, start)
        values = block_sums(g, u, kind)
        if decay == 0:
            return values
        averages = []
        for (_, past, new), now in zip(part.parameters, values, strict=False):
            before = past.get("norm_sq")
            now = now * start if before is None else torch.lerp(before.to(now.dtype), now, 1 - decay)
            new["norm_sq"] = now
            averages.append(now)
        return tuple(averages)

    def _take_over_momentum(self, part: Part, solution: Solved, factors: BlockValues, kind: Block) -> None:
        """Put momentum of a run with torch.optim.SGD, which averages gradients, into our coordinates."""
        before = [self.state[p].pop("gradient_momentum", None) for p, _, _ in part.parameters]
        if all(momentum is None for momentum in before):
            return
        filled = [torch.zeros_like(p) if m is None else m for (p, _, _), m in zip(part.parameters, before, strict=True)]
        momentum = part.vector(filled[0], None if part.bias is None else filled[1])
        buffers: dict[int, Tensor] = {}
        part.write(scale_blocks(solution.solve(momentum), factors, kind), buffers)
        for p, _, _ in part.parameters:
            self.state[p]["momentum_buffer"] = buffers[id(p)]

    def _descend(self, group: dict[str, Any], directions: Mapping[int, Tensor]) -> None:
        if group["rule"] != "sgd" and group["weight_decay"] != 0:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p * (group["lr"] * group["weight_decay"]))
            group = {**group, "weight_decay": 0.0}
        super()._descend(group, directions)

    # -- saving and reporting --------------------------------------------------------------------------------------

    def report(self) -> RuleReport:
        """Name every parameter with the metric that it gets, in the order of the groups.

        Returns:
            Rows (name, shape, rule, note); ``print`` shows them as a table.
        """
        own = self.metric if self.metric == "diagonal" else "identity"
        rows = []
        groups = [group for group in self.param_groups for _ in group["params"]]
        for row, group in zip(super().report(), groups, strict=True):
            if row.rule == "sgd" and group["rule"] != "sgd":
                row = row._replace(rule=own)
            rows.append(row)
        return RuleReport(rows)

    def _check_shapes(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        super()._check_shapes(state)
        layers = {layer.weight: layer for layer in self._layers}
        for p, values in state.items():
            shape = tuple(torch.view_as_real(p).shape) if p.is_complex() else tuple(p.shape) or (1,)
            layer = layers.get(p)
            shape = shape[::-1] if layer is not None and layer.is_embedding else shape
            needs = {"grad_sq": shape, "bias_row": shape}
            needs["norm_sq"] = {"weight": shape, "unit": shape[:1]}.get(self.block, ())
            if layer is not None and "output_factor" in values:
                groups, q = layer.groups, math.prod(shape[1:]) + (layer.bias is not None)
                needs["input_factor"] = (groups, q) if layer.is_embedding else (groups, q, q)
            for key, need in needs.items():
                value = values.get(key)
                if isinstance(value, Tensor) and tuple(value.shape) != need:
                    raise ValueError(
                        f"got a checkpoint with {key} of shape {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(p.shape)}; need {need}: it is of another model or of other blocks, or its groups are "
                        "in another order. Nothing was changed."
                    )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same metric, or of ``torch.optim.SGD``.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: a checkpoint of another metric, of a newer version, or tensors that do not fit the parameters;
                nothing was changed.
        """
        rules = {group.get("rule", self.metric) for group in state_dict["param_groups"]} - {"sgd", self.metric}
        if rules:
            raise ValueError(
                f"got a checkpoint of the metric {', '.join(map(repr, sorted(rules)))}, need {self.metric!r}: build "
                "the optimizer with the metric of the checkpoint. Nothing was changed."
            )
        state = {index: dict(values) for index, values in state_dict["state"].items()}
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if "state_version" not in saved and own["rule"] != "sgd":  # of SGD: a momentum of gradients
                for index in saved["params"]:
                    if "momentum_buffer" in state.get(index, {}):
                        state[index]["gradient_momentum"] = state[index].pop("momentum_buffer")
        super().load_state_dict({**state_dict, "state": state})

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy or a pickle needs."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}


def _check_intervals(**intervals: Any) -> None:
    for name, value in intervals.items():
        if callable(value):
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: need a whole number of steps, or a function of the step.")
        if value < 1:
            raise ValueError(f"{name}={value}: must be in [1, inf). 1 is every step.")
