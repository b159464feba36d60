"""What do diagnostics cost, in training steps of the same network?

Attached to the loop, ``Diagnostics`` takes the Gram matrix of the samples' gradients from the loop's own backward pass.
A step with a measurement is compared with the plain step (zero_grad, forward, backward, SGD with momentum) on the same
fresh batches and in turns. Asked for, with all metrics of the Gram matrix at every step: at most 1.5 on mlp2 (batch
128), 1.6 on cnn3 (batch 64), 1.9 on resnet18 (batch 32, frozen batch norm), the last with at most 200 MiB more memory;
with ``every=100`` at most 2 % of a run. That figure is (cost of a measured step + 99 steps in between) / 100, from the
same turns. Beside them, in their own words: BackPACK's per-sample gradients and the same metrics from these, and
Cockpit's economy configuration every step, which measures other quantities.

``--sweep`` asks instead how the cost grows with the number of parameters (Fig. 4.10 of the thesis): seconds of each
family of metrics on multilayer perceptrons 784-w-w-10 of 10^4 to 10^8 parameters, batch 64, and on a transformer of
GPT-2's size with random weights. Families whose predicted memory or time exceeds a bound are left out and named.

Inputs are drawn from a normal distribution in the shapes of MNIST and CIFAR-10. Memory: every candidate runs in a fresh
process, which first makes two plain steps; "extra MiB" is by how much two steps of the candidate raise the process's
largest resident size beyond theirs.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import benchmark_parser, start, time_interleaved, timing_rows, write_result
from benchmarks.what_does_the_gram_matrix_cost import _peak_mib
from torchgeom_optim.diagnostics import METRICS, Diagnostics, Options, agreement
from torchgeom_optim.models.reference import reference_network
from torchgeom_optim.models.reference_modules import CharGPT

NAME = "what_do_diagnostics_cost"
SWEEP = "how_does_the_cost_of_diagnostics_grow"
BASELINE = "step"
# network: batch size, sample shape, rounds, calls per round
CASES = {
    "mlp2": (128, (1, 28, 28), 15, 5),
    "cnn3": (64, (3, 32, 32), 11, 1),
    "resnet18": (32, (3, 32, 32), 3, 1),
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
    options = start(parser, argv)
    warnings.simplefilter("ignore")  # of peers, about torch's hooks
    if options.sweep:
        _sweep(options)
    else:
        _steps(options)


def _steps(options: Any) -> None:
    cases = {name: CASES[name] for name in options.networks}
    if options.smoke:
        cases = {"mlp2": (8, (1, 28, 28), 1, 1)}
    numbers: dict[str, Any] = {}
    rows: list[dict[str, object]] = []
    for network, (batch_size, shape, rounds, calls) in cases.items():
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
        timing = time_interleaved(
            steps,
            baseline=BASELINE,
            rounds=rounds,
            calls_per_round=calls,
            make_batch=lambda number, size=batch_size, shape=shape: _batch(number, size, shape),
            warmup_rounds=1 if network == "resnet18" else 2,
        )
        ratio = {name: figures["ratio"]["median"] for name, figures in timing["candidates"].items()}
        share = ((ratio[MEASURED] - 1) + 99 * max(0.0, ratio[BETWEEN] - 1)) / 100
        measured = [MEASURED] if options.smoke else list(steps)
        memory = {name: _extra_memory(network, name, batch_size, shape, options.threads) for name in measured}
        numbers[f"{network}, batch {batch_size}"] = {
            "timing": timing, "share of a run with every=100": share, "extra MiB": memory, "refused": remarks
        }  # fmt: skip
        for row in timing_rows(timing, network=network, batch=batch_size):
            rows.append({**row, "extra MiB": memory.get(str(row["candidate"]), "")})
        rows.append(
            {"network": network, "batch": batch_size, "candidate": "every=100: share", f"ratio to {BASELINE}": share}
        )
        rows += [
            {"network": network, "batch": batch_size, "candidate": name, "quartiles": remark[:40]}
            for name, remark in remarks.items()
        ]
    write_result(NAME, numbers, options, seeds=[0], rows=rows)


def _sweep(options: Any) -> None:
    subjects: dict[str, tuple[nn.Module, Batch]] = {}
    rows: list[dict[str, object]] = []
    builders: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
        f"784-{w}-{w}-10": lambda w=w: _perceptron(w) for w in (WIDTHS[:1] if options.smoke else WIDTHS)
    }  # fmt: skip
    if not options.smoke:
        builders["transformer of GPT-2's size, 4 windows of 32"] = _gpt2_size
    for name, build in builders.items():
        model, batch = build()
        subjects[name] = model, batch
        parameters = sum(p.numel() for p in model.parameters())
        for family, (source, how) in FAMILIES.items():
            metrics = [metric for metric, own in METRICS.items() if own == source]
            criterion = _TokenLoss() if batch[0].dtype == torch.int64 else nn.CrossEntropyLoss()
            diagnostics = Diagnostics(model, criterion, metrics=metrics, per_layer=False, options=how)
            row: dict[str, object] = {"network": name, "parameters": parameters, "family": family}
            try:
                cost = diagnostics.predict_cost(*batch)
                row["predicted s"], row["predicted MiB"] = cost.total_seconds, cost.peak_bytes / 2**20
                row["pass s"] = cost.pass_seconds
                if cost.peak_bytes > MAX_BYTES or cost.total_seconds > MAX_SECONDS:
                    row["remark"] = "left out: beyond the bound"
                else:
                    row["s"] = _seconds(lambda d=diagnostics, b=batch: d.measure(*b), 1 if parameters > 10**7 else 3)
                    row["passes"] = float(row["s"]) / cost.pass_seconds  # type: ignore[arg-type]
            except Exception as error:  # integer inputs have no gradient
                row["remark"] = f"{type(error).__name__}: {error}"[:60]
            rows.append(row)
        subjects.clear()
    write_result(SWEEP, {"rows": rows}, options, seeds=[0], rows=rows)


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


def _plain(model: nn.Module) -> Step:
    optimizer, criterion = _optimizer(model), nn.CrossEntropyLoss()

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


MEASURED, BETWEEN = "step, metrics of the Gram matrix", "step, attached and not due"
_GRAM_ONLY = [name for name, source in METRICS.items() if source == "gram"]
CANDIDATES: dict[str, Callable[[nn.Module], Step]] = {
    BASELINE: _plain,
    MEASURED: _attached(every=1, metrics=_GRAM_ONLY, per_layer=False),
    "step, default metrics per layer": _attached(every=1, metrics="default"),
    "step, two-step condition number": _attached(every=1, metrics="free", per_layer=False),
    BETWEEN: _attached(every=_never, metrics="default"),
    "step, 'cheap' metrics per layer": _attached(every=1, metrics="cheap"),
    "BackPACK, then the same metrics": _backpack,
    "Cockpit, economy": _cockpit,
}


def _extra_memory(network: str, candidate: str, batch_size: int, shape: tuple[int, ...], threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, network, candidate, batch_size, shape, threads))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        return math.nan
    finally:
        process.join()


def _measure_memory(
    sender: Connection, network: str, candidate: str, batch_size: int, shape: tuple[int, ...], threads: int
) -> None:
    torch.set_num_threads(threads)
    model = _model(network)
    plain = _plain(model)
    for number in range(2):
        plain(_batch(number, batch_size, shape))
    before = _peak_mib()
    step = CANDIDATES[candidate](model)
    for number in range(2, 4):
        step(_batch(number, batch_size, shape))
    sender.send(round(_peak_mib() - before, 1))


if __name__ == "__main__":
    main()
