"""What the library finds in a trained network, as plain numbers: measuring knows nothing of how it is drawn."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from examples.datasets import Dataset
from torchgeom_optim._optional import optional_import
from torchgeom_optim.geometry import data_spectrum, fisher_spectrum
from torchgeom_optim.models import GradNet, UnsupportedBaseError, decompose
from torchgeom_optim.optimizers import GeodesicSparsifier, Sparsity

__all__ = ["Budget", "Findings", "accuracy_of", "measure"]


@dataclass(frozen=True)
class Budget:
    """How much is measured.

    Attributes:
        spectrum_samples: whose whole Fisher spectrum is taken.
        reduction_samples: of the calibration.
        shares: of the directions that are kept.
        sparsity: of the weights, at the path's end.
        path_steps: of the sparsifier.
        path_samples: fresh inputs of each of its steps.
        gradnet_epochs: of the classifier around the network.
    """

    spectrum_samples: int = 200
    reduction_samples: int = 500
    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    sparsity: float = 0.95
    path_steps: int = 10
    path_samples: int = 300
    gradnet_epochs: int = 3


@dataclass
class Findings:
    """What was found in one trained network.

    Attributes:
        num_weights: P.
        accuracy: on the test set, of the network as it was.
        fisher: eigenvalues of the Fisher matrix above round-off, descending.
        data: those of the inputs' autocorrelation.
        sloppiness: name to number.
        shares: of the directions, or of the weights, that are kept.
        reduced: test accuracy with that share of the directions, in one shot.
        truncated: and with that share of the weights, the largest ones, in one shot.
        cut: share of the weights that are zero, along the path.
        walked: test accuracy there.
        pruned: test accuracy with as many weights cut by magnitude.
        gradnet: test accuracy of the GradNet; None where the network does not allow one.
        seconds: what each part took.
    """

    num_weights: int
    accuracy: float
    fisher: list[float] = field(default_factory=list)
    data: list[float] = field(default_factory=list)
    sloppiness: dict[str, float] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    reduced: list[float] = field(default_factory=list)
    truncated: list[float] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)
    walked: list[float] = field(default_factory=list)
    pruned: list[float] = field(default_factory=list)
    gradnet: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def measure(network: nn.Module, data: Dataset, budget: Budget, seed: int = 0) -> Findings:
    """Take a trained network apart, with a progress bar for each part; the network itself stays as it is.

    Args:
        network: trained, in evaluation mode.
        data: what it was trained on.
        budget: how much is measured.
        seed: of the inputs that are drawn.

    Returns:
        What was found.
    """
    findings = Findings(sum(p.numel() for p in network.parameters()), accuracy_of(network, data))
    generator = torch.Generator().manual_seed(seed)
    with _part(findings, "Fisher spectrum", 1, "matrix") as bar:
        _spectra(findings, network, data.train_inputs[: budget.spectrum_samples])
        bar.update()
    with _part(findings, "reduction", len(budget.shares), "cut") as bar:
        _reduce(findings, network, data, budget, bar)
    with _part(findings, "sparsification", budget.path_steps, "step") as bar:
        _sparsify(findings, network, data, budget, generator, bar)
    with _part(findings, "GradNet", budget.gradnet_epochs, "epoch") as bar:
        _gradnet(findings, network, data, budget, generator)
        bar.update(budget.gradnet_epochs)
    return findings


@torch.no_grad()
def accuracy_of(network: nn.Module, data: Dataset) -> float:
    """Share of the test set that a network in evaluation mode classifies rightly."""
    answers = torch.cat([network(part).argmax(1) for part in data.test_inputs.split(1000)])
    return (answers == data.test_targets).double().mean().item()


@contextmanager
def _part(findings: Findings, name: str, total: int, unit: str) -> Iterator[Any]:
    begin = time.perf_counter()
    with optional_import("tqdm", "the progress bar").tqdm(total=total, desc=f"{name:20}", unit=unit) as bar:
        yield bar
    findings.seconds[name] = time.perf_counter() - begin


def _spectra(findings: Findings, network: nn.Module, inputs: Tensor) -> None:
    spectrum = fisher_spectrum(network, inputs)
    findings.fisher = spectrum.eigenvalues[: spectrum.rank].tolist()
    of_data = data_spectrum(inputs)
    findings.data = of_data.eigenvalues[: of_data.rank].tolist()
    sloppiness = spectrum.sloppiness()
    findings.sloppiness = {
        "eigenvalues above round-off": sloppiness.rank,
        "decades they span": sloppiness.decades,
        "that hold 90% of the trace": sloppiness.num_for_90_percent,
        "above 1% of the largest": sloppiness.num_stiff,
        "effective dimension": sloppiness.effective_dimension,
    }


def _reduce(findings: Findings, network: nn.Module, data: Dataset, budget: Budget, bar: Any) -> None:
    decomposition = decompose(
        network, data.train_inputs, num_samples=min(budget.reduction_samples, len(data.train_inputs))
    )
    for share in budget.shares:
        reduced = decomposition.reduced(share, measure=False)
        findings.shares.append(share)
        findings.reduced.append(accuracy_of(reduced, data))
        findings.truncated.append(accuracy_of(_by_magnitude(network, share), data))
        bar.set_postfix_str(f"{share:.0%} of the directions: {findings.reduced[-1]:.3f}", refresh=False)
        bar.update()


def _sparsify(
    findings: Findings, network: nn.Module, data: Dataset, budget: Budget, generator: torch.Generator, bar: Any
) -> None:
    sparse = copy.deepcopy(network)
    target = Sparsity(budget.sparsity)
    sparsifier = GeodesicSparsifier(sparse, target=target, steps=budget.path_steps)
    weights = [p for p in network.parameters() if p.dim() > 1]
    size = sum(p.numel() for p in weights)
    while True:
        zeros = sum(int((p == 0).sum()) for p in sparse.parameters() if p.dim() > 1)
        findings.cut.append(zeros / size)
        findings.walked.append(accuracy_of(sparse, data))
        findings.pruned.append(accuracy_of(_by_magnitude(network, 1.0 - zeros / size), data))
        bar.set_postfix_str(f"{zeros / size:.0%} cut: {findings.walked[-1]:.3f}", refresh=False)
        if sparsifier.arrived:
            break
        fresh = torch.randperm(len(data.train_inputs), generator=generator)[: budget.path_samples]
        sparsifier.step(data.train_inputs[fresh])
        bar.update()


def _gradnet(findings: Findings, network: nn.Module, data: Dataset, budget: Budget, generator: torch.Generator) -> None:
    order = torch.randperm(len(data.train_inputs), generator=generator)
    batches = [(data.train_inputs[part], data.train_targets[part]) for part in order.split(50)]
    try:
        gradnet = GradNet(network, num_classes=data.num_classes)
    except UnsupportedBaseError:
        return
    gradnet.fit(batches, epochs=budget.gradnet_epochs, progress=False)
    findings.gradnet = accuracy_of(gradnet, data)


def _by_magnitude(network: nn.Module, share_kept: float) -> nn.Module:
    """A copy with that share of its weights, the largest of all layers; biases stay."""
    copied = copy.deepcopy(network)
    places: Sequence[tuple[nn.Module, str]] = [
        (module, name)
        for module in copied.modules()
        for name, p in module._parameters.items()
        if p is not None and p.dim() > 1
    ]
    prune.global_unstructured(places, prune.L1Unstructured, amount=1.0 - share_kept)
    return copied
