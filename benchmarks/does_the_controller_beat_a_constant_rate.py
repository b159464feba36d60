"""Does a learning rate that follows from step-consistency and noise beat the best constant one?

The thesis's open question (section 4.2.2). Plain SGD trains two networks for a fixed number of steps: with constant
rates, with cosine decay from the same rates, and with ``ConsistencyLR``, whose rate follows from measurements every few
steps. Rates of the others are tuned on the reported seeds themselves, which favours them; the controller's settings are
its defaults. What counts is the final training loss, over all training samples, and the test accuracy beside it; the
seconds say what the measurements cost. A constant rate of the controller's own mean, and its rates replayed without
measurements from another seed's run, show what the rate's level and its course are worth.

Beside it, the controller with the share of noise in its rate: half-way (signal power 0.5), and as the best single step
has it (signal power 1). Defaults were chosen on seed 100, which is not reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import benchmark_parser, quartiles, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim.diagnostics.controller import ConsistencyLR
from torchgeom_optim.diagnostics.hook import Diagnostics
from torchgeom_optim.models import lenet

METRICS = ["gradient_coherence", "gradient_norm", "weight_norm", "weight_condition_number"]
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
BATCH = 64


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
    """One run; ``rate`` is a number, the controller's settings, or a list of rates to replay."""
    torch.manual_seed(seed)
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate if isinstance(rate, float) else 0.01)
    diagnostics = scheduler = None
    if kind == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    elif kind == "replayed":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: rate[min(k, steps - 1)] / 0.01)
    elif kind == "controller":
        diagnostics = Diagnostics(model, criterion, every=every, metrics=METRICS, per_layer=False).attach(optimizer)
        scheduler = ConsistencyLR(optimizer, diagnostics, **rate)
    generator = torch.Generator().manual_seed(seed)
    rates, begin = [], time.process_time()
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
    return {"loss": loss, "accuracy": accuracy, "seconds": seconds, "rates": rates}


def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy over a whole set."""
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in inputs.split(1000)])
        loss = nn.functional.cross_entropy(outputs, targets)
        return float(loss), float((outputs.argmax(1) == targets).double().mean())


def task_numbers(name: str, data: Dataset, seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """All candidates on one task: name -> runs in the order of the seeds."""
    _, _, make_model, steps, every = TASKS[name]
    steps = 12 if smoke else steps
    every = 4 if smoke else every

    def runs(kind: str, rate: Any) -> list[dict[str, Any]]:
        return [train(data, make_model, steps, seed, every, rate, kind) for seed in seeds]

    candidates = {
        f"{kind} {rate:g}": runs(kind, rate) for kind in ("constant", "cosine") for rate in RATES[-2 if smoke else 0 :]
    }
    candidates["controller"] = runs("controller", {})
    candidates["controller, signal power 0.5"] = runs("controller", {"signal_power": 0.5})
    candidates["controller, signal power 1"] = runs("controller", {"signal_power": 1.0})
    own = candidates["controller"]
    candidates["constant, controller's mean"] = [
        train(data, make_model, steps, seed, every, statistics.fmean(run["rates"]), "constant")
        for seed, run in zip(seeds, own, strict=True)
    ]
    candidates["controller's rates of the next seed"] = [
        train(data, make_model, steps, seed, every, own[(k + 1) % len(own)]["rates"], "replayed")
        for k, seed in enumerate(seeds)
    ]
    return candidates


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    options = start(parser, argv)
    seeds = [0, 1] if options.smoke else [0, 1, 2, 3, 4]
    numbers: dict[str, Any] = {"batch_size": BATCH, "rates": RATES, "metrics": METRICS, "tasks": {}}
    rows: list[dict[str, object]] = []
    for name, (source, count, _, steps, every) in TASKS.items():
        data = stand_in(source, 128, 64) if options.smoke else load_dataset(source, options.root, train_limit=count)
        candidates = task_numbers(name, data, seeds, options.smoke)
        best = {
            kind: min(
                (f"{kind} {rate:g}" for rate in RATES if f"{kind} {rate:g}" in candidates),
                key=lambda c: median_loss(candidates[c]),
            )
            for kind in ("constant", "cosine")
        }
        wins = sum(
            own["loss"] < other["loss"]
            for own, other in zip(candidates["controller"], candidates[best["constant"]], strict=True)
        )
        numbers["tasks"][name] = {
            "data": data.title,
            "training_samples": len(data.train_inputs),
            "steps": steps,
            "measured_every": every,
            "best": best,
            "seeds_on_which_the_controller_beats_the_best_constant": wins,
            "candidates": {c: summarised(runs) for c, runs in candidates.items()},
        }
        rows += table(name, data.title, candidates, best)
        write_result("does_the_controller_beat_a_constant_rate", numbers, options, seeds=seeds)
    write_result("does_the_controller_beat_a_constant_rate", numbers, options, seeds=seeds, rows=rows)


def median_loss(runs: Sequence[dict[str, Any]]) -> float:
    return quartiles([run["loss"] for run in runs])["median"]


def summarised(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers per seed, medians, and the rate at twenty steps of the first seed's run."""
    rates = runs[0]["rates"]
    per_seed = {key: [run[key] for run in runs] for key in ("loss", "accuracy", "seconds")}
    medians = {f"{key}_quartiles": quartiles(values) for key, values in per_seed.items()}
    return {**per_seed, **medians, "rate_of_first_seed": rates[:: max(1, len(rates) // 20)]}


def table(
    task: str, title: str, candidates: dict[str, list[dict[str, Any]]], best: dict[str, str]
) -> list[dict[str, object]]:
    rows = []
    for name, runs in candidates.items():
        loss = quartiles([run["loss"] for run in runs])
        rows.append(
            {
                "task": f"{task}, {title}",
                "rate": name + (" (best)" if name in best.values() else ""),
                "training loss": loss["median"],
                "quartiles": f"{loss['lower']:.4g}-{loss['upper']:.4g}",
                "test accuracy": quartiles([run["accuracy"] for run in runs])["median"],
                "CPU seconds": quartiles([run["seconds"] for run in runs])["median"],
            }
        )
    return rows


if __name__ == "__main__":
    main()
