"""The training loop around a frozen network: learning-rate decay, early stopping, checkpoints, a progress bar."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from torchgeom_optim._optional import optional_import

__all__ = ["DEFAULT_OPTIMIZERS", "EpochRow", "FitSettings", "NonFiniteLossError", "OptimizerFactory", "fit_head"]

Batches = Callable[[], Iterable[tuple[Mapping[str, Any], Tensor]]]
EpochRow = dict[str, float]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


def _adam(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return Adam(parameters, lr, fused=all(p.device.type in ("cpu", "cuda") for p in parameters))


# By method; the paper's is trained by SGD, which it finds better than Adam (Fig. 4).
DEFAULT_OPTIMIZERS: dict[str, OptimizerFactory] = {
    "gated": lambda parameters: _adam(parameters, 1e-3),
    "linearised": lambda parameters: _adam(parameters, 3e-3),
    "paper": lambda parameters: SGD(parameters, 0.05, momentum=0.9),
}


class NonFiniteLossError(ValueError):
    """The loss of an epoch is nan or infinite: training diverged, or the features are not finite.

    Attributes:
        loss: that loss.
        epoch: from 1.
    """

    def __init__(self, loss: float, epoch: int) -> None:
        super().__init__(loss, epoch)
        self.loss, self.epoch = loss, epoch

    def __str__(self) -> str:
        return (
            f"loss {self.loss} in epoch {self.epoch}: it must stay finite. Look for nan in the inputs and in the "
            "features, or take a smaller learning rate."
        )


@dataclass(frozen=True)
class FitSettings:
    """How a head is trained.

    Attributes:
        epochs: passes over the data.
        make_optimizer: from the parameters that are trained to their optimizer.
        schedule: "linear" lowers the learning rate to 0 over all steps; "constant" leaves it.
        patience: stop after so many epochs without a better validation accuracy, and return to the best; None never.
        checkpoint: file that the state goes to after every epoch, and that a fit goes on from; None for none.
        progress: whether to show a bar (extra ``demo``); None where there is a terminal and the library.
        missing_classes: whether classes may be absent from the data.
        identity: what must be the same for a checkpoint to be gone on from.
    """

    epochs: int
    make_optimizer: OptimizerFactory
    schedule: str = "linear"
    patience: int | None = None
    checkpoint: str | Path | None = None
    progress: bool | None = None
    missing_classes: bool = False
    identity: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs}: must be at least 0; 2 to 5 are common.")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: must be 'linear' or 'constant'; 'linear' is the default.")
        if self.patience is not None and not self.patience >= 1:
            raise ValueError(
                f"patience={self.patience}: must be at least 1, or None for no early stopping; 3 is common."
            )


@dataclass
class _State:
    """What a checkpoint holds beside the head and its optimizer."""

    epoch: int = 0
    history: list[EpochRow] = field(default_factory=list)
    best: float = -math.inf
    best_head: dict[str, Tensor] | None = None
    waited: int = 0


def fit_head(
    head: nn.Module,
    batches: Batches,
    loss_of: Callable[[Mapping[str, Any], Tensor], Tensor],
    num_classes: int,
    settings: FitSettings,
    validate: Callable[[], float] | None,
    generator: torch.Generator,
    num_batches: int | None = None,
) -> list[EpochRow]:
    """Train a head on records, in place.

    Args:
        head: what is trained.
        batches: records with targets, one pass over the data per call.
        loss_of: the mean loss of a batch.
        num_classes: C.
        settings: see there.
        validate: accuracy on data set aside, after every epoch.
        generator: everything random is drawn from it; its state goes into the checkpoint.
        num_batches: of one pass, for the schedule and the bar.

    Returns:
        One row per epoch: "epoch", "loss", and "validation_accuracy" where there is one.

    Raises:
        ValueError: labels out of range, classes missing, a loss that is not finite (:class:`NonFiniteLossError`), a
            checkpoint of another fit. The head is then what it was.
        TypeError: data that are no pairs; likewise.
        BaseException: whatever the base and the loader raise, and interruptions; likewise. The checkpoint keeps the
            epochs that are over.
    """
    before = copy.deepcopy(head.state_dict())
    optimizer = settings.make_optimizer([p for p in head.parameters() if p.requires_grad])
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    state = _State()
    mode = head.training
    try:
        if settings.checkpoint is not None and Path(settings.checkpoint).exists():
            state = _resumed(Path(settings.checkpoint), settings.identity, head, optimizer, generator)
        with _bar(settings, num_batches, state.epoch) as advance:
            while state.epoch < settings.epochs and not (settings.patience and state.waited >= settings.patience):
                head.train()
                row = _epoch(
                    head, batches, loss_of, num_classes, settings, optimizer, rates, state, num_batches, advance
                )
                head.eval()
                if validate is not None:
                    row["validation_accuracy"] = accuracy = validate()
                    state.waited = 0 if accuracy > state.best else state.waited + 1
                    if accuracy > state.best and settings.patience is not None:
                        state.best_head = copy.deepcopy(head.state_dict())
                    state.best = max(state.best, accuracy)
                state.history.append(row)
                state.epoch += 1
                if settings.checkpoint is not None:
                    _save(Path(settings.checkpoint), settings.identity, head, optimizer, generator, state)
    except BaseException:  # whatever a loader raises, and Ctrl-C: a head half trained is none
        head.load_state_dict(before)
        head.train(mode)
        raise
    if state.best_head is not None:
        head.load_state_dict(state.best_head)
    head.eval()
    return state.history


def _epoch(
    head: nn.Module,
    batches: Batches,
    loss_of: Callable[[Mapping[str, Any], Tensor], Tensor],
    num_classes: int,
    settings: FitSettings,
    optimizer: Optimizer,
    rates: list[float],
    state: _State,
    num_batches: int | None,
    advance: Callable[[Tensor], None],
) -> EpochRow:
    total: Tensor | None = None
    counts: Tensor | None = None
    count = 0
    for i, (record, targets) in enumerate(batches()):
        if state.epoch == 0:  # later passes see the same labels
            seen = _label_counts(targets, num_classes)
            counts = seen if counts is None else counts + seen
        if settings.schedule == "linear":
            done = (state.epoch + (i / num_batches if num_batches else 0.0)) / settings.epochs
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * max(0.0, 1.0 - done)
        optimizer.zero_grad()
        loss = loss_of(record, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        weighted = loss.detach() * len(targets)
        total = weighted if total is None else total + weighted
        count += len(targets)
        advance(loss)
    if total is None:
        raise ValueError("data gave no sample: at least one is needed. Is the loader empty, or an iterator used up?")
    mean = float(total) / count
    if not math.isfinite(mean):
        raise NonFiniteLossError(mean, state.epoch + 1)
    if counts is not None and not settings.missing_classes and (missing := (counts == 0).nonzero().flatten().tolist()):
        raise ValueError(
            f"classes {missing} of {num_classes} do not occur in the data: every declared class must. Correct "
            "num_classes, or pass missing_classes=True."
        )
    return {"epoch": float(state.epoch + 1), "loss": mean}


def _label_counts(targets: Tensor, num_classes: int) -> Tensor:
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(
            f"targets of shape {list(targets.shape)} and type {targets.dtype}: whole numbers [N] in [0, {num_classes}) "
            "are needed. Pass class indices."
        )
    counts = torch.bincount(targets.clamp(0, num_classes - 1), minlength=num_classes)
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels from {low} to {high}: must be in [0, {num_classes}). Correct num_classes or the labels."
        )
    return counts


@contextmanager
def _bar(settings: FitSettings, num_batches: int | None, epoch: int) -> Iterator[Callable[[Tensor], None]]:
    wanted = settings.progress
    if wanted is None:
        wanted = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    if not wanted:
        yield lambda loss: None
        return
    total = None if num_batches is None else settings.epochs * num_batches
    tqdm = optional_import("tqdm", "the progress bar").tqdm
    with tqdm(total=total, initial=epoch * (num_batches or 0), desc="GradNet", unit="batch") as bar:

        def advance(loss: Tensor) -> None:
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{float(loss.detach()):.4g}")

        yield advance


def _save(
    path: Path, identity: str, head: nn.Module, optimizer: Optimizer, generator: torch.Generator, state: _State
) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # an interruption leaves the last checkpoint whole
    contents = {
        "identity": identity,
        "head": head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "state": dict(vars(state)),
    }
    try:
        torch.save(contents, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _resumed(path: Path, identity: str, head: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> _State:
    device = next(head.parameters()).device
    contents = torch.load(path, map_location=device, weights_only=True)
    if contents["identity"] != identity:
        raise ValueError(
            f"checkpoint {path.name} belongs to another network or to other settings: it must be of this very fit. "
            "Give another file, or delete it."
        )
    head.load_state_dict(contents["head"])
    optimizer.load_state_dict(contents["optimizer"])
    generator.set_state(contents["generator"].cpu())
    return _State(**contents["state"])
