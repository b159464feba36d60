"""How much of a trained network is stiff: what is left of it in 1 % and 5 % of its directions?

The question of Cowlagi & Chaudhari's Fig. 3. A network is trained, then written in k directions of its weight space,
without labels, and its test accuracy taken:

- "one shot", nothing is trained: the paper's rule (eigenvectors of the Fisher matrix by eigenvalue), the same by
  lam c^2, our default (layers' Kronecker-factored eigenbases by lam c^2, the kept coefficients making up for the
  dropped ones by least squares), the same without that, the same by eigenvalue, other bases, and magnitude pruning
  (with least squares too);
- "gradual", with distillation on unlabelled training images: our default, and ordinary gradual pruning by magnitude
  and by lam c^2, all for the same seconds of processor time.

Beside the accuracies: bytes that a file holds for each basis (indices, buffers and all, header aside), and InPCA of the
full and the reduced networks' predictions on test images: the share of the first axis in sum |Sigma| says how line-like
they are, and the correlation of the pairwise distances with the full network's how alike.

The networks are trained with weight decay, as image classifiers mostly are; without it much of w is in directions that
do nothing. Where the rank of the sampled Fisher matrix is below k, the exact basis keeps its rank: "num_directions".
Training sets, epochs and seconds are scaled down for a small machine; the result says what they were. Runs are written
one by one; with ``--resume`` those already in the result are not repeated. The picture is drawn by ``--draw`` from
the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry.inpca import inpca
from torchgeom_optim.models import ReducedModel, decompose, reduce_gradually
from torchgeom_optim.models.reference import allcnn9, lenet, mlp_thin

NAME = "how_much_of_a_network_is_stiff"
SHARES = (0.01, 0.05)
POINTS = 300


@dataclass(frozen=True)
class Setting:
    """How one network is trained and reduced."""

    data: str
    build: Callable[[], nn.Module]
    batch_size: int
    epochs: int
    num_train: int
    gradual_seconds: float
    every: int
    calibration: int
    weight_decay: float = 1e-3


# With less data, fewer epochs and seconds than a machine of one's own would take.
SETTINGS = {
    "mlp_thin": Setting("mnist", mlp_thin, 128, 6, 60000, 15.0, 20, 2000),
    "lenet": Setting("cifar10", lenet, 64, 6, 20000, 20.0, 20, 1000),
    # Without weight decay: with 1e-3 this network stays at chance.
    "allcnn9": Setting("cifar10", allcnn9, 64, 8, 10000, 30.0, 25, 500, weight_decay=0.0),
}
# Basis, importance, and least-squares steps of the kept coefficients; None for the default.
ONE_SHOT = {
    "paper: exact, eigenvalue": ("exact", "eigenvalue", 0),
    "exact, loss": ("exact", "loss", 0),
    "ours: kronecker, loss": ("kronecker", "loss", None),
    "ours, not compensated": ("kronecker", "loss", 0),
    "kronecker, eigenvalue": ("kronecker", "eigenvalue", 0),
    "pca, loss": ("pca", "loss", None),
    "dct, loss": ("dct", "loss", None),
    "pixels, loss": ("pixels", "loss", None),
    "magnitude pruning": ("pixels", "magnitude", 0),
    "magnitude pruning, compensated": ("pixels", "magnitude", 3),
}
GRADUAL = {
    "ours: kronecker, loss": ("kronecker", "loss"),
    "gradual magnitude pruning": ("pixels", "magnitude"),
    "gradual Fisher pruning": ("pixels", "loss"),
}
PICTURED = ("paper: exact, eigenvalue", "ours: kronecker, loss")


def main(argv: list[str] | None = None) -> None:
    """Train and reduce every network for every seed, writing after each."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--times", type=float, default=1.0, help="so many times the seconds of the gradual runs")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result has")
    parser.add_argument("--gradual", action="store_true", help="measure the gradual rows alone, of runs that there are")
    parser.add_argument("--draw", action="store_true", help="draw the picture from the result, and measure nothing")
    options = start(parser, argv)
    if options.draw:
        draw(options.output or RESULTS)
        return
    runs: dict[str, Any] = _earlier(options) if options.resume or options.gradual else {}
    networks, seeds = (["mlp_thin"], [0]) if options.smoke else (options.networks, options.seeds)
    for name in networks:
        setting = replace(SETTINGS[name], gradual_seconds=options.times * SETTINGS[name].gradual_seconds)
        dataset = stand_in(setting.data) if options.smoke else load_dataset(setting.data, options.root)
        for seed in seeds:
            earlier = runs.get(f"{name} seed {seed}")
            if options.gradual and earlier is not None:
                model, images = _trained(setting, dataset, seed, options.smoke)[:2]
                rows = _gradual(model, images, setting, dataset, seed, options.smoke)
                if rows[0]["accuracy_dense"] != earlier["accuracy_dense"]:
                    raise RuntimeError(
                        f"{name} seed {seed} trains to another network here: measure the whole run anew."
                    )
                earlier |= {"gradual": rows, "commit of gradual rows": options.environment["commit"]}
            elif earlier is None:
                run = _run(name, setting, dataset, seed, options.smoke)
                runs[f"{name} seed {seed}"] = {**run, **{key: options.environment[key] for key in ("commit", "cpu")}}
            rows = _summary(runs)
            write_result(NAME, {"runs": runs, "summary": rows}, options, seeds=seeds, rows=rows)


