"""What WhiteningSGD is checked against: layers that really store v, and the paper's lines. No code of the package.

Source: Lafond, Vasilache and Bottou 2017, "Diagonal rescaling for neural networks", Eqs. (2), (3), (5), (12), §2.3 and
App. B; drift guard and relative floor as the docstring of WhiteningSGD has them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def observations(layer: nn.Module, x: Tensor) -> Tensor:
    """Every input vector that the layer sees, one a row: [samples times positions, n]."""
    if isinstance(layer, nn.Embedding):
        return F.one_hot(x.reshape(-1), layer.num_embeddings).to(layer.weight.dtype)
    if isinstance(layer, CONVOLUTIONS):
        return x.movedim(1, -1).reshape(-1, layer.in_channels)
    return x.reshape(-1, layer.in_features)


def outputs_by_row(layer: nn.Module, y: Tensor) -> Tensor:
    """The same for outputs: [samples times positions, m]."""
    return (y.movedim(1, -1) if isinstance(layer, CONVOLUTIONS) else y).reshape(
        -1, y.shape[1 if isinstance(layer, CONVOLUTIONS) else -1]
    )


def fan_in(layer: nn.Module) -> int:
    """Weights per output unit."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings
    return layer.weight[0].numel()


def sharing(layer: nn.Module, y: Tensor) -> int:
    """At how many positions each kernel is applied."""
    return y[0, 0].numel() if isinstance(layer, CONVOLUTIONS) else 1


