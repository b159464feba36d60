"""The default rule of WhiteningSGD, a unit at a time: what its docstring says, in loops. No code of the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.optimizers.oracles_whitening import CONVOLUTIONS, LAYERS, observations, outputs_by_row

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
Call = tuple[nn.Module, Tensor, Tensor]  # module, input, output


class TrustedReference:
    """WhiteningSGD(model) for losses that reach every layer, with decay 0.95 and damping 0.001.

    Args:
        model: its linear layers, convolutions and embeddings are whitened; modules that share a weight are one layer.
        lr: learning rate, or None.
        rho: the trust radius.
        length: of the chain of layers.
        fault: what to get wrong, for tests that must fail:

            - "no_present": the bound goes by the average of t^2 alone
            - "no_memory": by the present t^2 alone
            - "average_of_changes": by the average of r^2
            - "uncorrelated": r^2 by the formula that takes inputs for uncorrelated, in place of a measurement
            - "no_spread_floor": sigma^2 as it is
            - "no_slope_floor": c = sigma^2 / sqrt(t^2)
            - "no_guard": alpha^2 by the running averages alone
            - "one_call": of several calls of a layer only the last is measured
            - "centred": inputs' means are moved out of weights even where no bias can take them up
            - "one_group": of a grouped convolution all units see the statistics of the first group
            - "momentum_outside": momentum of the scaled directions
            - "long_momentum": the bound is the same with and without momentum
            - "whole_norms": normalisations move by the full share
            - "no_chain": the radius is not shared
            - "no_turn", "whole_turn": none, or all, of the spread that a step adds is taken back
            - "turned_embeddings": of embeddings too
            - "turned_mean": outputs are turned about 0, not about their mean
    """

    def __init__(self, model: nn.Module, lr: float | None, rho: float, length: int, fault: str = "", **hyper) -> None:
        self.model, self.fault = model, fault
        self.lr = rho if lr is None else lr
        self.share = 1.0 if fault == "no_chain" else 1 / max(length, 4)
        self.hyper = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, **hyper}
        m = self.hyper["momentum"]
        self.share *= 1.0 if fault == "long_momentum" else math.sqrt((1 - m) / (1 + m))
        self.kappa = None if lr is None else rho * self.share / lr
        self.averages: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.expected: dict[Tensor, Tensor] = {}
        self.buffers: dict[Tensor, Tensor] = {}
        self.seen: list[Call] = []
        for module in model.modules():
            if isinstance(module, LAYERS):
                module.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        self.seen.append((module, args[0].detach().clone(), y.detach().clone()))

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients that are there."""
        calls: dict[Tensor, list[Call]] = {}
        for call in self.seen:
            calls.setdefault(call[0].weight, []).append(call)
        directions = {p: p.grad.clone() for p in self.model.parameters()}
        input_sq = {weight: self._whiten(weight, calls[weight], directions) for weight in calls}
        if self.fault != "momentum_outside":
            self._accumulate(directions)
        covered = set[Tensor]()
        for weight, own in calls.items():
            biases = [m.bias for m in {id(m): m for m, _, _ in own}.values() if getattr(m, "bias", None) is not None]
            rows = self._changes(own, directions)
            change = rows.square().mean(0)
            outputs = torch.cat([outputs_by_row(module, y) for module, _, y in own])
            spread = outputs.var(0, unbiased=False)
            if self.fault != "no_spread_floor":
                spread = spread + 1e-3 * spread.mean() + 1e-5 * input_sq[weight]
            is_embedding = isinstance(own[0][0], nn.Embedding)
            self._scale(weight, change, spread, [weight, *biases], directions, by_column=is_embedding)
            if not is_embedding or self.fault == "turned_embeddings":
                self._turn(rows, outputs.mean(0), spread, [weight, *biases], directions, by_column=is_embedding)
            covered |= {weight, *biases}
        for module in self.model.modules():
            if isinstance(module, NORMS):
                change = directions[module.weight].square() + directions[module.bias].square()
                spread = (1.0 if self.fault == "whole_norms" else 0.01) * (module.weight.square() + 0.01)
                spread = spread + 1e-3 * spread.mean()
                self._scale(module.weight, change, spread, [module.weight, module.bias], directions)
                covered |= {module.weight, module.bias}
        for p in self.model.parameters():
            if p not in covered:
                change, spread = directions[p].square().mean()[None], 1.001 * (p.square().mean()[None] + 1e-4)
                directions[p] = directions[p] * self._factors(p, change, spread)[0]
        if self.fault == "momentum_outside":
            self._accumulate(directions)
        for p, direction in directions.items():
            p.sub_(self.lr * (direction + self.hyper["weight_decay"] * p))
        self.seen = []  # measuring is a call, too

    def _whiten(self, weight: Tensor, calls: list[Call], directions: dict[Tensor, Tensor]) -> Tensor:
        """Eq. (3) with beta = 1, in ``directions``; and the mean square of the inputs about their mean."""
        module = calls[0][0]
        bias = getattr(module, "bias", None)
        centred = bias is not None and len({id(m) for m, _, _ in calls}) == 1
        x = torch.cat([observations(m, x) for m, x, _ in calls])
        mean, square = x.mean(0), x.square().mean(0)
        past = self.averages.get(weight)
        if past is not None:
            mean, square = 0.95 * past[0] + 0.05 * mean, 0.95 * past[1] + 0.05 * square
        self.averages[weight] = mean, square
        mu = mean if centred or self.fault == "centred" else torch.zeros_like(mean)
        q = square - mu.square()
        if self.fault != "no_guard":
            q = torch.maximum(q, (x - mu).square().mean(0))
        alpha_sq = 1 / (q + 0.001 * q.mean())
        by_unit = weight.grad.T if isinstance(module, nn.Embedding) else weight.grad
        step, groups = torch.empty_like(by_unit), getattr(module, "groups", 1)
        for j in range(len(by_unit)):
            group = 0 if self.fault == "one_group" else j // (len(by_unit) // groups)
            own, shape = slice(group * by_unit.shape[1], (group + 1) * by_unit.shape[1]), by_unit[j].shape
            gradient, b = by_unit[j].reshape(shape[0], -1), bias.grad[j] if centred else 0.0
            step[j] = (alpha_sq[own, None] * (gradient - mu[own, None] * b)).view(shape)
            if centred:
                directions[bias][j] -= (mu[own] * step[j].view(shape[0], -1).sum(1)).sum()
        directions[weight] = step.T if isinstance(module, nn.Embedding) else step
        return q.mean()

    def _accumulate(self, directions: dict[Tensor, Tensor]) -> None:
        if not (momentum := self.hyper["momentum"]):
            return
        for p, d in directions.items():
            past = self.buffers.get(p)
            self.buffers[p] = d if past is None else momentum * past + (1 - self.hyper["dampening"]) * d
            directions[p] = d + momentum * self.buffers[p] if self.hyper["nesterov"] else self.buffers[p]

    def _changes(self, calls: list[Call], directions: dict[Tensor, Tensor]) -> Tensor:
        """What the units compute with the directions as their weights, on a few samples: r_j^2 is the mean square."""
        rows = list[Tensor]()
        for module, x, _ in calls[-1:] if self.fault == "one_call" else calls:
            if isinstance(module, CONVOLUTIONS):
                few = x[:: max(len(x) // 2, 1)][:2]
            else:
                few = x.reshape(-1) if isinstance(module, nn.Embedding) else x.reshape(-1, x.shape[-1])
                few = few[:: max(len(few) // 16, 1)][:16]
            weight, bias = directions[module.weight], getattr(module, "bias", None)
            if self.fault == "uncorrelated":
                see = observations(module, few)
                mu, by_unit = see.mean(0), weight.T if isinstance(module, nn.Embedding) else weight
                total = torch.zeros(len(by_unit), dtype=weight.dtype)
                for j in range(len(by_unit)):
                    u = by_unit[j].reshape(by_unit.shape[1], -1)
                    own = slice(0, by_unit.shape[1])
                    middle = (mu[own, None] * u).sum() + (0.0 if bias is None else directions[bias][j])
                    total[j] = (see.var(0, unbiased=False)[own, None] * u.square()).sum() + middle**2
                rows.append(total[None].sqrt().expand(len(few), -1))
                continue
            state = {"weight": weight} if bias is None else {"weight": weight, "bias": directions[bias]}
            rows.append(outputs_by_row(module, torch.func.functional_call(module, state, (few,))))
        return torch.cat(rows)

    def _turn(
        self,
        changes: Tensor,
        mean: Tensor,
        spread: Tensor,
        parameters: list[Tensor],
        directions: dict[Tensor, Tensor],
        *,
        by_column: bool,
    ) -> None:
        """y - lr d.x, made m + (y - m) / sqrt(1 + theta^2 / 2) - lr d.x, where theta^2 is the variance that d adds."""
        share = {"no_turn": 0.0, "whole_turn": 1.0}.get(self.fault, 0.5)
        has_own_bias = len(parameters) == 2
        for j, added in enumerate((self.lr * self.last_factors).square() * changes.var(0, unbiased=False) / spread):
            decay = (1 - 1 / math.sqrt(1 + share * float(added))) / self.lr
            if not has_own_bias and self.fault != "turned_mean":
                decay *= float(spread[j] / (spread[j] + mean[j] ** 2))
            for p in parameters:
                own = p[:, j] if by_column else p[j]
                if has_own_bias and p.dim() == 1 and self.fault != "turned_mean":
                    own = own - mean[j]
                (directions[p][:, j] if by_column else directions[p][j]).add_(own, alpha=decay)

    def _scale(
        self,
        owner: Tensor,
        change: Tensor,
        spread: Tensor,
        parameters: list[Tensor],
        directions: dict[Tensor, Tensor],
        *,
        by_column: bool = False,
    ) -> None:
        factors = self.last_factors = self._factors(owner, change, spread)
        for p in parameters:
            units = directions[p].T if by_column else directions[p]
            units = torch.stack([factors[j] * units[j] for j in range(len(factors))])
            directions[p] = units.T if by_column else units

    def _factors(self, owner: Tensor, change: Tensor, spread: Tensor) -> Tensor:
        slope = change if self.fault == "average_of_changes" else change * spread
        past = self.expected.get(owner, slope)
        self.expected[owner] = expected = 0.95 * past + 0.05 * slope
        if self.fault == "average_of_changes":
            slope, expected = slope * spread, expected * spread
        bound = {"no_present": expected, "no_memory": slope}.get(self.fault, torch.maximum(expected, slope))
        floor = 0.0 if self.fault == "no_slope_floor" else 0.01 * float(bound.mean())
        pairs = zip(spread.tolist(), bound.tolist(), strict=True)
        scale = torch.tensor([own / math.sqrt(value + floor) for own, value in pairs], dtype=spread.dtype)
        return self.share * scale if self.kappa is None else torch.clamp(self.kappa * scale, max=1.0)
