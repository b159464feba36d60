"""How sloppy are networks, and how sloppy are the data that they are trained on?

The question of Cowlagi & Chaudhari's Fig. 2: eigenvalues of the Fisher matrix at the beginning, in the middle and at
the end of training, beside those of the data's autocorrelation X X'/N,

(a) of a nine-layer CNN (``allcnn9``) on CIFAR-10: the exact Fisher matrix, all N (C - 1) eigenvalues in float64;
(b) of a multilayer perceptron with two layers of weights (13-50-1) on Boston Housing: J'J / N of the output;
(c) of other multilayer perceptrons there, at the end of training;
(d) of (b)'s on random data of the same shape: Gaussian inputs, Gaussian targets.

Each of the paper's claims becomes a number with a threshold, stated beside it, and is confirmed or contradicted by it:
(b) to (d) by medians over seeds. The picture is drawn by ``--draw`` from the JSON alone.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, benchmark_parser, start, write_result
from examples.datasets import Dataset, load_dataset, stand_in
from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry.data_spectrum import data_spectrum
from torchgeom_optim.geometry.fisher import fisher_spectrum
from torchgeom_optim.geometry.spectrum import Spectrum
from torchgeom_optim.models.reference import allcnn9

NAME = "how_sloppy_are_networks_and_their_data"
CNN_SAMPLES, CNN_TRAIN, CNN_EPOCHS = 128, 10000, 6
ARCHITECTURES = {"1 x 50": (50,), "2 x 25": (25, 25), "2 x 50": (50, 50), "3 x 50": (50, 50, 50), "1 x 200": (200,)}
BASE = "1 x 50"
STIFF = 1e-2
POINTS = 120


def main(argv: list[str] | None = None) -> None:
    """Train, take spectra, judge the claims, write."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--draw", action="store_true", help="draw the picture from the result, and measure nothing")
    options = start(parser, argv)
    if options.draw:
        draw(options.output or RESULTS)
        return
    seeds = options.seeds[:2] if options.smoke else options.seeds
    boston = stand_in("boston", 60, 10) if options.smoke else load_dataset("boston", options.root)
    cifar = stand_in("cifar10", 64) if options.smoke else load_dataset("cifar10", options.root)
    numbers: dict[str, Any] = {"a": _cnn(cifar, options.smoke)}
    epochs = 3 if options.smoke else 400
    numbers["b, c"] = {
        name: [_perceptron(boston, widths, seed, epochs) for seed in seeds] for name, widths in ARCHITECTURES.items()
    }
    noise = [stand_in("boston", len(boston.train_inputs), 1, seed=seed) for seed in seeds]
    numbers["d"] = [
        _perceptron(data, ARCHITECTURES[BASE], seed, epochs) for data, seed in zip(noise, seeds, strict=True)
    ]
    claims = _claims(numbers)
    numbers = {"claims": claims, "stiff_threshold": STIFF, **numbers}
    rows = [{key: claim[key] for key in ("claim", "number", "threshold", "verdict")} for claim in claims]
    write_result(NAME, numbers, options, seeds=seeds, rows=rows)


