"""Every metric against its definition, dense and in float64, on networks of every kind."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from tests import oracles
from tests.zoo import ZOO, Case
from torchgeom_optim.diagnostics import METRICS, Diagnostics, Options, Record
from torchgeom_optim.diagnostics.agreement import gaussian_effective_rank

KINDS = ("mlp", "tied_linear", "attention", "gpt_block", "vision_transformer", "convnext_block")
CASES = [case for case in ZOO if case.name in KINDS]
LOSS = nn.CrossEntropyLoss()
SIZE, NUM, LR = 1e-3, 5, 0.05  # of a move, samples, step


@dataclass
class Dense:
    """A network, a batch, and what follows from them by loops over dense matrices."""

    case: Case
    seed: int = 2

    def __post_init__(self) -> None:
        self.model = self.case.model()
        self.x, self.y = self.case.batch(NUM, self.seed)
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.w = flat(self.named.values())

    def with_weights(self, w: Tensor) -> dict[str, Tensor]:
        parts = w.split([p.numel() for p in self.named.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(self.named.items(), parts, strict=True)}

    def loss(self, w: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        outputs = torch.func.functional_call(self.model, self.with_weights(w), (self.x if x is None else x,))
        return LOSS(outputs, self.y if y is None else y)

    def h(self, w: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss."""
        w = w.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(w, x, y), w)[0]

    @cached_property
    def rows(self) -> Tensor:
        """The samples' gradients."""
        gradients = oracles.per_sample_gradients(self.model, LOSS, self.x, self.y)
        return torch.cat([g.reshape(NUM, -1) for g in gradients.values()], 1)

    @cached_property
    def hessian(self) -> Tensor:
        """Entry by entry; the fast forms of attention have no second derivative."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(self.loss, self.w)

    @cached_property
    def input_rows(self) -> Tensor:
        """Gradients of the samples' losses with respect to their own inputs."""
        rows = []
        for i in range(NUM):
            one = self.x[i : i + 1].clone().requires_grad_()
            rows.append(torch.autograd.grad(LOSS(self.model(one), self.y[i : i + 1]), one)[0].reshape(-1))
        return torch.stack(rows)

    def agreement(self) -> dict[str, float]:
        rows, mean = self.rows, self.rows.mean(0)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(rows, 2)]
        trace = float(rows.var(0, correction=1).sum())
        signal = float(mean.square().sum()) - trace / NUM
        return {
            "gradient_confusion": max(0.0, *(-cosine for cosine in cosines)),
            "gradient_diversity": float(rows.square().sum() / rows.sum(0).square().sum()),
            "gradient_coherence": float(sum(mean @ row for row in rows) / rows.square().sum()),
            "relative_gradient_rank": relative_rank(rows),
            "gradient_noise_scale": trace / signal if signal > 0 else math.inf,
            "gradient_norm": float(mean.norm()),
            "fisher_trace": float(rows.square().sum() / NUM),
            "weight_norm": float(self.w.norm()),
        }

    def moves(self) -> dict[str, float]:
        """Def. 2.7: along the batch gradient and against it."""
        h = self.h(self.w)
        shift = h * SIZE / h.abs().max()
        moved = [self.h(self.w + shift), self.h(self.w - shift)]
        return {
            "weight_condition_number": max(
                float((m - h).norm() * self.w.norm() / (shift.norm() * h.norm())) for m in moved
            ),
            "weight_gradient_cosine": min(float(m @ h / (m.norm() * h.norm())) for m in moved),
            "weight_gradient_diversity": float(sum(m @ m for m in moved) / sum(moved).square().sum()),
            "weight_gradient_coherence": float(sum(m @ h for m in moved) / sum(m @ m for m in moved)),
        }

    def curvature(self) -> dict[str, float]:
        values = torch.linalg.eigvalsh(self.hessian)
        norm = float(values.abs().max())
        return {"weight_condition_number_exact": norm * float(self.w.norm() / self.h(self.w).norm())} | (
            # Of the two ends only the larger one has converged when the products stop.
            {"top_curvature": norm} if float(values[-1]) == norm else {}
        )

    def inputs(self) -> dict[str, float]:
        """Def. 3.7 and 3.5; the moves are the first samples', their sign does not matter to first order."""
        shifts = [SIZE * row / row.norm() for row in self.input_rows[:2]]
        numbers = []
        for x, y in zip(self.x.split(1), self.y.split(1), strict=True):
            h = self.h(self.w, x, y)
            ratios = []
            for shift, sign in itertools.product(shifts, (1, -1)):
                change = self.h(self.w, x + sign * shift.reshape(x.shape), y) - h
                ratios.append(float(change.norm() * x.norm() / (SIZE * h.norm())))
            numbers.append(max(ratios))
        return {"relative_input_gradient_rank": relative_rank(self.input_rows), "input": sum(numbers) / NUM}


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def relative_rank(rows: Tensor) -> float:
    rank = float(rows.norm() ** 2 / torch.linalg.matrix_norm(rows, 2) ** 2)
    return rank / gaussian_effective_rank(*rows.shape)


