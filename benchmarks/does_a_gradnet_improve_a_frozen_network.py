"""Does a GradNet improve a network whose weights must stay as they are, and by how much less than training it on?

The protocol of the paper's Table 2 on cnn_small: a base is trained on the first half of the training set, snapshots are
taken at the accuracies of its rows, and everything else sees the other half only. Three methods of GradNet; a linear
and an MLP head on the frozen last features; and the base itself trained on, for as many epochs as the gated method and
for as many seconds. The paper scored its bases of CIFAR-10 on distorted images, which took 4 to 5 points off: its row
.49 is a base of .53 here, and so on. Asked for: MNIST, base .92: .984, .96: .9857, .9894: .9914; CIFAR-10 (JPEG), base
.53: .67; the other rows as far as a network this small gets there.

Batches of 50; CIFAR-10 with random flips, MNIST with random shifts by up to one pixel, for all but the early base, and
the last epochs of a late base on CIFAR-10 with shifts by up to two pixels besides. All is trained by Adam with a
linearly falling rate, but for the paper's method (SGD). A snapshot is taken when the base reaches its accuracy on all
test images: a rule for how far it is trained, nothing else is chosen on test images. A base that ends less than a point
below counts, as the table shows; what is farther off has the row "base not reached" with the best figure. The paper's
method is scored on every fourth test image, since it predicts dozens of times as slowly as the base. A fit that
diverges is a row with accuracy nan and counts in "diverged"; least, most and median are those of the others. Seconds
are processor seconds of one thread; equal seconds are set from steps timed side by side, channels innermost for all.

Where a frozen base stays behind the continued one, is it for its gates? "gated, in the gates of the continued base"
starts from the early base's weights like "gated", but with the ReLU masks and pooling choices of the base trained on.

The runs come in the order of PLAN, one seed of every case first; how many seeds a row has stands in it. The result is
written after every run, and a second start goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, quartiles, start, time_interleaved, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim.models import GradNet, NonFiniteLossError, cnn_small, cnn_small_cifar

NAME = "does_a_gradnet_improve_a_frozen_network"
BATCH = 50


@dataclass(frozen=True)
class Case:
    """A base, by how far it is trained, and what is to be reached."""

    data: str
    level: float  # test accuracy at which the snapshot is taken
    paper: float
    asked: float


CASES = {
    "MNIST .92": Case("mnist", 0.92, 0.98, 0.984),
    "MNIST .96": Case("mnist", 0.96, 0.9857, 0.9857),
    "CIFAR-10 (JPEG) .49": Case("cifar10", 0.53, 0.678, 0.67),
    "MNIST .9894": Case("mnist", 0.9894, 0.9914, 0.9914),
    "CIFAR-10 (JPEG) .62": Case("cifar10", 0.66, 0.7274, 0.7274),
    "CIFAR-10 (JPEG) .72": Case("cifar10", 0.76, 0.7936, 0.7936),
    "CIFAR-10 (JPEG) .79": Case("cifar10", 0.83, 0.8289, 0.8289),
}
ASKED = ("MNIST .92", "MNIST .96", "CIFAR-10 (JPEG) .49")  # with figures and five seeds of their own
EPOCHS = {"mnist": 3, "cifar10": 6}  # of everything but the two dearer methods
COSTLY_EPOCHS = {"linearised": 3, "paper": 3}
LATE_EPOCHS = {"mnist": 12, "cifar10": 8}  # of the base beyond the accuracies of ASKED
LAST_EPOCHS = {"mnist": 0, "cifar10": 45}  # more of it where that was not enough, before it is given up

GATED, EQUAL_EPOCHS, EQUAL_SECONDS = "gated", "continued, equal epochs", "continued, equal seconds"
HEADS = ("linear head", "MLP head")
OTHER_GATES = "gated, in the gates of the continued base"
METHODS = (GATED, EQUAL_EPOCHS, EQUAL_SECONDS, *HEADS, "linearised", "paper", OTHER_GATES)
UNBOUNDED = "paper, values beyond the calibration set as they are"  # what it was, and no more
NOT_REACHED = "base not reached"
OTHERS = tuple(name for name in CASES if name not in ASKED)
# Seeds, cases, methods: what is missing when the time is over is what is missed least.
PLAN: tuple[tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    ((0,), ASKED, (GATED, EQUAL_EPOCHS, *HEADS)),
    ((0,), ASKED, (EQUAL_SECONDS, "linearised")),
    ((0,), OTHERS, (GATED, EQUAL_EPOCHS)),
    ((0,), ASKED, ("paper",)),
    ((1, 2, 3, 4), ASKED, (GATED,)),
    ((0,), OTHERS, (*HEADS, EQUAL_SECONDS)),
    ((1, 2, 3, 4), ASKED, (EQUAL_EPOCHS, *HEADS, EQUAL_SECONDS)),
    ((0,), OTHERS, ("linearised", "paper")),
    ((1, 2, 3, 4), ASKED, ("linearised", "paper")),
    ((0,), ("CIFAR-10 (JPEG) .49",), (OTHER_GATES,)),
)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the result after each run."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=50.0, help="processor minutes after which no run is started")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--again", action="store_true", help="forget what has been run before")
    options = start(parser, argv)
    result = _Result(options)
    benches: dict[tuple[str, int], _Bench] = {}
    for seeds, cases, methods in PLAN[:4] if options.smoke else PLAN:
        for seed in seeds:
            for name in (case for case in cases if case in options.cases):
                data = CASES[name].data
                for method in (method for method in methods if method in options.methods):
                    if result.has(name, seed, method):
                        continue
                    if time.process_time() > 60 * options.minutes:
                        result.write(unfinished=True)
                        print(f"{options.minutes} minutes are over; start again to go on")
                        return
                    if (data, seed) not in benches:
                        benches[data, seed] = _Bench(_data(data, options), data, seed, options.smoke)
                    result.add({"case": name, "seed": seed, "method": method, **benches[data, seed].run(name, method)})
    result.write(unfinished=not (options.smoke or result.is_whole()))


class _Result:
    """The runs so far, in memory and on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        path = (options.output or RESULTS) / f"{NAME}.json"
        keep = path.is_file() and not (options.smoke or options.again)
        self.runs: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["numbers"]["runs"] if keep else []

    def has(self, case: str, seed: int, method: str) -> bool:
        """Whether it is there already, or cannot be had: the base has not come that far in as many epochs as now."""
        of_case = [run for run in self.runs if (run["case"], run["seed"]) == (case, seed)]
        in_vain = any(run["method"] == NOT_REACHED and run["epochs"] >= _late_epochs(case) for run in of_case)
        return in_vain or any(run["method"] == method for run in of_case)

    def is_whole(self) -> bool:
        """Whether nothing of PLAN is missing, whatever cases and methods were asked for now."""
        return all(self.has(c, s, m) for seeds, cases, methods in PLAN for s in seeds for c in cases for m in methods)

    def add(self, run: dict[str, Any]) -> None:
        case = run["case"], run["seed"]  # a base that was given up sooner is what this one replaces
        self.runs = [old for old in self.runs if (old["case"], old["seed"], old["method"]) != (*case, NOT_REACHED)]
        self.runs.append({**run, "commit": self.options.environment["commit"]})
        print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
        self.write(table=False, unfinished=True)

    def write(self, *, table: bool = True, unfinished: bool = False) -> None:
        rows: list[dict[str, object]] = []
        for name, case in CASES.items():
            of_case = [run for run in self.runs if run["case"] == name]
            for method in (*METHODS, UNBOUNDED, NOT_REACHED):
                of_method = [run for run in of_case if run["method"] == method]
                if of_method:
                    medians = {
                        key: quartiles([run[key] for run in of_method])["median"]
                        for key in ("base", "epochs", "seconds")
                    }
                    figures = _figures([float(run["accuracy"]) for run in of_method])
                    wanted = {"paper": case.paper, "asked": case.asked}
                    rows.append(
                        {"case": name, "method": method, "seeds": len(of_method), **medians, **figures, **wanted}
                    )
        numbers = {"network": "cnn_small", "batch": BATCH, "summary": rows, "runs": self.runs}
        seeds = sorted({run["seed"] for run in self.runs})
        write_result(NAME, numbers, self.options, seeds=seeds, rows=rows if table else (), unfinished=unfinished)