def _cnn(dataset: Dataset, smoke: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model, generator = allcnn9(), torch.Generator().manual_seed(0)
    x, y = dataset.train_inputs[:CNN_TRAIN], dataset.train_targets[:CNN_TRAIN]
    samples = x[: 8 if smoke else CNN_SAMPLES]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    epochs = 2 if smoke else CNN_EPOCHS
    taken = {0: "beginning", epochs // 2: "middle", epochs: "end"}
    spectra = {}
    for epoch in range(epochs + 1):
        if epoch in taken:
            spectra[taken[epoch]] = _numbers(fisher_spectrum(model, samples)) | {"epoch": epoch}
        for rows in torch.randperm(len(x), generator=generator).split(64) if epoch < epochs else ():
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = float((model(dataset.test_inputs).argmax(1) == dataset.test_targets).double().mean())
    return {
        "network": "allcnn9",
        "data": dataset.title,
        "num_train": len(x),
        "epochs": epochs,
        "test_accuracy": accuracy,
        "spectra": spectra,
        "data_spectrum": _numbers(data_spectrum(x[: 64 if smoke else 4000])),
    }


def _perceptron(dataset: Dataset, widths: tuple[int, ...], seed: int, epochs: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    sizes = [dataset.train_inputs.shape[1], *widths]
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
    x, y = dataset.train_inputs, dataset.train_targets
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    taken = {0: "beginning", epochs // 2: "middle", epochs: "end"}
    spectra, losses = {}, {}
    for epoch in range(epochs + 1):
        if epoch in taken:
            spectra[taken[epoch]] = _numbers(fisher_spectrum(model, x, variant="outputs")) | {"epoch": epoch}
            with torch.no_grad():
                losses[taken[epoch]] = float(F.mse_loss(model(x)[:, 0], y))
        for rows in torch.randperm(len(x), generator=generator).split(64) if epoch < epochs else ():
            optimizer.zero_grad()
            F.mse_loss(model(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
    return {
        "seed": seed,
        "data": dataset.title,
        "mean_squared_error": losses,
        "spectra": spectra,
        "data_spectrum": _numbers(data_spectrum(x)),
    }


def _numbers(spectrum: Spectrum) -> dict[str, Any]:
    """What a figure needs of a spectrum: some of its eigenvalues, sloppiness, trace, and how the slope came about."""
    sloppy = spectrum.sloppiness(stiff_threshold=STIFF)
    values = spectrum.eigenvalues[: spectrum.rank]
    at = np.unique(np.geomspace(1, len(values), POINTS).round().astype(int)) - 1
    tenths = [float(part.log().mean().exp()) for part in values.tensor_split(10)]
    return {
        "matrix": spectrum.matrix,
        "variant": spectrum.variant,
        "size": spectrum.size,
        "num_samples": spectrum.num_samples,
        "rank": sloppy.rank,
        "decades": sloppy.decades,
        "decades_behind_the_tenth_part": float((values[len(values) // 10] / values[-1]).log10()),
        "slope_per_rank": sloppy.slope_per_rank,
        "slope_range": sloppy.slope_range,
        "num_stiff": sloppy.num_stiff,
        "stiff_fraction": sloppy.stiff_fraction,
        "stiff_fraction_of_size": sloppy.num_stiff / spectrum.size,
        "effective_dimension": sloppy.effective_dimension,
        "participation_ratio": sloppy.participation_ratio,
        "trace": spectrum.trace.value,
        "num_for_90_percent_of_trace": sloppy.num_for_90_percent,
        "roundoff": spectrum.roundoff,
        "geometric_means_of_tenths": tenths,
        "indices": at,
        "eigenvalues": values[torch.from_numpy(at)],
    }


def _claims(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim of the paper with its number, its threshold and the verdict."""
    cnn, boston, noise = numbers["a"]["spectra"], numbers["b, c"], numbers["d"]
    base = boston[BASE]

    def median(runs: list[dict[str, Any]], key: str, stage: str = "end") -> float:
        return float(np.median([run["spectra"][stage][key] for run in runs]))

    def growth(runs: list[dict[str, Any]], key: str, part: int | None = None) -> float:
        ratios = []
        for run in runs:
            first, last = (run["spectra"][stage][key] for stage in ("beginning", "end"))
            ratios.append(last / first if part is None else last[part] / first[part])
        return float(np.median(ratios))

    def monotone(runs: list[dict[str, Any]]) -> float:
        traces = [[run["spectra"][stage]["trace"] for stage in ("beginning", "middle", "end")] for run in runs]
        return float(np.mean([a < b < c for a, b, c in traces]))

    of_cnn = [{"spectra": cnn}]
    slopes = [median(runs, "slope_per_rank") for runs in boston.values()]
    drops = [median(runs, "decades_behind_the_tenth_part") for runs in (base, noise)]
    claims: list[dict[str, Any]] = []

    def claim(text: str, number: float, threshold: str, holds: bool) -> None:
        claims.append(
            {
                "claim": text,
                "number": number,
                "threshold": threshold,
                "verdict": "confirmed" if holds else "contradicted",
            }
        )

    for where, runs in (("CNN", of_cnn), ("Boston", base)):
        for key, of in (("stiff_fraction", "nonzero eigenvalues"), ("stiff_fraction_of_size", "all eigenvalues")):
            share = median(runs, key)
            claim(
                f"{where}: less than 5 % of {of} are stiff (>= {STIFF:g} of the largest)", share, "< 0.05", share < 0.05
            )
    spread = max(slopes) / min(slopes) if max(slopes) < 0 else math.nan
    spread = max(spread, 1 / spread)
    claim("(c): slope of the linear range (decades per rank) alike across architectures", spread, "largest ratio < 1.5",
          spread < 1.5)  # fmt: skip
    claim("(d): on random data 1 to 2 decades at most behind the first tenth", drops[1], "<= 2", drops[1] <= 2)
    claim("(b) against (d): real data are sloppier, decades behind the first tenth", drops[0] - drops[1], "> 1",
          drops[0] - drops[1] > 1)  # fmt: skip
    for where, runs in (("CNN", of_cnn), ("Boston", base)):
        share = monotone(runs)
        claim(f"{where}: the trace grows monotonically (share of runs)", share, "1", share == 1.0)
        ratio = growth(runs, "geometric_means_of_tenths", 0)
        claim(
            f"{where}: stiff eigenvalues stay (first tenth, end over beginning)",
            ratio,
            "in [1/2, 2]",
            0.5 <= ratio <= 2,
        )
        ratio = growth(runs, "geometric_means_of_tenths", 6)
        claim(f"{where}: sloppy eigenvalues grow (seventh tenth, end over beginning)", ratio, "> 2", ratio > 2)
    for where, runs, data in (
        ("CNN", of_cnn, numbers["a"]["data_spectrum"]),
        ("Boston", base, base[0]["data_spectrum"]),
    ):
        network = median(runs, "decades_behind_the_tenth_part")
        own = data["decades_behind_the_tenth_part"]
        claim(f"{where}: network as sloppy as its data (decades behind the first tenth, ratio)", network / own,
              "in [1/2, 2]", 0.5 <= network / own <= 2)  # fmt: skip
    return claims


def draw(folder: Path) -> None:
    """The four panels of Fig. 2: eigenvalues relative to the largest, over their rank."""
    plt = optional_import("matplotlib.pyplot", "the picture")
    numbers = json.loads((folder / f"{NAME}.json").read_text())["numbers"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5))
    colours = {"beginning": "tab:red", "middle": "tab:green", "end": "tab:blue"}

    def line(panel: Any, entry: dict[str, Any], **style: Any) -> None:
        panel.plot(np.array(entry["indices"]) + 1, entry["eigenvalues"], **style)

    base, noise = numbers["b, c"][BASE][0], numbers["d"][0]
    titles = (
        f"(a) allcnn9, {numbers['a']['data']}", f"(b) {BASE}, {base['data']}", f"(d) {BASE}, random data"
    )  # fmt: skip
    for panel, entry, title in zip(
        (axes[0, 0], axes[0, 1], axes[1, 1]), (numbers["a"], base, noise), titles, strict=True
    ):
        for stage, colour in colours.items():
            line(panel, entry["spectra"][stage], color=colour, label=f"Fisher matrix, {stage}")
        line(panel, entry["data_spectrum"], color="black", linestyle="--", label="data, X X'/N")
        panel.set_title(title, fontsize=10)
    for name, runs in numbers["b, c"].items():
        line(axes[1, 0], runs[0]["spectra"]["end"], label=name)
    line(axes[1, 0], base["data_spectrum"], color="black", linestyle="--", label="data, X X'/N")
    axes[1, 0].set_title("(c) hidden layers x width, Boston Housing, end of training", fontsize=10)
    for panel in axes.flat:
        panel.set_yscale("log")
        panel.set_xlabel("eigenvalue number")
        panel.set_ylabel("eigenvalue")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / f"{NAME}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
