"""Two networks that learn badly, each broken in one way, and what Diagnostics says about them and a healthy one.

python -m examples.diagnose_network
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import nn

from examples.datasets import load_dataset
from torchgeom_optim.diagnostics import Diagnostics, verdicts
from torchgeom_optim.models import mlp_deep


def healthy(model: nn.Module) -> float:
    """Nothing is wrong; returns the learning rate."""
    return 0.03


def dead_layer(model: nn.Module) -> float:
    """The biases of one layer are so low that none of its units ever fires."""
    with torch.no_grad():
        dict(model.named_modules())["linear4"].bias.fill_(-100.0)  # type: ignore[union-attr, operator]
    return 0.03


def learning_rate_too_high(model: nn.Module) -> float:
    """Every step overshoots."""
    return 3.0


def main(argv: Sequence[str] | None = None) -> dict[str, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(argv)
    data = load_dataset("digits")
    criterion = nn.CrossEntropyLoss()
    found = {}
    ways: tuple[Callable[[nn.Module], float], ...] = (healthy, dead_layer, learning_rate_too_high)
    for break_it in ways:
        torch.manual_seed(0)
        model = mlp_deep(in_features=64)
        optimizer = torch.optim.SGD(model.parameters(), lr=break_it(model), momentum=0.9)
        diagnostics = Diagnostics(model, criterion, every=10, metrics=["default", "top_curvature"]).attach(optimizer)
        for _ in range(options.steps):
            batch = torch.randint(len(data.train_inputs), (64,))
            optimizer.zero_grad()
            criterion(model(data.train_inputs[batch]), data.train_targets[batch]).backward()
            optimizer.step()
        diagnostics.close()
        print(f"== {break_it.__name__.replace('_', ' ')}\n{diagnostics.summary()}\n")
        found[break_it.__name__] = [verdict.kind for verdict in verdicts(diagnostics.history)]
    return found


if __name__ == "__main__":
    main()
