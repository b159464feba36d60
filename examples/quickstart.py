"""Train the same network with tuned SGD and with WhiteningSGD as it comes, print a table, draw both curves.

``make demo`` runs this on scikit-learn's digits. Larger data are read from a folder (see ``examples/datasets.py``)::

    make demo ARGS="--data cifar10 --root DIR"

Both optimizers start from the same weights and see the same batches, and the step size of both decays linearly to 0.
WhiteningSGD is given no learning rate. SGD's learning rates and momenta (TUNED, below) were chosen by the mean of the
logarithm of the training loss over the epochs (the area under the curve that is drawn), on a seed that the
demonstration does not use; ``--tune`` repeats that search.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.datasets import Dataset, load_dataset
from torchgeom_optim import WhiteningSGD
from torchgeom_optim._optional import optional_import
from torchgeom_optim.models import lenet, mlp_deep


@dataclass(frozen=True)
class Task:
    """What is trained on a data set, and for how long."""

    network: Callable[[], nn.Module]
    network_title: str
    epochs: int
    train_limit: int | None = None


@dataclass(frozen=True)
class Setting:
    """An optimizer with the values that the search chose for it; a learning rate of None is the optimizer's own."""

    optimizer: type[torch.optim.Optimizer]
    lr: float | None
    momentum: float = 0.0


