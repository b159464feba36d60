"""Does a learning rate that follows from step-consistency and noise beat the best constant one?

The thesis's open question (section 4.2.2). Plain SGD trains two networks for a fixed number of steps: with constant
rates, with cosine decay from the same rates, and with ``ConsistencyLR``, whose rate follows from measurements every few
steps. Rates of the others are tuned on the reported seeds themselves, which favours them; the controller's settings are
its defaults. What counts is the final training loss, over all training samples, and the test accuracy beside it; the
seconds say what the measurements cost. A constant rate of the controller's own mean, and its rates replayed without
measurements from another seed's run, show what the rate's level and its course are worth.

Where the best constant or cosine rate is at the grid's edge, the grid is extended by factors of two until it is not.
Beside them, the controller with the share of noise in its rate: half-way (signal power 0.5), and as the best single
step has it (signal power 1). Defaults were chosen on seed 100, which is not reported.

Each candidate is written when its seeds are done; ``--resume`` goes on from there, and ``--draw`` makes the picture
from the result without measuring anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, benchmark_parser, quartiles, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim._optional import optional_import
from torchgeom_optim.diagnostics.controller import ConsistencyLR
from torchgeom_optim.diagnostics.hook import Diagnostics
from torchgeom_optim.models import lenet

NAME = "does_the_controller_beat_a_constant_rate"
METRICS = ["gradient_coherence", "gradient_norm", "weight_norm", "weight_condition_number"]
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
MOST_EXTENSIONS = 4
BATCH = 64
CONTROLLERS: dict[str, dict[str, float]] = {
    "controller": {},
    "controller, signal power 0.5": {"signal_power": 0.5},
    "controller, signal power 1": {"signal_power": 1.0},
}
MEAN, REPLAYED = "constant, controller's mean", "controller's rates of the next seed"
Runs = dict[str, list[dict[str, Any]]]  # candidate -> runs in the order of the seeds


def digits_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


# Task -> data set, training samples, network, steps, steps between measurements
TASKS: dict[str, tuple[str, int, Callable[[], nn.Module], int, int]] = {
    "MLP 64-64-64-10": ("digits", 1500, digits_mlp, 800, 10),
    "lenet": ("cifar10", 5000, lenet, 250, 10),
}


def train(
    data: Dataset, make_model: Callable[[], nn.Module], steps: int, seed: int, every: int, rate: Any, kind: str
) -> dict[str, Any]:
    """One run; ``rate`` is a number, the controller's settings, or the rates to replay."""
    torch.manual_seed(seed)
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate if isinstance(rate, float) else 0.01)
    diagnostics = scheduler = None
    if kind == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    elif kind == "replayed":
        rates_at = [value / 0.01 for value, count in rate for _ in range(count)]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: rates_at[min(k, steps - 1)])
    elif kind == "controller":
        diagnostics = Diagnostics(model, criterion, every=every, metrics=METRICS, per_layer=False).attach(optimizer)
        scheduler = ConsistencyLR(optimizer, diagnostics, **rate)
    generator = torch.Generator().manual_seed(seed)
    rates: list[float] = []
    begin = time.process_time()
    for _ in range(steps):
        index = torch.randint(len(data.train_inputs), (BATCH,), generator=generator)
        optimizer.zero_grad()
        criterion(model(data.train_inputs[index]), data.train_targets[index]).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    seconds = time.process_time() - begin
    if diagnostics is not None:
        diagnostics.close()
    loss, _ = evaluate(model, data.train_inputs, data.train_targets)
    _, accuracy = evaluate(model, data.test_inputs, data.test_targets)
    found = {"loss": loss, "accuracy": accuracy, "seconds": seconds, "mean_rate": statistics.fmean(rates)}
    return {**found, "rates": spans(rates)} if kind == "controller" else found


def spans(rates: Sequence[float]) -> list[tuple[float, int]]:
    """Rates as (rate, number of steps in a row that had it)."""
    return [(rate, len(list(same))) for rate, same in itertools.groupby(rates)]


def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy over a whole set."""
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in inputs.split(1000)])
        loss = nn.functional.cross_entropy(outputs, targets)
        return float(loss), float((outputs.argmax(1) == targets).double().mean())


def fill(
    runs: Runs,
    task: str,
    data: Dataset,
    seeds: Sequence[int],
    options: argparse.Namespace,
    written: Callable[[], object],
) -> None:
    """Train what ``runs`` lacks, calling ``written`` after each candidate."""
    _, _, make_model, steps, every = (*TASKS[task][:3], 12, 4) if options.smoke else TASKS[task]

    def have(name: str, kind: str, rate_of: Callable[[int], Any]) -> None:
        if name not in runs:
            runs[name] = [train(data, make_model, steps, seed, every, rate_of(k), kind) for k, seed in enumerate(seeds)]
            written()

    for name, settings in CONTROLLERS.items():
        have(name, "controller", lambda k, settings=settings: settings)
    own = runs["controller"]
    have(MEAN, "constant", lambda k: own[k]["mean_rate"])
    have(REPLAYED, "replayed", lambda k: own[(k + 1) % len(own)]["rates"])
    for kind in ("constant", "cosine"):
        rates = list(RATES[-2:] if options.smoke else RATES)
        for extension in range(1 + MOST_EXTENSIONS):
            for rate in rates:
                have(f"{kind} {rate:g}", kind, lambda k, rate=rate: rate)
            best = float(best_of(kind, runs).removeprefix(kind))
            if options.smoke or min(rates) < best < max(rates) or extension == MOST_EXTENSIONS:
                break
            rates.append(best / 2 if best <= min(rates) else best * 2)


def best_of(kind: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The candidate of that kind with the lowest median loss."""
    return min((name for name in runs if name.startswith(f"{kind} ")), key=lambda name: median_loss(runs[name]))


