"""Can a network give up filters, take them back, or serve two tasks, along a geodesic? Figs. 2A, B, D and F in small.

A and B: vgg11 at 9/32 of its width (18 filters in the first convolution) on CIFAR-10 (JPEG), the first so many training
images; 14 of the 18 filters (78 %) are removed one after the other. The compensated path without labels, and with half
an epoch of training per filter (7 in all); beside it removal by magnitude without anything, and with two epochs of
fine-tuning per filter (28 in all; the paper takes 70); both once more with three epochs at the end. D: dense, 78 % of
the filters out, 12 % of the classifier's units out too, 47 % of the filters back, with 4 epochs of training in all;
beside it the same cuts without anything. F: mlp2 trained on MNIST, then walked to a copy that was trained on to
Fashion-MNIST, in the metric of MNIST's images alone; the network on the way that is best at the worse of its two tasks,
found by trying it on each by itself. Beside it the straight line. The last of its steps, which goes where the metric
forbade to go before, is looked at in ten pieces. Adam throughout; the dense vgg11 has 12 epochs at 1e-3 falling to 0,
training on the way runs at 3e-4, that at the end falls from there to 0. Accuracies are on the first 5,000 test images.
With ``--resume`` what the result has is not measured again.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.harness import RESULTS, benchmark_parser, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim.models.reference import mlp2, vgg11
from torchgeom_optim.optimizers import Dense, GeodesicSparsifier, OtherWeights, Target, Units

NAME = "can_filters_be_removed_along_a_geodesic"
WIDTH = 9 / 32
FILTERS, GONE, BACK = 18, 14, 8
BATCH = 64


def main(argv: list[str] | None = None) -> None:
    """Run all parts and write the result after each."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--images", type=int, default=5000, help="training images of CIFAR-10 (default: 5000)")
    parser.add_argument("--resume", action="store_true", help="keep what the result has, and measure what it lacks")
    parser.add_argument("--samples", type=int, default=300, help="inputs of a step (default: 300)")
    options = start(parser, argv)
    smoke = options.smoke
    numbers: dict[str, object] = {
        "width of vgg11": WIDTH,
        "filters": FILTERS,
        "removed": GONE,
        "samples": options.samples,
    }
    path = (options.output or RESULTS) / f"{NAME}.json"
    if options.resume and path.exists():
        numbers = json.loads(path.read_text())["numbers"]
    rows: list[dict[str, object]] = numbers.pop("rows", [])  # type: ignore[assignment]

    def note(part: str, name: str, curve: list[float], begin: float, epochs: float) -> None:
        row = {"part": part, "method": name, "epochs": epochs, "first": curve[0], "last": curve[-1],
               "cpu seconds": time.process_time() - begin}  # fmt: skip
        rows.append(row)
        numbers[f"{part}: {name}"] = {**row, "accuracies": curve}
        print(row, flush=True)
        write_result(NAME, {**numbers, "rows": rows}, options, seeds=[0])

    data = stand_in("cifar10", 128) if smoke else load_dataset("cifar10", options.root, train_limit=options.images)
    numbers["data"] = f"{data.title}, first {len(data.train_inputs)} training images"
    torch.manual_seed(0)
    dense = vgg11(width=1 / 16 if smoke else WIDTH)
    begin = time.process_time()
    _train(dense, data, 1 if smoke else 12, 1e-3, falling=True)
    if "A: dense" not in numbers:
        note("A", "dense", [_accuracy(dense, data)], begin, 1 if smoke else 12)
    samples = 32 if smoke else options.samples
    _filters(dense, data, samples, note, smoke, lambda name: f"A: {name}" in numbers)
    if "D: cut and put back, nothing else" not in numbers:
        _stations(dense, data, samples, note, smoke)
    if not any(key.startswith("F: straight line") for key in numbers):
        _two_tasks(options.root, note, smoke)
    write_result(NAME, {**numbers, "rows": rows}, options, seeds=[0], rows=rows)


Note = Callable[[str, str, list[float], float, float], None]


