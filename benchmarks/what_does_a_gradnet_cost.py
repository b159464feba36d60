"""What does a GradNet cost, against one training step and one forward pass of its base?

Training steps (forward, backward, Adam), predictions, and per-sample gradients for a candidate label, on fresh batches
of 50, interleaved. Asked for, on cnn_small: a step of the linearised method at most 1.8 of the base's own and 1.4 with
layer inputs cached, its prediction at most 3.2 forward passes; the gated method at most 1.5 and 2.4; a step of the
paper's method at most 3 for each candidate label drawn. The base that ratios refer to is as fast as its user can have
it: weights and images with their channels innermost, which on CPU halves its forward pass; the same Adam (fused) for
all. "base, channels first" is the base as PyTorch has it by default. Cached steps read their records from a cache in
memory. Beside the features: per-sample gradients by torch.func.vmap and by Opacus, where it is installed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from benchmarks.harness import benchmark_parser, start, time_interleaved, timing_rows, write_result
from examples.datasets import stand_in
from torchgeom_optim.models import GradNet, cnn_small, cnn_small_cifar

NAME = "what_does_a_gradnet_cost"
BATCH = 50
Batch = tuple[Tensor, Tensor]
FIRST = "base, channels first"
ASKED = {
    "training step": {
        "linearised": 1.8, "linearised, cached": 1.4, "gated": 1.5, "paper, one label": 3.0
    },
    "prediction": {"linearised": 3.2, "gated": 2.4},
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Time every case and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = start(parser, argv)
    rows: list[dict[str, object]] = []
    timings = {}
    for name, data_name, network in (("MNIST form", "mnist", cnn_small), ("CIFAR form", "cifar10", cnn_small_cifar)):
        torch.manual_seed(0)
        base = network()
        sample = stand_in(data_name, 64 if options.smoke else 256).train_inputs
        nets = {method: GradNet(base, 10, method=method, sample=sample) for method in ("gated", "linearised", "paper")}
        groups: dict[str, tuple[str, dict[str, Callable[[Any], object]]]] = {
            "training step": ("base", _steps(base, nets, data_name)),
            "prediction": ("base", _predictions(base, nets)),
            "features of one candidate label": ("base, forward and backward", _features(base, nets["paper"])),
        }
        for question, (baseline, candidates) in groups.items():
            timing = time_interleaved(
                candidates,
                baseline=baseline,
                rounds=2 if options.smoke else options.rounds,
                warmup_rounds=1 if options.smoke else 3,
                make_batch=lambda number, name=data_name: _batch(name, number),
            )
            timings[f"{name}: {question}"] = timing
            for row in timing_rows(timing, network=name, question=question):
                asked = ASKED.get(question, {}).get(str(row["candidate"]), "")
                rows.append({**_same_columns(row), "asked, at most": asked})
    write_result(NAME, {"asked": ASKED, **timings}, options, seeds=[0], rows=rows)


def _steps(base: nn.Module, nets: dict[str, GradNet], data: str) -> dict[str, Callable[[Batch], object]]:
    first, last = copy.deepcopy(base), _channels_last(copy.deepcopy(base))
    steps = {"base": _step(last, lambda x: last(_channels_last(x))), FIRST: _step(first, first)}
    generator = torch.Generator().manual_seed(0)
    for method, net in nets.items():
        head: Any = copy.deepcopy(net).head
        if method == "paper":
            steps["paper, one label"] = _step(
                head, lambda x, head=head: head.logits(head.training_record(x, generator))
            )
            continue
        steps[method] = _step(head, lambda x, head=head: head.logits(head.record(x)))
        steps[f"{method}, cached"] = _cached_step(net, data)
    return steps


def _step(model: nn.Module, logits: Callable[[Any], Tensor]) -> Callable[[Batch], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)

    def step(batch: tuple[Any, Tensor]) -> None:
        x, y = batch
        optimizer.zero_grad()
        F.cross_entropy(logits(x), y).backward()
        optimizer.step()

    return step


def _cached_step(net: GradNet, data: str) -> Callable[[Batch], None]:
    """Takes its batches from a cache in memory; the one it is given stays unused."""
    cache = net.cache([_batch(data, number) for number in range(4)])
    head: Any = copy.deepcopy(net).head
    step, generator = _step(head, head.logits), torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Any, Tensor]]:
        while True:
            yield from cache.batches(BATCH, generator, torch.device("cpu"))

    endless = batches()
    return lambda _: step(next(endless))


def _predictions(base: nn.Module, nets: dict[str, GradNet]) -> dict[str, Callable[[Batch], object]]:
    last = _channels_last(copy.deepcopy(base))

    @torch.no_grad()
    def forward(batch: Batch) -> Tensor:
        return last(_channels_last(batch[0]))

    @torch.no_grad()
    def forward_first(batch: Batch) -> Tensor:
        return base(batch[0])

    own = {"base": forward, FIRST: forward_first}
    return {**own, **{name: lambda batch, net=net: net.predict(batch[0]) for name, net in nets.items()}}


def _features(base: nn.Module, paper: GradNet) -> dict[str, Callable[[Batch], object]]:
    model, last = copy.deepcopy(base), _channels_last(copy.deepcopy(base))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    def base_pass(batch: Batch) -> None:
        last.zero_grad()
        F.cross_entropy(last(_channels_last(batch[0])), batch[1]).backward()

    head: Any = paper.head
    candidates: dict[str, Callable[[Batch], object]] = {
        "base, forward and backward": base_pass,
        "gradients": lambda batch: head._gradients(batch[0], batch[1][:, None]),
        "gradients, percentile, norm": lambda batch: head.record(batch[0], batch[1][:, None]),
        "gradients by vmap": lambda batch: vmap(grad(loss), (None, 0, 0))(parameters, *batch),
    }
    if importlib.util.find_spec("opacus") is not None:
        from opacus import GradSampleModule

        sampled = GradSampleModule(copy.deepcopy(base))

        def opacus(batch: Batch) -> None:
            sampled.zero_grad()
            F.cross_entropy(sampled(batch[0]), batch[1], reduction="sum").backward()

        candidates["gradients by Opacus"] = opacus
    return candidates


def _channels_last(x: Any) -> Any:
    return x.to(memory_format=torch.channels_last)


def _batch(name: str, number: int) -> Batch:
    data = stand_in(name, BATCH, 1, seed=number)
    return data.train_inputs, data.train_targets


def _same_columns(row: dict[str, object]) -> dict[str, object]:
    return {("ratio to base" if column.startswith("ratio to") else column): value for column, value in row.items()}


if __name__ == "__main__":
    main()
