"""The optimizers of the package, each with what it promises: one entry here, and every contract test runs on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.optimizers import BlockNaturalGradient, WhiteningSGD

NAN, INF = math.nan, math.inf
Refusal = tuple[dict[str, Any], type[Exception], str]

_SGD_REFUSALS: list[Refusal] = [
    *[({"lr": value}, ValueError, "lr=.*must be in") for value in (NAN, INF, -0.1, torch.tensor(NAN))],
    ({"lr": torch.ones(2)}, ValueError, "need one element"),
    *[({"lr": value}, TypeError, "lr=.*need a number") for value in ("0.1", True, 1j)],
    *[({"momentum": value}, ValueError, "momentum=.*must be in") for value in (NAN, INF, -0.1)],
    ({"momentum": "0.9"}, TypeError, "momentum=.*need a number"),
    *[({"dampening": value}, ValueError, "dampening=.*must be in") for value in (NAN, INF, -INF)],
    ({"dampening": None}, TypeError, "dampening=.*need a number"),
    *[({"weight_decay": value}, ValueError, "weight_decay=.*must be in") for value in (NAN, INF, -1.0)],
    ({"weight_decay": [0.1]}, TypeError, "weight_decay=.*need a number"),
    ({"nesterov": True, "momentum": 0.0}, ValueError, "needs a momentum"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "zero dampening"),
    ({"nesterov": "yes", "momentum": 0.9}, TypeError, "nesterov=.*True or False"),
    ({"maximize": 1}, TypeError, "maximize=.*True or False"),
]
_WHITENING_REFUSALS: list[Refusal] = [
    *_SGD_REFUSALS,
    *[({"decay": value}, ValueError, "decay=.*must be in") for value in (NAN, INF, -0.1, 1.0)],
    ({"decay": "0.9"}, TypeError, "decay=.*need a number"),
    *[({"damping": value}, ValueError, "damping=.*must be in") for value in (NAN, INF, -0.1)],
    ({"damping": "much"}, TypeError, "damping=.*need a number"),
    *[({"rule": value}, ValueError, "rule=.*must be one of") for value in ("adam", None, 3)],
    *[({"trust_radius": value}, ValueError, "trust_radius=.*must be in") for value in (NAN, INF, -0.1)],
    *[({"chain_length": value}, ValueError, "chain_length=.*whole number") for value in (0, -1, 1.5)],
]
_WHITENING_ONCE: list[Refusal] = [  # not hyper-parameters of a group
    *[({"loss_reduction": value}, ValueError, "loss_reduction=.*must be") for value in ("none", None)],
    *[({"loss_scale": value}, ValueError, "loss_scale=.*must be in") for value in (NAN, INF, 0.0, -1.0)],
]

_NATURAL_REFUSALS: list[Refusal] = [
    *[refusal for refusal in _WHITENING_REFUSALS if not {"rule", "trust_radius", "chain_length"} & set(refusal[0])],
    *[({"eps": value}, ValueError, "eps=.*must be in") for value in (NAN, INF, -0.1)],
    *[({"norm_decay": value}, ValueError, "norm_decay=.*must be in") for value in (NAN, INF, -0.1, 1.0)],
]
_NATURAL_ONCE: list[Refusal] = [
    *_WHITENING_ONCE,
    *[({"metric": value}, ValueError, "metric=.*must be one of") for value in ("adam", None)],
    *[({"block": value}, ValueError, "block=.*must be one of") for value in ("row", None)],
    ({"block": "weight"}, ValueError, "couples the parameters of one layer"),
    ({"inverse_interval": NAN}, TypeError, "inverse_interval=.*whole number"),
]
whitening_without_bound = partial(WhiteningSGD, rule="whitening")
_FLAGS = ("whitens", "has_statistics", "sees_output_grads", "is_linear")


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer with settings.

    Attributes:
        name: of the case.
        optimizer: its class; called as optimizer(model, **kwargs).
        kwargs: settings, a learning rate among them that trains the networks of these tests.
        whitens: whether layers get another step than plain SGD's.
        has_statistics: whether it has to see a layer's inputs before it can step.
        sees_output_grads: whether it looks at the gradients at a layer's outputs, of the first pass to arrive.
        is_linear: whether the direction is linear in ``p.grad``.
        refuses: (kwargs, exception, message): values that it must refuse, as default and in a group.
        refuses_once: the same for arguments of the constructor alone.
    """

    name: str
    optimizer: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    whitens: bool = True
    has_statistics: bool = True
    sees_output_grads: bool = False
    is_linear: bool = True
    refuses: list[Refusal] = field(default_factory=list)
    refuses_once: list[Refusal] = field(default_factory=list)

    def __call__(self, params: Any, **overrides: Any) -> torch.optim.Optimizer:
        """Build it."""
        return self.optimizer(params, **{**self.kwargs, **overrides})

    def __repr__(self) -> str:
        return self.name