def median_loss(runs: Sequence[Mapping[str, Any]]) -> float:
    """Of the seeds; a run that diverged counts as infinite."""
    losses = [float(run["loss"]) for run in runs]  # a string where JSON cannot hold it
    return statistics.median(math.inf if math.isnan(loss) else loss for loss in losses)


def summary(runs: Runs) -> dict[str, Any]:
    """Which constant and cosine rates are best, and on how many seeds the controller beats them."""
    best = {kind: best_of(kind, runs) for kind in ("constant", "cosine")}
    wins = {
        kind: sum(float(a["loss"]) < float(b["loss"]) for a, b in zip(runs["controller"], runs[name], strict=True))
        for kind, name in best.items()
    }
    return {"best": best, "seeds on which the controller beats it": wins}


def table(task: str, title: str, runs: Runs) -> list[dict[str, object]]:
    """A row per candidate."""
    best = [best_of(kind, runs) for kind in ("constant", "cosine")]
    rows: list[dict[str, object]] = []
    for name, own in runs.items():
        loss = quartiles([float(run["loss"]) for run in own])
        rows.append(
            {
                "task": f"{task}, {title}",
                "rate": name + (" (best)" if name in best else ""),
                "training loss": loss["median"],
                "quartiles": f"{loss['lower']:.4g}-{loss['upper']:.4g}",
                "test accuracy": quartiles([run["accuracy"] for run in own])["median"],
                "CPU seconds": quartiles([run["seconds"] for run in own])["median"],
            }
        )
    return rows


def draw(folder: Path) -> None:
    """Final loss against rate beside the controller's, and the rates that it chose."""
    plt = optional_import("matplotlib.pyplot", "the picture")
    tasks = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))["numbers"]["tasks"]
    figure, panels = plt.subplots(2, len(tasks), figsize=(5 * len(tasks), 7), layout="constrained", squeeze=False)
    for (task, found), above, below in zip(tasks.items(), *panels, strict=True):
        runs = found["runs"]
        for kind, colour in (("constant", "C0"), ("cosine", "C1")):
            names = sorted(
                (name for name in runs if name.startswith(f"{kind} ")), key=lambda name: float(name.split()[1])
            )
            rates = [float(name.split()[1]) for name in names]
            losses = [quartiles([float(run["loss"]) for run in runs[name]]) for name in names]
            above.plot(rates, [loss["median"] for loss in losses], "o-", color=colour, label=kind)
            band = [[loss[key] for loss in losses] for key in ("lower", "upper")]
            above.fill_between(rates, *band, color=colour, alpha=0.2)
        for number, name in enumerate(CONTROLLERS, start=2):
            above.axhline(median_loss(runs[name]), color=f"C{number}", label=name)
            rates = [rate for rate, count in runs[name][0]["rates"] for _ in range(count)]
            below.plot(rates, color=f"C{number}", label=f"{name}, first seed")
        above.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="final training loss")
        above.set_title(f"{task}, {found['data']}", fontsize=10)
        below.set(yscale="log", xlabel="step", ylabel="learning rate")
        above.legend(fontsize=7)
        below.legend(fontsize=7)
    figure.savefig(folder / f"{NAME}.png", dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Train every candidate on both tasks, writing after each."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="keep the candidates that the result has")
    parser.add_argument("--draw", action="store_true", help="draw the picture from the result, and measure nothing")
    options = start(parser, argv)
    if options.draw:
        draw(options.output or RESULTS)
        return
    seeds = [0, 1] if options.smoke else [0, 1, 2, 3, 4]
    path = (options.output or RESULTS) / f"{NAME}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["numbers"]["tasks"] if options.resume and path.exists() else {}
    numbers: dict[str, Any] = {"batch_size": BATCH, "metrics": METRICS, "tasks": known}
    rows: list[dict[str, object]] = []
    for task, (source, count, _, steps, every) in TASKS.items():
        data = stand_in(source, 128, 64) if options.smoke else load_dataset(source, options.root, train_limit=count)
        about = {"data": data.title, "training_samples": len(data.train_inputs), "steps": steps}
        found = known.setdefault(task, {**about, "measured_every": every, "runs": {}})
        fill(found["runs"], task, data, seeds, options, lambda: write_result(NAME, numbers, options, seeds=seeds))
        found |= summary(found["runs"])
        rows += table(task, data.title, found["runs"])
    write_result(NAME, numbers, options, seeds=seeds, rows=rows)


if __name__ == "__main__":
    main()
