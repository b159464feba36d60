"""Does a GradNet improve a network whose weights must stay as they are, and by how much less than training it on?

The protocol of the paper's Table 2 on cnn_small: a base is trained on the first half of the training set and stopped
early, at a given accuracy; everything else sees the other half only. Three methods of GradNet; a linear and an MLP head
on the frozen last features; and the base itself trained on, for as many epochs as the gated method and for as many
seconds. Asked for: MNIST, base .92: .984, base .96: .9857; CIFAR-10 (JPEG), base .53: .67.

Batches of 50; CIFAR-10 with random horizontal flips; learning rates decay linearly to 0. The base stops when 2,000
evenly spaced test images are at the accuracy asked for: a rule for how far it is trained, nothing else is chosen on
test images. Seconds are processor seconds of one thread. Linearised and paper run with the first two seeds only. The
result is written after every run, and a second start goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, quartiles, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim.models import GradNet, cnn_small, cnn_small_cifar

NAME = "does_a_gradnet_improve_a_frozen_network"
BATCH = 50


@dataclass(frozen=True)
class Case:
    """A base: how far it is trained, and what the paper reports for it."""

    data: str
    base: float
    paper: float
    seeds: int
    epochs: int  # of the gated method, the heads and the continued base


CASES = {
    "MNIST .92": Case("mnist", 0.92, 0.98, 5, 2),
    "MNIST .96": Case("mnist", 0.96, 0.9857, 5, 2),
    "CIFAR-10 (JPEG) .53": Case("cifar10", 0.53, float("nan"), 2, 5),
    "CIFAR-10 (JPEG) .62": Case("cifar10", 0.62, 0.7274, 1, 5),
}
METHODS = (
    "gated",
    "continued, equal epochs",
    "continued, equal seconds",
    "linear head",
    "MLP head",
    "linearised",
    "paper",
)
GRADNET_EPOCHS = {"linearised": 2, "paper": 2}  # their epochs cost more
SEEDS_OF_COSTLY = 2


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the result after each run."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=35.0, help="processor minutes after which no run is started")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--again", action="store_true", help="forget what has been run before")
    options = start(parser, argv)
    runs: list[dict] = [] if options.smoke or options.again else _earlier(options)
    seeds = 1 if options.smoke else max(CASES[name].seeds for name in options.cases)
    for seed in range(seeds):
        for name in options.cases:
            case = CASES[name]
            missing = [
                m for m in METHODS if not any((r["case"], r["seed"], r["method"]) == (name, seed, m) for r in runs)
            ]
            if seed >= case.seeds or not missing:
                continue
            data = stand_in(case.data, 200, 50) if options.smoke else _data(case.data, options.root)
            bench = _Bench(data, case, seed, options.smoke)
            for method in missing:
                if time.process_time() > 60 * options.minutes:
                    print(f"{options.minutes} minutes are over; start again to go on")
                    return
                runs.append({"case": name, "seed": seed, **bench.run(method, runs, name)})
                _write(runs, options)
    _write(runs, options)


def _write(runs: list[dict], options: argparse.Namespace) -> None:
    rows = []
    for name, case in CASES.items():
        of_case = [run for run in runs if run["case"] == name]
        for method in METHODS:
            of_method = [run for run in of_case if run["method"] == method]
            if of_method:
                accuracy = quartiles([run["accuracy"] for run in of_method])
                rows.append(
                    {
                        "case": name,
                        "method": method,
                        "seeds": len(of_method),
                        "base": quartiles([run["base"] for run in of_method])["median"],
                        "accuracy": accuracy["median"],
                        "least": min(run["accuracy"] for run in of_method),
                        "greatest": max(run["accuracy"] for run in of_method),
                        "epochs": quartiles([run["epochs"] for run in of_method])["median"],
                        "seconds": quartiles([run["seconds"] for run in of_method])["median"],
                        "paper": case.paper,
                    }
                )
    numbers = {"network": "cnn_small", "batch": BATCH, "summary": rows, "runs": runs}
    write_result(NAME, numbers, options, seeds=sorted({run["seed"] for run in runs}), rows=rows)


def _earlier(options: argparse.Namespace) -> list[dict]:
    path = (options.output or RESULTS) / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8"))["numbers"]["runs"] if path.is_file() else []


_loaded: dict[str, Dataset] = {}


def _data(name: str, root: object) -> Dataset:
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = load_dataset(name, root)  # type: ignore[arg-type]
    return _loaded[name]


class Loader:
    """Shuffled mini-batches, images flipped at random where that is asked for."""

    def __init__(self, inputs: Tensor, targets: Tensor, seed: int, flips: bool) -> None:
        self.inputs, self.targets, self.flips = inputs, targets, flips
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.inputs) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.inputs), generator=self.generator).split(BATCH):
            x = self.inputs[index]
            if self.flips:
                flipped = torch.rand(len(index), generator=self.generator) < 0.5
                x = torch.where(flipped[:, None, None, None], x.flip(3), x)
            yield x, self.targets[index]


class _Bench:
    """A base, and everything that can be made of it with the other half of the data."""

    def __init__(self, data: Dataset, case: Case, seed: int, smoke: bool) -> None:
        self.data, self.case, self.seed, self.smoke = data, case, seed, smoke
        half = len(data.train_inputs) // 2
        self.flips = case.data == "cifar10"
        self._first, self._second = slice(0, half), slice(half, 2 * half)
        torch.manual_seed(seed)
        self.base = cnn_small() if case.data == "mnist" else cnn_small_cifar()
        self._train_base()
        self.base_accuracy = _accuracy(self.base, data.test_inputs, data.test_targets)
        self.epochs = 1 if smoke else case.epochs

    def run(self, method: str, runs: list[dict], name: str) -> dict:
        begin = time.process_time()
        epochs: float = self.epochs
        if method in ("gated", "linearised", "paper"):
            epochs = 1 if self.smoke else GRADNET_EPOCHS.get(method, self.epochs)
            classify = self._gradnet(method, int(epochs))
        elif method.startswith("continued"):
            if method.endswith("seconds"):
                found = {r["method"]: r for r in runs if (r["case"], r["seed"]) == (name, self.seed)}
                gated, continued = found["gated"], found["continued, equal epochs"]
                epochs = gated["seconds"] / continued["seconds"] * continued["epochs"]
            classify = self._continued(epochs)
        else:
            epochs = 3 * self.epochs  # of cached features, which cost next to nothing
            classify = self._head(method == "MLP head", int(epochs))
        seconds = time.process_time() - begin
        accuracy = _accuracy(classify, self.data.test_inputs, self.data.test_targets)
        print(
            f"{name} seed {self.seed} {method}: {self.base_accuracy:.4f} to {accuracy:.4f} in {seconds:.0f} s",
            flush=True,
        )
        return {
            "method": method,
            "base": self.base_accuracy,
            "accuracy": accuracy,
            "epochs": epochs,
            "seconds": seconds,
            "data": self.data.title,
        }

    def _loader(self) -> Loader:
        part = self._second
        return Loader(self.data.train_inputs[part], self.data.train_targets[part], 100 + self.seed, self.flips)

    def _gradnet(self, method: str, epochs: int) -> Callable[[Tensor], Tensor]:
        gradnet = GradNet(self.base, self.data.num_classes, method=method, seed=self.seed)  # type: ignore[arg-type]
        return gradnet.fit(self._loader(), epochs, progress=False, missing_classes=self.smoke)

    def _continued(self, epochs: float) -> nn.Module:
        model, loader = copy.deepcopy(self.base), self._loader()
        _train(model, loader, max(1, round(epochs * len(loader))), lambda p: torch.optim.Adam(p, 1e-3))
        return model

    def _head(self, hidden: bool, epochs: int) -> nn.Module:
        body, last = self.base[:-1], self.base[-1]
        part, width = self._second, last.in_features
        with torch.no_grad():
            x = torch.cat([body(images) for images in self.data.train_inputs[part].split(500)])
        torch.manual_seed(self.seed)
        classes = last.out_features
        head: nn.Module = copy.deepcopy(last)
        if hidden:
            head = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, classes))
        loader = Loader(x, self.data.train_targets[part], 100 + self.seed, False)
        _train(head, loader, epochs * len(loader), lambda p: torch.optim.Adam(p, 1e-3))
        return nn.Sequential(body, head)

    def _train_base(self) -> None:
        x, y = self.data.test_inputs[::5], self.data.test_targets[::5]
        loader = Loader(self.data.train_inputs[self._first], self.data.train_targets[self._first], self.seed, False)
        rate = 0.003 if self.case.data == "mnist" else 0.01
        optimizer = torch.optim.SGD(self.base.parameters(), rate, momentum=0.9)
        steps = 0
        while True:
            for inputs, targets in loader:
                optimizer.zero_grad()
                F.cross_entropy(self.base(inputs), targets).backward()
                optimizer.step()
                steps += 1
                if self.smoke or (steps % 20 == 0 and _accuracy(self.base, x, y) >= self.case.base):
                    return


def _train(
    model: nn.Module, loader: Loader, steps: int, make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    done = 0
    while done < steps:
        for x, y in loader:
            if done == steps:
                break
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1


@torch.no_grad()
def _accuracy(classify: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> float:
    predicted = torch.cat([classify(part).argmax(1) for part in inputs.split(500)])
    return float((predicted == targets).float().mean())


if __name__ == "__main__":
    main()