def _earlier(options: argparse.Namespace) -> dict[str, Any]:
    path = (options.output or RESULTS) / f"{NAME}.json"
    runs: dict[str, Any] = json.loads(path.read_text())["numbers"]["runs"] if path.exists() else {}
    return runs


def _run(name: str, setting: Setting, dataset: Dataset, seed: int, smoke: bool) -> dict[str, Any]:
    model, images, train_seconds = _trained(setting, dataset, seed, smoke)
    test = (dataset.test_inputs, dataset.test_targets)
    size = sum(p.numel() for p in model.parameters())
    points = dataset.test_inputs[:POINTS]
    embedded: dict[str, Any] = {"full": _embedding(model, points, None)}
    distances = embedded["full"].pop("distances")
    one_shot = []
    for basis in dict.fromkeys(basis for basis, _, _ in ONE_SHOT.values()):
        if smoke and basis == "exact":
            continue
        samples, options = min(setting.calibration, len(images)), {}
        if (
            basis == "exact"
        ):  # samples with some room beyond 5 %; a sure network's rank may fall short of it all the same
            samples = round(1.4 * max(SHARES) * size / (dataset.num_classes - 1)) + 1
            options = {"max_directions": max(SHARES)}
        begin = time.process_time()
        decomposition = decompose(model, images, basis=basis, num_samples=samples, **options)
        seconds = time.process_time() - begin
        for label, (own, importance, rounds) in ONE_SHOT.items():
            for share in SHARES if own == basis else ():
                num = min(max(1, round(share * size)), decomposition.directions.num_directions)
                begin = time.process_time()
                reduced = decomposition.ranked_by(importance).reduced(num, compensate=rounds, measure=False)
                taken = seconds + time.process_time() - begin
                one_shot.append(_row(label, share, decomposition.measured(reduced, *test), taken))
                if label in PICTURED:
                    embedded[f"{label}, {share:.0%}"] = _embedding(reduced, points, distances)
        del decomposition
    for entry in embedded.values():
        entry.pop("distances", None)
    settings = {key: value for key, value in asdict(setting).items() if key != "build"}
    return {
        "network": name,
        "seed": seed,
        "data": dataset.title,
        "settings": {**settings, "num_train": len(images), "num_test": len(test[0])},
        "num_weights": size,
        "accuracy_dense": one_shot[0]["accuracy_dense"],
        "train_seconds": train_seconds,
        "one_shot": one_shot,
        "gradual": _gradual(model, images, setting, dataset, seed, smoke),
        "inpca": embedded,
        "inpca_labels": dataset.test_targets[:POINTS].tolist(),
    }


def _trained(setting: Setting, dataset: Dataset, seed: int, smoke: bool) -> tuple[nn.Module, Tensor, float]:
    """The network, its training images in another order, from here on without labels, and seconds."""
    torch.manual_seed(seed)
    model = setting.build()
    generator = torch.Generator().manual_seed(seed)
    x, y = dataset.train_inputs[: setting.num_train], dataset.train_targets[: setting.num_train]
    begin = time.process_time()
    train(model, x, y, 1 if smoke else setting.epochs, setting.batch_size, generator, setting.weight_decay)
    return model, x[torch.randperm(len(x), generator=generator)], time.process_time() - begin


