"""What does a full training step cost with WhiteningSGD, against torch.optim.SGD of equal settings?

Forward pass, backward pass and optimizer step on fresh batches, interleaved; beside it the same network with batch
normalization, trained by SGD. Ratios are medians over rounds of the ratio within a round. Asked for: at most 1.10 on
lenet (batch 64 and 128), at most 1.06 on vgg_small and resnet18 (batch 64), and less than batch norm in every case.
resnet18 has batch norms of its own: it is measured with them, and without them beside the network that has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness import benchmark_parser, start, time_interleaved, timing_rows, training_step, write_result
from torchgeom_optim import WhiteningSGD, fold_batch_norm
from torchgeom_optim.models.reference import lenet, resnet18, vgg_small

NAME = "what_does_a_whitening_step_cost"
LR, MOMENTUM = 0.01, 0.9


def main(argv: list[str] | None = None) -> None:
    """Time every case and write the result."""
    options = start(benchmark_parser(__doc__), argv)
    rounds = {"lenet": 300, "vgg_small": 60, "resnet18 without norms": 9, "resnet18": 9}
    cases: list[tuple[str, int, nn.Module, nn.Module | None]] = [
        ("lenet", 64, lenet(), lenet(batch_norm=True)),
        ("lenet", 128, lenet(), lenet(batch_norm=True)),
        ("vgg_small", 64, vgg_small(), vgg_small(batch_norm=True)),
    ]
    if not options.smoke:
        cases.append(("resnet18 without norms", 64, _without_norm(resnet18()), resnet18()))
        cases.append(("resnet18", 64, resnet18(), None))
    rows, timings = [], {}
    for name, batch, plain, normalized in cases:
        torch.manual_seed(0)
        candidates = {
            "SGD": training_step(plain, _sgd),
            "WhiteningSGD, rule whitening": training_step(
                plain, lambda m: WhiteningSGD(m, LR, momentum=MOMENTUM, rule="whitening")
            ),
            "WhiteningSGD": training_step(plain, lambda m: WhiteningSGD(m, trust_radius=0.1, momentum=MOMENTUM)),
            "Adam": training_step(plain, lambda m: torch.optim.Adam(m.parameters(), 1e-4)),
        }
        if normalized is not None:
            candidates["batch norm, SGD"] = training_step(normalized, _sgd)
        timing = time_interleaved(
            candidates,
            baseline="SGD",
            rounds=2 if options.smoke else rounds[name],
            make_batch=lambda number, batch=batch: _batch(number, batch),
        )
        timings[f"{name}, batch {batch}"] = timing
        rows += timing_rows(timing, network=name, batch=batch)
    write_result(NAME, timings, options, seeds=[0], rows=rows)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)


def _without_norm(model: nn.Module) -> nn.Module:
    fold_batch_norm(model)
    return model


def _batch(number: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


if __name__ == "__main__":
    main()
