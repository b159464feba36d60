"""What do diagnostics cost, in training steps of the same network?

Attached to the loop, ``Diagnostics`` takes the Gram matrix of the samples' gradients from the loop's own backward pass.
A step with a measurement is compared with the plain step (zero_grad, forward, backward, SGD with momentum) on the same
fresh batches and in turns. Asked for, with all metrics of the Gram matrix at every step: at most 1.5 on mlp2 (batch
128), 1.6 on cnn3 (batch 64), 1.9 on resnet18 (batch 32, frozen batch norm), the last with at most 200 MiB more memory;
with ``every=100`` and the default metrics at most 2 % of a run. That figure is the surplus of (a step measured per
layer + 99 steps in between) / 100; steps in between are also timed alone against plain ones, in more rounds. Beside
them, in their own words: BackPACK's per-sample gradients and the same metrics from these, and Cockpit's economy
configuration every step, which measures other quantities.

``--sweep`` asks instead how the cost grows with the number of parameters (Fig. 4.10 of the thesis): seconds of each
family of metrics on multilayer perceptrons 784-w-w-10 of 10^4 to 10^8 parameters, batch 64, and on a transformer of
GPT-2's size with random weights. Families whose predicted memory or time exceeds a bound are left out and named.

Results are written network by network; ``--resume`` goes on from what a result has, and ``--draw`` makes the sweep's
picture from it without measuring anything.

Inputs are drawn from a normal distribution in the shapes of MNIST and CIFAR-10. Memory: every candidate runs in a fresh
process, which first makes two plain steps; "extra MiB" is by how much two steps of the candidate (one measurement in
the sweep) raise the process's largest resident size beyond theirs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    RESULTS,
    benchmark_parser,
    extra_memory,
    start,
    time_interleaved,
    timing_rows,
    write_result,
)
from torchgeom_optim._optional import optional_import
from torchgeom_optim.diagnostics import METRICS, Diagnostics, Options, agreement
from torchgeom_optim.models.reference import reference_network
from torchgeom_optim.models.reference_modules import CharGPT

NAME = "what_do_diagnostics_cost"
SWEEP = "how_does_the_cost_of_diagnostics_grow"
BASELINE = "step"
# network: batch size, sample shape, rounds, calls per round, rounds of the steps in between
CASES = {
    "mlp2": (128, (1, 28, 28), 15, 5, 60),
    "cnn3": (64, (3, 32, 32), 11, 1, 60),
    "resnet18": (32, (3, 32, 32), 3, 1, 12),
}
WIDTHS = (12, 110, 680, 2790, 9600)  # 784-w-w-10: 10^4, 10^5, 10^6, 10^7 and 10^8 parameters
MAX_BYTES, MAX_SECONDS = 2**31, 30.0
FAMILIES = {
    "agreement (Gram matrix)": ("gram", Options()),
    "moved gradients (Def. 2.7)": ("moves", Options()),
    "moved gradients (Def. 2.6)": ("moves", Options(perturbations="sample_gradients", num_perturbations=4)),
    "moved gradients on a 5 % mask": ("moves", Options(mask_fraction=0.05)),
    "input gradient rank": ("inputs", Options()),
    "input condition number": ("input_moves", Options(num_input_samples=4)),
    "curvature (Lanczos)": ("hessian", Options(curvature_products=10)),
}
Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], object]


def main(argv: list[str] | None = None) -> None:
    """Time every network and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="cost against parameters instead")
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES), help="which of them")
    parser.add_argument("--resume", action="store_true", help="keep what the result has")
    parser.add_argument("--draw", action="store_true", help="draw the sweep's result, and measure nothing")
    options = start(parser, argv)
    warnings.simplefilter("ignore")  # of peers, about torch's hooks
    if options.draw:
        draw(options.output or RESULTS)
    elif options.sweep:
        _sweep(options)
    else:
        _steps(options)


def _earlier(options: argparse.Namespace, name: str) -> dict[str, Any]:
    path = (options.output or RESULTS) / f"{name}.json"
    if not options.resume or not path.exists():
        return {}
    numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    return numbers