@dataclass
class Curve:
    """What was seen after each epoch of one run; entry 0 is before the first step."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


TASKS = {
    "digits": Task(lambda: mlp_deep(in_features=64), "deep MLP, 64-(128)x9-10", epochs=10),
    "mnist": Task(lambda: lenet(in_channels=1, image_size=28), "LeNet", epochs=4, train_limit=10_000),
    "fashion-mnist": Task(lambda: lenet(in_channels=1, image_size=28), "LeNet", epochs=4, train_limit=10_000),
    "cifar10": Task(lenet, "LeNet", epochs=6, train_limit=10_000),
}
BATCH_SIZE = 64
SEEDS = (1, 2, 3)
TUNING_SEED = 0
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MOMENTA = (0.0, 0.9)

# Chosen by --tune; no best value lies at the edge of the grid of learning rates. Geometric mean of the training loss on
# the digits, and at the neighbouring rates: .034 (.135, .051); WhiteningSGD .0069. The other sets' were chosen for a
# rate that does not decay.
TUNED = {
    "digits": Setting(torch.optim.SGD, 0.01, 0.9),
    "mnist": Setting(torch.optim.SGD, 0.03, 0.9),
    "fashion-mnist": Setting(torch.optim.SGD, 0.03, 0.9),
    "cifar10": Setting(torch.optim.SGD, 0.03, 0.9),
}
OURS = Setting(WhiteningSGD, None)
COLORS = ("#7a869a", "#d1495b")


def train(task: Task, data: Dataset, setting: Setting, seed: int, on_epoch: Callable[[Curve], None]) -> Curve:
    """Train one network; everything random follows from the seed.

    Args:
        task: network and budget.
        data: the data set.
        setting: optimizer and its values.
        seed: of the weights and of the order of the samples.
        on_epoch: called after each epoch.

    Returns:
        The curve; it ends early if the loss is no longer finite.
    """
    torch.manual_seed(seed)
    network = task.network()
    optimizer = _optimizer(setting, network)
    num_steps = task.epochs * -(-len(data.train_inputs) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    order = torch.Generator().manual_seed(seed)
    curve = Curve()
    elapsed = 0.0
    _record(curve, network, data, elapsed)
    for _ in range(task.epochs):
        begin = time.perf_counter()
        for batch in torch.randperm(len(data.train_inputs), generator=order).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(network(data.train_inputs[batch]), data.train_targets[batch]).backward()
            optimizer.step()
            schedule.step()
        elapsed += time.perf_counter() - begin
        _record(curve, network, data, elapsed)
        on_epoch(curve)
        if not math.isfinite(curve.loss[-1]):
            break
    return curve


def _optimizer(setting: Setting, network: nn.Module) -> torch.optim.Optimizer:
    if setting.optimizer is WhiteningSGD:
        return WhiteningSGD(network, lr=setting.lr, momentum=setting.momentum)
    optimizer: Any = setting.optimizer
    return optimizer(network.parameters(), lr=setting.lr, momentum=setting.momentum)  # type: ignore[no-any-return]


@torch.no_grad()
def _record(curve: Curve, network: nn.Module, data: Dataset, elapsed: float) -> None:
    network.eval()
    train_logits = _logits(network, data.train_inputs)
    test_classes = _logits(network, data.test_inputs).argmax(1)
    network.train()
    curve.loss.append(F.cross_entropy(train_logits, data.train_targets).item())
    curve.accuracy.append((test_classes == data.test_targets).float().mean().item())
    curve.seconds.append(elapsed)


def _logits(network: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([network(part) for part in inputs.split(1000)])


def compare(task: Task, data: Dataset, settings: Sequence[Setting], seeds: Sequence[int]) -> list[list[Curve]]:
    """Train with each optimizer from each seed, in turns, with a progress bar.

    Args:
        task: network and budget.
        data: the data set.
        settings: the optimizers.
        seeds: one run of each optimizer for each.

    Returns:
        For each optimizer its curves, one a seed.
    """
    curves: list[list[Curve]] = [[] for _ in settings]
    progress = optional_import("tqdm", "the progress bar").tqdm
    width = max(len(_title(setting)) for setting in settings)
    for seed in seeds:
        for setting, collected in zip(settings, curves, strict=True):
            with progress(total=task.epochs, desc=f"{_title(setting):{width}}  seed {seed}", unit="epoch") as bar:

                def advance(curve: Curve, bar: Any = bar) -> None:
                    state = f"loss {curve.loss[-1]:.4f}, test accuracy {curve.accuracy[-1]:.3f}"
                    bar.set_postfix_str(state, refresh=False)
                    bar.update()

                collected.append(train(task, data, setting, seed, advance))
    return curves


def tune(task: Task, data: Dataset) -> dict[Setting, float]:
    """Search the grid, and print the geometric mean of the training loss over the epochs at every point.

    Args:
        task: network and budget.
        data: the data set.

    Returns:
        That figure for every setting, inf where the loss did not stay finite.
    """
    print(f"{data.title}, {task.network_title}: training loss, geometric mean over {task.epochs} epochs")
    print(f"{'learning rate':>26}" + "".join(f"{lr:>9g}" for lr in LEARNING_RATES))
    found = {}
    for momentum in MOMENTA:
        row = [Setting(torch.optim.SGD, lr, momentum) for lr in LEARNING_RATES]
        for setting in row:
            found[setting] = _mean_loss(train(task, data, setting, TUNING_SEED, lambda curve: None))
        figures = "".join(f"{found[setting]:9.3g}" for setting in row)
        print(f"{'SGD':>12}, momentum {momentum:.1f}{figures}", flush=True)
    best = min(found, key=found.__getitem__)
    edge = " (at the edge of the grid)" if best.lr in (LEARNING_RATES[0], LEARNING_RATES[-1]) else ""
    print(f"best for SGD: lr={best.lr:g}, momentum={best.momentum:g}{edge}")
    ours = _mean_loss(train(task, data, OURS, TUNING_SEED, lambda curve: None))
    print(f"WhiteningSGD, without a learning rate: {ours:.3g}")
    return found


def table(settings: Sequence[Setting], curves: Sequence[Sequence[Curve]]) -> str:
    """The result as text: medians over the seeds.

    Args:
        settings: the optimizers; epochs are counted until the first one's final loss is reached.
        curves: of each optimizer, one a seed.

    Returns:
        The table.
    """
    goals = [curve.loss[-1] for curve in curves[0]]
    until = f"epochs to {_title(settings[0])}'s loss"
    lines = [("", "lr", "momentum", "training loss", "test accuracy", until, "seconds")]
    for setting, runs in zip(settings, curves, strict=True):
        epochs = statistics.median(_epochs_until(run, goal) for run, goal in zip(runs, goals, strict=True))
        lines.append(
            (
                _title(setting),
                "none" if setting.lr is None else f"{setting.lr:g}",
                f"{setting.momentum:g}",
                f"{statistics.median(run.loss[-1] for run in runs):.2g}",
                f"{statistics.median(run.accuracy[-1] for run in runs):.1%}",
                f"{epochs:g}" if math.isfinite(epochs) else "not reached",
                f"{statistics.median(run.seconds[-1] for run in runs):.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def draw(path: Path, title: str, settings: Sequence[Setting], curves: Sequence[Sequence[Curve]]) -> None:
    """Draw training loss over epochs and over seconds: each run thin, the median of the seeds thick.

    Args:
        path: the PNG to write.
        title: what was trained on what.
        settings: the optimizers.
        curves: of each optimizer, one a seed.
    """
    figure = optional_import("matplotlib.figure", "the picture").Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for axes, over in zip(figure.subplots(1, 2, sharey=True), ("epochs", "seconds"), strict=True):
        for setting, runs, color in zip(settings, curves, COLORS, strict=True):
            length = min(len(run.loss) for run in runs)
            along = [list(range(length)) if over == "epochs" else run.seconds[:length] for run in runs]
            for x, run in zip(along, runs, strict=True):
                axes.plot(x, run.loss[:length], color=color, linewidth=0.8, alpha=0.4)
            middle = [statistics.median(values) for values in zip(*(run.loss[:length] for run in runs), strict=True)]
            x = [statistics.median(values) for values in zip(*along, strict=True)]
            label = (
                f"{_title(setting)}, lr {setting.lr:g}, momentum {setting.momentum:g}"
                if setting.lr
                else (f"{_title(setting)}, no learning rate")
            )
            axes.plot(x, middle, color=color, linewidth=2.4, label=label, solid_capstyle="round")
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", integer=over == "epochs")
        axes.set_xlabel(f"{over} of training" if over == "seconds" else over)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(color="#9aa3af")
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(frameon=False, loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _title(setting: Setting) -> str:
    return setting.optimizer.__name__


def _mean_loss(curve: Curve) -> float:
    """Geometric mean over the epochs; what has diverged counts as inf."""
    after = curve.loss[1:]
    return statistics.geometric_mean(after) if math.isfinite(sum(after)) else math.inf


def _epochs_until(curve: Curve, goal: float) -> float:
    return next((float(epoch) for epoch, loss in enumerate(curve.loss) if loss <= goal), math.inf)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration.

    Args:
        argv: arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(TASKS), default="digits")
    parser.add_argument("--root", type=Path, help="folder with the data sets (default: $TORCHGEOM_DATA)")
    parser.add_argument("--epochs", type=int, help="instead of the number that the settings were tuned for")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (default: 1)")
    parser.add_argument("--output", type=Path, help="the PNG to write (default: output/quickstart_DATA.png)")
    parser.add_argument("--tune", action="store_true", help="search the learning rates instead, which takes minutes")
    options = parser.parse_args(argv)
    for name in ("epochs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value}: must be at least 1; leave it out for the usual number")

    torch.set_num_threads(options.threads)
    task = TASKS[options.data]
    if options.epochs is not None:
        task = replace(task, epochs=options.epochs)
    try:
        data = load_dataset(options.data, options.root, train_limit=task.train_limit)
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    title = f"{task.network_title} on {data.title}, {len(data.train_inputs):,} images, batches of {BATCH_SIZE}"
    if options.tune:
        tune(task, data)
        return
    print(f"{title}; {len(options.seeds)} seeds", flush=True)
    settings = (TUNED[options.data], OURS)
    curves = compare(task, data, settings, options.seeds)
    print(
        f"\n{table(settings, curves)}\n\nmedians over the seeds; "
        "SGD tuned over a grid of half-decades, WhiteningSGD as it comes"
    )
    path = options.output or Path("output") / f"quickstart_{options.data}.png"
    draw(path, title, settings, curves)
    print(f"curves drawn to {path}")


if __name__ == "__main__":
    main()