def _filters(
    dense: nn.Module, data: Dataset, samples: int, note: Note, smoke: bool, known: Callable[[str], bool]
) -> None:
    """A and B: one filter after the other."""
    gone = 2 if smoke else GONE
    for name, per_filter, at_the_end in (
        ("compensated path", 0.0, 0),
        ("compensated path and training", 0.5, 0),
        ("compensated path, training, 3 epochs at the end", 0.5, 3),
    ):
        if known(name):
            continue
        model, begin, curve = copy.deepcopy(dense), time.process_time(), [_accuracy(dense, data)]
        path = GeodesicSparsifier(
            model, Units({_first(dense, nn.Conv2d): gone}), steps=gone, undo_drift=per_filter == 0
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-4)
        while not path.arrived:
            path.step(_batch(data, samples, len(curve)))
            _train(model, data, per_filter, 3e-4, optimizer=optimizer, after=path.hold, seed=len(curve))
            curve.append(_accuracy(model, data))
        if at_the_end:
            _train(model, data, at_the_end, 3e-4, falling=True, optimizer=optimizer, after=path.hold)
            curve.append(_accuracy(model, data))
        note("A", name, curve, begin, per_filter * gone + at_the_end)
    for name, per_filter, at_the_end in (
        ("magnitude", 0.0, 0),
        ("magnitude and fine-tuning", 2.0, 0),
        ("magnitude, the same training as ours, 3 epochs at the end", 0.5, 3),
        ("magnitude and fine-tuning, 3 epochs at the end", 2.0, 3),
    ):
        if known(name):
            continue
        model, begin, curve = copy.deepcopy(dense), time.process_time(), [_accuracy(dense, data)]
        optimizer = torch.optim.Adam(model.parameters(), 3e-4)
        layer = model.get_submodule(_first(dense, nn.Conv2d))
        out = torch.zeros(len(layer.weight), dtype=torch.bool)  # type: ignore[arg-type]

        @torch.no_grad()
        def hold(layer: nn.Module = layer, out: Tensor = out) -> None:
            layer.weight[out] = 0  # type: ignore[operator]
            layer.bias[out] = 0  # type: ignore[operator]

        for _ in range(gone):
            sizes = layer.weight.detach().flatten(1).norm(dim=1)
            out[sizes.masked_fill(out, float("inf")).argmin()] = True
            hold()
            _train(model, data, per_filter, 3e-4, optimizer=optimizer, after=hold, seed=len(curve))
            curve.append(_accuracy(model, data))
        if at_the_end:
            _train(model, data, at_the_end, 3e-4, falling=True, optimizer=optimizer, after=hold)
            curve.append(_accuracy(model, data))
        note("A", name, curve, begin, per_filter * gone + at_the_end)


def _stations(dense: nn.Module, data: Dataset, samples: int, note: Note, smoke: bool) -> None:
    """D: filters out, units of the classifier out, filters back."""
    convolution, classifier = _first(dense, nn.Conv2d), _first(dense, nn.Linear)
    gone, restored = (2, 1) if smoke else (GONE, BACK)
    targets: list[tuple[Target, int, float]] = [
        (Units({convolution: gone}), gone, 2.0),
        (Units({classifier: 0.12}), 1 if smoke else 3, 1.0),
        (Dense({convolution: restored}), 1 if smoke else 4, 1.0),
    ]
    for name, share in (("no labels", 0.0), ("4 epochs", 1.0)):
        model, begin, curve = copy.deepcopy(dense), time.process_time(), [_accuracy(dense, data)]
        path = GeodesicSparsifier(model, targets[0][0], steps=targets[0][1], undo_drift=share == 0)
        optimizer = torch.optim.Adam(model.parameters(), 3e-4)
        for target, steps, epochs in targets:
            path.walk_to(target, steps)
            while not path.arrived:
                path.step(_batch(data, samples, len(path.path)))
                per_step = share * epochs / steps / (10 if smoke else 1)
                _train(model, data, per_step, 3e-4, optimizer=optimizer, after=path.hold, seed=len(path.path))
            curve.append(_accuracy(model, data))
        note("D", f"compensated path, {name}", curve, begin, 4 * share)
    model, begin, curve = copy.deepcopy(dense), time.process_time(), [_accuracy(dense, data)]
    first, hidden = model.get_submodule(convolution), model.get_submodule(classifier)
    before = dense.get_submodule(convolution)
    with torch.no_grad():
        order = first.weight.flatten(1).norm(dim=1).argsort()
        first.weight[order[:gone]] = 0
        first.bias[order[:gone]] = 0
        curve.append(_accuracy(model, data))
        smallest = hidden.weight.norm(dim=1).argsort()[: round(0.12 * len(hidden.weight))]  # type: ignore[operator,arg-type]
        hidden.weight[smallest] = 0  # type: ignore[operator]
        hidden.bias[smallest] = 0  # type: ignore[operator]
        curve.append(_accuracy(model, data))
        back = order[gone - restored : gone]
        first.weight[back] = before.weight[back]
        first.bias[back] = before.bias[back]
        curve.append(_accuracy(model, data))
    note("D", "cut and put back, nothing else", curve, begin, 0)


