"""How low is the training loss after a given number of steps, and of seconds, with each member of BlockNaturalGradient?

mlp2 on MNIST, lenet on CIFAR-10 and char_gpt on the documentation strings that Python ships, a few steps each: a
comparison of beginnings. Every method at the best learning rate of a half-decade grid, searched with the first seed and
grown until the best lies inside; then the best with every seed (the same seeds, weights and batches for all methods).
Learning rates decay linearly to 0. Loss: the mean over the last fifth of the steps, each on its batch before the step;
a run that diverges or is refused counts as infinite. Settings other than the learning rate are each class's defaults.

Runs are written as they come in, and a second start of the same command goes on where the first one ended.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, start, write_result
from examples.datasets import documentation_text, load_dataset, random_windows, stand_in
from torchgeom_optim.models.reference import reference_network
from torchgeom_optim.optimizers import BlockNaturalGradient

NAME = "does_the_natural_gradient_lower_the_loss"
SEEDS = (1, 2, 3, 4, 5)
BATCH = {"mlp2": 128, "lenet": 64, "char_gpt": 32}
IMAGES = 10_000

Optimizer = Callable[[nn.Module, float], torch.optim.Optimizer]
Run = dict[str, Any]
NaturalGradient = BlockNaturalGradient


def _soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=10)


# name: (optimizer, middle of the first grid as an exponent of sqrt(10))
METHODS: dict[str, tuple[Optimizer, int]] = {
    "SGD, momentum 0.9": (lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9), -3),
    "Adam": (lambda model, lr: torch.optim.Adam(model.parameters(), lr), -4),
    "SOAP": (_soap, -4),
    "RMSprop (torch)": (lambda model, lr: torch.optim.RMSprop(model.parameters(), lr), -6),
    "rmsprop": (NaturalGradient.rmsprop, -6),
    "normalized_sgd, layers": (lambda model, lr: NaturalGradient.normalized_sgd(model, lr, "layer"), -2),
    "normalized_sgd, network": (NaturalGradient.normalized_sgd, -1),
    "fan_in": (NaturalGradient.fan_in, 1),
    "diagonal, layers": (lambda model, lr: NaturalGradient(model, lr, "diagonal", "layer"), -6),
    "quasi_diagonal, units": (lambda model, lr: NaturalGradient(model, lr, "quasi_diagonal", "unit"), -7),
    "fisher_diagonal, layers": (lambda model, lr: NaturalGradient(model, lr, "fisher_diagonal", "layer"), -4),
    "fisher_quasi_diagonal, units": (
        lambda model, lr: NaturalGradient(model, lr, "fisher_quasi_diagonal", "unit"),
        -5,
    ),
    "whitening, units": (lambda model, lr: NaturalGradient(model, lr, "whitening", "unit"), -3),
    "whitening, layers": (lambda model, lr: NaturalGradient(model, lr, "whitening", "layer"), -2),
    "scale_free_whitening, units": (lambda model, lr: NaturalGradient(model, lr, "scale_free_whitening", "unit"), -3),
    "kfac": (NaturalGradient.kfac, -2),
    "kfac, per_sample": (lambda model, lr: NaturalGradient.kfac(model, lr, expectation="per_sample"), -3),
    "kronecker, units": (lambda model, lr: NaturalGradient(model, lr, "kronecker", "unit"), -5),
    "trpo": (NaturalGradient.trpo, -1),
}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of every run (default: 100)")
    options = start(parser, argv)
    seeds, steps, methods, networks = SEEDS, options.steps, list(METHODS), list(BATCH)
    if options.smoke:
        seeds, steps, methods, networks = (1,), 3, ["Adam", "kfac"], ["mlp2"]
    setting = {"steps": steps, "batch": BATCH, "images": IMAGES, "seeds": list(seeds)}
    runs = [] if options.smoke else _earlier_runs(options, setting)
    numbers: dict[str, Any] = {"setting": setting, "data": {}, "best": [], "runs": runs}
    for network in networks:
        batches, numbers["data"][network] = _batches(network, options)
        for method in methods:

            def run(exponent: int, seed: int, network: str = network, method: str = method, batches=batches) -> float:
                key = {"network": network, "method": method, "exponent": exponent, "seed": seed}
                known = next((r for r in runs if all(r[k] == v for k, v in key.items())), None)
                if known is None:
                    runs.append(known := {**key, **_train(network, method, exponent, seed, steps, batches)})
                    known["commit"] = options.environment["commit"]
                    print(network, method, f"lr {known['lr']:.3g} seed {seed}: {known['loss']}", flush=True)
                return float(known["loss"])

            numbers["best"].append(_search(run, network, method, seeds, runs))
            write_result(NAME, numbers, options, seeds=seeds)
    write_result(NAME, numbers, options, seeds=seeds, rows=numbers["best"])


def _earlier_runs(options: Any, setting: dict[str, Any]) -> list[Run]:
    paths = [folder / f"{NAME}.json" for folder in (options.output or RESULTS, RESULTS)]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return []
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    return numbers["runs"] if numbers["setting"] == setting else []  # each with the commit that it was measured on


def _search(
    run: Callable[[int, int], float], network: str, method: str, seeds: tuple[int, ...], runs: list[Run]
) -> dict[str, Any]:
    """The best of the grid with the first seed, then with all seeds."""
    middle = METHODS[method][1]
    grid = [middle - 1, middle, middle + 1]
    losses = {k: run(k, seeds[0]) for k in grid}
    while (best := min(losses, key=lambda k: losses[k])) in (min(losses), max(losses)) and len(losses) < 12:
        k = best - 1 if best == min(losses) else best + 1
        losses[k] = run(k, seeds[0])
    of_best = [run(best, seed) for seed in seeds]
    same = [r for r in runs if (r["network"], r["method"], r["exponent"]) == (network, method, best)]
    return {
        "network": network,
        "method": method,
        "lr": same[0]["lr"],
        "loss": statistics.median(of_best),
        "least": min(of_best),
        "greatest": max(of_best),
        "seconds": statistics.median(r["seconds"] for r in same),
        "cpu seconds": statistics.median(r["cpu_seconds"] for r in same),
    }


def _train(
    network: str, method: str, exponent: int, seed: int, steps: int, batches: Callable[[torch.Generator], Any]
) -> Run:
    lr = float(f"{10 ** (exponent / 2):.4g}")
    torch.manual_seed(seed)
    model = reference_network(network)
    optimizer = METHODS[method][0](model, lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    losses, error = list[Tensor](), None
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        for _ in range(steps):
            x, y = batches(generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
    except ArithmeticError as refused:  # of gradients that are not finite
        error = str(refused)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    curve = torch.stack(losses)
    last = float(curve[-max(steps // 5, 1) :].mean())
    failed = error is not None or last != last
    return {
        "lr": lr,
        "loss": float("inf") if failed else last,
        "error": error,
        "curve": [float(f"{part.mean():.4g}") for part in curve.chunk(20)],
        "seconds": wall,
        "cpu_seconds": cpu,
    }


def _batches(network: str, options: Any) -> tuple[Callable[[torch.Generator], tuple[Tensor, Tensor]], str]:
    """Random batches of a network's data, and what the data are called."""
    size = BATCH[network]
    if network == "char_gpt":
        text = documentation_text()
        return lambda generator: random_windows(text, size, 48, generator=generator), "documentation strings of Python"
    name = "mnist" if network == "mlp2" else "cifar10"
    data = stand_in(name) if options.smoke else load_dataset(name, options.root, train_limit=IMAGES)
    inputs = data.train_inputs.flatten(1) if network == "mlp2" else data.train_inputs

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(inputs), (size,), generator=generator)
        return inputs[index], data.train_targets[index]

    return batch, f"{data.title}, first {len(inputs)} training images"


if __name__ == "__main__":
    main()