def _figures(accuracies: list[float]) -> dict[str, float]:
    """Of the runs that did not diverge, and the number of those that did, if any; nan stands for them."""
    whole = [accuracy for accuracy in accuracies if not math.isnan(accuracy)] or [math.nan]
    figures = {"accuracy": quartiles(whole)["median"], "least": min(whole), "most": max(whole)}
    diverged = sum(map(math.isnan, accuracies))
    return {**figures, "diverged": diverged} if diverged else figures


def _late_epochs(case: str) -> int:
    """Epochs of the late base, before it is given up."""
    return LATE_EPOCHS[CASES[case].data] + LAST_EPOCHS[CASES[case].data]


_loaded: dict[str, Dataset] = {}


def _data(name: str, options: argparse.Namespace) -> Dataset:
    if options.smoke:
        return stand_in(name, 200, 50)
    if name not in _loaded:
        _loaded[name] = load_dataset(name, options.root)
    return _loaded[name]


class Loader:
    """Shuffled mini-batches of images, distorted at random where that is asked for."""

    def __init__(self, inputs: Tensor, targets: Tensor, seed: int, *, flips: bool = False, shift: int = 0) -> None:
        self.inputs, self.targets, self.flips, self.shift = inputs, targets, flips, shift
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.inputs) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.inputs), generator=self.generator).split(BATCH):
            yield self._distorted(self.inputs[index]), self.targets[index]

    def _distorted(self, x: Tensor) -> Tensor:
        if self.flips:
            flipped = torch.rand(len(x), generator=self.generator) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        if self.shift:
            height, width = x.shape[2:]
            windows = F.pad(x, [self.shift] * 4, mode="replicate").unfold(2, height, 1).unfold(3, width, 1)
            down, right = torch.randint(2 * self.shift + 1, (2, len(x)), generator=self.generator)
            x = windows[torch.arange(len(x)), :, down, right]
        return x


