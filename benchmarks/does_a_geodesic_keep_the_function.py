"""How accurate is mlp2 on MNIST after a share of its weights has been taken away, with labels and without?

Without labels: one-shot magnitude pruning, the paper's Eq. (5) in 20 steps (first seed only), the compensated path,
and gradual magnitude pruning that trains on the dense network's outputs (distillation) for the seconds of the
compensated path. With labels: fine-tuning after one-shot pruning, and gradual magnitude pruning, both for these
seconds; the compensated path with one epoch of training between its steps, and gradual magnitude pruning for three
epochs. The compensated path has one setting for all sparsities. Dense: Adam, 10 epochs, rate 1.5e-3 falling to 0.
Training after pruning: Adam, 1e-3 falling to 0 over the time that it has; gradual pruning follows the cubic schedule
of Zhu and Gupta (2017) over the first two thirds.
Seconds are processor seconds of one thread; accuracy is on all test images.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benchmarks.harness import benchmark_parser, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim.models.reference import mlp2
from torchgeom_optim.optimizers import GeodesicSparsifier, Sparsity

NAME = "does_a_geodesic_keep_the_function"
SEEDS = (1, 2, 3)
SHARES = (0.7, 0.9, 0.95)
BATCH = 128
Loss = Callable[[nn.Module, Tensor], Tensor]


def main(argv: list[str] | None = None) -> None:
    """Run all methods and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1000, help="fresh inputs of a step (default: 1000)")
    options = start(parser, argv)
    smoke = options.smoke
    seeds, shares = (SEEDS[:1], SHARES[-1:]) if smoke else (SEEDS, SHARES)
    data = stand_in("mnist", 512) if smoke else load_dataset("mnist", options.root)
    runs: list[dict] = []
    for seed in seeds:
        dense, seconds = _dense(data, seed, epochs=1 if smoke else 10)
        runs.append(_run("dense", 0.0, seed, dense, data, seconds))
        for share in shares:
            found = _at(share, seed, dense, data, 64 if smoke else options.samples, smoke)
            runs += found
            for run in found:
                print("{share:.2f} {method:48s} {accuracy:.4f}  {seconds:5.1f} s".format(**run), flush=True)
            _write(runs, data, options, seeds)


def _write(runs: list[dict], data: Dataset, options: object, seeds: tuple[int, ...]) -> None:
    rows = []
    for share, method in dict.fromkeys((run["share"], run["method"]) for run in runs):
        of_kind = [run for run in runs if run["share"] == share and run["method"] == method]
        accuracies = [run["accuracy"] for run in of_kind]
        rows.append(
            {
                "share": share,
                "method": method,
                "labels": of_kind[0]["labels"],
                "accuracy": statistics.mean(accuracies),
                "least": min(accuracies),
                "seconds": statistics.mean(run["seconds"] for run in of_kind),
                "seeds": len(of_kind),
            }
        )
    numbers = {"network": "mlp2", "data": data.title, "summary": rows, "runs": runs}
    write_result(NAME, numbers, options, seeds=seeds, rows=rows)  # type: ignore[arg-type]


def _at(share: float, seed: int, dense: nn.Module, data: Dataset, samples: int, smoke: bool) -> list[dict]:
    found = []
    x = data.train_inputs
    generator = torch.Generator().manual_seed(seed)

    def note(method: str, model: nn.Module, begin: float, **more: object) -> float:
        seconds = time.process_time() - begin
        found.append(_run(method, share, seed, model, data, seconds, **more))
        return seconds

    def batch(count: int) -> Tensor:
        return x[torch.randint(len(x), (count,), generator=generator)]

    begin, model = time.process_time(), copy.deepcopy(dense)
    _prune(model, share)
    note("one-shot magnitude", model, begin)

    if seed == SEEDS[0]:
        begin, model = time.process_time(), copy.deepcopy(dense)
        path = GeodesicSparsifier(
            model, Sparsity(share), method="paper", metric="outputs", damping=1e-2, steps=2 if smoke else 20
        )
        while not path.arrived:
            path.step(batch(min(100, samples)))
        note("Eq. (5), outputs, 100 samples", model, begin)

    begin, model = time.process_time(), copy.deepcopy(dense)
    path = GeodesicSparsifier(model, Sparsity(share), steps=2 if smoke else 10)
    while not path.arrived:
        path.step(batch(samples))
    budget = note("compensated path", model, begin, length=path.path[-1].length, drift=path.path[-1].drift)

    with_labels = _label_loss(data)
    model = copy.deepcopy(dense)
    begin = time.process_time()
    _train_pruned(model, share, with_labels, data, seed, seconds=budget, gradual=False)
    note("fine-tuning, equal seconds", model, begin, labels=True)

    model = copy.deepcopy(dense)
    begin = time.process_time()
    _train_pruned(model, share, with_labels, data, seed, seconds=budget)
    note("gradual magnitude, equal seconds", model, begin, labels=True)
    if share != SHARES[-1]:
        return found

    model = copy.deepcopy(dense)
    begin = time.process_time()
    _train_pruned(model, share, _distillation(dense, data), data, seed, seconds=budget)
    note("gradual magnitude, distilled, equal seconds", model, begin)

    begin, model = time.process_time(), copy.deepcopy(dense)
    _path_with_an_epoch(model, share, data, seed, batch, samples)
    note("compensated path and one epoch", model, begin, labels=True)

    begin, model = time.process_time(), copy.deepcopy(dense)
    _train_pruned(model, share, with_labels, data, seed, epochs=1 if smoke else 3)
    note("gradual magnitude, three epochs", model, begin, labels=True)
    return found