@pytest.fixture(scope="module", params=CASES, ids=repr)
def dense(request) -> Dense:
    return Dense(request.param)


@pytest.fixture(scope="module")
def record(dense) -> Record:
    options = Options(curvature_tolerance=1e-10, curvature_products=300, num_input_samples=NUM)
    diagnostics = Diagnostics(dense.model, LOSS, metrics=sources(dense), options=options)
    return diagnostics.measure(dense.x, dense.y)


def sources(dense: Dense) -> list[str]:
    """All metrics that a batch alone tells; tokens have no gradient."""
    left_out = {"step", "spectrum"} | (set() if dense.x.is_floating_point() else {"inputs", "input_moves"})
    return [name for name, source in METRICS.items() if source not in left_out]


def assert_metrics(record: Record, expected: dict[str, float], condition: float) -> None:
    found = {name: record.values[name] for name in expected}
    assert_close(found, expected, **oracles.tolerance(condition=condition))


def test_agreement_of_the_samples_gradients(dense, record):
    assert_metrics(record, dense.agreement(), 1e4)


def test_gradients_at_moved_weights(dense, record):
    assert_metrics(record, dense.moves(), 1e6)  # differences over 1e-3 of the weights


def test_curvature(dense, record):
    # Lanczos takes as many products as there are parameters at most, without making vectors orthogonal again.
    assert_metrics(record, dense.curvature(), 1e8)
    values = torch.linalg.eigvalsh(dense.hessian)
    assert record.values["top_curvature"] <= float(values[-1]) * (1 + 1e-6)


def test_inputs(dense, record):
    if not dense.x.is_floating_point():
        with pytest.raises(ValueError, match="a gradient needs floating point inputs"):
            Diagnostics(dense.model, LOSS, metrics="relative_input_gradient_rank").measure(dense.x, dense.y)
        return
    expected = dense.inputs()
    assert_metrics(record, {"relative_input_gradient_rank": expected["relative_input_gradient_rank"]}, 1e4)
    # The signs that were drawn are not the oracle's: both agree to first order in the size of the move.
    assert record.values["input_condition_number"] == pytest.approx(expected["input"], rel=20 * SIZE)


def test_two_steps(dense):
    first, second = Dense(dense.case), Dense(dense.case, seed=3)
    model = first.model
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with Diagnostics(model, LOSS, every=1, metrics="free").attach(optimizer) as diagnostics:
        for x, y in ((first.x, first.y), (second.x, second.y)):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    w, h = dense.w, dense.h(dense.w)
    moved = w - LR * h
    change = dense.h(moved, second.x, second.y) - h
    expected = float(change.norm() * w.norm() / ((moved - w).norm() * h.norm()))
    assert_metrics(diagnostics.history[1], {"weight_condition_number_two_step": expected}, 1e4)


def test_spectrum(dense):
    """All eigenvalues of J'J, rows of J being the gradients of 2 sqrt(p)."""
    record = Diagnostics(dense.model, LOSS, metrics="spectrum").measure(dense.x, dense.y)
    parameters = list(dense.named.values())
    J = oracles.jacobian(lambda i: 2 * dense.model(dense.x[i : i + 1]).softmax(1).sqrt(), NUM, parameters)
    expected = torch.linalg.svdvals(J).square() / NUM
    found = torch.tensor(record.spectrum["fisher"], dtype=torch.float64)
    assert_close(found, expected[: len(found)], **oracles.tolerance(condition=1e4))
    assert float(expected[len(found) :].sum()) < 1e-10 * float(expected[0])
    assert record.values["fisher_spectrum_trace"] == pytest.approx(float(expected.sum()))


def test_the_oracles_are_able_to_fail(dense, record):
    expected = {**dense.agreement(), **dense.moves()}
    for name, value in expected.items():
        # Numbers that are 0, 1 or inf on a network may not move by a share.
        wrong = {name: value * 1.001 + 1e-3}
        if math.isfinite(value):
            with pytest.raises(AssertionError):
                assert_metrics(record, wrong, 1e6)