class Averages:
    """The running averages of §2.3 for one layer, and the constants that follow from them.

    Args:
        decay: lambda.
        damping: floor of variances and of E[g^2] as a share of their mean.
        fault: what to get wrong, for tests that must fail: "mu_sign", "no_sharing", "no_sample_count", "no_guard".
    """

    def __init__(self, decay: float = 0.95, damping: float = 0.01, fault: str = "") -> None:
        self.decay, self.damping, self.fault = decay, damping, fault
        self.mx = self.mx2 = self.mg2 = None

    def _average(self, past: Tensor | None, now: Tensor) -> Tensor:
        return now if past is None else self.decay * past + (1 - self.decay) * now

    def constants(
        self, rule: str, x: Tensor, g: Tensor, n: int, s: float, *, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take a batch in, and return alpha [n], mu [n], beta [m].

        Args:
            rule: of WhiteningSGD.
            x: inputs by row.
            g: gradients of every sample's own loss with respect to the outputs, by row.
            n: fan-in.
            s: sharing.
            centred: whether there is a bias.
        """
        count = 1 if self.fault == "no_sample_count" else len(x)
        self.mx = self._average(self.mx, x.sum(0) / count)
        self.mx2 = self._average(self.mx2, (x * x).sum(0) / count)
        self.mg2 = self._average(self.mg2, (g * g).sum(0) / len(g))
        if self.fault == "no_sharing":
            s = 1
        alpha, mu = torch.ones_like(self.mx), torch.zeros_like(self.mx)
        beta = torch.full_like(self.mg2, math.sqrt(1 / math.sqrt(n * s)))
        if rule != "fan_in":
            if centred:
                mu = self.mx
            q = self.mx2 - mu * mu
            if self.fault != "no_guard":
                q = torch.maximum(q, ((x - mu) ** 2).sum(0) / count)
            alpha = 1 / torch.sqrt(q + self.damping * q.mean())
        if rule == "whitening_second_order":
            beta = 1 / torch.sqrt(s * (self.mg2 + self.damping * self.mg2.mean()))
        return alpha, -mu if self.fault == "mu_sign" else mu, beta


class StoredV(nn.Module):
    """A layer that stores v and computes Eq. (2) as it stands, with the constants alpha, mu and beta.

    Padding is made explicit first: what lies beyond the edge is an input like any other.
    """

    def __init__(self, layer: nn.Module, alpha: Tensor, mu: Tensor, beta: Tensor) -> None:
        super().__init__()
        self.layer, self.alpha, self.mu, self.beta = [layer], alpha, mu, beta  # in a list: not a part of this module
        w = self._by_unit(layer.weight.detach())
        self.v = nn.Parameter(w / self._alpha_of_unit(w) / self._of_unit(beta, w))
        self.v0 = None
        if layer.bias is not None if not isinstance(layer, nn.Embedding) else False:
            self.v0 = nn.Parameter((layer.bias.detach() + self._moved_mean(w)) / beta)

    def _by_unit(self, w: Tensor) -> Tensor:
        """Weights as [m, n / groups, *kernel]."""
        return w.T if isinstance(self.layer[0], nn.Embedding) else w

    def _of_unit(self, values: Tensor, w: Tensor) -> Tensor:
        return values.view(-1, *[1] * (w.dim() - 1))

    def _of_input(self, values: Tensor, w: Tensor) -> Tensor:
        """What each unit sees of the values of all inputs, shaped to multiply the weights."""
        groups = getattr(self.layer[0], "groups", 1)
        m, per_group = w.shape[0], len(values) // groups
        rows = [
            values[(j // (m // groups)) * per_group : (j // (m // groups) + 1) * per_group] for j in range(m)
        ]  # one group after the other
        return torch.stack(rows).view(m, per_group, *[1] * (w.dim() - 2))

    def _alpha_of_unit(self, w: Tensor) -> Tensor:
        return self._of_input(self.alpha, w)

    def _moved_mean(self, w: Tensor) -> Tensor:
        return (self._of_input(self.mu, w) * w).flatten(1).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        """Eq. (2)."""
        layer = self.layer[0]
        v0 = torch.zeros_like(self.beta) if self.v0 is None else self.v0
        if isinstance(layer, nn.Embedding):
            x = F.one_hot(x, layer.num_embeddings).to(self.v.dtype)
        if not isinstance(layer, CONVOLUTIONS):
            return self.beta * (v0 + ((x - self.mu) * self.alpha) @ self.v.T)
        trailing = [1] * len(layer.kernel_size)
        z = (pad(layer, x) - self.mu.view(-1, *trailing)) * self.alpha.view(-1, *trailing)
        y = CONVOLVE[len(layer.kernel_size)](
            z, self.v, None, layer.stride, padding=0, dilation=layer.dilation, groups=layer.groups
        )
        return self.beta.view(-1, *trailing) * (v0.view(-1, *trailing) + y)

    @torch.no_grad()
    def pull_back(self) -> None:
        """Write the weights that mean the same into the layer: w = alpha beta v, w0 = beta v0 - sum mu w."""
        layer = self.layer[0]
        w = self._alpha_of_unit(self.v) * self._of_unit(self.beta, self.v) * self.v
        layer.weight.copy_(self._by_unit(w))
        if self.v0 is not None:
            layer.bias.copy_(self.beta * self.v0 - self._moved_mean(w))


def pad(layer: nn.Module, x: Tensor) -> Tensor:
    """The convolution's input with its padding written out."""
    amounts: list[int] = []
    for k in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[k] * (layer.kernel_size[k] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [layer.padding[k]] * 2
    return F.pad(x, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


class Reference:
    """WhiteningSGD by the paper's lines: everything kept, nothing fast. The loss is a mean over samples.

    Args:
        model: its Linear, Conv and Embedding layers are whitened, everything else takes SGD steps.
        rule: as for WhiteningSGD, like the next ones.
        fault: see :class:`Averages`.
    """

    def __init__(self, model: nn.Module, lr: float, rule: str = "whitening", fault: str = "", **hyper: float) -> None:
        self.model, self.lr, self.rule = model, lr, rule
        self.hyper = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
        averages = {key: hyper.pop(key) for key in ("decay", "damping") if key in hyper}
        self.hyper.update(hyper)
        self.layers = [m for m in model.modules() if isinstance(m, LAYERS)]
        self.averages = {layer: Averages(**averages, fault=fault) for layer in self.layers}
        self.buffers: dict[Tensor, Tensor] = {}
        self.seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        for layer in self.layers:
            layer.register_forward_hook(self._see)

    def _see(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if y.requires_grad:
            y.retain_grad()
            self.seen.append((layer, args[0].detach(), y))

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients that are there."""
        directions = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for layer in self.layers:
            calls = [(x, y) for seen, x, y in self.seen if seen is layer and y.grad is not None]
            if not calls:
                continue
            x = torch.cat([observations(layer, x) for x, _ in calls])
            g = torch.cat([outputs_by_row(layer, y.grad * len(x)) for x, y in calls])  # undo the mean of the loss
            self._directions(layer, x, g, sharing(layer, calls[0][1]), directions)
        self.seen.clear()
        for p, direction in directions.items():
            d = -direction if self.hyper["maximize"] else direction
            d = d + self.hyper["weight_decay"] * p
            if momentum := self.hyper["momentum"]:
                past = self.buffers.get(p)
                self.buffers[p] = d if past is None else momentum * past + (1 - self.hyper["dampening"]) * d
                d = d + momentum * self.buffers[p] if self.hyper["nesterov"] else self.buffers[p]
            p.sub_(self.lr * d)

    def _directions(self, layer: nn.Module, x: Tensor, g: Tensor, s: float, directions: dict[Tensor, Tensor]) -> None:
        bias = None if isinstance(layer, nn.Embedding) else layer.bias
        centred = bias is not None and bias.grad is not None and layer.weight.grad is not None
        alpha, mu, beta = self.averages[layer].constants(self.rule, x, g, fan_in(layer), s, centred=centred)
        weight_grad = layer.weight.grad
        if weight_grad is None:
            if bias is not None and bias.grad is not None:
                directions[bias] = beta**2 * bias.grad
            return
        embedding = isinstance(layer, nn.Embedding)
        W = weight_grad.T[..., None] if embedding else weight_grad.reshape(*weight_grad.shape[:2], -1)
        m, per_group, _ = W.shape
        dW = torch.zeros_like(W)
        db = torch.zeros(m, dtype=W.dtype)
        for j in range(m):  # Eq. (3)
            first = j // (m // getattr(layer, "groups", 1)) * per_group
            mu_j, alpha_j = (values[first : first + per_group, None] for values in (mu, alpha))
            b = bias.grad[j] if bias is not None and bias.grad is not None else 0.0
            dW[j] = beta[j] ** 2 * alpha_j**2 * (W[j] - mu_j * b)
            db[j] = beta[j] ** 2 * b - (mu_j * dW[j]).sum()
        directions[layer.weight] = (dW.squeeze(-1).T if embedding else dW).reshape(weight_grad.shape)
        if bias is not None and bias.grad is not None:
            directions[bias] = db
