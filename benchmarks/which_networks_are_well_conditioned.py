"""Which networks have well conditioned gradients, and do they train better?

The thesis's study (its Figs. 2.5-2.6, 3.3-3.20, 4.4-4.9) at a size that two cores can train: its kinds of networks over
depths, narrow ones, on 16 x 16 images (CIFAR-10 averaged over 2 x 2 pixels), plain SGD with one rate for all, batch 64.
Every metric of the thesis is measured through a short training. As in the thesis each run gives two points, at its
steepest descent (moving average of the loss over 20 steps) and at its lowest loss; and, as the thesis's section 4.2.1
asks, a third, at initialisation. Spearman's rank correlations of each metric with the speed of the descent, and with
the final loss, say which of the thesis's trends hold here; networks are the samples, a network's numbers are medians
over its seeds. ``CLAIMS`` are what the thesis reads off its figures; each is held against the correlation here and its
permutation test, over all networks and over those that learned (lowest loss below 0.9 log 10).

Each run is written when it is done; ``--resume`` goes on from there, and ``--draw`` makes the pictures from the result
without measuring anything: every metric through training, and the scatter against speed and lowest loss.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, start, write_result
from examples.datasets import load_dataset, stand_in
from torchgeom_optim._optional import optional_import
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
LEARNED = 0.9 * math.log(10)
PERMUTATIONS = 10_000


class Claim(NamedTuple):
    """A correlation that the thesis sees in a figure; "some" where it names no direction, "none" where it sees none."""

    figure: str
    metric: str
    point: str
    outcome: str
    trend: Literal["+", "-", "some", "none"]


CLAIMS = (
    Claim("2.6", "weight_condition_number", "lowest", "lowest loss", "+"),
    Claim("3.4", "input_condition_number", "steepest", "speed", "some"),
    Claim("3.4", "input_condition_number", "lowest", "lowest loss", "none"),
    Claim("3.8", "relative_gradient_rank", "steepest", "speed", "some"),
    Claim("3.8", "relative_gradient_rank", "lowest", "lowest loss", "none"),
    Claim("3.10", "relative_input_gradient_rank", "steepest", "speed", "+"),
    Claim("3.10", "relative_input_gradient_rank", "lowest", "lowest loss", "+"),
    Claim("section 4.2.1", "relative_input_gradient_rank", "start", "lowest loss", "+"),
    Claim("3.13", "gradient_confusion", "steepest", "speed", "-"),
    Claim("3.13", "gradient_confusion", "lowest", "lowest loss", "+"),
    Claim("3.17", "gradient_diversity", "steepest", "speed", "-"),
    Claim("3.17", "gradient_diversity", "lowest", "lowest loss", "+"),
    Claim("3.20", "gradient_coherence", "steepest", "speed", "none"),
    Claim("3.20", "gradient_coherence", "lowest", "lowest loss", "none"),
    Claim("4.7", "weight_gradient_diversity", "steepest", "speed", "some"),
    Claim("4.9", "weight_gradient_coherence", "lowest", "lowest loss", "-"),
)
# Point and outcome of the correlations.
PAIRS = (("start", "speed"), ("start", "lowest loss"), ("steepest", "speed"), ("lowest", "lowest loss"))


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
        "seed": seed,
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


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, int]:
    """Spearman's rank correlation over the pairs whose numbers are both known; inf counts as largest.

    Args:
        x: one number per network.
        y: another.

    Returns:
        The correlation, its two-sided p-value by permutations, and the number of pairs; nan below three pairs, or where
        all numbers are the same.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(a) and not math.isnan(b)]
    if len(pairs) < 3:
        return math.nan, math.nan, len(pairs)
    a, b = (ranked([pair[k] for pair in pairs]) for k in (0, 1))
    a, b = (r / torch.linalg.vector_norm(r) for r in (a - a.mean(), b - b.mean()))
    rho = float(a @ b)
    generator = torch.Generator().manual_seed(0)
    shuffled = b[torch.rand(PERMUTATIONS, len(pairs), generator=generator).argsort(1)]
    at_least = int((torch.abs(shuffled @ a) >= abs(rho) - 1e-12).sum())
    return rho, math.nan if math.isnan(rho) else (at_least + 1) / (PERMUTATIONS + 1), len(pairs)


