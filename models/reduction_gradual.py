r"""Gradual reduction without labels: directions are dropped a few at a time while the kept coefficients are trained.

    k_t = k (P / k)^((1 - t/T)^2),   t = 0 ... T

Every few steps the importances are taken anew and the k_t largest are kept; in between the kept c are trained on the
mean of KL(p_dense || p) over unlabelled inputs. On the way lam is estimated from one row of random signs per sample
(:func:`~torchgeom_optim.models.reduction_metric.probed_jacobian`), for time is better spent on training than on all C
rows. T is by default 60 % of the training: what is dropped last costs most, and the k that stay need time to learn it.
With ``basis="pixels"`` it is ordinary gradual pruning with distillation.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.mini_batches import MiniBatch, map_tensors, tensors_of
from torchgeom_optim.models.reduced_model import ReducedModel
from torchgeom_optim.models.reduction import decompose
from torchgeom_optim.models.reduction_decomposition import Decomposition, importances, number_of
from torchgeom_optim.models.reduction_metric import divergence, head_of, probed_jacobian
from torchgeom_optim.models.reduction_report import take_samples

__all__ = ["distil", "kept_at", "reduce_gradually"]

_OF_THE_JACOBIAN = ("parameters", "batch_size", "memory_limit")
_REMEMBERED_BYTES = 2**28
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def kept_at(share_done: float, num_directions: int, num_weights: int) -> int:
    """k_t = k (P / k)^((1 - t/T)^2): P at first, k at the end, most of the way down early.

    Args:
        share_done: t / T in [0, 1].
        num_directions: k.
        num_weights: P, or where it starts from.

    Returns:
        k_t, rounded up.

    Example:
        >>> [kept_at(done, 10, 1000) for done in (0.0, 0.5, 1.0)]
        [1000, 32, 10]
    """
    k: float = num_directions * (num_weights / num_directions) ** ((1.0 - share_done) ** 2)
    return min(num_weights, math.ceil(k - 1e-9 * num_weights))


def reduce_gradually(
    model: nn.Module,
    data: Any,
    num_directions: int | float,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 5e-3,
    optimizer: OptimizerFactory | None = None,
    every: int = 20,
    settle: float = 0.4,
    importance_samples: int = 300,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    test_data: Any = None,
    test_targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ReducedModel:
    """A trained network in few directions, reached gradually and without labels.

    Args:
        model: as for :func:`~torchgeom_optim.models.reduction.reduce_model`; left as it was. It teaches, and it is
            followed, in evaluation behaviour: no dropout, running statistics as they are.
        data: unlabelled inputs: a tensor, a tuple of arguments or a mapping, from which mini-batches are drawn; or an
            iterable of mini-batches that can be gone through again and again (labels in it are not used).
        num_directions: k at the end, or a share of P.
        steps: of training.
        batch_size: where mini-batches are drawn.
        lr: of Adam, falling linearly to zero over the last half; the optimizer's own is scaled in the same way.
        optimizer: makes an optimizer of parameters; Adam by default.
        every: steps after which directions are dropped.
        settle: share of the training, at its end, in which no more are dropped, in [0, 1).
        importance_samples: drawn each time for the estimate of lam.
        seconds: stop after so much time instead of ``steps``; the schedule goes by the share of time.
        clock: what tells it; ``time.process_time`` leaves out what other programs take.
        test_data: for the report.
        test_targets: labels beside it.
        generator: of the mini-batches and of the signs, on the CPU; by default one seeded with 0.
        **options: as for :func:`~torchgeom_optim.models.reduction.decompose`: metric, basis, importance, center, ...

    Returns:
        The reduced network with its report.

    Raises:
        ValueError: an argument out of range; data that run dry; the loss is not finite.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("every", every)):
        if not value >= 1:
            raise ValueError(f"{name}={value}: must be at least 1.")
    if not 0.0 < lr < math.inf:
        raise ValueError(f"lr={lr}: must be in (0, inf); 5e-3 is a common start for Adam.")
    if seconds is not None and not 0.0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds}: must be in (0, inf), or None to go by steps.")
    if not 0.0 <= settle < 1.0:
        raise ValueError(f"settle={settle}: must be in [0, 1), a share of the training; 0.4 is the default.")
    start = clock()
    decomposition = decompose(model, data, **options)
    k = number_of(num_directions, decomposition.directions, decomposition.samples.size)
    reduced = decomposition.reduced(decomposition.directions.num_directions, measure=False, compensate=0)
    training = _Distillation(
        model, reduced, decomposition.metric, decomposition.select, decomposition.class_dim, optimizer or _adam(lr)
    )
    generator = generator or torch.Generator().manual_seed(0)
    ranking = _Ranking(decomposition, reduced, generator, {k: v for k, v in options.items() if k in _OF_THE_JACOBIAN})
    batches = _mini_batches(data, batch_size, reduced.coefficients.device, generator)
    recent: list[_Batch] = []
    step, done = 0, 0.0
    while done < 1.0:
        if step % every == 0:
            fewer = kept_at(min(1.0, done / (1.0 - settle)), k, decomposition.directions.num_directions)
            if recent and fewer < reduced.num_directions:
                training.keep(ranking.most_important(fewer, recent))
            recent = []
        batch = next(batches)
        if sum(b.samples.size for b in recent) < importance_samples:
            recent.append(batch)
        training.step(batch, min(1.0, 2 * (1.0 - done)))
        step += 1
        done = step / steps if seconds is None else (clock() - start) / seconds
    if k < reduced.num_directions:
        training.keep(ranking.most_important(k, recent or [next(batches)]))
    training.close()
    return decomposition.measured(reduced, test_data, test_targets)