def _whitening(name: str, **settings: Any) -> OptimizerCase:
    flags = {key: settings.pop(key) for key in _FLAGS if key in settings}
    return OptimizerCase(
        name, WhiteningSGD, settings, refuses=_WHITENING_REFUSALS, refuses_once=_WHITENING_ONCE, **flags
    )


def _natural(name: str, metric: str, block: str, **settings: Any) -> OptimizerCase:
    output_grads = metric in ("kronecker", "exact")
    return OptimizerCase(
        f"natural_{name}",
        BlockNaturalGradient,
        {"metric": metric, "block": block, **settings},
        has_statistics=output_grads or metric.endswith("whitening"),
        sees_output_grads=output_grads,
        is_linear=False,
        refuses=_NATURAL_REFUSALS,
        refuses_once=_NATURAL_ONCE,
    )


OPTIMIZER_CASES = [
    _whitening("trust_region", trust_radius=0.1, is_linear=False),
    _whitening("trust_region_lr", lr=0.02, trust_radius=0.1, momentum=0.9, weight_decay=1e-3, is_linear=False),
    _whitening("whitening", rule="whitening", lr=0.02),
    _whitening("paper", rule="paper", lr=0.02),
    _whitening("whitening_momentum", rule="whitening", lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    _whitening(
        "second_order",
        lr=0.001,
        momentum=0.5,
        dampening=0.1,
        rule="whitening_second_order",
        sees_output_grads=True,
    ),
    _whitening("fan_in", lr=0.05, momentum=0.9, rule="fan_in"),
    _whitening("sgd", lr=0.02, momentum=0.9, rule="sgd", whitens=False, has_statistics=False),
    _natural("kronecker", "kronecker", "layer", lr=0.002, damping=0.1, momentum=0.9, inverse_interval=2),
    _natural("kronecker_unit", "kronecker", "unit", lr=0.002, factor_interval=2, weight_decay=1e-3),
    _natural("kronecker_network", "kronecker", "network", lr=0.002, damping=0.1, momentum=0.5, dampening=0.1),
    _natural("whitening", "whitening", "unit", lr=0.01, momentum=0.9, nesterov=True),
    _natural("scale_free_whitening", "scale_free_whitening", "unit", lr=0.01),
    _natural("quasi_diagonal", "quasi_diagonal", "unit", lr=1e-4, damping=0.1),
    _natural("diagonal", "diagonal", "layer", lr=1e-4, momentum=0.9),
    _natural("rmsprop", "identity", "weight", lr=0.002, norm_start="zero", weight_decay=1e-3),
    _natural("normalized_sgd", "identity", "network", lr=0.02, norm_decay=0.0),
]


# Metrics and blocks of BlockNaturalGradient, every metric at least once.
NATURAL_MEMBERS = [
    ("identity", "weight"), ("identity", "layer"), ("diagonal", "unit"), ("quasi_diagonal", "unit"),
    ("whitening", "unit"), ("kronecker", "layer"), ("kronecker", "unit"), ("exact", "layer"), ("kronecker", "network"),
    ("scale_free_whitening", "unit"), ("fisher_diagonal", "weight"), ("fisher_quasi_diagonal", "unit"),
]  # fmt: skip


class SmallNet(nn.Module):
    """A convolution, a norm layer, a bare parameter and two linear layers, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.shift = nn.Parameter(torch.zeros(4))
        self.hidden = nn.Linear(36, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)) + self.shift[:, None, None])
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def small_net(seed: int = 1, dtype: torch.dtype = torch.float32) -> SmallNet:
    """The small network, drawn from a seed of its own."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return SmallNet().to(dtype)


def small_batches(number: int, num_samples: int = 8, seed: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Batches of inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_samples, 2, 6, 6, generator=generator).to(dtype) + 0.5 for _ in range(number)]


def mean_loss(outputs: Tensor) -> Tensor:
    """A loss that is a mean over samples."""
    return (outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs).sub(1).square().sum(
        -1
    ).mean() / 2


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    loss: Callable[[Tensor], Tensor] = mean_loss,
) -> list[Tensor]:
    """Plain training loop; returns the losses."""
    losses = []
    for x in batches:
        optimizer.zero_grad()
        value = loss(model(x))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return losses


def assert_same_parameters(actual: nn.Module, expected: nn.Module, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal bit for bit, unless a tolerance is given."""
    torch.testing.assert_close(
        dict(actual.named_parameters()), dict(expected.named_parameters()), rtol=rtol, atol=atol, equal_nan=False
    )


def tensors_of(tree: Any) -> list[Tensor]:
    """Copies of all tensors in nested dicts and lists, in order."""
    if isinstance(tree, Tensor):
        return [tree.detach().clone()]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors_of(value)]
    if isinstance(tree, (list, tuple)):
        return [t for value in tree for t in tensors_of(value)]
    return []