class _Bench:
    """The bases of one seed, and everything that can be made of them with the other half of the data."""

    def __init__(self, data: Dataset, name: str, seed: int, smoke: bool) -> None:
        self.data, self.name, self.seed, self.smoke = data, name, seed, smoke
        self.distortions: dict[str, Any] = {"shift": 1} if name == "mnist" else {"flips": True}
        self.epochs = 1 if smoke else EPOCHS[name]
        self._snapshots = self._training()
        self._bases: dict[str, tuple[nn.Module, float]] = {}
        self._step_ratio = 0.0

    def run(self, case: str, method: str) -> dict[str, Any]:
        """One method on one base; "base not reached" where there is no such base."""
        base, at = self._base(case)
        begin = time.process_time()
        epochs: float = self.epochs
        changed: dict[str, Any] = {}
        classify: Callable[[Tensor], Tensor] | None
        if at < CASES[case].level - 0.01 and not self.smoke:
            return {"method": NOT_REACHED, "base": at, "accuracy": at, "epochs": _late_epochs(case), "seconds": 0.0}
        if method in HEADS:
            classify = self._head(base, method == "MLP head")
        elif method == EQUAL_SECONDS:
            self._step_ratio = self._step_ratio or self._timed_steps(base)
            begin = time.process_time()  # that was not of it
            epochs *= self._step_ratio
            changed = {"step of gated / of the base": self._step_ratio}
            classify = self._continued(base, epochs)
        elif method == EQUAL_EPOCHS:
            classify = self._continued(base, epochs)
        else:
            epochs = 1 if self.smoke else COSTLY_EPOCHS.get(method, self.epochs)
            kind: Any = GATED if method == OTHER_GATES else method
            gradnet = GradNet(base, self.data.num_classes, method=kind, seed=self.seed)
            if method == OTHER_GATES:
                own = gradnet.head.state_dict()  # type: ignore[union-attr]
                gradnet = GradNet(self._continued(base, epochs), self.data.num_classes, seed=self.seed)
                gradnet.head.load_state_dict(own)  # type: ignore[union-attr]
                begin = time.process_time()
            try:
                classify = gradnet.fit(self._loader(), int(epochs), progress=False, missing_classes=self.smoke)
            except NonFiniteLossError:  # a result, and the head is untrained again
                classify = None
        seconds = time.process_time() - begin
        every = 4 if method == "paper" else 1
        test = self.data.test_inputs[::every], self.data.test_targets[::every]
        accuracy = math.nan if classify is None else _accuracy(classify, *test)
        found = {"base": at, "accuracy": accuracy, "epochs": epochs, "seconds": seconds, "data": self.data.title}
        return {**found, **changed}

    def _base(self, case: str) -> tuple[nn.Module, float]:
        while case not in self._bases:
            name, model = next(self._snapshots)
            self._bases[name] = model, _accuracy(model, self.data.test_inputs, self.data.test_targets)
        return self._bases[case]

    def _training(self) -> Iterator[tuple[str, nn.Module]]:
        """The base's course on the first half: a snapshot for each case, in the order of their accuracies."""
        levels = sorted((case.level, name) for name, case in CASES.items() if case.data == self.name)
        early = sum(name in ASKED for _, name in levels)
        half = len(self.data.train_inputs) // 2
        x, y = self.data.train_inputs[:half], self.data.train_targets[:half]
        torch.manual_seed(self.seed)
        model = _channels_last(cnn_small() if self.name == "mnist" else cnn_small_cifar())
        loader = Loader(x, y, self.seed)
        rate = 0.003 if self.name == "mnist" else 0.01
        course = _steps(model, loader, 10**6, torch.optim.SGD(model.parameters(), rate, momentum=0.9), falling=False)
        for place, (level, name) in enumerate(levels):
            if place == early:  # the rest is farther than a constant rate leads
                loader = Loader(x, y, self.seed, **self.distortions)
                course = itertools.chain(
                    _late_steps(model, loader, LATE_EPOCHS[self.name]),
                    _late_steps(model, Loader(x, y, self.seed, flips=True, shift=2), LAST_EPOCHS[self.name]),
                )
            while not (self.smoke or self._reaches(model, level)):
                if next(course, None) is None:
                    break
            yield name, copy.deepcopy(model)

    def _reaches(self, model: nn.Module, level: float) -> bool:
        """On all test images, which are looked at where a tenth of them comes within two points (its noise) of it."""
        wanted = ((10, level - 0.02), (1, level))
        return all(_accuracy(model, self.data.test_inputs[::k], self.data.test_targets[::k]) >= at for k, at in wanted)

    def _loader(self) -> Loader:
        half = len(self.data.train_inputs) // 2
        x, y = self.data.train_inputs[half : 2 * half], self.data.train_targets[half : 2 * half]
        return Loader(x, y, 100 + self.seed, **self.distortions)

    def _continued(self, base: nn.Module, epochs: float) -> nn.Module:
        model, loader = copy.deepcopy(base), self._loader()
        _train(model, loader, max(1, round(epochs * len(loader))), model)
        return model

    def _head(self, base: nn.Module, hidden: bool) -> nn.Module:
        assert isinstance(base, nn.Sequential)
        body, last = base[:-1], base[-1]
        assert isinstance(last, nn.Linear)
        torch.manual_seed(self.seed)
        head: nn.Module = copy.deepcopy(last)
        if hidden:
            head = nn.Sequential(nn.Linear(last.in_features, 256), nn.ReLU(), nn.Linear(256, last.out_features))
        loader = self._loader()
        classify = nn.Sequential(body.requires_grad_(False), head)
        _train(classify, loader, self.epochs * len(loader), head)
        body.requires_grad_(True)
        return classify

    def _timed_steps(self, base: nn.Module) -> float:
        """A training step of the gated method in steps of the base's, in processor seconds."""
        head: Any = GradNet(base, self.data.num_classes).head
        model = copy.deepcopy(base)
        return time_interleaved(
            {"base": _step(model, model), "gated": _step(head, head)},
            baseline="base",
            rounds=1 if self.smoke else 15,
            make_batch=lambda _: next(iter(self._loader())),
        )["candidates"]["gated"]["cpu_ratio"]["median"]


