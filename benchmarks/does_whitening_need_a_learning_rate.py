"""Does WhiteningSGD train as well without a learning rate as other optimizers with the best of theirs?

Four networks (lenet, resnet20 without normalisation, mlp_deep, char_gpt), one setting of ours for all of them:
``WhiteningSGD(model)``. Beside it the same rule with learning rates over three decades, the paper's own whitening, SGD
with and without momentum, Adam and AdamW, each at the best of a half-decade grid that grows until its best lies inside
(searched with the first seed). Every method's rate decays linearly to zero; losses are means over the training images
(char_gpt: over 40 fixed batches of windows) after the last step. "worst" is the largest loss of a batch on the way
there, as a multiple of the first one.

Which form of Eq. (11) should be the default? It gives unit j the direction d_j of Eq. (3), scaled:

    whitening       1 / sqrt(E[g_j.d_j])                    the equation on the metric of §2
    scale-free      sigma_j^2 / sqrt(E[sigma_j^2 g_j.d_j])  the same, outputs in units of their spread sigma_j
    WhiteningSGD    sigma_j^2 / (L sqrt(max(t_j^2, E[t_j^2]))),  t_j = sigma_j r_j

WhiteningSGD's default rule *is* the scale-free Eq. (11): r_j^2, how far d_j moves y_j, is g_j.d_j where inputs are
uncorrelated, but measured; the present slope beside its average is a cap; L shares the step among moves that add up;
norms and bare parameters, which the first two step by a Euclidean length, move by a share of their own size. The first
two are ``BlockNaturalGradient(model, lr, metric, "unit")``, whose lr is the length of a unit's step, tuned as the
others', and once more with one lr for all networks ("untuned", UNTUNED below).

Part two multiplies the incoming weights of every hidden ReLU unit by 10^U(-1, 1) in the middle of training and divides
its outgoing ones by the same: the function stays what it was. "dead": by how much the share of hidden units that no
sample of a batch activates has grown at the end; mean losses of an epoch before and after stand beside it.

Every run is written as it comes, with the commit that it was measured on. A second start does only what is missing:
``--networks``, ``--methods`` and ``--seeds`` say what to run, rows of everything else are made of the runs that stand.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from torchgeom_optim.optimizers import BlockNaturalGradient

NAME = "does_whitening_need_a_learning_rate"
OURS = "WhiteningSGD(model)"
CAPPED = "WhiteningSGD(model, lr)"
RATES = (0.3, 3.0, 30.0, 300.0)
PLAIN, SCALE_FREE = "Eq. (11), whitening", "Eq. (11), scale-free"
UNTUNED = {PLAIN: 0.03162, SCALE_FREE: 0.01}  # with 0.1 the latter diverges


@dataclass(frozen=True)
class Job:
    """A network and how long it is trained.

    Attributes:
        data: name of the data set, or None for the text.
        images: training images used.
        steps: of batches of 64 images or 32 windows.
    """

    data: str | None
    images: int
    steps: int


Run = dict[str, Any]

JOBS = {
    "lenet": Job("cifar10", 5000, 1280),
    "mlp_deep": Job("mnist", 5000, 1280),
    "char_gpt": Job(None, 0, 1000),
    "resnet20": Job("cifar10", 1000, 480),
}

# name: (first grid as exponents of sqrt(10), optimizer)
BASELINES: dict[str, tuple[range, Callable[[nn.Module, float], torch.optim.Optimizer]]] = {
    "SGD": (range(-2, 1), lambda model, lr: torch.optim.SGD(model.parameters(), lr)),
    "SGD, momentum 0.9": (range(-4, -1), lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9)),
    "Adam": (range(-6, -3), lambda model, lr: torch.optim.Adam(model.parameters(), lr)),
    "AdamW": (range(-6, -3), lambda model, lr: torch.optim.AdamW(model.parameters(), lr)),
    "the paper's whitening": (range(-2, 1), lambda model, lr: WhiteningSGD(model, lr, rule="paper")),
    PLAIN: (range(-4, -1), lambda model, lr: BlockNaturalGradient(model, lr, "whitening", "unit")),
    SCALE_FREE: (range(-5, -2), lambda model, lr: BlockNaturalGradient(model, lr, "scale_free_whitening", "unit")),
}
METHODS = (OURS, CAPPED, *BASELINES)
RESCALED = (OURS, "SGD, momentum 0.9", "Adam", "the paper's whitening", PLAIN, SCALE_FREE)


Get = Callable[[str, str, float | None, int, bool], Run | None]  # network, method, lr, seed, rescaled


def main(argv: list[str] | None = None) -> None:
    """Run what has not been run yet and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--networks", default=",".join(JOBS), help="some of them, with commas (default: all)")
    parser.add_argument("--methods", default=";".join(METHODS), help="some of them, with semicolons (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="of each method at its best (default: 5)")
    parser.add_argument("--few", type=int, default=2, help="seeds of other learning rates, rescaled units (default: 2)")
    options = start(parser, argv)
    networks, methods = _chosen(parser, options.networks, ",", JOBS), _chosen(parser, options.methods, ";", METHODS)
    jobs = JOBS
    if options.smoke:
        jobs = {name: Job(JOBS[name].data, 128, 3) for name in ("lenet", "char_gpt")}
        networks, methods, options.seeds = list(jobs), [OURS, "Adam", SCALE_FREE], 1
    result = Result(jobs, options)
    for network in networks:
        for method in methods:
            for _ in _rows(result.run, network, method, range(1, 1 + options.seeds), options.few):
                pass  # each is made once more from what stands
    write_result(NAME, result.numbers(), options, seeds=result.seeds(), rows=result.rows())


def _chosen(parser: Any, names: str, separator: str, known: Iterable[str]) -> list[str]:
    chosen = [name.strip() for name in names.split(separator)]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"{unknown[0]!r}: need some of {separator.join(known)}")
    return chosen


