"""Which settings of a GradNet matter? The paper's Figs. 4-9 in small, and those of the other two methods.

One base, cnn_small on MNIST, trained on the first half of the training set and stopped at .92 (digits of scikit-learn
without --root). From the setting that the paper found best (SGD, no regularization, 85th percentile, 5 + 100 + 25
units, scale norm then power norm 1/2) one thing at a time is changed; the normalisations also with 5 + 25 + 10 units
(Fig. 8). Every network sees the same images of the other half in the same order with the same candidate labels; those
with the same features are trained side by side, which saves most of the time. Rates fall linearly to 0. Accuracy is on
evenly spaced test images, and shows what the settings do, nothing is chosen by it.

"conclusions" in the result compares, figure by figure, the paper's choice with the best of the others, seed by seed:
it holds if it is at least as good for every seed, fails if it is worse for every seed, else the seeds disagree. The
best of three rates of SGD is compared with the best of three of Adam. A difference below "noise", two standard errors
of one accuracy, is called none; Figs. 5 and 6 claim no more than that. A run whose loss does not stay finite counts in
"diverged", its figures are those of the other seeds, if any, and it wins no comparison.
The result is written after every group, and a second start goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, quartiles, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim.models import CandidateNetwork, GradNet, NonFiniteLossError, cnn_small

NAME = "which_gradnet_settings_matter"
BATCH = 50
BEST = "paper's best"


@dataclass(frozen=True)
class Setting:
    """One change of the paper's best setting."""

    figure: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "SGD .05"


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD .02": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9),
    "SGD .05": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "SGD .1": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "Adam .0003": lambda parameters: torch.optim.Adam(parameters, 3e-4),
    "Adam .001": lambda parameters: torch.optim.Adam(parameters, 1e-3),
    "Adam .003": lambda parameters: torch.optim.Adam(parameters, 3e-3),
}
NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "none": {"normalization": "none"},
    "scale": {"normalization": "scale"},
    **{f"power {p}": {"normalization": "power", "power": p} for p in (0.125, 0.25, 0.5, 2.0)},
    "standard": {"normalization": "standard"},
    "standard, unit length": {"normalization": "standard_unit"},
}
SMALL = {"hidden": (5, 25, 10)}
# Those in a row have the same features, and are trained side by side.
GROUPS: tuple[tuple[Setting, ...], ...] = (
    (
        Setting(BEST, "as it is"),
        *(Setting("Fig. 4, optimizer", name, optimizer=name) for name in OPTIMIZERS if name != "SGD .05"),
        Setting("Fig. 5, regularization", "dropout", {"dropout": 0.5}),
        Setting("Fig. 5, regularization", "batch norm", {"batch_norm": True}),
        Setting("Fig. 5, regularization", "both", {"dropout": 0.5, "batch_norm": True}),
        *(
            Setting("Fig. 7, units", "+".join(map(str, units)), {"hidden": units})
            for units in ((5, 25, 10), (20, 100, 40), (10, 50, 20), (10, 200, 50), (20, 400, 100))
        ),
        Setting("Fig. 8, normalisation, 5+25+10", "scale, power 0.5", SMALL),
    ),
    *(
        (
            Setting("Fig. 9, normalisation", name, changes),
            Setting("Fig. 8, normalisation, 5+25+10", name, {**changes, **SMALL}),
        )
        for name, changes in NORMALIZATIONS.items()
    ),
    *((Setting("Fig. 6, percentile", str(q), {"percentile": float(q)}),) for q in (99, 95, 90, 80, 70)),
    (Setting("Fig. 6, percentile", "10 % of each label", {"label_share": 0.1}),),
)
CLAIMS = {
    "Fig. 4, optimizer": "SGD is better than Adam",
    "Fig. 5, regularization": "no regularization is needed",
    "Fig. 6, percentile": "the 85th percentile suffices",
    "Fig. 7, units": "5+100+25 is best",
    "Fig. 8, normalisation, 5+25+10": "scale norm, then power norm 1/2, is best",
    "Fig. 9, normalisation": "scale norm, then power norm 1/2, is best",
}
ENOUGH = ("no regularization is needed", "the 85th percentile suffices")  # which a draw bears out
OURS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    *(("linearised, damping", str(d), "linearised", {"damping": d}) for d in (0.01, 0.1, 1.0, 3.0)),
    *(("gated, block", str(units), "gated", {"block": units}) for units in (0, 64, 256)),
)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the result after each group."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--images", type=int, default=6000, help="of the other half that are used (default: 6000)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test", type=int, default=1000, help="evenly spaced test images (default: 1000)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=12.0, help="processor minutes after which nothing is started")
    parser.add_argument("--again", action="store_true", help="forget what has been run before")
    options = start(parser, argv)
    if options.smoke:
        options.epochs, options.seeds, options.images = 1, 1, 100
        data = stand_in("mnist", 160, 40)
    else:
        data = load_dataset("mnist" if options.root else "digits", options.root)
    runs: list[dict] = [] if options.smoke or options.again else _earlier(options)
    for seed in range(options.seeds):
        bench = None
        for group in [*GROUPS[:2], *OURS[::4]] if options.smoke else [*GROUPS, *OURS]:
            first = group[0]
            figure, setting = (first.figure, first.name) if isinstance(first, Setting) else group[:2]
            if any((run["figure"], run["setting"], run["seed"]) == (figure, setting, seed) for run in runs):
                continue
            if time.process_time() > 60 * options.minutes:
                _write(runs, data, options, unfinished=True)
                print(f"{options.minutes} minutes are over; start again to go on")
                return
            bench = bench or _Bench(data, seed, options)
            new = bench.paper(group) if isinstance(first, Setting) else bench.ours(*group)  # type: ignore[arg-type]
            runs += [{**run, "seed": seed, "commit": options.environment["commit"]} for run in new]
            _write(runs, data, options, table=False, unfinished=True)
    _write(runs, data, options)