def _gradual(
    model: nn.Module, images: Tensor, setting: Setting, dataset: Dataset, seed: int, smoke: bool
) -> list[dict[str, Any]]:
    rows = []
    for label, (basis, importance) in GRADUAL.items():
        for share in SHARES:
            begin = time.process_time()
            reduced = reduce_gradually(
                model,
                images,
                share,
                seconds=1.0 if smoke else setting.gradual_seconds,
                clock=time.process_time,
                every=setting.every,
                basis=basis,
                importance=importance,
                num_samples=min(setting.calibration, len(images)),
                test_data=dataset.test_inputs,
                test_targets=dataset.test_targets,
                generator=torch.Generator().manual_seed(seed),
            )
            rows.append(_row(label, share, reduced, time.process_time() - begin))
    return rows


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    weight_decay: float,
    lr: float = 2e-3,
) -> None:
    """Cross-entropy with Adam, whose learning rate goes up and down again over the whole run; decay in the gradient."""
    optimizer = torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay)
    steps = epochs * len(x.split(batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


def _row(label: str, share: float, reduced: ReducedModel, seconds: float) -> dict[str, Any]:
    report = reduced.report
    assert report is not None
    return {
        "rule": label,
        "share": share,
        "num_directions": report.at.num_directions,
        "accuracy": report.at.accuracy,
        "accuracy_dense": report.accuracy_before,
        "norm_share": report.at.norm_share,
        "bhattacharyya": report.at.bhattacharyya,
        "bytes_dense": report.bytes_dense,
        "bytes_stored": report.bytes_stored,
        "bytes_regenerated": report.bytes_regenerated,
        "seconds": seconds,
    }


def _embedding(model: nn.Module, points: Tensor, full: Tensor | None) -> dict[str, Any]:
    with torch.no_grad():
        probabilities = model.eval()(points).double().softmax(-1)
    try:
        result = inpca(probabilities)
    except ValueError as error:  # a network of which nothing is left predicts the same everywhere
        return {"not embedded": str(error)}
    sizes = result.eigenvalues.abs()
    roots = result.distances.sqrt().flatten()
    alike = 1.0 if full is None else float(torch.corrcoef(torch.stack([roots, full.sqrt().flatten()]))[0, 1])
    return {
        "share_of_first_axis": float(sizes[0] / sizes.sum()),
        "axes_for_90_percent": int((sizes.cumsum(0) < 0.9 * sizes.sum()).sum()) + 1,
        "num_imaginary_of_first_ten": int(result.imaginary[:10].sum()),
        "first_eigenvalues": result.eigenvalues[:5].tolist(),
        "correlation_of_distances_with_full": alike,
        "num_clipped": result.num_clipped,
        "coordinates": [[round(v, 3) for v in point] for point in result.coordinates[:, :2].tolist()],
        "distances": result.distances,
    }


def _summary(runs: dict[str, Any]) -> list[dict[str, object]]:
    """Median over seeds of the accuracy, and of what it is below the dense network's."""
    rows: list[dict[str, object]] = []
    for network in dict.fromkeys([*SETTINGS, *(run["network"] for run in runs.values())]):
        own = [run for run in runs.values() if run["network"] == network]
        # The rows of rules that are no more stay, under their own names.
        for kind in ("one_shot", "gradual"):
            for label in dict.fromkeys(row["rule"] for run in own for row in run[kind]):
                having = [run for run in own if any(r["rule"] == label for r in run[kind])]
                row: dict[str, object] = {"network": network, "kind": kind, "rule": label, "seeds": len(having)}
                commits = [str(run["commit"]) for run in having]
                if kind == "gradual":
                    commits = [str(run.get("commit of gradual rows", run["commit"])) for run in having]
                row["commit"] = ", ".join(dict.fromkeys(commit[:7] for commit in commits))
                row["dense"] = float(np.median([run["accuracy_dense"] for run in having]))
                row["bytes dense"] = own[0][kind][0]["bytes_dense"]
                for share in SHARES:
                    found = [r for run in own for r in run[kind] if r["rule"] == label and r["share"] == share]
                    row[f"{share:.0%}"] = float(np.median([r["accuracy"] for r in found]))
                    lost = [100 * (r["accuracy_dense"] - r["accuracy"]) for r in found]
                    row[f"points lost at {share:.0%}"] = float(np.median(lost))
                    row[f"bytes at {share:.0%}"] = int(np.median([r["bytes_stored"] for r in found]))
                rows.append(row)
    return rows


def draw(folder: Path) -> None:
    """InPCA of the full and the reduced networks, first seed of each: one row of panels per network and rule."""
    plt = optional_import("matplotlib.pyplot", "the picture")
    runs = json.loads((folder / f"{NAME}.json").read_text())["numbers"]["runs"]
    first = {run["network"]: run for run in reversed(list(runs.values()))}
    lines = []
    for run in (first[network] for network in SETTINGS if network in first):
        there = [rule for rule in ONE_SHOT if f"{rule}, {SHARES[0]:.0%}" in run["inpca"]]  # of what was pictured then
        lines += [(run, rule) for rule in there]
    figure, axes = plt.subplots(len(lines), 3, figsize=(10, 3.1 * len(lines)), squeeze=False)
    for (run, rule), panels in zip(lines, axes, strict=True):
        accuracies = {r["share"]: r["accuracy"] for r in run["one_shot"] if r["rule"] == rule}
        keys = [*((f"{rule}, {share:.0%}", accuracies[share]) for share in SHARES), ("full", run["accuracy_dense"])]
        for panel, (key, found) in zip(panels, keys, strict=True):
            entry = run["inpca"][key]
            panel.set_title(f"{run['network']}, {key}: accuracy {found:.3f}", fontsize=8)
            if "not embedded" in entry:
                panel.text(0.5, 0.5, "one point: predictions are constant", ha="center", fontsize=8)
                continue
            x = np.array(entry["coordinates"])
            panel.scatter(x[:, 0], x[:, 1], c=run["inpca_labels"], cmap="tab10", s=6)
            imaginary = ["", " (imaginary)"]
            signs = [imaginary[value < 0] for value in entry["first_eigenvalues"][:2]]
            panel.set_xlabel(f"axis 1{signs[0]}, {entry['share_of_first_axis']:.0%} of all", fontsize=8)
            panel.set_ylabel(f"axis 2{signs[1]}", fontsize=8)
            panel.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(folder / f"{NAME}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
