"""Does WhiteningSGD train as well without a learning rate as other optimizers with the best of theirs?

Four networks (lenet, resnet20 without normalisation, mlp_deep, char_gpt), one setting of ours for all of them:
``WhiteningSGD(model)``. Beside it the same rule with learning rates over three decades, the paper's own whitening, SGD
with and without momentum, Adam and AdamW, each at the best of a half-decade grid that grows until its best lies inside
(searched with the first seed). Every method's rate decays linearly to zero; losses are means over the training images
(char_gpt: over 40 fixed batches of windows) after the last step. "worst" is the largest loss of a batch on the way
there, as a multiple of the first one.

Part two multiplies the incoming weights of every hidden ReLU unit by 10^U(-1, 1) in the middle of training and divides
its outgoing ones by the same: the function stays what it was. "dead": by how much the share of hidden units that no
sample of a batch activates has grown at the end; mean losses of an epoch before and after stand beside it.

Runs are kept in a file of their own as they come, so that an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, benchmark_parser, start, write_result
from examples.datasets import documentation_text, load_dataset, random_windows, stand_in
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.models.reference import reference_network

NAME = "does_whitening_need_a_learning_rate"
OURS = "WhiteningSGD(model)"
CAPPED = "WhiteningSGD(model, lr)"
RATES = (0.3, 3.0, 30.0, 300.0)


@dataclass(frozen=True)
class Job:
    """A network and how long it is trained.

    Attributes:
        data: name of the data set, or None for the text.
        images: training images used.
        steps: of batches of 64 images or 32 windows.
        seeds: how many.
    """

    data: str | None
    images: int
    steps: int
    seeds: int


JOBS = {
    "lenet": Job("cifar10", 5000, 640, 5),
    "mlp_deep": Job("mnist", 5000, 640, 5),
    "char_gpt": Job(None, 0, 500, 3),
    "resnet20": Job("cifar10", 1000, 80, 1),
}

# name: (first grid as exponents of sqrt(10), optimizer)
BASELINES: dict[str, tuple[range, Callable[[nn.Module, float], torch.optim.Optimizer]]] = {
    "SGD": (range(-2, 1), lambda model, lr: torch.optim.SGD(model.parameters(), lr)),
    "SGD, momentum 0.9": (range(-4, -1), lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9)),
    "Adam": (range(-6, -3), lambda model, lr: torch.optim.Adam(model.parameters(), lr)),
    "AdamW": (range(-6, -3), lambda model, lr: torch.optim.AdamW(model.parameters(), lr)),
    "the paper's whitening": (range(-2, 1), lambda model, lr: WhiteningSGD(model, lr, rule="paper")),
}
RESCALED = (OURS, "SGD, momentum 0.9", "Adam", "the paper's whitening")


def main(argv: list[str] | None = None) -> None:
    """Run what has not been run yet and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--networks", default=",".join(JOBS), help="some of them (default: all)")
    options = start(parser, argv)
    names = options.networks.split(",")
    jobs = {name: JOBS[name] for name in names}
    if options.smoke:
        jobs = {name: Job(job.data, 128, 3, 1) for name, job in jobs.items() if name in ("lenet", "char_gpt")}
    runs = Runs(None if options.smoke else Path(options.output or RESULTS) / f"{NAME}.runs.jsonl")
    rows = [row for name, job in jobs.items() for row in _compare(runs, name, job, options)]
    numbers = {
        "data": "CIFAR-10 (JPEG), MNIST, documentation strings of Python's standard library",
        "jobs": {name: vars(job) for name, job in jobs.items()},
        "runs": [run for run in runs.done.values() if run["network"] in jobs],
        "rows": rows,
    }
    write_result(NAME, numbers, options, seeds=list(range(1, 1 + max(job.seeds for job in jobs.values()))), rows=rows)


