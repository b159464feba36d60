from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.oracles import tolerance
from torchgeom_optim.diagnostics import conditioning, weight_gradients
from torchgeom_optim.diagnostics.batch_gradient import BatchGradient
from torchgeom_optim.diagnostics.conditioning import gradient_changes
from torchgeom_optim.diagnostics.scales import extreme_eigenvalues
from torchgeom_optim.geometry.per_sample import Batch

LOSS = nn.CrossEntropyLoss()


class Problem:
    """A small smooth network whose Hessian is dense."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.x = torch.randn(6, 3, dtype=torch.float64)
        self.y = torch.tensor([0, 1, 2, 2, 1, 0])
        self.gradient = BatchGradient(self.model, LOSS, Batch(self.x, self.y))
        self.parameters = dict(self.model.named_parameters())
        self.w = torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])
        self.members = torch.ones(1, len(self.parameters))

    def named(self, vector):
        parts = vector.split([p.numel() for p in self.parameters.values()])
        return {name: v.reshape(p.shape) for (name, p), v in zip(self.parameters.items(), parts, strict=True)}

    def loss(self, w, x=None, y=None):
        x, y = (self.x, self.y) if x is None else (x, y)
        return LOSS(torch.func.functional_call(self.model, self.named(w), (x,)), y)

    def h(self, w, x=None, y=None):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(self.loss(w, x, y), w)[0]

    @property
    def H(self):
        return torch.autograd.functional.hessian(self.loss, self.w)


@pytest.fixture(scope="module")
def problem():
    return Problem()


def moves(problem, kind):
    h = problem.gradient()
    if kind == "batch":
        return conditioning.batch_gradient_shifts(h, 1e-3)
    if kind == "samples":
        return conditioning.sample_gradient_shifts(problem.gradient.of_samples(range(4)), 1e-3)
    return conditioning.random_shifts(problem.parameters, 3, 1e-3)


def flat(named):
    return torch.cat([v.reshape(-1) for v in named.values()])


@pytest.mark.parametrize("kind", ["batch", "samples", "random"])
def test_sampled_numbers_against_loops(problem, kind):
    shifts = moves(problem, kind)
    changes = gradient_changes(problem.gradient, shifts, problem.gradient()).summed(problem.members)
    h, w = problem.h(problem.w), problem.w
    moved = [problem.h(w + flat(shift)) for shift in shifts]
    kappa = max(
        float((m - h).norm() * w.norm() / (flat(s).norm() * h.norm())) for m, s in zip(moved, shifts, strict=True)
    )
    # Differences of nearly equal gradients: eps / size of the move.
    tol = tolerance(condition=1e4)
    assert_close(float(changes.condition_number()), kappa, **tol)
    cosine = weight_gradients.weight_gradient_cosine(changes.inner_products, changes.norms_sq, changes.base_norms_sq)
    assert_close(float(cosine), min(float(m @ h / (m.norm() * h.norm())) for m in moved), **tol)
    diversity = weight_gradients.weight_gradient_diversity(changes.norms_sq, changes.sum_norms_sq)
    assert_close(float(diversity), float(sum(m @ m for m in moved) / sum(moved).square().sum()), **tol)
    coherence = weight_gradients.weight_gradient_coherence(changes.inner_products, changes.norms_sq)
    assert_close(float(coherence), float(sum(h @ m for m in moved) / sum(m @ m for m in moved)), **tol)


@pytest.mark.parametrize("kind", ["batch", "samples", "random"])
def test_finite_moves_agree_with_their_limit_to_first_order(problem, kind):
    H, h, w = problem.H, problem.h(problem.w), problem.w
    scale = w.norm() / h.norm()
    norm = torch.linalg.matrix_norm(H, 2)
    base = problem.gradient()
    errors = []
    for factor in (1.0, 0.1, 0.01):
        shifts = [{name: factor * v for name, v in shift.items()} for shift in moves(problem, kind)]
        changes = gradient_changes(problem.gradient, shifts, base).summed(problem.members)
        limits = [(H @ flat(s)).norm() / flat(s).norm() for s in shifts]
        assert all(limit <= norm * (1 + 1e-12) for limit in limits)
        errors.append(abs(float(changes.condition_number() - max(limits) * scale)))
        sizes = max(float(flat(s).norm()) for s in shifts)
        assert errors[-1] < 20 * sizes * float(norm * scale)
    assert errors[2] < errors[0] / 30  # ten times smaller per step of ten


def test_the_top_eigenvector_reaches_the_norm(problem):
    H, h, w = problem.H, problem.h(problem.w), problem.w
    values, vectors = torch.linalg.eigh(H)
    top = vectors[:, int(values.abs().argmax())]
    exact = float(torch.linalg.matrix_norm(H, 2) * w.norm() / h.norm())
    changes = gradient_changes(problem.gradient, [problem.named(1e-6 * top)], problem.gradient())
    assert float(changes.summed(problem.members).condition_number()) == pytest.approx(exact, rel=1e-4)

    def lanczos(product, gradient):
        return extreme_eigenvalues(product, torch.randn_like(gradient), tolerance=1e-10)

    ends = problem.gradient.with_hessian(lanczos)
    assert ends.converged
    assert ends.norm == pytest.approx(float(torch.linalg.matrix_norm(H, 2)), rel=1e-9)


def test_moves_are_as_defined(problem):
    h = problem.gradient()
    forward, back = conditioning.batch_gradient_shifts(h, 1e-2)
    largest = flat(h).abs().max()
    assert_close(flat(forward), 1e-2 * flat(h) / largest)
    assert_close(flat(back), -flat(forward))
    samples = problem.gradient.of_samples(range(6))
    signs = set()
    for shift, sample in zip(conditioning.sample_gradient_shifts(samples, 1e-2), samples, strict=True):
        assert_close(flat(shift).norm(), torch.tensor(1e-2, dtype=torch.float64))
        cosine = flat(shift) @ flat(sample) / (flat(shift).norm() * flat(sample).norm())
        signs.add(round(float(cosine), 9))
    assert signs == {-1.0, 1.0}
    weights = {"a": torch.randn(5000) * 3 + 1, "b": torch.tensor([2.0])}
    (shift,) = conditioning.random_shifts(weights, 1, 0.1)
    assert float(shift["a"].mean()) == pytest.approx(0.1, abs=5 * 0.3 / 5000**0.5)
    assert float(shift["a"].std()) == pytest.approx(0.3, rel=0.05)
    assert float(shift["b"]) == pytest.approx(0.2)


def test_two_steps(problem):
    w, h = problem.w, problem.h(problem.w)
    omega = -0.1 * h
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([1, 1, 0, 2, 0, 2])
    later = problem.h(w + omega, x, y)
    expected = (later - h).norm() * w.norm() / (0.1 * h.norm() ** 2)  # the formula below Def. 2.5
    found = conditioning.two_step_condition_number(
        problem.named(w), problem.named(h), problem.named(w + omega), problem.named(later), problem.members
    )
    assert_close(found, expected[None], **tolerance(condition=100))
    # On the same batch it is the sampled number of that move.
    same = conditioning.two_step_condition_number(
        problem.named(w),
        problem.named(h),
        problem.named(w + omega),
        problem.named(problem.h(w + omega)),
        problem.members,
    )
    changes = gradient_changes(problem.gradient, [problem.named(omega)], problem.gradient())
    assert_close(same, changes.summed(problem.members).condition_number(), **tolerance(condition=1e3))


def test_inputs_against_loops(problem):
    input_gradients = problem.gradient.of_inputs()
    shifts = conditioning.input_gradient_shifts(input_gradients, 3, 1e-3)
    for k, (shift,) in enumerate(shifts):
        g = input_gradients[0][k : k + 1]
        assert float(shift.norm()) == pytest.approx(1e-3)
        assert abs(float((shift * g).sum() / (shift.norm() * g.norm()))) == pytest.approx(1.0)
    total = 0.0
    for i in range(4):
        x, y = problem.x[i : i + 1], problem.y[i : i + 1]
        h = problem.h(problem.w, x, y)
        total += max(
            float((problem.h(problem.w, x + d, y) - h).norm() * x.norm() / (d.norm() * h.norm())) for (d,) in shifts
        )
    found = conditioning.input_condition_number(problem.gradient, shifts, 4, problem.members)
    assert_close(float(found), total / 4, **tolerance(condition=1e4))
    # Along the worst direction it tends to the norm of the Jacobian of h with respect to x.
    x, y = problem.x[:1], problem.y[:1]
    w = problem.w.clone().requires_grad_()

    def h_of(x):
        return torch.autograd.grad(problem.loss(w, x, y), w, create_graph=True)[0]

    J = torch.autograd.functional.jacobian(h_of, x).reshape(len(w), 3)
    _, S, Vh = torch.linalg.svd(J)
    exact = float(S[0] * x.norm() / problem.h(problem.w, x, y).norm())
    one = problem.gradient.on(Batch(x, y))
    along = conditioning.input_condition_number(one, [[1e-6 * Vh[:1]]], 1, problem.members)
    across = conditioning.input_condition_number(one, [[1e-6 * Vh[1:2]]], 1, problem.members)
    assert float(along) == pytest.approx(exact, rel=1e-4)
    assert float(across) < float(along)


def test_per_layer_and_scale_invariance(problem):
    members = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    shifts = moves(problem, "batch")
    changes = gradient_changes(problem.gradient, shifts, problem.gradient()).summed(members)
    whole, first, second = changes.condition_number().tolist()
    h, w = problem.h(problem.w), problem.w
    n = sum(p.numel() for p in list(problem.parameters.values())[:2])
    for part, number in ((slice(n), first), (slice(n, None), second), (slice(None), whole)):
        expected = max(
            float((problem.h(w + flat(s)) - h)[part].norm() / h[part].norm() * w.norm() / flat(s).norm())
            for s in shifts
        )
        assert number == pytest.approx(expected, rel=1e-8)
    # The loss in other units: moves of equal size, and the same numbers.
    louder = BatchGradient(problem.model, lambda o, t: 1e3 * LOSS(o, t), problem.gradient.batch, reduction="mean")
    base = louder()
    other = gradient_changes(louder, conditioning.batch_gradient_shifts(base), base).summed(members)
    assert_close(other.condition_number(), changes.condition_number(), **tolerance(condition=1e5))


def test_refusals(problem):
    with pytest.raises(ValueError, match="no shift"):
        gradient_changes(problem.gradient, [], problem.gradient())
    shifts = conditioning.input_gradient_shifts(problem.gradient.of_inputs(), 1)
    with pytest.raises(ValueError, match="num_samples=7"):
        conditioning.input_condition_number(problem.gradient, shifts, 7, problem.members)
