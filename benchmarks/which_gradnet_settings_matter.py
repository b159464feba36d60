"""Which settings of a GradNet matter? The paper's Figs. 4-9 in small, and those of the other two methods.

One base, cnn_small on MNIST, trained on the first half of the training set and stopped at .92 (digits of scikit-learn
without --root). From the setting that the paper found best (SGD, no regularization, 85th percentile, 5 + 100 + 25
units, scale norm then power norm 1/2) one thing at a time is changed; every GradNet sees the same images of the other
half, a few thousand of them, two epochs, with the same seeds. Differences of a percent are within the spread between
seeds. The result is written after every run, and a second start goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, quartiles, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim.models import GradNet, cnn_small

NAME = "which_gradnet_settings_matter"
BATCH = 50

# figure: setting as it is printed -> (method, settings, optimizer)
PAPER: dict[str, dict[str, tuple[str, dict[str, Any], str]]] = {
    "paper's best": {"as it is": ("paper", {}, "SGD")},
    "Fig. 4, optimizer": {"Adam": ("paper", {}, "Adam")},
    "Fig. 5, regularization": {
        "dropout": ("paper", {"dropout": 0.5}, "SGD"),
        "batch norm": ("paper", {"batch_norm": True}, "SGD"),
        "both": ("paper", {"dropout": 0.5, "batch_norm": True}, "SGD"),
    },
    "Fig. 6, percentile": {
        **{str(q): ("paper", {"percentile": float(q)}, "SGD") for q in (70, 80, 90, 95, 99)},
        "10 % of each label": ("paper", {"label_share": 0.1}, "SGD"),
    },
    "Fig. 7, units": {
        "+".join(map(str, units)): ("paper", {"hidden": units}, "SGD")
        for units in ((5, 25, 10), (20, 100, 40), (10, 50, 20), (10, 200, 50), (20, 400, 100))
    },
    "Figs. 8-9, normalisation": {
        "none": ("paper", {"normalization": "none"}, "SGD"),
        "scale": ("paper", {"normalization": "scale"}, "SGD"),
        **{f"power {p}": ("paper", {"normalization": "power", "power": p}, "SGD") for p in (0.125, 0.25, 0.5, 2.0)},
        "standard": ("paper", {"normalization": "standard"}, "SGD"),
        "standard, unit length": ("paper", {"normalization": "standard_unit"}, "SGD"),
    },
    "linearised, damping": {
        **{str(d): ("linearised", {"damping": d}, "Adam") for d in (0.01, 0.1, 1.0, 3.0)},
    },
    "gated, block": {str(units): ("gated", {"block": units}, "Adam") for units in (0, 64, 256)},
}
RATES = {"SGD": (0.02,), "Adam": (1e-3,)}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write the result after each run."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--images", type=int, default=4000, help="of the other half that are used (default: 4000)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="processor minutes after which no run is started")
    parser.add_argument("--again", action="store_true", help="forget what has been run before")
    options = start(parser, argv)
    data = (
        stand_in("mnist", 160, 40)
        if options.smoke
        else load_dataset("mnist" if options.root else "digits", options.root)
    )
    runs: list[dict] = [] if options.smoke or options.again else _earlier(options)
    half = len(data.train_inputs) // 2
    images = min(options.images, half)
    x, y = data.train_inputs[half : half + images], data.train_targets[half : half + images]
    for seed in range(options.seeds):
        base = None
        for figure, settings in PAPER.items():
            for setting, (method, chosen, optimizer) in settings.items():
                if options.smoke and setting not in ("as it is", "dropout", "scale"):
                    continue
                if any((run["figure"], run["setting"], run["seed"]) == (figure, setting, seed) for run in runs):
                    continue
                if time.process_time() > 60 * options.minutes:
                    print(f"{options.minutes} minutes are over; start again to go on")
                    return
                base = base or _base(data, seed, options.smoke)
                begin = time.process_time()
                gradnet = GradNet(base, data.num_classes, method=method, seed=seed, **chosen)  # type: ignore[arg-type]
                order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
                batches = [(x[part], y[part]) for part in order.split(BATCH)]
                gradnet.fit(
                    batches,
                    1 if options.smoke else 2,
                    optimizer=_OPTIMIZERS[optimizer],
                    progress=False,
                    missing_classes=options.smoke,
                )
                accuracy = gradnet.accuracy(
                    [*zip(data.test_inputs.split(500), data.test_targets.split(500), strict=True)]
                )
                runs.append(
                    {
                        "figure": figure,
                        "setting": setting,
                        "seed": seed,
                        "accuracy": accuracy,
                        "last_loss": gradnet.history[-1]["loss"],
                        "seconds": time.process_time() - begin,
                    }
                )
                print(f"{figure}: {setting}: {accuracy:.4f}", flush=True)
                _write(runs, data, images, options)
    _write(runs, data, images, options)


_OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, RATES["SGD"][0], momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, RATES["Adam"][0]),
}


def _write(runs: list[dict], data: Dataset, images: int, options: argparse.Namespace) -> None:
    rows = []
    for figure, settings in PAPER.items():
        for setting in settings:
            found = [run for run in runs if (run["figure"], run["setting"]) == (figure, setting)]
            if found:
                rows.append(
                    {
                        "figure": figure,
                        "setting": setting,
                        "seeds": len(found),
                        "accuracy": quartiles([run["accuracy"] for run in found])["median"],
                        "last loss": quartiles([run["last_loss"] for run in found])["median"],
                        "seconds": quartiles([run["seconds"] for run in found])["median"],
                    }
                )
    numbers = {"network": "cnn_small", "data": data.title, "images": images, "epochs": 2, "rates": RATES}
    numbers |= {"summary": rows, "runs": runs}
    write_result(NAME, numbers, options, seeds=sorted({run["seed"] for run in runs}), rows=rows)


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