def ranked(values: Sequence[float]) -> Tensor:
    """Ranks, ties having their mean."""
    x = torch.tensor(values, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() / 2


Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def correlation(runs: Runs, metric: str, point: str, outcome: str) -> dict[str, Any]:
    """Of a metric at a point with an outcome; a network's numbers are medians over its seeds."""
    x = [typical(one[point][metric] for one in several) for several in runs.values()]
    y = [typical(one[outcome] for one in several) for several in runs.values()]
    rho, p, count = spearman(x, y)
    return {"rho": rho, "p": p, "networks": count}


def typical(values: Iterable[float | str]) -> float:
    """The median, nan if one is; numbers that JSON cannot hold come from it as strings."""
    numbers = [float(value) for value in values]
    return math.nan if any(map(math.isnan, numbers)) else statistics.median(numbers)


def findings(runs: Runs) -> dict[str, Any]:
    """All correlations, and what they say about the thesis's claims."""
    learned = {name: own for name, own in runs.items() if typical(one["lowest loss"] for one in own) < LEARNED}
    found = {
        f"{outcome} against {point}": {name: correlation(runs, name, point, outcome) for name in CORRELATED}
        for point, outcome in PAIRS
    }
    claims = []
    for claim in CLAIMS:
        row: dict[str, Any] = {"thesis": claim.figure, **claim._asdict()}
        row.pop("figure")
        for title, chosen in (("all", runs), ("learned", learned)):
            own = correlation(chosen, claim.metric, claim.point, claim.outcome)
            row |= {f"rho, {title}": own["rho"], f"p, {title}": own["p"], f"holds, {title}": holds(claim.trend, **own)}
        claims.append(row)
    return {"correlations": found, "networks that learned": list(learned), "claims": claims}


def holds(trend: str, *, rho: float, p: float, networks: int) -> bool | None:
    """Whether a correlation of that direction is there at p < 0.05, or, for "none", is not; None without numbers."""
    if math.isnan(rho):
        return None
    clear = p < 0.05
    return {"+": clear and rho > 0, "-": clear and rho < 0, "some": clear, "none": not clear}[trend]


def draw(folder: Path) -> None:
    """Every metric through training, and its scatter against speed and lowest loss."""
    plt = optional_import("matplotlib.pyplot", "the pictures")
    runs = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))["numbers"]["runs"]
    kinds = list(dict.fromkeys(name.rpartition(" ")[0] for name in runs))
    colour = {kind: f"C{number}" for number, kind in enumerate(kinds)}

    def finished(figure: Any, name: str) -> None:
        handles = [plt.Line2D([], [], color=colour[kind], marker="o", label=kind) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds))
        figure.savefig(folder / f"{NAME}_{name}.png", dpi=80)
        plt.close(figure)

    def panels(rows: int) -> tuple[Any, Any]:
        figure, places = plt.subplots(rows, 4, figsize=(3.4 * 4, 2.7 * rows), layout="constrained", squeeze=False)
        return figure, places.flat

    def scaled(axes: Any, metric: str, direction: Literal["x", "y"]) -> None:
        axes.tick_params(labelsize=7)
        if "condition" in metric or metric == "gradient_noise_scale":
            axes.set(**{f"{direction}scale": "log"})

    figure, places = panels(math.ceil(len(CORRELATED) / 4))
    for axes, metric in zip(places, CORRELATED, strict=False):
        for name, several in runs.items():
            through, depth = several[0]["through_training"], name.rpartition(" ")[2]
            values = [float(value) for value in through[metric]]
            axes.plot(through["step"], values, color=colour[name.rpartition(" ")[0]], linewidth=0.9)
            if math.isfinite(values[-1]):
                axes.annotate(depth, (through["step"][-1], values[-1]), fontsize=6)
        axes.set_title(metric, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        scaled(axes, metric, "y")
    finished(figure, "through_training")
    for point, outcome in PAIRS[2:]:
        figure, places = panels(math.ceil(len(CORRELATED) / 4))
        for axes, metric in zip(places, CORRELATED, strict=False):
            for name, several in runs.items():
                x = typical(one[point][metric] for one in several)
                y = typical(one[outcome] for one in several)
                if math.isfinite(x) and math.isfinite(y):
                    axes.plot(x, y, "o", markersize=4, color=colour[name.rpartition(" ")[0]])
                    axes.annotate(name.rpartition(" ")[2], (x, y), fontsize=6)
            rho, p = (correlation(runs, metric, point, outcome)[key] for key in ("rho", "p"))
            axes.set_title(f"{metric}: {rho:.2f} (p {p:.2g})", fontsize=9)
            axes.set_ylabel({"speed": "descent per step", "lowest loss": "lowest loss"}[outcome], fontsize=8)
            scaled(axes, metric, "x")
        finished(figure, outcome.replace(" ", "_"))


def earlier(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs that the result has already."""
    path = (options.output or RESULTS) / f"{NAME}.json"
    if not options.resume or not path.exists():
        return {}
    runs: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))["numbers"]["runs"]
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """Train every network for every seed, writing after each."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result has")
    parser.add_argument("--draw", action="store_true", help="draw the pictures from the result, and measure nothing")
    options = start(parser, argv)
    if options.draw:
        draw(options.output or RESULTS)
        return
    steps, every, seeds = (9, 4, [0]) if options.smoke else (STEPS, EVERY, [0, 1])
    data = stand_in("cifar10", 128, 8) if options.smoke else load_dataset("cifar10", options.root, train_limit=IMAGES)
    inputs = F.avg_pool2d(data.train_inputs, 32 // PIXELS)
    chosen = networks()
    if options.smoke:
        chosen = {name: chosen[name] for name in ("ReLU 3", "looks-linear 6", "conv norm skip 8")}
    runs = earlier(options)
    settings = {"data": data.title, "images": len(inputs), "pixels": PIXELS, "steps": steps, "measured_every": every}
    numbers: dict[str, Any] = {**settings, "batch_size": BATCH, "learning_rate": RATE, "metrics": METRICS, "runs": runs}
    for seed in seeds:
        for name, make in chosen.items():
            if any(one["seed"] == seed for one in runs.setdefault(name, [])):
                continue
            done = run(make, inputs, data.train_targets, seed, steps, every)
            runs[name].append({**done, "commit": options.environment["commit"]})
            print(f"{name}, seed {seed}: loss {done['lowest loss']:.3f}, {done['cpu_s']:.1f} s of CPU", flush=True)
            write_result(NAME, numbers, options, seeds=seeds[: seed + 1])
    numbers |= findings(runs)
    write_result(NAME, numbers, options, seeds=seeds, rows=numbers["claims"])


if __name__ == "__main__":
    main()
