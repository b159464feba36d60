"""How large a network can a spectrum see, in how much memory and time?

The 50 largest eigenvalues of the Fisher matrix with one drawn label per sample, their residuals, the trace and the peak
memory of a process of its own: ``resnet18`` (11 million weights) and a transformer of 10^8, random weights, random
inputs, products in float32 and eigenvalues in float64.

Two ways in the space of J J' (N rows): "formed", J J' from the layers' factors and decomposed, which gives all its
eigenvalues; and "iterated", block Lanczos on products J (J'u), stopped after a number of products, with the residuals
that it has reached by then. One product costs as much as a training step on all samples or more, J J' some of these, so
while N is in the hundreds forming it is the cheaper of the two; iteration is what is left when J J' does not fit.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ROOT, benchmark_parser, start, write_result
from torchgeom_optim.geometry.fisher import fisher_spectrum
from torchgeom_optim.models.reference import resnet18
from torchgeom_optim.models.reference_modules import CharGPT

NAME = "how_large_a_network_can_a_spectrum_see"
NUM_LARGEST = 50
# Samples, products allowed where iterated, and their eigenvalues.
CASES = {"resnet18": (96, 24, 5), "transformer": (64, 12, 3)}
CONTEXT, VOCABULARY = 32, 10000


def main(argv: list[str] | None = None) -> None:
    """Run every case in a process of its own and write."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=["formed", "iterated"], default=["formed", "iterated"])
    parser.add_argument("--one", action="store_true", help="measure the first network and way here, print JSON")
    options = start(parser, argv)
    if options.one:
        print(json.dumps(measure(options.networks[0], options.ways[0], options.smoke)))
        return
    cases = {}
    for network in options.networks:
        for way in options.ways:
            cases[f"{network}, {way}"] = _in_a_process(network, way, options.smoke, options.threads)
            rows = [_row(name, found) for name, found in cases.items()]
            write_result(NAME, {"cases": cases}, options, seeds=[0], rows=rows)


def _in_a_process(network: str, way: str, smoke: bool, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{NAME}", "--one", "--networks", network, "--ways", way]
    command += ["--threads", str(threads), *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{network}, {way}: the process ended with {done.returncode}. {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(network: str, way: str, smoke: bool) -> dict[str, Any]:
    """One spectrum, with time and memory."""
    num_samples, products, num = CASES[network]
    num_samples = 4 if smoke else num_samples
    torch.manual_seed(0)
    model, x = _model_and_inputs(network, num_samples, smoke)
    size = sum(p.numel() for p in model.parameters())
    before = _peak()
    wall, cpu = time.perf_counter(), time.process_time()
    spectrum = fisher_spectrum(
        model,
        x,
        None,
        None if way == "formed" else min(num, num_samples),
        variant="drawn",
        dtype=torch.float32,
        max_products=None if way == "formed" else products,
        memory_limit=2**33,
    )
    return {
        "network": network,
        "way": way,
        "num_weights": size,
        "num_samples": num_samples,
        "matrix": spectrum.matrix,
        "rows": num_samples,
        "eigenvalues": spectrum.eigenvalues[:NUM_LARGEST].tolist(),
        "residuals": spectrum.residuals[:NUM_LARGEST].tolist(),
        "largest_relative_residual": float(spectrum.residuals[:NUM_LARGEST].max() / spectrum.eigenvalues[0]),
        "converged": spectrum.converged,
        "num_products": spectrum.num_products,
        "trace": spectrum.trace.value,
        "trace_standard_error": spectrum.trace.standard_error,
        "share_of_trace": spectrum.trace_share(min(NUM_LARGEST, len(spectrum.eigenvalues))),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_GiB": _peak(),
        "peak_GiB_before": before,
    }


def _model_and_inputs(network: str, num_samples: int, smoke: bool) -> tuple[nn.Module, Tensor]:
    if network == "resnet18":
        return resnet18(), torch.randn(num_samples, 3, 32, 32)
    width, blocks = (48, 2) if smoke else (768, 12)
    vocabulary = 100 if smoke else VOCABULARY
    model = CharGPT(vocabulary, context=CONTEXT, width=width, num_heads=width // 12 if smoke else 12, num_blocks=blocks)
    return model, torch.randint(vocabulary, (num_samples, CONTEXT))


def _row(name: str, found: dict[str, Any]) -> dict[str, object]:
    return {
        "case": name,
        "weights": found["num_weights"],
        "samples": found["num_samples"],
        "eigenvalues": len(found["eigenvalues"]),
        "largest": found["eigenvalues"][0],
        "relative residual": found["largest_relative_residual"],
        "cpu s": found["cpu_seconds"],
        "peak GiB": found["peak_GiB"],
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


if __name__ == "__main__":
    main()
