"""Restricted Boltzmann machine with binary units, and the normalised gradients of its log-likelihood as features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgeom_optim.geometry.metric import DiagonalMetric, LayerVector

__all__ = ["BernoulliRBM", "DivergenceMethod", "RBMGradientFeatures"]

DivergenceMethod = Literal["contrastive", "persistent"]

_MOST_ENUMERATED = 20  # 2^20 configurations
_CACHED_NUMBERS = 2**17  # features that are worked on while they are in the cache


class BernoulliRBM(nn.Module):
    r"""Restricted Boltzmann machine over v in {0, 1}^V with hidden h in {0, 1}^H.

        p(v, h) = exp(h'W v + b'v + c'h) / Z,      log p(v) = -F(v) - log Z
        F(v) = -b'v - \sum_i softplus(c_i + W_i v)                                        the free energy
        d log p(v) / d (W, b, c) = (q v', v, q) - E_p[(q v', v, q)],   q = p(h = 1 | v) = sigmoid(c + W v)

    The expectation is under the model and out of reach; :meth:`divergence_gradients` puts Gibbs samples in its place.
    Source: Hinton 2002, "Training products of experts by minimizing contrastive divergence"; Tieleman 2008 for the
    persistent chains. As Hinton advises (2010, "A practical guide", §3), hidden units are drawn as bits except where
    they enter statistics, and data between 0 and 1 count as probabilities of bits.

    Args:
        num_visible: V.
        num_hidden: H.
        mean: data means [V], from which the visible biases start at log(p / (1 - p)), p within [0.01, 0.99]; 0 if None.
        generator: of the first weights, normal with standard deviation 0.01; biases c start at 0.

    Raises:
        ValueError: a size below 1, or means of another shape.

    Example:
        >>> rbm = BernoulliRBM(6, 3, generator=torch.Generator().manual_seed(0))
        >>> rbm(torch.rand(5, 6)).shape, rbm.free_energy(torch.rand(5, 6)).shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        *,
        mean: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not (num_visible >= 1 and num_hidden >= 1):
            raise ValueError(
                f"num_visible={num_visible}, num_hidden={num_hidden}: both must be at least 1; 784 and 64 suit MNIST."
            )
        if mean is not None and mean.shape != (num_visible,):
            raise ValueError(f"mean of shape {list(mean.shape)}: [{num_visible}] is needed; try data.mean(0).")
        bias = torch.zeros(num_visible) if mean is None else torch.logit(mean.detach().clone(), 0.01)
        self.weight = nn.Parameter(torch.randn(num_hidden, num_visible, generator=generator, dtype=bias.dtype) * 0.01)
        self.visible_bias = nn.Parameter(bias)
        self.hidden_bias = nn.Parameter(bias.new_zeros(num_hidden))

    def forward(self, visible: Tensor) -> Tensor:
        """Probabilities q = p(h = 1 | v) [N, H] of visible [N, V]."""
        return torch.sigmoid(F.linear(visible, self.weight, self.hidden_bias))

    def visible_probabilities(self, hidden: Tensor) -> Tensor:
        """p(v = 1 | h) [N, V] of hidden [N, H]."""
        return torch.sigmoid(F.linear(hidden, self.weight.T, self.visible_bias))

    def free_energy(self, visible: Tensor) -> Tensor:
        """F(v) [N], in nats; differentiable. -F is the log-likelihood up to log Z."""
        hidden = F.softplus(F.linear(visible, self.weight, self.hidden_bias))
        return -(visible @ self.visible_bias) - hidden.sum(-1)

    def log_partition(self) -> Tensor:
        """Log Z exactly, summed over all configurations of the smaller side; differentiable.

        Returns:
            A scalar, in nats.

        Raises:
            ValueError: both sides have more than 20 units.
        """
        num_hidden, num_visible = self.weight.shape
        if min(num_hidden, num_visible) > _MOST_ENUMERATED:
            raise ValueError(
                f"{num_visible} visible and {num_hidden} hidden units: one side may have at most {_MOST_ENUMERATED} "
                "for its configurations to be enumerated. Compare free energies instead, which need no log Z."
            )
        if num_visible <= num_hidden:
            return torch.logsumexp(-self.free_energy(_all_bits(num_visible, self.weight)), 0)
        hidden = _all_bits(num_hidden, self.weight)
        visible = F.softplus(F.linear(hidden, self.weight.T, self.visible_bias)).sum(-1)
        return torch.logsumexp(hidden @ self.hidden_bias + visible, 0)

    def log_likelihood(self, visible: Tensor) -> Tensor:
        """Exact log p(v) [N], in nats; for small machines, see :meth:`log_partition`."""
        return -self.free_energy(visible) - self.log_partition()

    @torch.no_grad()
    def gibbs(self, visible: Tensor, steps: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Visible bits after some rounds of h ~ p(h | v), v ~ p(v | h).

        Args:
            visible: bits, or probabilities of bits, [N, V].
            steps: rounds, at least 1.
            generator: of the draws.

        Returns:
            Bits [N, V].
        """
        for _ in range(steps):
            hidden = torch.bernoulli(self(visible), generator=generator)
            visible = torch.bernoulli(self.visible_probabilities(hidden), generator=generator)
        return visible

    @torch.no_grad()
    def statistics(self, visible: Tensor) -> dict[str, Tensor]:
        """Means over N samples of (q v', v, q), by the parameters' names: the gradient of -F, averaged."""
        hidden = self(visible)
        return {
            "weight": hidden.T @ visible / len(visible),
            "visible_bias": visible.mean(0),
            "hidden_bias": hidden.mean(0),
        }

    def divergence_gradients(
        self,
        visible: Tensor,
        chains: Tensor | None = None,
        *,
        steps: int = 1,
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Estimate the gradient of the mean log-likelihood: statistics of the data less those of Gibbs samples.

        Args:
            visible: data [N, V].
            chains: where the Gibbs rounds begin, [M, V]: what the last call returned for persistent contrastive
                divergence; None for the data themselves, contrastive divergence.
            steps: rounds.
            generator: of the draws.

        Returns:
            name -> gradient to ascend, a mean over samples, in nats / [parameter]; and the chains' new state [M, V].
        """
        chains = self.gibbs(visible if chains is None else chains, steps, generator)
        data, model = self.statistics(visible), self.statistics(chains)
        return {name: data[name] - model[name] for name in data}, chains

    def fit(
        self,
        data: Tensor,
        *,
        epochs: int = 10,
        batch_size: int = 100,
        lr: float = 0.05,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        method: DivergenceMethod = "persistent",
        steps: int = 1,
        num_chains: int = 100,
        generator: torch.Generator | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    ) -> BernoulliRBM:
        """Climb the log-likelihood by contrastive divergence, with momentum and a rate that falls linearly to zero.

        Args:
            data: [N, V] in [0, 1].
            epochs: passes over the data.
            batch_size: samples a step.
            lr: first learning rate, in [parameter]^2 / nats.
            momentum: in [0, 1).
            weight_decay: pulls the weights (not the biases) to zero by lr * weight_decay a step.
            method: "contrastive": chains begin at the data each time; "persistent": they go on.
            steps: Gibbs rounds a step.
            num_chains: chains of the persistent method, which begin at random bits of the data's means.
            generator: of order and draws; a seeded one fixes the result.
            progress: wraps the range of epochs, such as ``tqdm.tqdm``.

        Returns:
            Itself.

        Raises:
            ValueError: a setting out of range, or data that are not in [0, 1] with V columns.
            FloatingPointError: weights ceased to be finite; they are left as they were before the call.
        """
        self._check_settings(data, epochs, batch_size, lr, momentum, weight_decay, method, steps, num_chains)
        before = {name: p.detach().clone() for name, p in self.named_parameters()}
        velocity = {name: torch.zeros_like(value) for name, value in before.items()}
        chains = None
        if method == "persistent":
            chains = torch.bernoulli(data.mean(0).expand(num_chains, -1), generator=generator)
        total, step = epochs * -(-len(data) // batch_size), 0
        for _ in (progress or iter)(range(epochs)):
            order = torch.randperm(len(data), generator=generator, device=data.device if generator is None else None)
            for part in torch.split(order, batch_size):
                gradients, state = self.divergence_gradients(data[part], chains, steps=steps, generator=generator)
                chains = None if chains is None else state
                rate = lr * (1 - step / total)
                with torch.no_grad():
                    for name, p in self.named_parameters():
                        pull = weight_decay * p if name == "weight" else 0.0
                        velocity[name].mul_(momentum).add_(gradients[name] - pull)
                        p.add_(velocity[name], alpha=rate)
                    finite = torch.stack([p.sum() for p in self.parameters()]).isfinite().all()
                if not bool(finite):  # of what is not a number no bits can be drawn
                    self.load_state_dict(before)
                    raise FloatingPointError(
                        f"the weights are no longer finite after {step + 1} steps at lr={lr}: a rate at which the "
                        f"likelihood climbs is needed. Try lr={lr / 10:.3g}."
                    )
                step += 1
        return self

    def _check_settings(
        self,
        data: Tensor,
        epochs: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        method: str,
        steps: int,
        num_chains: int,
    ) -> None:
        if method not in get_args(DivergenceMethod):
            raise ValueError(f"method={method!r}: must be 'contrastive' or 'persistent', which mixes better.")
        counts = {"epochs": epochs, "batch_size": batch_size, "steps": steps, "num_chains": num_chains}
        for name, count in counts.items():
            if not count >= 1:
                raise ValueError(f"{name}={count}: must be at least 1; the default is a common start.")
        if not 0.0 < lr < math.inf:
            raise ValueError(f"lr={lr}: must be in (0, inf); 0.05 is a common start.")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: must be in [0, 1); 0.5 is a common start.")
        if not 0.0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay={weight_decay}: must be in [0, inf); 1e-4 is a common start.")
        self._check_data(data)

    def _check_data(self, data: Tensor) -> None:
        num_visible = self.weight.shape[1]
        if data.dim() != 2 or data.shape[1] != num_visible or len(data) == 0:
            raise ValueError(
                f"data of shape {list(data.shape)}: [N, {num_visible}] is needed, N at least 1; try data.flatten(1)."
            )
        if not bool(((data >= 0) & (data <= 1)).all()):  # NaN fails
            raise ValueError(
                f"data between {float(data.min()):.3g} and {float(data.max()):.3g}: probabilities of bits are needed, "
                "in [0, 1]. Rescale them, for instance by (x - min) / (max - min)."
            )

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_visible={self.weight.shape[1]}, num_hidden={self.weight.shape[0]}"


class RBMGradientFeatures:
    r"""Normalised gradients of log p(v), the Fisher vector of each sample, as features of a linear model.

        phi(v) = G^(-1/2) d log p(v) / d theta,       theta = (W, b, c)
        d log p(v) / d theta = t(v) - E_p[t],         t(v) = (q v', v, q)

    By Hammersley and Clifford p(v) = exp(-F(v)) / Z, so the gradient needs no more than F and an expectation, which is
    taken once, over samples of the model. G is the diagonal of the mean outer product of the gradients over the data
    (Eq. (2) with the arithmetic mean), plus ``damping`` times its mean; phi(v)'phi(v') is then the kernel of Eq. (3).
    Source: "GradNet", §2.1 and Table 1; the paper does not say how the expectation or G is estimated. Perronnin's power
    norm sign(x)|x|^p and unit length may follow.

    Args:
        rbm: the machine; its present parameters are copied.
        data: [N, V] in [0, 1], over which G is averaged.
        model_samples: [M, V], bits or probabilities of bits, for E_p; by default 1,000 chains that begin at data and
            run for 100 rounds of :meth:`BernoulliRBM.gibbs`.
        damping: in [0, inf); what units that never change are divided by.
        power: exponent p in (0, inf); 1 leaves the features as they are.
        unit_length: whether each sample's features are divided by their Euclidean length.
        generator: of the default samples.

    Raises:
        ValueError: a setting out of range, or data that do not fit.
        NotPositiveDefiniteError: without damping, a coordinate never varies.

    Example:
        >>> rbm, data = BernoulliRBM(6, 3), torch.rand(50, 6)
        >>> RBMGradientFeatures(rbm, data)(data[:4]).shape  # 3 * 6 + 6 + 3
        torch.Size([4, 27])
    """

    def __init__(
        self,
        rbm: BernoulliRBM,
        data: Tensor,
        model_samples: Tensor | None = None,
        *,
        damping: float = 0.1,
        power: float = 1.0,
        unit_length: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0.0 <= damping < math.inf:
            raise ValueError(f"damping={damping}: must be in [0, inf); 0.1 is a common start.")
        if not 0.0 < power < math.inf:
            raise ValueError(f"power={power}: must be in (0, inf); 0.5 is a common choice, 1 changes nothing.")
        rbm._check_data(data)
        if model_samples is None:
            begin = data[torch.randint(len(data), (1000,), generator=generator, device=data.device)]
            model_samples = rbm.gibbs(begin, 100, generator)
        rbm._check_data(model_samples)
        self.power, self.unit_length = power, unit_length
        self._weight, self._bias = rbm.weight.detach().clone(), rbm.hidden_bias.detach().clone()
        self._center = _joined(rbm.statistics(model_samples))
        moments = DiagonalMetric.damped(LayerVector(self._second_moments(rbm, data)), damping)
        moments.require_positive_definite()
        self._scale = moments.diagonal.weight.rsqrt()

    @property
    def num_features(self) -> int:
        """P = H V + V + H."""
        return self._scale.numel()

    @torch.no_grad()
    def __call__(self, visible: Tensor, out: Tensor | None = None) -> Tensor:
        """Features [N, P] of visible [N, V]: those of W row by row, of b, of c.

        Args:
            visible: [N, V], in [0, 1].
            out: [N, P], to write to: in a training loop, fresh memory for each batch costs as much as the arithmetic.

        Returns:
            [N, P]; ``out`` if given.
        """
        num_hidden, num_visible = self._weight.shape
        out = visible.new_empty(len(visible), self.num_features) if out is None else out
        hidden = torch.sigmoid(F.linear(visible, self._weight, self._bias))
        at_once = max(1, _CACHED_NUMBERS // self.num_features)
        for v, q, row in zip(*(torch.split(x, at_once) for x in (visible, hidden, out)), strict=True):
            outer, v_part, q_part = torch.split(row, [num_hidden * num_visible, num_visible, num_hidden], 1)
            torch.mul(q[:, :, None], v[:, None], out=torch.unflatten(outer, 1, (num_hidden, num_visible)))
            v_part.copy_(v)
            q_part.copy_(q)
            row.sub_(self._center).mul_(self._scale)
            if self.power != 1.0:
                size = row.abs()
                row.copy_((size.sqrt_() if self.power == 0.5 else size.pow_(self.power)).copysign_(row))
            if self.unit_length:
                row.div_(row.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(row.dtype).tiny))
        return out

    def linear(self, visible: Tensor, weight: Tensor) -> Tensor:
        r"""What a linear layer makes of the features, without forming them: N C H V products in place of N H V numbers.

            \sum_p w_cp phi_p(v) = \sum_i q_i (A_c v)_i + a_c'v + e_c'q - (w S m)_c,     (A, a, e) = w S

        Args:
            visible: [N, V], in [0, 1].
            weight: w, [C, P]; the result can be differentiated by it.

        Returns:
            [N, C].

        Raises:
            ValueError: with a power or unit length, which the features have to be formed for.
        """
        if self.power != 1.0 or self.unit_length:
            raise ValueError(
                f"power={self.power}, unit_length={self.unit_length}: only power 1 without unit length is linear in "
                "the statistics. Call the features themselves, and multiply."
            )
        num_hidden, num_visible = self._weight.shape
        scaled = weight * self._scale
        outer, for_v, for_q = torch.split(scaled, [num_hidden * num_visible, num_visible, num_hidden], 1)
        hidden = torch.sigmoid(F.linear(visible, self._weight, self._bias))
        products = F.linear(visible, torch.cat([outer.reshape(-1, num_visible), for_v]))
        gated, ungated = torch.split(products, [len(weight) * num_hidden, len(weight)], 1)
        gated = torch.einsum("nci,ni->nc", torch.unflatten(gated, 1, (len(weight), num_hidden)), hidden)
        return gated + ungated + F.linear(hidden, for_q) - scaled @ self._center

    def _second_moments(self, rbm: BernoulliRBM, data: Tensor) -> Tensor:
        """E[(t - m)^2] = E[t^2] - 2 m E[t] + m^2 by matrix products, [P]."""
        with torch.no_grad():
            hidden, n = rbm(data), len(data)
            squares = {
                "weight": hidden.square().T @ data.square() / n,
                "visible_bias": data.square().mean(0),
                "hidden_bias": hidden.square().mean(0),
            }
            means = _joined(rbm.statistics(data))
        spread = _joined(squares) - means.square()  # cancels less than the three terms at once
        return spread.clamp_(min=0.0) + (means - self._center).square()


def _joined(statistics: dict[str, Tensor]) -> Tensor:
    return torch.cat([statistics[name].flatten() for name in ("weight", "visible_bias", "hidden_bias")])


def _all_bits(count: int, like: Tensor) -> Tensor:
    """Every configuration of some bits, [2^count, count]."""
    bits: list[Any] = list(itertools.product((0.0, 1.0), repeat=count))
    return torch.tensor(bits, dtype=like.dtype, device=like.device)