def distil(
    reduced: ReducedModel,
    teacher: nn.Module,
    data: Any,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    lr: float = 2e-3,
    metric: str = "fisher",
    optimizer: OptimizerFactory | None = None,
    select: Callable[[Any], Tensor] | None = None,
    class_dim: int = -1,
    generator: torch.Generator | None = None,
) -> ReducedModel:
    """Train a reduced network's coefficients to follow a teacher on unlabelled inputs; no direction is dropped.

    Args:
        reduced: trained in place.
        teacher: the dense network.
        data: as for :func:`reduce_gradually`.
        steps: of training.
        batch_size: where mini-batches are drawn.
        lr: of Adam, falling linearly to zero over the last half.
        metric: "fisher", KL(p_teacher || p); "outputs", half the squared difference.
        optimizer: makes an optimizer of parameters.
        select: picks the outputs out of what the networks return.
        class_dim: axis of the classes.
        generator: of the mini-batches.

    Returns:
        ``reduced`` itself; its report is gone, for it holds no more.

    Raises:
        ValueError: an unknown metric; data that run dry; the loss is not finite.
    """
    training = _Distillation(teacher, reduced, metric, select, class_dim, optimizer or _adam(lr))
    batches = _mini_batches(
        data, batch_size, reduced.coefficients.device, generator or torch.Generator().manual_seed(0)
    )
    for step in range(steps):
        training.step(next(batches), min(1.0, 2 * (1.0 - step / steps)))
    training.close()
    reduced.report = None
    return reduced


class _Batch(NamedTuple):
    """Inputs, and where they are among the samples that come again; None of a loader's."""

    samples: MiniBatch
    rows: Tensor | None = None
    num_samples: int = 0


class _Distillation:
    """Trains the coefficients on the divergence from a frozen copy of the teacher."""

    def __init__(
        self,
        teacher: nn.Module,
        reduced: ReducedModel,
        metric: str,
        select: Callable[[Any], Tensor] | None,
        class_dim: int,
        optimizer: OptimizerFactory,
    ) -> None:
        head_of(metric)  # refuses an unknown one
        self._teacher = _Teacher(teacher, select or _same)
        self._reduced = reduced
        self._modes = [(module, module.training) for module in reduced.modules()]
        reduced.eval()
        self._metric, self._select, self._class_dim = metric, select or _same, class_dim
        self._optimizer = optimizer([reduced.coefficients])
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def step(self, batch: _Batch, factor: float) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        wanted = self._teacher.outputs(batch)
        with torch.enable_grad():
            loss = divergence(wanted, self._select(batch.samples.call(self._reduced)), self._metric, self._class_dim)
            (gradient,) = torch.autograd.grad(loss, [self._reduced.coefficients])
        self._reduced.coefficients.grad = gradient
        self._optimizer.step()

    def keep(self, positions: Tensor) -> None:
        """Drop all coefficients but these, and what the optimizer knows of the others."""
        before = self._reduced.coefficients
        self._reduced.keep(positions)
        state = self._optimizer.state.pop(before, {})
        self._optimizer.state[self._reduced.coefficients] = {
            key: x[positions] if isinstance(x, Tensor) and x.shape == before.shape else x for key, x in state.items()
        }
        self._optimizer.param_groups[0]["params"] = [self._reduced.coefficients]

    def close(self) -> None:
        self._reduced.coefficients.grad = None
        for module, mode in self._modes:
            module.training = mode
        if not bool(torch.isfinite(self._reduced.coefficients).all()):
            raise ValueError("training has left finite numbers: the loss must fall. Take a smaller lr.")


