"""What does one step of Eq. (5) cost, in seconds and memory, and what does a general solver take for the same?

The problem: minimise theta' J'J theta - beta theta' v with ||theta|| <= r, for a multilayer perceptron 784-h-h-10
(width h for the wanted number of weights P), 100 random inputs, outputs as metric, v = -w on the smaller half of the
weights.
Ours is what a step takes from nothing: J J' of 1,000 rows, its eigendecomposition in float64, and the step in float32.
Clarabel, an interior-point solver, is given the explicit matrix J'J at P = 2,000 (inputs of 16 numbers there) in
float64 where it is installed (extra "peers"), and the time that forming it takes is left out of its own. Every size
runs in a process of its own: memory is the peak beyond what the process held with the network built.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import benchmark_parser, start, write_result
from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.trust_region import eigenpairs, geodesic_step

NAME = "what_does_a_geodesic_step_cost"
SIZES = (2_000, 100_000, 10_000_000, 100_000_000)
DAMPING = 1e-3


def main(argv: list[str] | None = None) -> None:
    """Run all sizes and write the result."""
    options = start(benchmark_parser(__doc__), argv)
    sizes, samples = (SIZES[:1], 10) if options.smoke else (SIZES, 100)
    rows: list[dict[str, object]] = []
    context = multiprocessing.get_context("spawn")
    for size in sizes:
        has_clarabel = importlib.util.find_spec("clarabel") is not None
        methods = ["ours", "Clarabel"] if size <= 2_000 and has_clarabel else ["ours"]
        for method in methods:
            with ProcessPoolExecutor(1, context) as pool:
                measured = pool.submit(_measure, method, size, samples, options.threads, options.smoke)
                try:
                    rows.append(measured.result())
                except BrokenProcessPool:  # a pool of multiprocessing's would wait for ever
                    rows.append({"method": method, "P": size, "failed": "the process was killed: memory?"})
            print(rows[-1], flush=True)
            write_result(NAME, {"samples": samples, "outputs": 10, "rows": rows}, options, seeds=[0])
    write_result(NAME, {"samples": samples, "outputs": 10, "rows": rows}, options, seeds=[0], rows=rows)


def _measure(method: str, size: int, samples: int, threads: int, smoke: bool) -> dict[str, object]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    num_inputs = 16 if size <= 2_000 else 784
    # P = h^2 + (inputs + 12) h + 10
    b = num_inputs + 12
    width = round((-b + math.sqrt(b * b + 4 * (size - 10))) / 2)
    if smoke:
        width //= 4
    model = nn.Sequential(
        nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    x = torch.randn(samples, num_inputs)
    J = Jacobian(model, x, memory_limit=math.inf)
    v = J.vectors.flat(J.vectors.values())
    sizes = v.abs()
    v = torch.where(sizes < sizes[:: max(1, len(sizes) // 100_000)].median(), -v, 0.0)
    radius = 0.1 * float(v.norm())
    before = _peak()
    begin, cpu = time.perf_counter(), time.process_time()
    result = geodesic_step(
        J.product, J.transposed_product, eigenpairs(J.gram().double()), v, radius, relative_multiplier=DAMPING,
        measure_residual=False,
    )  # fmt: skip
    row: dict[str, object] = {"method": method, "P": J.shape[1], "rows of J": J.shape[0]}
    if method == "ours":
        row |= {"seconds": time.perf_counter() - begin, "cpu seconds": time.process_time() - cpu}
        row["MiB"] = (_peak() - before) / 2**20
        if size <= 100_000:
            again = geodesic_step(
                J.product, J.transposed_product, eigenpairs(J.gram().double()), v, radius, pull=float(result.pull)
            )
            assert again.kkt_residual is not None
            row["KKT residual"] = float(again.kkt_residual)
        return row
    return row | _clarabel(J, v, radius, float(result.pull), result.step)


def _clarabel(J: Jacobian, v: Tensor, radius: float, pull: float, ours: Tensor) -> dict[str, object]:
    """The second-order cone ||theta|| <= r, and the explicit quadratic."""
    clarabel = optional_import("clarabel", "the comparison with a general solver")
    sparse = optional_import("scipy.sparse", "the comparison with a general solver")
    dense = J.dense().double().numpy()
    before = _peak()
    metric = sparse.csc_matrix(np.triu(2 * dense.T @ dense))
    size = len(v)
    constraints = sparse.vstack([sparse.csc_matrix((1, size)), -sparse.identity(size)], format="csc")
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    begin, cpu = time.perf_counter(), time.process_time()
    solver = clarabel.DefaultSolver(
        metric,
        -pull * v.double().numpy(),
        constraints,
        np.concatenate([[radius], np.zeros(size)]),
        [clarabel.SecondOrderConeT(size + 1)],
        settings,
    )
    solution = solver.solve()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    found = torch.tensor(solution.x)
    return {
        "seconds": seconds,
        "cpu seconds": cpu_seconds,
        "MiB": (_peak() - before) / 2**20,
        "status": str(solution.status),
        "difference from ours": float((found - ours).norm() / ours.norm()),
    }


def _peak() -> int:
    """Bytes; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
