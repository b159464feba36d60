"""BlockNaturalGradient: steps whose length, in a metric of one's choice, is the same for every block of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.capture import activations_are_not_kept
from torchgeom_optim.geometry.metric import Block, LayerVector
from torchgeom_optim.geometry.trust_region import network_sum
from torchgeom_optim.optimizers.block_metrics import Solved, shapes_of_statistics, solver
from torchgeom_optim.optimizers.block_steps import note_direction, shrink, step_in_place
from torchgeom_optim.optimizers.layer_factors import (
    FactorCall,
    FactorKind,
    PassCounter,
    captured_product,
    factors_with_counts,
    pooled_factors,
    with_factors,
)
from torchgeom_optim.optimizers.layers import AffineLayer, SeenCall
from torchgeom_optim.optimizers.layerwise import LayerwiseOptimizer
from torchgeom_optim.optimizers.metric_grid import (
    FROM_GRADIENTS,
    OF_INPUTS,
    WITH_MATRICES,
    Metric,
    check_combination,
    kind_of_factors,
    without_layer,
)
from torchgeom_optim.optimizers.named_members import NamedMembers
from torchgeom_optim.optimizers.natural_settings import Interval, check_group, check_once, default_damping, default_lr
from torchgeom_optim.optimizers.parts import Part, parts_with_gradients
from torchgeom_optim.optimizers.pooled_calls import Quantity
from torchgeom_optim.optimizers.report import RuleReport
from torchgeom_optim.optimizers.step_lengths import (
    Expectation,
    Norms,
    average_of_steps,
    bound_by_samples,
    unit_sizes,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BlockNaturalGradient"]


class BlockNaturalGradient(NamedMembers, LayerwiseOptimizer):
    r"""Natural gradient whose step has a given length in the metric, in every block of parameters.

        delta w_b = -lr G_b^-1 g_b / sqrt(eps + E[g_b^T G_b^-1 g_b])

    for every block b, with g the gradient in ``p.grad`` and E a running average over steps (``norm_decay``; with
    ``norm_decay=0`` it is this step's value alone, and every block moves by exactly lr in its metric).
    The metric G and the blocks are chosen independently:

    ===========================  ====================================================  ============
    ``metric``                   G                                                     finest block
    ===========================  ====================================================  ============
    ``"identity"``               1                                                     ``"weight"``
    ``"diagonal"``               average of squared mini-batch gradients               ``"weight"``
    ``"fisher_diagonal"``        of the samples' squared gradients, the diagonal of    ``"weight"``
                                 the empirical Fisher matrix
    ``"quasi_diagonal"``         as "diagonal", and products with the bias gradient    ``"unit"``
    ``"fisher_quasi_diagonal"``  as "fisher_diagonal", likewise                        ``"unit"``
    ``"whitening"``              mean and variance of the inputs, see WhiteningSGD     ``"unit"``
    ``"scale_free_whitening"``   the same, outputs in units of their own spread         ``"unit"``
    ``"kronecker"``              A (x) B, second moments of inputs, output gradients   ``"layer"``
    ``"kronecker_diagonal"``     the same, of B its diagonal                           ``"unit"``
    ``"exact"``                  the layer's whole empirical Fisher matrix             ``"layer"``
    ===========================  ====================================================  ============

    ``block``: ``"weight"`` (each number), ``"unit"`` (a row of the weight and its bias), ``"layer"`` or ``"network"``.
    Blocks that are finer than G's own are refused, since then g^T G^-1 g of a block would be no length; but
    ``metric="kronecker"`` with ``block="unit"`` is taken for ``"kronecker_diagonal"``. Known members of the family
    have constructors of their own: :meth:`rmsprop`, :meth:`normalized_sgd`, :meth:`fan_in`, :meth:`trpo`, :meth:`kfac`.

    Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", Eq. (9) (one block), Eq. (10)
    (``norm_decay=0``), Eq. (11), §3.4, §3.5. g is the mini-batch's gradient, in E as well; with
    ``expectation="per_sample"`` E is over the samples' own, as in the paper, whose lengths bound that of their mean.
    Changed: its mu is called eps; where a block never had a gradient the step is 0, not 0 / 0; E over samples is
    never taken for less than the mini-batch's own value.

    Statistics: each running average is initialised by its first batch, so that nothing pulls it towards 0;
    ``norm_start="zero"`` lets E start at zero instead, as RMSProp does. G includes the present batch. Factors and
    exact matrices come from the output gradients of the user's own loss (empirical Fisher, samples' gradients: the
    division by N of a mean loss and ``loss_scale`` are undone); of many patches of a convolution every k-th is used.

    Speed: a linear layer's gradient is a product g^T [a, 1] of what the layer saw. Where ``p.grad`` is still that
    product, G^-1 of it is taken as (B^-1 g^T)([a, 1] A^-1), if that is less work: same result to rounding. Told by
    structure (one call, memory and version as autograd left them), and by a product at steps that take inverses;
    gradients that are accumulated, clipped, unscaled, reduced over processes or changed by a hook go the long way.

    Damping: a share of the layer's own mean, so that units do not matter. Diagonals: G + damping mean(G).
    Quasi-diagonals: of the weights' and of the biases' diagonals. "whitening": of the inputs' variances, together with
    WhiteningSGD's drift guard; "scale_free_whitening": and of the outputs'. Kronecker: the pi-split of Martens and
    Grosse 2015, §6.3, of damping * mean(diag A) mean(diag B). "exact": of its mean diagonal. A matrix that is not
    positive definite even so is an error, before anything has changed. Where G is zero to rounding (dead units, a loss
    that is met; in float32 gradients of 1e-16) diagonal metrics take no step, matrices are taken for 1.
    Metrics made of gradients measure in units of the loss: as gradients vanish, a step of given length grows in the
    weights, so let lr decay.

    Without a layer of their own (norm layers, bare parameters, attention's packed projection, everything if no model is
    given) parameters take the metric "identity", or "diagonal" in place of the diagonals, each as a layer of its own.
    Sparse gradients are left as SGD takes them. :meth:`report` says which parameter gets what.

    Several processes (DistributedDataParallel, ``fully_shard`` of FSDP2): what layers have seen is averaged over all of
    them, in one collective per step before anything else is done with it; the trajectory is that of one process with
    the whole batch. Sharded gradients are brought together, and every process computes all directions and keeps its
    part: statistics are not sharded, momentum is. Build the optimizer after ``fully_shard``. Where batches differ in
    size, let each process weigh its loss by its share of the samples times the number of processes.

    Memory beside momentum: one number per block for E; diagonals one per weight, quasi-diagonals two; "whitening" two
    vectors per layer; Kronecker 2 (q^2 + m^2) per layer with q inputs of a patch, and until the step the inputs and
    output gradients of linear layers with fewer samples than either; "exact" 2 (m q)^2.

    Args:
        params: a model, or parameters or groups of them; groups may set everything from lr to maximize, and
            ``rule="sgd"`` for plain SGD.
        lr: eta, the length of the step in the metric, a number or a tensor of one element, in [0, inf). None takes what
            suited three small networks over 100 steps, decaying linearly to 0: "kronecker" 0.03 (units 0.003),
            "whitening" 0.03 (layers 0.1), "scale_free_whitening" 0.01, "fisher_diagonal" by layers and
            "fisher_quasi_diagonal" 0.003, "diagonal" by layers 0.001, "quasi_diagonal" 0.0003, "identity" by weights
            0.001, by layers or as a network 1, each times 1 - momentum; other pairs of metric and block need a number,
            and so does another ``expectation`` than "average".
        metric: see above; the same for all groups.
        block: see above; likewise.
        model: the module that the parameters belong to.
        eps: added to E, in its units, in [0, inf).
        norm_decay: weight of the past in E, in [0, 1). "auto" is 0 for Kronecker and exact metrics, as an average over
            values in the metrics of before misleads when inverses are taken anew, and 0.95 for the others.
        norm_start: "first" or "zero".
        expectation: "average"; "per_sample", where the average is that of the metric's own statistics (``decay``; at no
            cost for metrics made of samples' gradients, for others it has to look at these), for Kronecker and exact
            metrics their effective dimension, tr(G^-1 F); or "fan_in": with E = sqrt(n s)^2 in its place, as §3.5 finds
            it for inputs and output gradients of unit size (n weights per unit, applied at s positions); blocks must be
            units then, and parameters without a layer take a plain gradient step.
        decay: weight of the past in the averages that make G, in [0, 1).
        damping: see above, in [0, inf); "auto" is 1 for Kronecker, exact and quasi-diagonal metrics, of which training
            with 0.01 diverged in trials, 0.1 for "diagonal", and 0.01 for the others.
        factor_interval: Kronecker and exact: on every how many steps a batch is looked at; a number, or a function of
            the step that returns one.
        inverse_interval: likewise, how often their inverses are taken anew.
        momentum: of the directions, in [0, inf).
        dampening: as in SGD.
        nesterov: as in SGD.
        weight_decay: decoupled: weights shrink by lr * weight_decay before each step; in [0, inf).
        loss_reduction: "mean" or "sum": how the loss treats samples; used by metrics made of samples' gradients.
        loss_scale: a number, or a function such as ``scaler.get_scale``, by which the loss was multiplied; same use.
        maximize: ascend.
        foreach: as in SGD; steps without momentum are taken in place, a layer at a time.
        process_group: the processes that train the model together; None takes those of DistributedDataParallel or
            ``fully_shard`` if the model is in one, else the default group.
        error_if_nonfinite: whether a step refuses gradients that are NaN or infinite, which waits for the device; None
            does so on the CPU. Else they end in weights and statistics, as in torch.optim; a GradScaler skips them.

    Raises:
        ValueError: a hyper-parameter out of its range, a metric that couples the wanted blocks, or parameters that
            the model does not own.
        TypeError: a value of the wrong type.
        RuntimeError: at :meth:`step`, when a layer's inputs are needed and no pass with gradients went through it, or
            when one of several processes is lost; nothing was changed.
        NotPositiveDefiniteError: at :meth:`step`; nothing was changed.
        FloatingPointError: at :meth:`step`: gradients that are not finite; nothing was changed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = BlockNaturalGradient(model, lr=0.05, metric="kronecker", block="layer")
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [row.rule for row in optimizer.report()]
        ['kronecker', 'kronecker', 'kronecker', 'kronecker']
    """

    _input_statistics = ("input_mean", "input_variance")
    _output_statistics = ("spread_sq", "output_mean")
    _statistics = (
        *_input_statistics,
        *_output_statistics,
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
        lr: float | Tensor | None = None,
        metric: Metric = "kronecker",
        block: Block | Literal["network"] = "layer",
        *,
        model: nn.Module | None = None,
        eps: float = 1e-16,
        norm_decay: float | Literal["auto"] = "auto",
        norm_start: Literal["first", "zero"] = "first",
        expectation: Expectation = "average",
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
        error_if_nonfinite: bool | None = None,
    ) -> None:
        check_once(
            {
                "metric": metric,
                "block": block,
                "norm_start": norm_start,
                "expectation": expectation,
                "factor_interval": factor_interval,
                "inverse_interval": inverse_interval,
                "loss_reduction": loss_reduction,
                "loss_scale": loss_scale,
            }
        )
        if metric == "kronecker" and block == "unit":
            metric = "kronecker_diagonal"
        check_combination(metric, block, expectation)
        norm_decay = (0.0 if metric in WITH_MATRICES else 0.95) if norm_decay == "auto" else norm_decay
        damping = default_damping(metric) if damping == "auto" else damping
        lr = default_lr(metric, block, expectation, momentum) if lr is None else lr
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
        super().__init__(params, defaults, model, process_group, error_if_nonfinite)

    # -- what LayerwiseOptimizer asks for --------------------------------------------------------------------------

    def _check_group(self, group: Mapping[str, Any], where: str) -> None:
        check_group(group, where, self.metric)

    def _wants(self, rule: str) -> tuple[bool, bool]:
        return rule in OF_INPUTS, False

    def _wants_outputs(self, layer: AffineLayer) -> bool:
        return self.metric == "scale_free_whitening"

    @property
    def _kind(self) -> FactorKind | None:
        return kind_of_factors(self.metric, self._expectation)

    @property
    def _needs_model(self) -> bool:
        return self.metric != "identity" or self._expectation != "average"

    @property
    def _needs_calls(self) -> bool:
        return self.metric not in FROM_GRADIENTS or self._expectation != "average"

    def _watch_layers(self) -> None:
        self._passes = PassCounter()
        super()._watch_layers()
        if not self._needs_calls:
            self._capture.close()

    def _on_call(self, module: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], None] | None:
        layer = self._layer_of.get(module)
        if layer is None or y.numel() == 0:  # as in super()
            return None
        if (kind := self._kind) is None or not self._is_due(layer, self._factor_interval):
            return super()._on_call(module, x, y)
        call = FactorCall(
            layer,
            module,
            x,
            y,
            kind,
            self._passes,
            with_moments=self.metric in OF_INPUTS,
            with_outputs=self._wants_outputs(layer),
        )
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

    def _is_known(self, layer: AffineLayer) -> bool:
        if self._expectation == "fan_in" and "sharing" not in self.state.get(layer.weight, {}):
            return False
        return super()._is_known(layer)

    def _is_seen(self, layer: AffineLayer) -> bool:
        return self._needs_calls and super()._is_seen(layer)

    def _extra_means(self, layer: AffineLayer) -> list[Quantity]:
        if (kind := self._kind) is None or not self._is_due(layer, self._factor_interval):
            return []
        return factors_with_counts(layer, kind)

    def _with_extras(self, call: SeenCall, means: list[Tensor]) -> SeenCall:
        return with_factors(call, self._kind, means) if means and self._kind is not None else call

    # -- the step ------------------------------------------------------------------------------------------------

    def _directions(self, layers: list[AffineLayer]) -> dict[int, Tensor]:
        kind: Block = "layer" if self.block == "network" else self.block
        parts = parts_with_gradients(layers, self._group_of, self.param_groups, self.state)
        momenta = [self._foreign_momentum(part) for part in parts]  # sharded ones come together while all is as it was
        solvers = [self._solver(part) for part in parts]  # may raise; nothing has changed so far
        directions: dict[int, Tensor] = {}
        self._moved = set[int]()
        if self.block != "network":
            for part, complete, momentum in zip(parts, solvers, momenta, strict=True):
                solution = complete()
                self._step_part(part, solution, self._norms(part, solution, kind), kind, directions, momentum)
        elif parts:
            found = [complete().whole() for complete in solvers]
            norms = [self._norms(part, solution, kind) for part, solution in zip(parts, found, strict=True)]
            pieces = [next(solution.pieces(may_split=False)) for solution in found]
            total = network_sum([values(piece) for values, piece in zip(norms, pieces, strict=True)])
            for part, solution, momentum in zip(parts, found, momenta, strict=True):
                self._step_part(part, solution, lambda _: total, kind, directions, momentum)
        if self._has_foreign_momentum:  # of what sat this step out
            self._has_foreign_momentum = any("gradient_momentum" in values for values in self.state.values())
        return directions

    def _step_part(
        self,
        part: Part,
        solution: Solved,
        norms: Norms,
        kind: Block,
        directions: dict[int, Tensor],
        momentum: LayerVector | None,
    ) -> None:
        """Move the parameters; or, where there is more to do than that, note the direction that SGD is to take."""
        parameters = [p for p, _, _ in part.parameters]
        groups = [self._group_of_parameter[p] for p in parameters]
        eps = part.group["eps"] if self._expectation != "fan_in" else 0.0
        if momentum is None and step_in_place(part, solution, norms, kind, eps, groups):
            self._moved.update(map(id, parameters))
        else:
            buffers = note_direction(part, solution, norms, kind, eps, directions, momentum)
            for p in parameters if buffers else ():
                self.state[p].pop("gradient_momentum", None)
                self.state[p]["momentum_buffer"] = buffers[id(p)]
        for p, _, new in part.parameters:
            self.state[p].update(new)

    def _foreign_momentum(self, part: Part) -> LayerVector | None:
        """Momentum of a run with torch.optim.SGD, which averages gradients: to be put into our coordinates."""
        known = [past.get("gradient_momentum") for _, past, _ in part.parameters]
        if all(momentum is None for momentum in known):
            return None
        filled = [torch.zeros_like(p) if m is None else m for (p, _, _), m in zip(part.parameters, known, strict=True)]
        return part.vector(filled[0], None if part.bias is None else filled[1])

    def _solver(self, part: Part) -> Callable[[], Solved]:
        layer = part.layer
        if layer is None or self._kind is None:
            return solver(part, self.metric, ())
        scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
        factors = pooled_factors(layer.calls, mean_reduction=self._loss_reduction == "mean", loss_scale=scale)
        invert = self.metric in WITH_MATRICES and self._is_due(layer, self._inverse_interval)
        product = None
        if scale is self._loss_scale and scale == 1.0 and not part.past[0].get("is_edited"):  # else one may unscale
            product = captured_product(layer.calls, [p for p, _, _ in part.parameters])
        if invert and product is not None and not product.agrees_with(part.gradient.weight):
            part.new[0]["is_edited"], product = True, None
        part.new[0]["step"] = part.past[0].get("step", 0) + 1
        with_samples = self._expectation == "per_sample"
        return solver(part, self.metric, factors, invert=invert, product=product, with_samples=with_samples)

    def _norms(self, part: Part, solution: Solved, kind: Block) -> Norms:
        """E of every block."""
        if self._expectation == "fan_in":
            return unit_sizes(part)
        if solution.sample_norms is not None:
            return bound_by_samples(solution.sample_norms, kind)
        return average_of_steps(part, kind, from_zero=self._norm_start == "zero")

    def _descend(self, group: dict[str, Any], directions: Mapping[int, Tensor]) -> None:
        params = [p for p in group["params"] if p.grad is not None and id(p) not in self._moved]
        if group["rule"] != "sgd" and group["weight_decay"] != 0:
            for p in params:
                shrink(p, group)
            group = {**group, "weight_decay": 0.0}
        if params:
            super()._descend({**group, "params": params}, directions)

    # -- saving and reporting --------------------------------------------------------------------------------------

    def report(self) -> RuleReport:
        """Name every parameter with the metric that it gets, in the order of the groups.

        Returns:
            Rows (name, shape, rule, note); ``print`` shows them as a table.
        """
        own, rows = without_layer(self.metric), []
        edited = {p for p, values in self.state.items() if values.get("is_edited")}
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        for row, (p, group) in zip(super().report(), owners, strict=True):
            if row.rule == "sgd" and group["rule"] != "sgd":
                row = row._replace(rule=own)
            if p in edited:
                row = row._replace(note="; ".join(filter(None, (row.note, "gradients are changed through .data"))))
            rows.append(row)
        return RuleReport(rows)

    def _needed_shapes(self, parameter: Tensor, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        own = shapes_of_statistics(parameter, self._layer_with(parameter), self.metric, self.block)
        return super()._needed_shapes(parameter, values) | own

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of the same metric, or of ``torch.optim.SGD``; raises if it is of another metric."""
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
        return {**state_dict, "state": state}

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy or a pickle needs."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}