class _Teacher:
    """The dense network's outputs; of samples that come again they are remembered, where there is room for all."""

    def __init__(self, model: nn.Module, select: Callable[[Any], Tensor]) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._select = select
        self._remembered: Tensor | None = None  # [N, ...]
        self._known = torch.empty(0, dtype=torch.bool)  # [N], which of them

    @torch.no_grad()
    def outputs(self, batch: _Batch) -> Tensor:
        if batch.rows is None:
            return self._select(batch.samples.call(self._model))
        if self._remembered is None:
            found = self._select(batch.samples.call(self._model))
            if found[0].numel() * found.element_size() * batch.num_samples > _REMEMBERED_BYTES:
                return found
            self._remembered = found.new_empty(batch.num_samples, *found.shape[1:])
            self._known = torch.zeros(batch.num_samples, dtype=torch.bool)
            self._remember(batch.rows, found)
            return found
        new = ~self._known[batch.rows]
        if bool(new.any()):
            part = MiniBatch(_rows(batch.samples.inputs, new.nonzero()[:, 0]), None, int(new.sum()))
            self._remember(batch.rows[new], self._select(part.call(self._model)))
        return self._remembered[batch.rows.to(self._remembered.device)]

    def _remember(self, rows: Tensor, outputs: Tensor) -> None:
        assert self._remembered is not None
        self._remembered[rows.to(outputs.device)] = outputs
        self._known[rows] = True


class _Ranking:
    """Takes the importances of a reduced network's directions anew, at its present weights."""

    def __init__(
        self,
        decomposition: Decomposition,
        reduced: ReducedModel,
        generator: torch.Generator,
        options: Mapping[str, Any],
    ) -> None:
        self._decomposition, self._reduced, self._options = decomposition, reduced, options
        self._generator = generator
        self._plain = reduced.merge().eval()

    def most_important(self, num: int, batches: list[_Batch]) -> Tensor:
        """Positions among the coefficients, ascending."""
        reduced, decomposition = self._reduced, self._decomposition
        diagonal = torch.zeros_like(reduced.coefficients, dtype=torch.float64)
        if decomposition.importance != "magnitude":  # which needs no Fisher matrix
            own = dict(self._plain.named_parameters())
            with torch.no_grad():
                for name, value in reduced.weights().items():
                    own[name].copy_(value)
            jacobian = probed_jacobian(
                self._plain, _joined(batches), decomposition.metric, self._generator, select=decomposition.select,
                class_dim=decomposition.class_dim, **self._options
            )  # fmt: skip
            diagonal = reduced.directions.diagonal(jacobian)[reduced.positions]
        ranking = importances(decomposition.importance, reduced.coefficients, diagonal)
        return ranking.topk(num).indices.sort().values


def _mini_batches(data: Any, batch_size: int, device: torch.device, generator: torch.Generator) -> Iterator[_Batch]:
    """Mini-batches without end: each sample once before any comes again, or the loader's own, again and again."""
    if isinstance(data, (Tensor, tuple, Mapping)):
        whole = take_samples(data, None, None, None)
        while True:
            order = torch.randperm(whole.size, generator=generator)
            for start in range(0, max(1, whole.size - batch_size + 1), batch_size):
                part = order[start : start + batch_size]
                yield _Batch(_on(device, _rows(whole.inputs, part), len(part)), part, whole.size)
    while True:
        empty = True
        for item in data:
            one = take_samples([item], None, None, None)
            empty = False
            yield _Batch(_on(device, one.inputs, one.size))
        if empty:
            raise ValueError(
                "the data ran dry: they must give mini-batches each time they are gone through. Give a list of "
                "mini-batches or a DataLoader, not an iterator."
            )


def _rows(inputs: Any, positions: Tensor) -> Any:
    return map_tensors(lambda x: x[positions.to(x.device)], inputs)


def _on(device: torch.device, inputs: Any, size: int) -> MiniBatch:
    return MiniBatch(map_tensors(lambda x: x.to(device), inputs), None, size)


def _joined(batches: list[_Batch]) -> MiniBatch:
    columns = iter([torch.cat(same) for same in zip(*(tensors_of(b.samples.inputs) for b in batches), strict=True)])
    inputs = map_tensors(lambda _: next(columns), batches[0].samples.inputs)
    return MiniBatch(inputs, None, sum(b.samples.size for b in batches))


def _adam(lr: float) -> OptimizerFactory:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def _same(x: Any) -> Any:
    return x
