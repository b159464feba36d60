"""Which networks have well conditioned gradients, and do they train better?

The thesis's study (its Figs. 2.5-2.6, 3.3-3.20, 4.4-4.9) at a size that two cores can train: its kinds of networks over
depths, narrow ones, on 16 x 16 images (CIFAR-10 averaged over 2 x 2 pixels), plain SGD with one rate for all, batch 64.
Every metric of the thesis is measured through a short training. As in the thesis each run gives two points, at its
steepest descent (moving average of the loss over 20 steps) and at its lowest loss; and, as the thesis's section 4.2.1
asks, a third, at initialisation. Spearman's rank correlations of each metric with the speed of the descent, and with
the final loss, say which of the thesis's trends hold here; networks are the samples, seeds are averaged.

The points are in the JSON; ``--plot FILE`` draws them from there without measuring anything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, start, write_result
from examples.datasets import load_dataset, stand_in
from torchgeom_optim.diagnostics import Diagnostics
from torchgeom_optim.diagnostics.reading import verdicts
from torchgeom_optim.models.thesis_networks import convolutional, looks_linear, orthogonal_mlp

NAME = "which_networks_are_well_conditioned"
STEPS, EVERY, BATCH, RATE, SMOOTH = 300, 30, 64, 0.05, 20
IMAGES, PIXELS = 5000, 16
METRICS = ["cheap", "input_condition_number"]
CORRELATED = (
    "weight_condition_number",
    "weight_condition_number_two_step",
    "input_condition_number",
    "relative_gradient_rank",
    "relative_input_gradient_rank",
    "gradient_confusion",
    "gradient_diversity",
    "gradient_coherence",
    "weight_gradient_cosine",
    "weight_gradient_diversity",
    "weight_gradient_coherence",
    "gradient_noise_scale",
)
# What the thesis reports, as the sign of a correlation with the speed of the descent, or with the lowest loss.
THESIS = {
    "speed": {
        "weight_condition_number": -1,
        "relative_input_gradient_rank": 1,
        "gradient_confusion": -1,
        "gradient_diversity": -1,
    },
    "lowest loss": {
        "weight_condition_number": 1,
        "relative_input_gradient_rank": 1,
        "gradient_confusion": 1,
        "gradient_diversity": 1,
        "weight_gradient_diversity": 1,
        "weight_gradient_coherence": -1,
    },
}


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Kind and depth -> network."""
    fully = {"width": 32, "in_features": 3 * PIXELS**2}
    made: dict[str, Callable[[], nn.Module]] = {}
    for depth in (3, 6, 11, 21):
        made[f"ReLU {depth}"] = lambda depth=depth: orthogonal_mlp(depth, activation="relu", **fully)
        made[f"CReLU {depth}"] = lambda depth=depth: orthogonal_mlp(depth, activation="crelu", **fully)
    for depth in (6, 11, 21, 41):
        made[f"looks-linear {depth}"] = lambda depth=depth: looks_linear(depth, **fully)
    for depth in (8, 14, 26):
        for kind, normalised, skip in (
            ("conv", False, False),
            ("conv skip", False, True),
            ("conv norm", True, False),
            ("conv norm skip", True, True),
        ):
            made[f"{kind} {depth}"] = lambda depth=depth, normalised=normalised, skip=skip: convolutional(
                depth, normalised=normalised, skip=skip, width=8
            )
    return made


def run(
    make: Callable[[], nn.Module], inputs: Tensor, targets: Tensor, seed: int, steps: int, every: int
) -> dict[str, Any]:
    """Train one network and read its three points off."""
    torch.manual_seed(seed)
    model, criterion = make(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    losses, begin = [], time.process_time()
    with Diagnostics(model, criterion, every=every, metrics=METRICS, per_layer=True).attach(optimizer) as diagnostics:
        for _ in range(steps):
            index = torch.randint(len(inputs), (BATCH,), generator=generator)
            optimizer.zero_grad()
            loss = criterion(model(inputs[index]), targets[index])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    history = diagnostics.history
    speed, at_steepest, lowest, at_lowest = landmarks(losses)

    def nearest(step: int) -> dict[str, float]:
        record = min(history, key=lambda one: abs(one.step - step))
        return {name: record.values.get(name, math.nan) for name in CORRELATED}

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_s": time.process_time() - begin,
        "measuring_s": sum(history.column("time_s")),
        "losses": [sum(part) / len(part) for part in batches(losses, 10)],
        "speed": speed,
        "lowest loss": lowest,
        "start": nearest(0),
        "steepest": nearest(at_steepest),
        "lowest": nearest(at_lowest),
        "verdicts": [f"{v.kind}{f' in {v.layer}' if v.layer else ''}" for v in verdicts(history)],
        "through_training": {"step": history.column("step"), **{n: history.column(n) for n in CORRELATED}},
    }