def _step(model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Callable[[tuple[Tensor, Tensor]], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits(_channels_last(batch[0])), batch[1]).backward()
        optimizer.step()

    return step


def _train(model: nn.Module, loader: Loader, steps: int, trained: nn.Module) -> None:
    for _ in _steps(model, loader, steps, torch.optim.Adam(trained.parameters(), 1e-3, fused=True)):
        pass


def _late_steps(model: nn.Module, loader: Loader, epochs: int) -> Iterator[int]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    return _steps(model, loader, epochs * len(loader), optimizer, stop=100)


def _steps(
    model: nn.Module,
    loader: Loader,
    steps: int,
    optimizer: torch.optim.Optimizer,
    *,
    falling: bool = True,
    stop: int = 25,
) -> Iterator[int]:
    """Train, the rate falling to 0 or not, with a stop every few steps."""
    rate = optimizer.param_groups[0]["lr"]
    done = 0
    while done < steps:
        for x, y in loader:
            if done == steps:
                break
            optimizer.param_groups[0]["lr"] = rate * (1 - done / steps) if falling else rate
            optimizer.zero_grad()
            F.cross_entropy(model(_channels_last(x)), y).backward()
            optimizer.step()
            done += 1
            if done % stop == 0:
                yield done


@torch.no_grad()
def _accuracy(classify: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> float:
    predicted = torch.cat([classify(_channels_last(part)).argmax(1) for part in inputs.split(250)])
    return float((predicted == targets).float().mean())


def _channels_last(x: Any) -> Any:
    return x.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
