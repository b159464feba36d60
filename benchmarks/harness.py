"""What every benchmark shares: options, interleaved timing, the environment, one JSON per question.

A benchmark is a module run from the root of the repository, ``python -m benchmarks.<question>``::

    def main(argv=None):
        options = start(benchmark_parser(__doc__), argv)
        timing = time_interleaved({"SGD": sgd_step, "WhiteningSGD": whitening_step}, baseline="SGD",
                                  rounds=3 if options.smoke else 60, make_batch=fresh_batch)
        write_result("does_whitening_cost_little", timing, options, seeds=[0], rows=timing_rows(timing))

Measuring and drawing are separate: a benchmark writes numbers, and whoever draws reads the JSON.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "benchmark_parser",
    "environment",
    "extra_memory",
    "format_table",
    "quartiles",
    "start",
    "time_interleaved",
    "timing_rows",
    "training_step",
    "write_result",
]

Prepared = TypeVar("Prepared")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Their values are paths of the machine at hand: a result names the option and not the value.
PATH_OPTIONS = ("--root", "--output")


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have in common; add your own, then call :func:`start`.

    Args:
        description: usually the module's docstring.

    Returns:
        A parser with ``--smoke``, ``--root``, ``--threads`` and ``--output``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds only: shows that it runs, measures nothing")
    parser.add_argument("--root", type=Path, help="folder with the data sets (default: $TORCHGEOM_DATA)")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (default: 1)")
    parser.add_argument("--output", type=Path, help="folder of the JSON (default: benchmarks/results)")
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options, set the number of threads, and note the environment before anything is measured.

    Args:
        parser: from :func:`benchmark_parser`.
        argv: arguments; those of the command line by default.

    Returns:
        The options, with ``environment`` and ``command`` beside them.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads={options.threads}: must be at least 1; 1 is what the committed figures use")
    if options.smoke and options.output is not None and options.output.resolve() == RESULTS:
        parser.error(f"--output={options.output}: a smoke run must not replace measured results; leave it out")
    torch.set_num_threads(options.threads)
    options.environment = environment()  # now, since a long run may see other commits come in
    options.command = _command_line(arguments)
    return options


def time_interleaved(
    candidates: Mapping[str, Callable[..., object]],
    *,
    baseline: str,
    rounds: int,
    make_batch: Callable[[int], object] | None = None,
    calls_per_round: int = 1,
    warmup_rounds: int = 2,
    other_baselines: Sequence[str] = (),
) -> dict[str, Any]:
    """Time callables side by side, so that whatever slows the machine down slows all of them.

    In every round each candidate runs once (``calls_per_round`` times), the order rotating from round to
    round. Ratios to the baseline are taken round by round and their median reported: a ratio of two overall
    medians would mix moments in which the machine was busy with others in which it was not.

    Args:
        candidates: name to callable, taking nothing, or the batch where ``make_batch`` is given.
        baseline: name of the candidate that ratios refer to.
        rounds: how many rounds are measured.
        make_batch: makes the batch of a call, outside the time taken. Called afresh for every candidate, with
            a number that is the same for all candidates and grows from call to call: on one repeated batch
            gradients vanish into denormal numbers, which are many times slower.
        calls_per_round: calls of a candidate in a row that are timed together; more for very short ones.
        warmup_rounds: rounds before the measured ones, thrown away.
        other_baselines: candidates that processor seconds are put in relation to besides.

    Returns:
        Per candidate the median and quartiles of the wall-clock seconds of one call, of their ratio to the
        baseline, and of the ratio of processor seconds (all threads of this process; time that other programs
        take away is not in it), the latter also to each other baseline.

    Raises:
        ValueError: no such baseline, or a count below its least value.
    """
    for name in (baseline, *other_baselines):
        if name not in candidates:
            raise ValueError(f"baseline={name!r}: must be one of {sorted(candidates)}; pass its name as in candidates.")
    if rounds < 1 or calls_per_round < 1 or warmup_rounds < 0:
        raise ValueError(
            f"rounds={rounds}, calls_per_round={calls_per_round}, warmup_rounds={warmup_rounds}: must be at "
            "least 1, 1 and 0; 60, 1 and 2 are a common start."
        )
    names = list(candidates)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection that happens to fall into one candidate's time is not its cost
    try:
        for turn in range(-warmup_rounds, rounds):
            gc.collect()
            first = (turn + warmup_rounds) * calls_per_round
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                numbers = range(first, first + calls_per_round)
                arguments = [() if make_batch is None else (make_batch(number),) for number in numbers]
                wall_s, cpu_s = _timed(candidates[name], arguments)
                if turn >= 0:
                    wall[name].append(wall_s / calls_per_round)
                    cpu[name].append(cpu_s / calls_per_round)
    finally:
        if collecting:
            gc.enable()
    return {
        "baseline": baseline,
        "rounds": rounds,
        "calls_per_round": calls_per_round,
        "threads": torch.get_num_threads(),
        "candidates": {
            name: {
                "seconds": quartiles(wall[name]),
                "ratio": quartiles(np.divide(wall[name], wall[baseline])),
                "cpu_ratio": quartiles(np.divide(cpu[name], np.maximum(cpu[baseline], 1e-9))),
                "cpu_ratio_to": {
                    other: quartiles(np.divide(cpu[name], np.maximum(cpu[other], 1e-9))) for other in other_baselines
                },
            }
            for name in names
        },
    }


def extra_memory(prepare: Callable[[], Prepared], work: Callable[[Prepared], object], *, threads: int) -> float:
    """By how much a piece of work raises the largest resident size of a fresh process.

    Args:
        prepare: what comes before, such as a model and two plain steps; like ``work`` a function of a module, or a
            ``functools.partial`` of one, since it has to reach the other process.
        work: what is measured; takes what ``prepare`` returned.
        threads: that torch may use there.

    Returns:
        MiB beyond the largest size until then, 0 where the work fits into what had been used before; nan if the
        process failed, having printed why.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_extra_memory, args=(sender, prepare, work, threads))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        return math.nan
    finally:
        process.join()