def _path_with_an_epoch(
    model: nn.Module, share: float, data: Dataset, seed: int, batch: Callable[[int], Tensor], samples: int
) -> None:
    """A tenth of an epoch after each of the ten steps."""
    path = GeodesicSparsifier(model, Sparsity(share), undo_drift=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss = _label_loss(data)
    indices = torch.randperm(len(data.train_inputs), generator=torch.Generator().manual_seed(seed)).chunk(10)
    for step, part in enumerate(indices):
        path.step(batch(samples))
        for index in part.split(BATCH):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / len(indices))
            optimizer.zero_grad()
            loss(model, index).backward()
            optimizer.step()
            path.hold()


def _label_loss(data: Dataset) -> Loss:
    return lambda model, index: cross_entropy(model(data.train_inputs[index]), data.train_targets[index])


def _distillation(dense: nn.Module, data: Dataset, temperature: float = 4.0) -> Loss:
    def loss(model: nn.Module, index: Tensor) -> Tensor:
        x = data.train_inputs[index]
        with torch.no_grad():
            wanted = log_softmax(dense(x) / temperature, 1)
        is_now = log_softmax(model(x) / temperature, 1)
        return temperature**2 * kl_div(is_now, wanted, reduction="batchmean", log_target=True)

    return loss


def _prune(model: nn.Module, share: float) -> list[Tensor]:
    """Zero the smallest weights of all matrices together; returns what is left as masks."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    sizes = torch.cat([p.detach().abs().flatten() for p in weights])
    threshold = sizes.kthvalue(max(1, round(share * len(sizes)))).values
    masks = [(p.detach().abs() > threshold).to(p.dtype) for p in weights]
    _apply(weights, masks)
    return masks


@torch.no_grad()
def _apply(weights: list[nn.Parameter], masks: list[Tensor]) -> None:
    for p, mask in zip(weights, masks, strict=True):
        p.mul_(mask)


def _train_pruned(
    model: nn.Module,
    share: float,
    loss: Loss,
    data: Dataset,
    seed: int,
    *,
    seconds: float | None = None,
    epochs: int | None = None,
    gradual: bool = True,
) -> None:
    """Until the seconds are over, or for so many epochs."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    weights = [p for p in model.parameters() if p.dim() > 1]
    total = None if epochs is None else epochs * -(-len(data.train_inputs) // BATCH)
    begin, step, masks = time.process_time(), 0, _prune(model, 0.0 if gradual else share)
    while True:
        for index in torch.randperm(len(data.train_inputs), generator=generator).split(BATCH):
            done = step / total if total is not None else (time.process_time() - begin) / (seconds or 1.0)
            if gradual and (step % 50 == 0 or done >= 1):
                masks = _prune(model, share * (1 - (1 - min(1.0, 1.5 * done)) ** 3))
            if done >= 1:
                return
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - done)
            optimizer.zero_grad()
            loss(model, index).backward()
            optimizer.step()
            _apply(weights, masks)
            step += 1


def _dense(data: Dataset, seed: int, epochs: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    model = mlp2()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1.5e-3)
    loss, begin, step = _label_loss(data), time.process_time(), 0
    total = epochs * -(-len(data.train_inputs) // BATCH)
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_inputs), generator=generator).split(BATCH):
            optimizer.param_groups[0]["lr"] = 1.5e-3 * (1 - step / total)
            optimizer.zero_grad()
            loss(model, index).backward()
            optimizer.step()
            step += 1
    return model, time.process_time() - begin


def _run(
    method: str,
    share: float,
    seed: int,
    model: nn.Module,
    data: Dataset,
    seconds: float,
    labels: bool = False,
    **more: object,
) -> dict:
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    with torch.no_grad():
        right = (model(data.test_inputs).argmax(1) == data.test_targets).float().mean()
    zeros = float((weights == 0).float().mean())
    return {
        "share": share, "method": method, "seed": seed, "labels": labels, "accuracy": float(right),
        "zeros": zeros, "seconds": seconds, **more,
    }  # fmt: skip


if __name__ == "__main__":
    main()