class Result:
    """All runs, those of an earlier result included, and what is written of them.

    Args:
        jobs: runs with other numbers of steps are forgotten.
        options: of the command.
    """

    def __init__(self, jobs: dict[str, Job], options: Any) -> None:
        self._jobs, self._options = jobs, options
        self._runs: dict[tuple[Any, ...], Run] = {}
        folder = Path(options.output or RESULTS)
        path = (folder if (folder / f"{NAME}.json").exists() else RESULTS) / f"{NAME}.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not options.smoke else None
        for run in earlier["numbers"]["runs"] if earlier else ():
            if run["network"] in jobs and run["steps"] == jobs[run["network"]].steps:
                run = {key: float(value) if value in ("inf", "nan") else value for key, value in run.items()}
                self._runs[_key(run)] = run

    def find(self, network: str, method: str, lr: float | None, seed: int, rescaled: bool) -> Run | None:
        """A run that stands."""
        return self._runs.get((network, method, lr, seed, rescaled))

    def run(self, network: str, method: str, lr: float | None, seed: int, rescaled: bool) -> Run:
        """The same, or a new one, which is written down."""
        if (known := self.find(network, method, lr, seed, rescaled)) is not None:
            return known
        job, environment = self._jobs[network], self._options.environment
        what: Run = {"network": network, "method": method, "lr": lr, "seed": seed, "rescaled": rescaled}
        run = {**what, "steps": job.steps, **_train(network, job, method, lr, seed, rescaled, self._options)}
        run["commit"] = str(environment["commit"]) + (", changed" if environment["dirty"] else "")
        self._runs[_key(run)] = run
        print(
            "{network:9s} {method:24s} lr {lr} seed {seed}: loss {loss:.4g} worst {worst:.3g}".format(**run), flush=True
        )
        write_result(NAME, self.numbers(), self._options, seeds=self.seeds())
        return run

    def seeds(self) -> list[int]:
        """Of all runs."""
        return sorted({run["seed"] for run in self._runs.values()})

    def rows(self) -> list[dict[str, Any]]:
        """Of what stands."""
        seeds = self.seeds()
        found = [_rows(self.find, network, method, seeds, len(seeds)) for network in self._jobs for method in METHODS]
        return [row for rows in found for row in rows]

    def numbers(self) -> dict[str, Any]:
        """What is written."""
        return {
            "data": "CIFAR-10 (JPEG), MNIST, documentation strings of Python's standard library",
            "jobs": {name: vars(job) for name, job in self._jobs.items()},
            "runs": list(self._runs.values()),
            "rows": self.rows(),
        }