def _two_tasks(root: object, note: Note, smoke: bool) -> None:
    """F: from MNIST to Fashion-MNIST."""
    names = ("mnist", "fashion-mnist")
    first, second = (stand_in(n, 128) if smoke else load_dataset(n, root) for n in names)  # type: ignore[arg-type]
    torch.manual_seed(0)
    one = mlp2()
    _train(one, first, 0.5 if smoke else 3, 1e-3, falling=True)
    two = copy.deepcopy(one)
    _train(two, second, 0.5 if smoke else 3, 1e-3, falling=True)
    steps = 2 if smoke else 20
    for name, damping in (("compensated path", 0.03), ("straight line", 1e9)):
        model, begin = copy.deepcopy(one), time.process_time()
        corrections = 6 if damping < 1 else 0
        path = GeodesicSparsifier(
            model, OtherWeights(two), steps=steps, damping=damping, factor_damping=damping / 30, corrections=corrections
        )
        both = [(_accuracy(model, first), _accuracy(model, second))]
        while not path.arrived:
            before = parameters_to_vector(model.parameters()).detach()
            path.step(_batch(first, 64 if smoke else 500, len(both)))
            after = parameters_to_vector(model.parameters()).detach()
            for k in range(1, 11 if path.arrived else 2):  # the last side of the polygon is the longest by far
                if path.arrived:
                    vector_to_parameters(before.lerp(after, k / 10), model.parameters())
                both.append((_accuracy(model, first), _accuracy(model, second)))
        best = max(range(len(both)), key=lambda k: min(both[k]))
        note("F", f"{name}, MNIST", [a for a, _ in both], begin, 0)
        note("F", f"{name}, Fashion-MNIST", [b for _, b in both], begin, 0)
        note("F", f"{name}, best for both: the better and the worse task", sorted(both[best])[::-1], begin, 0)


def _first(model: nn.Module, kind: type[nn.Module]) -> str:
    return next(name for name, module in model.named_modules() if isinstance(module, kind))


def _batch(data: Dataset, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return data.train_inputs[torch.randperm(len(data.train_inputs), generator=generator)[:count]]


def _train(
    model: nn.Module,
    data: Dataset,
    epochs: float,
    lr: float,
    *,
    falling: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    after: Callable[[], None] | None = None,
    seed: int = 0,
) -> None:
    """For whole epochs or a part of one."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    left = total = round(epochs * -(-len(data.train_inputs) // BATCH))
    while left:
        for index in torch.randperm(len(data.train_inputs), generator=generator).split(BATCH)[:left]:
            optimizer.param_groups[0]["lr"] = lr * left / total if falling else lr
            optimizer.zero_grad()
            cross_entropy(model(data.train_inputs[index]), data.train_targets[index]).backward()
            optimizer.step()
            if after is not None:
                after()
            left -= 1


@torch.no_grad()
def _accuracy(model: nn.Module, data: Dataset) -> float:
    logits = torch.cat([model(part) for part in data.test_inputs[:5000].split(500)])
    return float((logits.argmax(1) == data.test_targets[:5000]).float().mean())


if __name__ == "__main__":
    main()
