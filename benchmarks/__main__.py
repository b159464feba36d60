"""Every benchmark in turn, taken up again where it was interrupted: ``make benchmarks ARGS="--root DIR"``.

A question is left out if it was measured on this processor with this torch and as many threads, and its run came to its
end. Questions whose benchmarks keep what they have measured go on from there, as they do if a time of theirs was over.
Other options are handed on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, environment
from benchmarks.report import questions
from benchmarks.results_tables import load

# A file for each question that was begun and has not come to its end.
BEGUN = ROOT / "output" / "benchmarks"


def is_done(name: str, threads: int, results: Path = RESULTS, begun: Path = BEGUN) -> bool:
    """Whether a question has a whole result of this machine.

    Args:
        name: of the question.
        threads: that it would run with.
        results: folder of the results.
        begun: folder of the marks.

    Returns:
        Whether it can be left out.
    """
    return not (begun / name).exists() and is_whole(name, results) and is_from_here(name, threads, results)


def is_whole(name: str, results: Path = RESULTS) -> bool:
    """Whether a question's result, if there is one, has all that is to be measured.

    Args:
        name: of the question.
        results: folder of the results.

    Returns:
        False where it says itself that it is unfinished.
    """
    record = load(name, results)
    return record is None or not record.get("unfinished", False)


def is_from_here(name: str, threads: int, results: Path = RESULTS) -> bool:
    """Whether a question's result, be it whole or not, is of this machine, so that it can be gone on from.

    Args:
        name: of the question.
        threads: that it would run with.
        results: folder of the results.

    Returns:
        Whether there is one, with the same processor, torch and threads.
    """
    record = load(name, results)
    if record is None:
        return False
    then, now = record["environment"], environment()
    return then["threads"] == threads and all(then[key] == now[key] for key in ("cpu", "torch", "accelerator"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run them.

    Args:
        argv: arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = questions()
    parser.add_argument("--only", nargs="+", choices=known, metavar="QUESTION", help="these questions alone")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--smoke", action="store_true", help="each in seconds: shows that it runs, measures nothing")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (default: 1)")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and run nothing")
    options, handed_on = parser.parse_known_args(argv)
    handed_on += ["--threads", str(options.threads), *(["--smoke"] if options.smoke else [])]
    failed, unfinished = [], []
    for number, name in enumerate(options.only or known, 1):
        done = is_done(name, options.threads) and not options.again and not options.smoke
        print(f"== {number} of {len(options.only or known)}: {name}{': done' if done else ''}", flush=True)
        if done or options.list:
            continue
        mark = BEGUN / name
        if not options.smoke:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        further = ["--again"] if options.again else []
        if not (options.again or options.smoke) and is_from_here(name, options.threads):
            further = ["--resume"]
        further = [option for option in further if f'"{option}"' in _options_of(name) and option not in handed_on]
        command = [sys.executable, "-m", f"benchmarks.{name}", *handed_on, *further]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        elif not options.smoke and not is_whole(name):
            unfinished.append(name)
        elif not options.smoke:
            mark.unlink()
    said = {"failed": failed, "unfinished, to be gone on with by the same command": unfinished}
    if failed or unfinished:
        sys.exit("; ".join(f"{what}: {', '.join(names)}" for what, names in said.items() if names))


def _options_of(name: str) -> str:
    return (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