class Runs:
    """Results by what was run, kept in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.done: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                run = json.loads(line)
                self.done[_key(run)] = run

    def __call__(
        self, options: Any, name: str, job: Job, method: str, lr: float | None, seed: int, rescale: bool
    ) -> dict:
        """The result of a run, from the file if it is there."""
        what = {"network": name, "method": method, "lr": lr, "seed": seed, "rescaled": rescale, "steps": job.steps}
        if _key(what) not in self.done:
            run = self.done[_key(what)] = {**what, **_train(name, job, method, lr, seed, rescale, options)}
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
            print(
                "{network:9s} {method:24s} lr {lr} seed {seed}: loss {loss:.4g} worst {worst:.3g}".format(**run),
                flush=True,
            )
        return self.done[_key(what)]


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[part] for part in ("network", "method", "lr", "seed", "rescaled", "steps"))


def _compare(runs: Runs, name: str, job: Job, options: Any) -> Iterator[dict[str, Any]]:
    seeds = range(1, 1 + job.seeds)
    best: dict[str, float | None] = {OURS: None}
    for method, (first, _) in BASELINES.items():
        grid = list(first)
        loss = {k: runs(options, name, job, method, _rate(k), 1, False)["loss"] for k in grid}
        while (k := min(loss, key=lambda k: loss[k])) in (min(loss), max(loss)) and not options.smoke:
            new = k - 1 if k == min(loss) else k + 1
            loss[new] = runs(options, name, job, method, _rate(new), 1, False)["loss"]
        best[method] = _rate(k)
    for method, lr in best.items():
        yield _row(name, method, lr, [runs(options, name, job, method, lr, seed, False) for seed in seeds])
    for lr in RATES:
        yield _row(
            name,
            CAPPED,
            lr,
            [runs(options, name, job, CAPPED, lr, seed, False) for seed in list(seeds)[: max(job.seeds // 2, 1)]],
        )
    few = list(seeds)[: max(job.seeds // 2, 1)]
    for method in RESCALED:
        yield _row(name, method, best[method], [runs(options, name, job, method, best[method], s, True) for s in few])


def _rate(exponent: int) -> float:
    return float(f"{10 ** (exponent / 2):.4g}")


def _row(name: str, method: str, lr: float | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    rescaled = runs[0]["rescaled"]
    return {
        "network": name,
        "method": method + (", units rescaled half way" if rescaled else ""),
        "lr": "none" if lr is None else lr,
        "loss": statistics.median(run["loss"] for run in runs),
        "losses": [run["loss"] for run in runs],
        "worst": max(run["worst"] for run in runs),
        "test accuracy": statistics.median(run["accuracy"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        **({key: max(run[key] for run in runs) for key in ("dead", "epoch before", "epoch after")} if rescaled else {}),
    }


@cache
def _data(name: str, root: Path | None, images: int, smoke: bool) -> Any:
    return stand_in(name, images) if smoke else load_dataset(name, root, train_limit=images)


_text = cache(documentation_text)


def _batches(job: Job, seed: int, options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    if job.data is None:
        while True:
            yield random_windows(_text(), 32, 48, generator=generator)
    data = _data(job.data, options.root, job.images, options.smoke)
    while True:
        for index in torch.randperm(len(data.train_inputs), generator=generator).split(64):
            if len(index) == 64:
                yield data.train_inputs[index], data.train_targets[index]


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def _optimizer(method: str, model: nn.Module, lr: float | None) -> torch.optim.Optimizer:
    if lr is None:
        return WhiteningSGD(model)
    return WhiteningSGD(model, lr) if method == CAPPED else BASELINES[method][1](model, lr)


def _train(
    name: str, job: Job, method: str, lr: float | None, seed: int, rescale: bool, options: Any
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = reference_network(name)
    optimizer = _optimizer(method, model, lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=job.steps)
    losses: list[float] = []
    begin = time.perf_counter()
    dead = 0.0
    for step, (x, y) in enumerate(_batches(job, seed, options)):
        if step == job.steps or (losses and not math.isfinite(losses[-1])):
            break
        if rescale and step == job.steps // 2:
            dead = -_dead_share(model, x)
            _rescale_units(model, torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = _loss(model, x, y)
        loss.backward()
        try:
            optimizer.step()
        except FloatingPointError:  # gradients that are not finite
            losses.append(math.inf)
            break
        scheduler.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    final, accuracy = _evaluate(model, job, options)
    diverged = not (math.isfinite(losses[-1]) and math.isfinite(final))
    if rescale:
        dead += _dead_share(model, next(_batches(job, seed + 100, options))[0])
    finite = [loss for loss in losses if math.isfinite(loss)]
    half, epoch = job.steps // 2, max(job.images // 64, job.steps // 10)
    return {
        "loss": math.inf if diverged else final,
        "worst": math.inf if diverged else max(finite) / losses[0],
        "accuracy": accuracy,
        "seconds": seconds,
        "dead": dead,
        "epoch before": statistics.fmean(losses[half - epoch : half] or losses[-1:]),
        "epoch after": statistics.fmean(losses[half : half + epoch] or losses[-1:]),
    }


@torch.no_grad()
def _evaluate(model: nn.Module, job: Job, options: Any) -> tuple[float, float]:
    if job.data is None:
        batches = _batches(job, 999, options)
        parts = [next(batches) for _ in range(40)]
        pairs = [(model(x).flatten(0, 1), y.flatten()) for x, y in parts]
        losses = [float(nn.functional.cross_entropy(z, y)) for z, y in pairs]
        return statistics.fmean(losses), statistics.fmean(float((z.argmax(1) == y).float().mean()) for z, y in pairs)
    data = _data(job.data, options.root, job.images, options.smoke)
    train, test = (
        torch.cat([model(part) for part in x.split(500)]) for x in (data.train_inputs, data.test_inputs[:2000])
    )
    loss = float(nn.functional.cross_entropy(train, data.train_targets))
    return loss, float((test.argmax(1) == data.test_targets[:2000]).float().mean())


def _hidden_layers(model: nn.Module) -> list[tuple[Any, ...]]:
    """Pairs of layers with ReLU units between them, and nothing else but pooling and flattening."""
    if isinstance(model, nn.Sequential):
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return list(pairwise(layers))
    names = (("expand", "contract"), ("conv1", "conv2"))  # inside the blocks of a transformer, of a residual network
    return [tuple(getattr(m, n) for n in pair) for m in model.modules() for pair in names if hasattr(m, pair[0])]


@torch.no_grad()
def _rescale_units(model: nn.Module, generator: torch.Generator) -> None:
    for before, after in _hidden_layers(model):
        kappa = 10 ** (2 * torch.rand(len(before.weight), generator=generator) - 1)
        before.weight.mul_(kappa.view(-1, *[1] * (before.weight.dim() - 1)))
        before.bias.mul_(kappa)
        per_input = kappa.repeat_interleave(after.weight.shape[1] // len(kappa))
        after.weight.div_(per_input.view(1, -1, *[1] * (after.weight.dim() - 2)))


@torch.no_grad()
def _dead_share(model: nn.Module, x: Tensor) -> float:
    """Share of hidden units that no sample of the batch activates."""
    alive: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _, __, y: alive.append(
                (y > 0).flatten(2).any(-1).any(0) if y.dim() == 4 else (y > 0).flatten(0, -2).any(0)
            )
        )
        for layer, _ in _hidden_layers(model)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return 1.0 - float(torch.cat(alive).float().mean())


if __name__ == "__main__":
    main()
