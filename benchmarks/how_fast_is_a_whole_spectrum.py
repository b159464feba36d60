"""How long does the whole spectrum of the Fisher matrix take, next to the ten largest eigenvalues by curvlinops?

All nonzero eigenvalues and the exact trace, 256 samples, 10 classes, through J J'; in float64, and in float32, that is
products, and eigenvalues too where their errors stay far below the smallest of them, which the result tells. Beside
them block Lanczos for the ten largest, and the peer: curvlinops' GGN of the softmax cross-entropy, which is the Fisher
matrix, with SciPy's eigsh for the ten largest, at eigsh's default tolerance and at 1e-5, which serves. Asked for: at
most half of the peer's time, the ten agreeing to 1e-5; processor time is given in units of both. MNIST for mlp2,
CIFAR-10 (JPEG) for cnn3, networks as they are initialised.

A missing peer is reported as missing: ``pip install curvlinops-for-pytorch``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import benchmark_parser, start, time_interleaved, timing_rows, write_result
from examples.datasets import load_dataset, stand_in
from torchgeom_optim.geometry.fisher import fisher_spectrum
from torchgeom_optim.geometry.spectrum import Spectrum
from torchgeom_optim.models.reference import cnn3, mlp2

NAME = "how_fast_is_a_whole_spectrum"
NUM_LARGEST = 10
WHOLE, PEER = "whole spectrum, float64", "top 10, curvlinops + eigsh, tol 1e-5"
PEER_BY_DEFAULT = "top 10, curvlinops + eigsh"


def main(argv: list[str] | None = None) -> None:
    """Time both networks and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=["mlp2", "cnn3"], default=["mlp2", "cnn3"])
    options = start(parser, argv)
    rows, numbers = [], {}
    for name in options.networks:
        torch.manual_seed(0)
        model = mlp2() if name == "mlp2" else cnn3()
        x, data = _inputs(name, 16 if options.smoke else 256, options)
        results: dict[str, Any] = {}
        timing = time_interleaved(
            {key: _kept(results, key, call) for key, call in _candidates(model, x).items()},
            baseline=PEER if _peer_is_there() else WHOLE,
            other_baselines=[PEER_BY_DEFAULT] if _peer_is_there() else [],
            rounds=1 if options.smoke else {"mlp2": 7, "cnn3": 3}[name],
            warmup_rounds=0 if name == "cnn3" else 1,
        )
        numbers[name] = {"data": data, "num_samples": len(x), "timing": timing, "found": _summary(results)}
        for row in timing_rows(timing, network=name):
            found = numbers[name]["found"][row["candidate"]]
            rows.append(
                {
                    **row,
                    "eigenvalues": found["num_eigenvalues"],
                    "top ten off by": found["largest_difference"],
                    "all off by": found["difference"],
                }
            )
    missing = None if _peer_is_there() else "curvlinops or scipy is not installed: the peer is missing"
    write_result(NAME, {"networks": numbers, "missing": missing}, options, seeds=[0], rows=rows)
    if missing:
        print(missing)


def _candidates(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    candidates: dict[str, Callable[[], Any]] = {
        WHOLE: lambda: fisher_spectrum(model, x),
        "whole spectrum, float32": lambda: fisher_spectrum(model, x, dtype=torch.float32),
        "top 10, block Lanczos": lambda: fisher_spectrum(model, x, None, NUM_LARGEST, dtype=torch.float32),
    }
    if _peer_is_there():
        candidates[PEER_BY_DEFAULT] = lambda: _peer(model, x, 0.0)
        candidates[PEER] = lambda: _peer(model, x, 1e-5)
    return candidates


def _peer_is_there() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("curvlinops", "scipy"))


def _peer(model: nn.Module, x: Tensor, tolerance: float) -> np.ndarray:
    curvlinops, linalg = importlib.import_module("curvlinops"), importlib.import_module("scipy.sparse.linalg")
    labels = torch.zeros(len(x), dtype=torch.long)  # the matrix does not depend on them
    operator = curvlinops.GGNLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, labels)], check_deterministic=False
    )
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
    values: np.ndarray = linalg.eigsh(
        operator.to_scipy(), k=NUM_LARGEST, tol=tolerance, v0=start, return_eigenvectors=False
    )
    return np.sort(values)[::-1].astype(np.float64)


def _kept(results: dict[str, Any], name: str, call: Callable[[], Any]) -> Callable[[], None]:
    def keep() -> None:
        results[name] = call()

    return keep


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    exact = results[WHOLE].eigenvalues.numpy()
    summary: dict[str, Any] = {}
    for name, result in results.items():
        values = result.eigenvalues.numpy() if isinstance(result, Spectrum) else result
        summary[name] = {
            "num_eigenvalues": len(values),
            "largest": values[:NUM_LARGEST],
            # Relative to each eigenvalue, against the whole spectrum in float64.
            "largest_difference": float(np.abs(values / exact[: len(values)] - 1)[:NUM_LARGEST].max()),
            "difference": float(np.abs(values / exact[: len(values)] - 1).max()),
        }
        if isinstance(result, Spectrum):
            summary[name] |= {
                "trace": result.trace.value,
                "trace_standard_error": result.trace.standard_error,
                "eigenvalue_dtype": str(result.eigenvalue_dtype),
                "largest_residual": float(result.residuals.max()),
                "largest_residual_of_top_ten": float(result.residuals[:NUM_LARGEST].max()),
                "smallest": float(values[-1]),
                "roundoff": result.roundoff,
                "rank": result.rank,
                "num_products": result.num_products,
                "share_of_trace_in_top_ten": result.trace_share(NUM_LARGEST),
            }
    return summary


def _inputs(network: str, num_samples: int, options: argparse.Namespace) -> tuple[Tensor, str]:
    name = "mnist" if network == "mlp2" else "cifar10"
    dataset = stand_in(name) if options.smoke else load_dataset(name, options.root)
    return dataset.train_inputs[:num_samples].clone(), f"first {num_samples} training images of {dataset.title}"


if __name__ == "__main__":
    main()
