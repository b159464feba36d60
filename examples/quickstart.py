"""Train a network, watch it, take it apart, and see all of it on one page.

``make demo`` runs this on scikit-learn's digits, in a minute or two. Larger data are read from a folder (see
``examples/datasets.py``)::

    make demo ARGS="--data cifar10 --root DIR"

The same network is trained with tuned SGD and with WhiteningSGD as it comes, with diagnostics attached
(``examples/demo/training.py``); then come its Fisher spectrum, its reduction, a walk to a sparse network and a GradNet
around it (``examples/demo/measuring.py``). The page is a single HTML file (``examples/demo/page.py``).
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from examples.datasets import load_dataset
from examples.demo.measuring import Budget, measure
from examples.demo.page import Report, html, overview, tiles
from examples.demo.training import BATCH_SIZE, OURS, SEEDS, TASKS, TUNED, as_text, compare, table, tune

TEST_LIMIT = 2000
SMOKE = Budget(
    spectrum_samples=20, reduction_samples=40, shares=(0.1, 1.0), path_steps=2, path_samples=40, gradnet_epochs=1
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration.

    Args:
        argv: arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(TASKS), default="digits")
    parser.add_argument("--root", type=Path, help="folder with the data sets (default: $TORCHGEOM_DATA)")
    parser.add_argument("--epochs", type=int, help="instead of the number that the settings were tuned for")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (default: 1)")
    parser.add_argument("--output", type=Path, help="the page to write (default: output/quickstart_DATA.html)")
    parser.add_argument("--picture", type=Path, help="also write the main figures to this SVG file")
    parser.add_argument("--smoke", action="store_true", help="seconds only: shows that it runs")
    parser.add_argument("--tune", action="store_true", help="search the learning rates instead, which takes minutes")
    options = parser.parse_args(argv)
    for name in ("epochs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value}: must be at least 1; leave it out for the usual number")

    begin = time.perf_counter()
    torch.set_num_threads(options.threads)
    task, budget, seeds = TASKS[options.data], Budget(), tuple(options.seeds)
    if options.smoke:
        task, budget, seeds = replace(task, epochs=1, train_limit=300), SMOKE, seeds[:1]
    if options.epochs is not None:
        task = replace(task, epochs=options.epochs)
    try:
        data = load_dataset(options.data, options.root, train_limit=task.train_limit)
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    # Some forty accuracies are taken: on more images they would take longer than the training.
    data = replace(data, test_inputs=data.test_inputs[:TEST_LIMIT], test_targets=data.test_targets[:TEST_LIMIT])
    title = f"{task.network_title} on {data.title}, {len(data.train_inputs):,} images, batches of {BATCH_SIZE}"
    if options.tune:
        tune(task, data)
        return

    print(f"{title}; {len(seeds)} seeds", flush=True)
    settings = (TUNED[options.data], OURS)
    runs = compare(task, data, settings, seeds)
    findings = measure(runs[-1][0].network, data, budget)
    report = Report(title, settings, runs, findings, len(data.test_inputs), _environment(), time.perf_counter() - begin)
    path = options.output or Path("output") / f"quickstart_{options.data}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(report), encoding="utf-8")
    if options.picture:
        options.picture.write_text(overview(report), encoding="utf-8")
    curves = [[run.curve for run in part] for part in runs]
    print(f"\n{as_text(table(settings, curves))}\n(medians over the seeds; SGD tuned over a grid of half-decades)\n")
    for number, words in tiles(report):
        print(f"{number:>20}  {words}")
    print(f"\n{report.seconds:.0f} seconds. Everything, with figures: {path.resolve().as_uri()}")


def _environment() -> str:
    threads = torch.get_num_threads()
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )


if __name__ == "__main__":
    main()