class _Bench:
    """A base, the images for what is built on it, and those for its score."""

    def __init__(self, data: Dataset, seed: int, options: argparse.Namespace) -> None:
        self.data, self.seed, self.epochs, self.smoke = data, seed, options.epochs, options.smoke
        self.base = _base(data, seed, options.smoke)
        half = len(data.train_inputs) // 2
        images = min(options.images, half)
        self.x, self.y = data.train_inputs[half : half + images], data.train_targets[half : half + images]
        every = max(1, len(data.test_inputs) // options.test)
        self.test = data.test_inputs[::every], data.test_targets[::every]

    def paper(self, group: Sequence[Setting]) -> list[dict[str, Any]]:
        """The paper's method in several settings that share their features."""
        begin = time.process_time()
        heads, optimizers = [], []
        for setting in group:
            head = CandidateNetwork(self.base, self.data.num_classes, generator=self._generator(), **setting.changes)
            head.calibrate(self.x[:256], self._generator())
            heads.append(head.train())
            optimizers.append(OPTIMIZERS[setting.optimizer](head.parameters()))
        schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, self._num_steps()) for o in optimizers]
        generator, dropout, last = self._generator(), self._generator(), [math.nan] * len(group)
        for x, y in self._batches():
            record = heads[0].training_record(x, generator)
            for i, (head, optimizer, schedule) in enumerate(zip(heads, optimizers, schedules, strict=True)):
                optimizer.zero_grad()
                loss = F.cross_entropy(head.logits(head.with_dropout(record, dropout)), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                last[i] = float(loss.detach())
        right = [0] * len(group)
        with torch.no_grad():
            for x, y in zip(self.test[0].split(BATCH), self.test[1].split(BATCH), strict=True):
                record = heads[0].record(x)
                for i, head in enumerate(heads):
                    right[i] += int((head.eval().logits(record).argmax(1) == y).sum())
        seconds = (time.process_time() - begin) / len(group)
        scores = [
            c / len(self.test[1]) if math.isfinite(loss) else math.nan for c, loss in zip(right, last, strict=True)
        ]
        rows = zip(group, scores, last, strict=True)
        return [_run(s.figure, s.name, score, loss, seconds) for s, score, loss in rows]

    def ours(self, figure: str, name: str, method: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """One setting of another method."""
        begin = time.process_time()
        gradnet = GradNet(self.base, self.data.num_classes, method=method, seed=self.seed, **settings)  # type: ignore[arg-type]
        batches = list(self._batches(1))
        try:
            gradnet.fit(batches, self.epochs, progress=False, missing_classes=self.smoke)
        except NonFiniteLossError as error:
            return [_run(figure, name, math.nan, error.loss, time.process_time() - begin)]
        accuracy = gradnet.accuracy(zip(self.test[0].split(250), self.test[1].split(250), strict=True))
        return [_run(figure, name, accuracy, gradnet.history[-1]["loss"], time.process_time() - begin)]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _num_steps(self) -> int:
        return self.epochs * -(-len(self.x) // BATCH)

    def _batches(self, epochs: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        generator = self._generator()
        for _ in range(epochs or self.epochs):
            for part in torch.randperm(len(self.x), generator=generator).split(BATCH):
                yield self.x[part], self.y[part]


def _run(figure: str, setting: str, accuracy: float, loss: float, seconds: float) -> dict[str, Any]:
    print(f"{figure}: {setting}: {accuracy:.4f}", flush=True)
    run = {"figure": figure, "setting": setting, "accuracy": accuracy, "last_loss": loss, "seconds": seconds}
    return {**run, "diverged": True} if math.isnan(accuracy) else run


def _write(
    runs: list[dict], data: Dataset, options: argparse.Namespace, *, table: bool = True, unfinished: bool = False
) -> None:
    rows = []
    for figure, setting in dict.fromkeys((run["figure"], run["setting"]) for run in runs):
        found = [run for run in runs if (run["figure"], run["setting"]) == (figure, setting)]
        whole = [run for run in found if not run.get("diverged")] or found
        medians = {
            key: quartiles([run[key] for run in whole])["median"] for key in ("accuracy", "last_loss", "seconds")
        }
        diverged = sum(run.get("diverged", False) for run in found)
        rows.append({"figure": figure, "setting": setting, "seeds": len(found), **medians, "diverged": diverged})
    numbers = {
        "network": "cnn_small", "data": data.title, "images": options.images, "epochs": options.epochs,
        "test images": options.test, "conclusions": _conclusions(runs, options.test), "summary": rows, "runs": runs,
    }  # fmt: skip
    seeds = sorted({run["seed"] for run in runs})
    write_result(NAME, numbers, options, seeds=seeds, rows=rows if table else (), unfinished=unfinished)


def _conclusions(runs: list[dict], test: int) -> list[dict[str, object]]:
    found = []
    runs = [{**run, "accuracy": 0.0} if run.get("diverged") else run for run in runs]
    for figure, claim in CLAIMS.items():
        own = (figure, "scale, power 0.5") if figure.startswith("Fig. 8") else (BEST, "as it is")
        best: dict[int, float] = {}
        others = []
        for run in runs:
            by_sgd = run["figure"] == figure and run["setting"].startswith("SGD")  # the best of its rates stands for it
            if by_sgd or (run["figure"], run["setting"]) == own:
                best[run["seed"]] = max(run["accuracy"], best.get(run["seed"], 0.0))
            elif run["figure"] == figure:
                others.append(run)
        seeds = sorted(seed for seed in best if any(run["seed"] == seed for run in others))
        if not seeds:
            continue
        rivals = {seed: max((r for r in others if r["seed"] == seed), key=lambda r: r["accuracy"]) for seed in seeds}
        leads = [best[seed] - rivals[seed]["accuracy"] for seed in seeds]
        accuracy = sum(best[seed] for seed in seeds) / len(seeds)
        noise = 2 * math.sqrt(accuracy * (1 - accuracy) / test)
        verdict = "holds" if min(leads) >= 0 else "fails" if max(leads) < 0 else "seeds disagree"
        if max(map(abs, leads)) < noise:
            verdict = "holds" if claim in ENOUGH else "no difference"
        rival = [rivals[seed]["setting"] for seed in seeds]
        row = {"figure": figure, "paper": claim, "verdict": verdict, "lead": quartiles(leads)["median"], "noise": noise}
        of = ", ".join(dict.fromkeys(rival))
        found.append({**row, "best of the others": of, "lead by seed": leads, "best of the others by seed": rival})
    return found


def _earlier(options: argparse.Namespace) -> list[dict]:
    path = (options.output or RESULTS) / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8"))["numbers"]["runs"] if path.is_file() else []


def _base(data: Dataset, seed: int, smoke: bool) -> nn.Module:
    torch.manual_seed(seed)
    base = cnn_small(image_size=data.train_inputs.shape[-1])
    optimizer = torch.optim.SGD(base.parameters(), 0.003, momentum=0.9)
    half = len(data.train_inputs) // 2
    generator = torch.Generator().manual_seed(seed)
    steps = 0
    while True:
        for part in torch.randperm(half, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(base(data.train_inputs[part]), data.train_targets[part]).backward()
            optimizer.step()
            steps += 1
            if smoke or (steps % 20 == 0 and _accuracy(base, data) >= 0.92):
                return base


@torch.no_grad()
def _accuracy(base: nn.Module, data: Dataset) -> float:
    return float((base(data.test_inputs[::5]).argmax(1) == data.test_targets[::5]).float().mean())


if __name__ == "__main__":
    main()