def _steps(options: argparse.Namespace) -> None:
    cases = {name: CASES[name] for name in options.networks}
    if options.smoke:
        cases = {"mlp2": (8, (1, 28, 28), 1, 1, 2)}
    numbers = _earlier(options, NAME)
    for network, case in cases.items():
        title = f"{network}, batch {case[0]}"
        if title not in numbers:
            numbers[title] = _case(network, *case, options)
        rows = [row for name, found in numbers.items() for row in _case_rows(name, found)]
        write_result(NAME, numbers, options, seeds=[0], rows=rows if network == list(cases)[-1] else ())


def _case(
    network: str,
    batch_size: int,
    shape: tuple[int, ...],
    rounds: int,
    calls: int,
    rounds_between: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    model = _model(network)
    steps: dict[str, Step] = {}
    remarks: dict[str, str] = {}
    for name, build in CANDIDATES.items():
        try:
            steps[name] = build(copy.deepcopy(model))
            steps[name](_batch(0, batch_size, shape))
        except Exception as error:  # whatever a peer raises is its answer
            steps.pop(name, None)
            remarks[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def timed(names: Iterable[str], rounds: int) -> dict[str, Any]:
        return time_interleaved(
            {name: steps[name] for name in names},
            baseline=BASELINE,
            rounds=rounds,
            calls_per_round=calls,
            make_batch=lambda number: _batch(number, batch_size, shape),
            warmup_rounds=1 if network == "resnet18" else 2,
        )

    timing = timed([name for name in steps if name != BETWEEN], rounds)
    between = timed((BASELINE, BETWEEN), rounds_between)
    surplus = [
        found["candidates"][name]["ratio"]["median"] - 1 for found, name in ((timing, DEFAULT), (between, BETWEEN))
    ]
    warm = partial(_warm, network, batch_size, shape)
    memory = {
        name: extra_memory(
            warm, partial(_twice, candidate=name, batch_size=batch_size, shape=shape), threads=options.threads
        )
        for name in ([MEASURED] if options.smoke else steps)
    }
    return {
        "timing": timing,
        "timing in between": between,
        SHARE: (surplus[0] + 99 * max(0.0, surplus[1])) / 100,
        "extra MiB": memory,
        "refused": remarks,
    }


def _case_rows(title: str, found: Mapping[str, Any]) -> list[dict[str, object]]:
    rows = [
        {**row, "extra MiB": found["extra MiB"].get(str(row["candidate"]), "")}
        for timing in (found["timing"], found["timing in between"])
        for row in timing_rows(timing, network=title)
    ]
    rows.append({"network": title, "candidate": SHARE, f"ratio to {BASELINE}": found[SHARE]})
    for name, remark in found["refused"].items():
        rows.append({"network": title, "candidate": name, "quartiles": remark[:40]})
    return rows


def _sweep(options: argparse.Namespace) -> None:
    names = list(SUBJECTS)[:1] if options.smoke else list(SUBJECTS)
    rows: list[dict[str, Any]] = _earlier(options, SWEEP).get("rows", [])
    for name in names:
        done = {row["family"] for row in rows if row["network"] == name}
        if set(FAMILIES) <= done:
            continue
        model, batch = SUBJECTS[name]()
        for family in FAMILIES:
            if family not in done:
                rows.append({"network": name, **_family_row(name, family, model, batch, options)})
                write_result(SWEEP, {"rows": rows}, options, seeds=[0])
    write_result(SWEEP, {"rows": rows}, options, seeds=[0], rows=rows)


def _family_row(
    name: str, family: str, model: nn.Module, batch: Batch, options: argparse.Namespace
) -> dict[str, object]:
    """Predicted and measured cost of a family of metrics on one network."""
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, object] = {"parameters": parameters, "family": family}
    diagnostics = _family(family, model, batch)
    try:
        cost = diagnostics.predict_cost(*batch)
        row |= {
            "predicted s": cost.total_seconds,
            "predicted MiB": cost.peak_bytes / 2**20,
            "pass s": cost.pass_seconds,
        }
        if cost.peak_bytes > MAX_BYTES or cost.total_seconds > MAX_SECONDS:
            return {**row, "remark": "left out: beyond the bound"}
        seconds = _seconds(lambda: diagnostics.measure(*batch), 1 if parameters > 10**7 else 3)
    except Exception as error:  # integer inputs have no gradient
        return {**row, "remark": f"{type(error).__name__}: {error}"[:60]}
    work = partial(_measure_once, family=family)
    extra = extra_memory(partial(_warm_subject, name), work, threads=options.threads)
    return {**row, "s": seconds, "passes": seconds / cost.pass_seconds, "extra MiB": extra}


def _family(family: str, model: nn.Module, batch: Batch) -> Diagnostics:
    source, how = FAMILIES[family]
    metrics = [metric for metric, own in METRICS.items() if own == source]
    return Diagnostics(model, _criterion(batch), metrics=metrics, per_layer=False, options=how)


def _criterion(batch: Batch) -> nn.Module:
    return _TokenLoss() if batch[0].dtype == torch.int64 else nn.CrossEntropyLoss()


def _warm_subject(name: str) -> tuple[nn.Module, Batch]:
    model, batch = SUBJECTS[name]()
    step = _plain(model, _criterion(batch))
    for _ in range(2):
        step(batch)
    return model, batch


def _measure_once(subject: tuple[nn.Module, Batch], family: str) -> None:
    model, batch = subject
    _family(family, model, batch).measure(*batch)


def draw(folder: Path) -> None:
    """Seconds and extra memory of each family of metrics against parameters: Fig. 4.10 of the thesis."""
    plt = optional_import("matplotlib.pyplot", "the picture")
    rows = json.loads((folder / f"{SWEEP}.json").read_text(encoding="utf-8"))["numbers"]["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    perceptrons = [row for row in rows if row["network"].startswith("784") and "s" in row]
    for panel, key, unit in zip(panels, ("s", "extra MiB"), ("seconds", "MiB beyond two training steps"), strict=True):
        for number, family in enumerate(FAMILIES):
            own = [row for row in perceptrons if row["family"] == family]
            x = [row["parameters"] for row in own]
            panel.plot(x, [row[key] for row in own], "o-", markersize=4, color=f"C{number}", label=family)
            for row in rows:
                if row["family"] == family and key in row and not row["network"].startswith("784"):
                    panel.plot(row["parameters"], row[key], "*", markersize=11, color=f"C{number}")
        panel.set(xscale="log", yscale="log" if key == "s" else "symlog", xlabel="parameters", ylabel=unit)
    passes = {row["parameters"]: row["pass s"] for row in perceptrons}
    panels[0].plot(list(passes), list(passes.values()), "k--", label="one forward and backward pass")
    panels[0].legend(fontsize=7)
    panels[1].set_ylim(bottom=0)
    panels[1].set_title("stars: transformer of GPT-2's size", fontsize=9)
    figure.savefig(folder / f"{SWEEP}.png", dpi=110)
    plt.close(figure)


def _seconds(work: Callable[[], object], repetitions: int) -> float:
    work()
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def _perceptron(width: int) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    return model, _batch(0, 64, (1, 28, 28))


def _gpt2_size() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = CharGPT(50257, context=32, width=768, num_heads=12, num_blocks=12)
    tokens = torch.randint(50257, (4, 33), generator=torch.Generator().manual_seed(0))
    return model, (tokens[:, :-1], tokens[:, 1:])


SUBJECTS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    **{f"784-{width}-{width}-10": partial(_perceptron, width) for width in WIDTHS},
    "transformer of GPT-2's size, 4 windows of 32": _gpt2_size,
}


class _TokenLoss(nn.Module):
    """Mean cross-entropy over samples and positions."""

    reduction = "mean"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _model(network: str) -> nn.Module:
    torch.manual_seed(0)
    return reference_network(network).eval()  # batch norm frozen; the others do not notice


def _batch(number: int, size: int, shape: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, *shape, generator=generator)
    return x, torch.randint(10, (size,), generator=generator)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _plain(model: nn.Module, criterion: nn.Module | None = None) -> Step:
    optimizer, criterion = _optimizer(model), criterion or nn.CrossEntropyLoss()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        criterion(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def _attached(**settings: Any) -> Callable[[nn.Module], Step]:
    def build(model: nn.Module) -> Step:
        optimizer, criterion = _optimizer(model), nn.CrossEntropyLoss()
        diagnostics = Diagnostics(model, criterion, **settings).attach(optimizer)

        def step(batch: Batch) -> Diagnostics:
            optimizer.zero_grad()
            criterion(model(batch[0]), batch[1]).backward()
            optimizer.step()
            return diagnostics  # which would let go of its hooks if it were forgotten

        return step

    return build


def _never(step: int) -> bool:
    return False


def _backpack(model: nn.Module) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    has_branches = any(hasattr(module, "downsample") for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    extended = extend(model, use_converter=True) if has_branches else extend(model)
    criterion = extend(nn.CrossEntropyLoss())
    optimizer = _optimizer(extended)
    dimension = sum(p.numel() for p in extended.parameters())

    def step(batch: Batch) -> list[float]:
        optimizer.zero_grad()
        with backpack(BatchGrad()):
            criterion(extended(batch[0]), batch[1]).backward()
        gram = torch.zeros(len(batch[0]), len(batch[0]))
        for p in extended.parameters():
            rows = p.grad_batch.flatten(1)
            gram += rows @ rows.T
            del p.grad_batch
        optimizer.step()
        numbers = [
            agreement.gradient_confusion(gram),
            agreement.gradient_diversity(gram),
            agreement.gradient_coherence(gram),
            agreement.relative_gradient_rank(gram, dimension),
            agreement.gradient_noise_scale(gram).value,
        ]
        return torch.stack(numbers).tolist()

    return step


def _cockpit(model: nn.Module) -> Step:
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.utils.configuration import configuration

    extended, criterion = extend(model), extend(nn.CrossEntropyLoss())
    apart = extend(nn.CrossEntropyLoss(reduction="none"))
    optimizer = _optimizer(extended)
    cockpit = Cockpit(extended.parameters(), quantities=configuration("economy"))
    count = 0

    def step(batch: Batch) -> None:
        nonlocal count
        optimizer.zero_grad()
        outputs = extended(batch[0])
        loss, losses = criterion(outputs, batch[1]), apart(outputs, batch[1])
        info = {"batch_size": len(batch[0]), "individual_losses": losses, "loss": loss, "optimizer": optimizer}
        with cockpit(count, info=info):
            loss.backward(create_graph=cockpit.create_graph(count))
        optimizer.step()
        count += 1

    return step


MEASURED, DEFAULT = "step, metrics of the Gram matrix", "step, default metrics per layer"
BETWEEN, SHARE = "step, attached and not due", "share of a run with every=100"
_GRAM_ONLY = [name for name, source in METRICS.items() if source == "gram"]
CANDIDATES: dict[str, Callable[[nn.Module], Step]] = {
    BASELINE: _plain,
    MEASURED: _attached(every=1, metrics=_GRAM_ONLY, per_layer=False),
    DEFAULT: _attached(every=1, metrics="default"),
    "step, two-step condition number": _attached(every=1, metrics="free", per_layer=False),
    BETWEEN: _attached(every=_never, metrics="default"),
    "step, 'cheap' metrics per layer": _attached(every=1, metrics="cheap"),
    "BackPACK, then the same metrics": _backpack,
    "Cockpit, economy": _cockpit,
}


def _warm(network: str, batch_size: int, shape: tuple[int, ...]) -> nn.Module:
    model = _model(network)
    step = _plain(model)
    for number in range(2):
        step(_batch(number, batch_size, shape))
    return model


def _twice(model: nn.Module, candidate: str, batch_size: int, shape: tuple[int, ...]) -> None:
    step = CANDIDATES[candidate](model)
    for number in range(2, 4):
        step(_batch(number, batch_size, shape))


if __name__ == "__main__":
    main()