def _key(run: Run) -> tuple[Any, ...]:
    return tuple(run[part] for part in ("network", "method", "lr", "seed", "rescaled"))


def _rows(get: Get, network: str, method: str, seeds: Sequence[int], few: int) -> Iterator[dict[str, Any]]:
    """The rows of a method, of the runs that ``get`` has; ``few`` is for how many seeds of the less important ones."""
    if method in BASELINES:
        if (best := _best(get, network, method)) is None:
            return
        rates: list[tuple[float | None, str]] = [(best, "")]
        rates += [(UNTUNED[method], ", untuned")] if method in UNTUNED else []
    else:
        rates = [(None, "")] if method == OURS else [(lr, "") for lr in RATES]
    wanted = [(lr, note, False, few if method == CAPPED else len(seeds)) for lr, note in rates]
    wanted += [(rates[0][0], ", units rescaled half way", True, few)] if method in RESCALED else []
    for lr, note, rescaled, number in wanted:
        found = [get(network, method, lr, seed, rescaled) for seed in list(seeds)[:number]]
        if runs := [run for run in found if run is not None]:
            yield _row(network, method + note, runs)


def _best(get: Get, network: str, method: str) -> float | None:
    """The best learning rate of the grid, which grows while the best lies at its edge; None if ``get`` has it not."""
    losses: dict[int, float] = {}
    grid = list(BASELINES[method][0])
    best = grid[0]
    while grid:
        for k in grid:
            run = get(network, method, _rate(k), 1, False)
            if run is None:
                return None  # the search is not over
            losses[k] = run["loss"]
        best = min(losses, key=lambda k: losses[k])
        grid = [best - 1] if best == min(losses) else [best + 1] if best == max(losses) else []
    return _rate(best)


def _rate(exponent: int) -> float:
    return float(f"{10 ** (exponent / 2):.4g}")


def _row(network: str, method: str, runs: list[Run]) -> dict[str, Any]:
    lr, rescaled = runs[0]["lr"], runs[0]["rescaled"]
    row = {
        "network": network,
        "method": method,
        "lr": "none" if lr is None else lr,
        "loss": statistics.median(run["loss"] for run in runs),
        "losses": [run["loss"] for run in runs],
        "worst": max(run["worst"] for run in runs),
        "test accuracy": statistics.median(run["accuracy"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
    }
    if all("cpu_seconds" in run for run in runs):
        row["cpu seconds"] = statistics.median(run["cpu_seconds"] for run in runs)
    if rescaled:
        row |= {key: max(run[key] for run in runs) for key in ("dead", "epoch before", "epoch after")}
    return row


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


def _train(name: str, job: Job, method: str, lr: float | None, seed: int, rescale: bool, options: Any) -> Run:
    torch.manual_seed(seed)
    model = reference_network(name)
    optimizer = _optimizer(method, model, lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=job.steps)
    losses: list[float] = []
    begin, begin_cpu = time.perf_counter(), time.process_time()
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
        except ArithmeticError:  # gradients that are not finite
            losses.append(math.inf)
            break
        scheduler.step()
        losses.append(loss.item())
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
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
        "cpu_seconds": cpu_seconds,
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
