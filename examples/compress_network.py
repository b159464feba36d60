"""Compress a trained network in three ways, without labels: few directions, few weights, few units.

python -m examples.compress_network
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import nn

from examples.datasets import Dataset, load_dataset
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.models import compact, mlp_deep, reduce_model
from torchgeom_optim.optimizers import GeodesicSparsifier, Sparsity, Target, Units


def trained(data: Dataset, epochs: int) -> nn.Module:
    model = mlp_deep(in_features=64)
    optimizer = WhiteningSGD(model)
    steps = epochs * -(-len(data.train_inputs) // 64)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_inputs[batch]), data.train_targets[batch]).backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


def accuracy(model: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        return (model(data.test_inputs).argmax(1) == data.test_targets).float().mean().item()


def walked(model: nn.Module, target: Target, data: Dataset, steps: int) -> nn.Module:
    """A copy of the network at the end of the path to a target; inputs are all it is shown."""
    model = copy.deepcopy(model)
    sparsifier = GeodesicSparsifier(model, target=target, steps=steps)
    while not sparsifier.arrived:
        sparsifier.step(data.train_inputs[torch.randperm(len(data.train_inputs))[:300]])
    return model


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="of the path to a sparse network")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = trained(data, options.epochs)
    found = {"dense": accuracy(model, data)}
    print(f"dense: {found['dense']:.1%}")

    test = {"test_data": data.test_inputs, "test_targets": data.test_targets}  # for the report alone
    # The default basis takes the fewest directions, but more bytes than it saves; that of the inputs takes fewer.
    reduced = reduce_model(model, data.train_inputs, num_directions=0.1, basis="pca", **test)
    found["reduced"] = accuracy(reduced, data)
    print(f"a tenth of the directions: {found['reduced']:.1%}\n{reduced.report}\n")

    sparse = walked(model, Sparsity(0.8), data, options.steps)
    found["sparse"] = accuracy(sparse, data)
    print(f"a fifth of the weights: {found['sparse']:.1%}\n")

    hidden = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    narrow, report = compact(
        walked(model, Units(dict.fromkeys(hidden, 0.3)), data, options.steps), data.test_inputs[:2]
    )
    found["narrow"] = accuracy(narrow, data)
    print(f"without three tenths of the units, really taken out: {found['narrow']:.1%}\n{report}")
    return found


if __name__ == "__main__":
    main()
