"""How low is the training loss of lenet on CIFAR-10 after a given number of epochs, by method?

Lafond, Vasilache and Bottou (2017), Fig. 2, in small: plain SGD, SGD with steps scaled by 1/sqrt(n s), batch
normalization, and whitening, each at the best of a learning-rate grid; SGD with momentum and Adam stand beside them.

The grid of a method (half-decades) is searched with the first seed and grows until its best lies inside; the best
is then run with every seed. A run that diverges counts with an infinite loss. Loss: mean cross-entropy over all
training images after the last epoch, in evaluation mode. Constant learning rate, no weight decay, one thread per run.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import benchmark_parser, quartiles, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.models.reference import lenet

NAME = "does_whitening_lower_the_training_loss"
SEEDS = (1, 2, 3, 4, 5)
BATCH = 64
Optimizer = Callable[[nn.Module, float], torch.optim.Optimizer]

# name: (first grid as exponents of sqrt(10), batch norm, optimizer)
METHODS: dict[str, tuple[range, bool, Optimizer]] = {
    "SGD": (range(-3, 1), False, lambda model, lr: torch.optim.SGD(model.parameters(), lr)),
    "SGD, momentum 0.9": (
        range(-5, -1),
        False,
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9),
    ),
    "Adam": (range(-7, -3), False, lambda model, lr: torch.optim.Adam(model.parameters(), lr)),
    "SGD with 1/sqrt(n s)": (range(-1, 3), False, lambda model, lr: WhiteningSGD(model, lr, rule="fan_in")),
    "batch norm": (range(-3, 1), True, lambda model, lr: torch.optim.SGD(model.parameters(), lr)),
    "whitening": (range(-2, 2), False, lambda model, lr: WhiteningSGD(model, lr, rule="whitening")),
    "whitening, momentum 0.9": (
        range(-4, 0),
        False,
        lambda model, lr: WhiteningSGD(model, lr, momentum=0.9, rule="whitening"),
    ),
}

_data: Dataset


def main(argv: list[str] | None = None) -> None:
    """Run all methods and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="training images used (default: 10000)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    options = start(parser, argv)
    seeds, epochs, images = (SEEDS[:1], 1, 256) if options.smoke else (SEEDS, options.epochs, options.images)
    methods = ["SGD", "whitening"] if options.smoke else list(METHODS)
    context = multiprocessing.get_context("spawn")
    source = (None if options.smoke else options.root, images, options.smoke)
    with context.Pool(options.jobs, _load, (source, options.threads)) as pool:
        runs = _search(pool, methods, seeds, epochs)
    best = {method: _best(runs, method, seeds) for method in methods}
    rows = [
        {
            "method": method,
            "lr": lr,
            "training loss": quartiles([run["loss"] for run in of_best])["median"],
            "least": min(run["loss"] for run in of_best),
            "greatest": max(run["loss"] for run in of_best),
            "test accuracy": statistics.median(run["accuracy"] for run in of_best),
            "seconds": statistics.median(run["seconds"] for run in of_best),
        }
        for method, (lr, of_best) in best.items()
    ]
    numbers = {
        "network": "lenet",
        "data": f"{runs[0]['data']}, first {images} training images",
        "epochs": epochs,
        "batch": BATCH,
        "best": rows,
        "runs": runs,
    }
    write_result(NAME, numbers, options, seeds=seeds, rows=rows)


def _search(pool: multiprocessing.pool.Pool, methods: list[str], seeds: tuple[int, ...], epochs: int) -> list[dict]:
    """All runs: a grid per method with the first seed, then every seed at its best."""
    runs: dict[tuple[str, int, int], dict] = {}

    def run(jobs: list[tuple[str, int, int]]) -> None:
        jobs = [job for job in jobs if job not in runs]
        for job, result in zip(jobs, pool.imap(_train, [(*job, epochs) for job in jobs]), strict=True):
            runs[job] = result
            print("{method:24s} lr {lr:8.4g} seed {seed}: loss {loss:.4g}".format(**result), flush=True)

    for method in methods:
        grid = list(METHODS[method][0])
        while True:
            run([(method, k, seeds[0]) for k in grid])
            best = min(grid, key=lambda k: runs[method, k, seeds[0]]["loss"])
            if min(grid) < best < max(grid):
                break
            grid.append(best - 1 if best == min(grid) else best + 1)
        run([(method, best, seed) for seed in seeds])
    return list(runs.values())


def _best(runs: list[dict], method: str, seeds: tuple[int, ...]) -> tuple[float, list[dict]]:
    if len(seeds) == 1:
        best = min((run for run in runs if run["method"] == method), key=lambda run: run["loss"])
        return best["lr"], [best]
    by_lr: dict[float, list[dict]] = {}
    for run in runs:
        if run["method"] == method:
            by_lr.setdefault(run["lr"], []).append(run)
    return next((lr, group) for lr, group in by_lr.items() if len(group) == len(seeds))


def _load(source: tuple, threads: int) -> None:
    """Once per process."""
    global _data
    root, images, smoke = source
    torch.set_num_threads(threads)
    _data = stand_in("cifar10", images) if smoke else load_dataset("cifar10", root, train_limit=images)


def _train(job: tuple[str, int, int, int]) -> dict:
    method, exponent, seed, epochs = job
    _, batch_norm, make_optimizer = METHODS[method]
    lr = 10 ** (exponent / 2)
    torch.manual_seed(seed)
    model = lenet(batch_norm=batch_norm)
    optimizer = make_optimizer(model, lr)
    order = torch.Generator().manual_seed(seed)
    x, y = _data.train_inputs, _data.train_targets
    begin, diverged = time.perf_counter(), False
    for _ in range(epochs):
        epoch_loss = torch.zeros(())
        for index in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            loss.backward()
            epoch_loss += loss.detach()
            try:
                optimizer.step()
            except FloatingPointError:  # gradients that are not finite
                epoch_loss += float("inf")
                break
        if not torch.isfinite(epoch_loss):
            diverged = True
            break
    seconds = time.perf_counter() - begin
    loss, _ = _evaluate(model, x, y)
    _, accuracy = _evaluate(model, _data.test_inputs, _data.test_targets)
    return {
        "method": method,
        "lr": float(f"{lr:.4g}"),
        "seed": seed,
        "loss": float("inf") if diverged or loss != loss else loss,
        "accuracy": accuracy,
        "seconds": seconds,
        "data": _data.title,
    }


@torch.no_grad()
def _evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    model.eval()
    logits = torch.cat([model(part) for part in x.split(1000)])
    model.train()
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