def landmarks(losses: Sequence[float]) -> tuple[float, int, float, int]:
    """Steepest descent of the moving average in loss per step and where, its lowest value and where."""
    width = min(SMOOTH, len(losses) // 3)
    smooth = [sum(losses[k : k + width]) / width for k in range(len(losses) - width + 1)]
    drops = [(before - after) / width for before, after in zip(smooth, smooth[width:], strict=False)]
    if not all(map(math.isfinite, losses)):
        return 0.0, 0, math.inf, 0
    steepest = max(range(len(drops)), key=drops.__getitem__)
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    return drops[steepest], steepest + width // 2, smooth[lowest], lowest + width // 2


def batches(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[k : k + size] for k in range(0, len(values), size)]


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, int]:
    """Spearman's rank correlation over the pairs whose numbers are both known (inf counts as largest), and how many."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(a) and not math.isnan(b)]
    if len(pairs) < 3:
        return math.nan, len(pairs)
    ranks = torch.stack([ranked([pair[k] for pair in pairs]) for k in (0, 1)])
    return float(torch.corrcoef(ranks)[0, 1]), len(pairs)


def ranked(values: Sequence[float]) -> Tensor:
    """Ranks, ties having their mean."""
    x = torch.tensor(values, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() / 2


def correlations(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Point and outcome -> metric -> correlation; a network's numbers are medians over its seeds."""

    def typical(of: Callable[[Mapping[str, Any]], float]) -> list[float]:
        return [float(torch.tensor([of(one) for one in several]).median()) for several in runs.values()]

    result: dict[str, dict[str, Any]] = {}
    for point, outcome in (
        ("start", "speed"),
        ("start", "lowest loss"),
        ("steepest", "speed"),
        ("lowest", "lowest loss"),
    ):
        outcomes = typical(lambda one, outcome=outcome: one[outcome])
        rows = {}
        for name in CORRELATED:
            rho, count = spearman(typical(lambda one, point=point, name=name: one[point][name]), outcomes)
            rows[name] = {"rho": rho, "networks": count, "thesis": THESIS[outcome].get(name)}
        result[f"{outcome} against {point}"] = rows
    return result


def correlation_rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, object]]:
    return [{"metric": name, **{point: rows[name]["rho"] for point, rows in found.items()}} for name in CORRELATED]


def plot(source: Path, target: Path) -> None:
    """Scatter of every metric against speed at the steepest point, and against loss at the lowest."""
    from matplotlib.figure import Figure

    runs = json.loads(source.read_text(encoding="utf-8"))["numbers"]["runs"]
    kinds = sorted({name.rpartition(" ")[0] for name in runs})
    figure = Figure(figsize=(3.2 * 6, 3 * 4), layout="constrained")
    places = figure.subplots(4, 6)
    for half, (point, outcome) in enumerate((("steepest", "speed"), ("lowest", "lowest loss"))):
        for k, metric in enumerate(CORRELATED):
            axes = places[2 * half + k // 6, k % 6]
            for number, kind in enumerate(kinds):
                for name, several in runs.items():
                    if name.rpartition(" ")[0] == kind:
                        x = [float(one[point][metric]) for one in several]
                        y = [float(one[outcome]) for one in several]
                        axes.scatter(x, y, s=14, color=f"C{number}")
                        axes.annotate(name.rpartition(" ")[2], (x[0], y[0]), fontsize=6)
            axes.set_title(metric, fontsize=8)
            axes.set_ylabel(outcome, fontsize=8)
            axes.tick_params(labelsize=7)
            if "condition" in metric or metric == "gradient_noise_scale":
                axes.set_xscale("log")
    for number, kind in enumerate(kinds):
        places[0, 0].scatter([], [], s=14, color=f"C{number}", label=kind)
    figure.legend(loc="outside lower center", ncols=len(kinds))
    figure.savefig(target, dpi=80)


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="draw the committed result into this file, and measure nothing")
    options = start(parser, argv)
    if options.plot is not None:
        plot(RESULTS / f"{NAME}.json", options.plot)
        return
    steps, every, seeds = (9, 4, [0]) if options.smoke else (STEPS, EVERY, [0, 1])
    data = stand_in("cifar10", 128, 8) if options.smoke else load_dataset("cifar10", options.root, train_limit=IMAGES)
    inputs = F.avg_pool2d(data.train_inputs, 32 // PIXELS)
    chosen = networks()
    if options.smoke:
        chosen = {name: chosen[name] for name in ("ReLU 3", "looks-linear 6", "conv norm skip 8")}
    settings = {"data": data.title, "images": len(inputs), "pixels": PIXELS, "steps": steps, "measured_every": every}
    numbers: dict[str, Any] = {**settings, "batch_size": BATCH, "learning_rate": RATE, "metrics": METRICS, "runs": {}}
    for seed in seeds:
        for name, make in chosen.items():
            done = run(make, inputs, data.train_targets, seed, steps, every)
            numbers["runs"].setdefault(name, []).append(done)
            print(f"{name}, seed {seed}: loss {done['lowest loss']:.3f}, {done['cpu_s']:.1f} s of CPU", flush=True)
            numbers["correlations"] = correlations(numbers["runs"])
            write_result(NAME, numbers, options, seeds=seeds[: seed + 1])
    rows = correlation_rows(numbers["correlations"])
    write_result(NAME, numbers, options, seeds=seeds, rows=rows)


if __name__ == "__main__":
    main()
