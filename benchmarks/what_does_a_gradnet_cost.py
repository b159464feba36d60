"""What does a GradNet cost, against one training step and one forward pass of its base?

Training steps (forward, backward, Adam), predictions, and per-sample gradients for a candidate label, on fresh batches
of 50, interleaved. Asked for, on cnn_small: a step of the linearised method at most 1.8 of the base's own and 1.4 with
layer inputs cached, its prediction at most 3.2 forward passes; the gated method at most 1.5 and 2.4; a step of the
paper's method at most 3 for each candidate label drawn. Beside the features: per-sample gradients by torch.func.vmap
and by Opacus, where it is installed. The base is as PyTorch has it: its poolings see channels first, ours channels
last, which on CPU is much of the difference.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
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


def main(argv: list[str] | None = None) -> None:
    """Time every case and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = start(parser, argv)
    rows, timings = [], {}
    for name, data_name, network in (("MNIST form", "mnist", cnn_small), ("CIFAR form", "cifar10", cnn_small_cifar)):
        torch.manual_seed(0)
        base = network()
        sample = stand_in(data_name, 64 if options.smoke else 256).train_inputs
        nets = {method: GradNet(base, 10, method=method, sample=sample) for method in ("gated", "linearised", "paper")}
        groups: dict[str, tuple[str, dict[str, Callable[[Any], object]]]] = {
            "training step": ("base", _steps(base, nets)),
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
            rows += timing_rows(timing, network=name, question=question)
    write_result(NAME, timings, options, seeds=[0], rows=[_same_columns(row) for row in rows])


def _steps(base: nn.Module, nets: dict[str, GradNet]) -> dict[str, Callable[[Batch], object]]:
    model = copy.deepcopy(base)
    steps = {"base": _step(model, lambda x: model(x))}
    last = copy.deepcopy(base).to(memory_format=torch.channels_last)
    steps["base, channels last"] = _step(last, lambda x: last(x.contiguous(memory_format=torch.channels_last)))
    generator = torch.Generator().manual_seed(0)
    for method, net in nets.items():
        head: Any = copy.deepcopy(net).head
        if method == "paper":
            steps["paper, one label"] = _step(
                head, lambda x, head=head: head.logits(head.training_record(x, generator))
            )
            continue
        steps[method] = _step(head, lambda x, head=head: head.logits(head.record(x)))
        kept: dict[str, Tensor] = {}  # of one batch; what a cache reads costs the same for any other

        def cached(x: Tensor, head: Any = head, kept: dict[str, Tensor] = kept) -> Tensor:
            if not kept:
                kept.update(head.record(x))
            return head.logits(kept)

        steps[f"{method}, cached"] = _step(head, cached)
    return steps


def _step(model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Callable[[Batch], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step(batch: Batch) -> None:
        x, y = batch
        optimizer.zero_grad()
        F.cross_entropy(logits(x), y).backward()
        optimizer.step()

    return step


def _predictions(base: nn.Module, nets: dict[str, GradNet]) -> dict[str, Callable[[Batch], object]]:
    def forward(batch: Batch) -> Tensor:
        with torch.no_grad():
            return base(batch[0])

    last = copy.deepcopy(base).to(memory_format=torch.channels_last)

    def forward_last(batch: Batch) -> Tensor:
        with torch.no_grad():
            return last(batch[0].contiguous(memory_format=torch.channels_last))

    own = {"base": forward, "base, channels last": forward_last}
    return {**own, **{name: lambda batch, net=net: net.predict(batch[0]) for name, net in nets.items()}}


def _features(base: nn.Module, paper: GradNet) -> dict[str, Callable[[Batch], object]]:
    model = copy.deepcopy(base)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    def base_pass(batch: Batch) -> None:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()

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


def _batch(name: str, number: int) -> Batch:
    data = stand_in(name, BATCH, 1, seed=number)
    return data.train_inputs, data.train_targets


def _same_columns(row: dict[str, object]) -> dict[str, object]:
    return {("ratio to base" if column.startswith("ratio to") else column): value for column, value in row.items()}


if __name__ == "__main__":
    main()