def training_step(
    network: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> Callable[[tuple[Tensor, Tensor]], None]:
    """One step of training on a batch of inputs and labels, as a candidate of :func:`time_interleaved`.

    Args:
        network: copied, so that every candidate starts with the same weights.
        make_optimizer: is given the copy.

    Returns:
        A function of the batch: zero_grad, forward pass, cross entropy, backward pass, step.
    """
    model = copy.deepcopy(network)
    optimizer = make_optimizer(model)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median with lower and upper quartile, by linear interpolation.

    Args:
        values: at least one number; a nan makes all three nan.

    Returns:
        ``lower``, ``median`` and ``upper``.
    """
    lower, median, upper = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75]).tolist()
    return {"lower": lower, "median": median, "upper": upper}


def timing_rows(timing: Mapping[str, Any], **columns: object) -> list[dict[str, object]]:
    """Rows for :func:`format_table` from what :func:`time_interleaved` returns.

    Args:
        timing: result of :func:`time_interleaved`.
        columns: constant columns to put in front (``network="lenet"``).

    Returns:
        One row per candidate.
    """
    rows: list[dict[str, object]] = []
    for name, figures in timing["candidates"].items():
        seconds, ratio, cpu_ratio = figures["seconds"], figures["ratio"], figures["cpu_ratio"]
        rows.append(
            {
                **columns,
                "candidate": name,
                "ms": 1e3 * seconds["median"],
                f"ratio to {timing['baseline']}": ratio["median"],
                "quartiles": f"{ratio['lower']:.3f}-{ratio['upper']:.3f}",
                "cpu ratio": cpu_ratio["median"],
                **{f"cpu ratio to {other}": ratio["median"] for other, ratio in figures["cpu_ratio_to"].items()},
            }
        )
    return rows


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A plain text table, numbers to four significant digits and to the right.

    Args:
        rows: each maps column to value; a missing value stays blank, columns come in the order of appearance.

    Returns:
        The table, without a closing line break.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    numeric = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)
        )
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def write_result(
    name: str,
    numbers: Mapping[str, Any],
    options: argparse.Namespace,
    *,
    seeds: Sequence[int],
    rows: Sequence[Mapping[str, object]] = (),
    unfinished: bool = False,
) -> Path:
    """Print a table and write ``benchmarks/results/<name>.json``.

    A smoke run goes to the machine's temporary folder instead: it must never pass for a measurement.

    Args:
        name: the benchmark's question, which is also the name of its file.
        numbers: what was measured; tensors and arrays become lists, a nan or inf the string of that name.
        options: from :func:`start`.
        seeds: seeds of the runs.
        rows: the table to print and to keep for benchmarks/README.md, if any.
        unfinished: whether something is still to be measured: the result says so, and does not pass for a whole one.

    Returns:
        The path written to.
    """
    smoke_folder = Path(tempfile.gettempdir()) / "torchgeom_optim_smoke"
    folder = options.output or (smoke_folder if options.smoke else RESULTS)
    record = {
        "name": name,
        "smoke": options.smoke,
        "command": options.command,
        "environment": options.environment,
        "seeds": list(seeds),
        "numbers": numbers,
        "rows": list(rows),
        **({"unfinished": True} if unfinished else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(_plain(record), indent=1, allow_nan=False) + "\n"
    partial = path.with_suffix(f".{os.getpid()}.tmp")  # a run that is interrupted leaves the old result whole
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    if rows:
        print(format_table(rows))
    print(f"{'smoke run, no measurement: ' if options.smoke else ''}{path.name} written to {_short(folder)}")
    return path


def environment() -> dict[str, Any]:
    """What a number depends on, without any path of the machine.

    Returns:
        Versions, processor, accelerator, threads, date, commit, and whether tracked sources differ from it.
    """
    # Results written a moment ago do not make the sources differ from the commit.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _send_extra_memory(
    sender: Connection, prepare: Callable[[], Prepared], work: Callable[[Prepared], object], threads: int
) -> None:
    torch.set_num_threads(threads)
    prepared = prepare()
    before = _peak_mib()
    work(prepared)
    sender.send(round(_peak_mib() - before, 1))


def _peak_mib() -> float:
    """The process's largest resident size so far."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage there: a new process starts with its parent's peak
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _timed(call: Callable[..., object], arguments: Sequence[tuple[object, ...]]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a few calls in a row."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for args in arguments:
        call(*args)
    _synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _command_line(arguments: Sequence[str]) -> str:
    """The command as somebody else would type it, values of path options left open."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    shown, hide = [], False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if hide:
            shown.append("DIR")
        elif option in PATH_OPTIONS and equals:
            shown.append(f"{option}=DIR")
        else:
            shown.append(argument)
        hide = argument in PATH_OPTIONS
    return " ".join(["python -m", spec.name if spec else Path(sys.argv[0]).stem, *shown])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an unpacked archive has no history
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _plain(value: Any) -> Any:
    """The same value in what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _short(folder: Path) -> str:
    resolved = folder.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else str(folder)
