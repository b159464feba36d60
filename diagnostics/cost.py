"""What a measurement will cost, told before the first one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchgeom_optim.diagnostics.batch_gradient import BatchGradient
from torchgeom_optim.diagnostics.measurement import Layers, Options
from torchgeom_optim.diagnostics.metrics import METRICS
from torchgeom_optim.geometry.factors import WORKSPACE_BYTES
from torchgeom_optim.geometry.per_sample import Batch

__all__ = ["Cost", "predicted_cost"]

# In forward and backward passes over the batch. Of the Gram matrix: what benchmarks/what_does_the_gram_matrix_cost
# measures, between 0.3 and 0.9; of a Hessian-vector product: a backward pass through a graph of twice the size.
_GRAM_RIDING, _GRAM_ALONE, _PRODUCT = 0.6, 1.4, 1.5


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one measurement, beyond what the loop does anyway. Right to a factor of about two.

    Attributes:
        seconds: by source (:data:`~torchgeom_optim.diagnostics.metrics.METRICS`).
        bytes: likewise, at the peak; sources follow one another, so the peaks do not add up.
        pass_seconds: of one forward and backward pass over the batch, measured just now.
    """

    seconds: dict[str, float]
    bytes: dict[str, int]
    pass_seconds: float

    @property
    def total_seconds(self) -> float:
        """Of one measurement."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> int:
        """Most memory held at a time. The two-step form's lies there for a whole step, beside the others."""
        others = [n for source, n in self.bytes.items() if source != "step"]
        return max(others, default=0) + self.bytes.get("step", 0)

    def __str__(self) -> str:
        seconds, mib = self.total_seconds, self.peak_bytes / 2**20
        return f"about {seconds:.2g} s ({seconds / self.pass_seconds:.2g} passes) and {mib:.3g} MiB a measurement"


def predicted_cost(
    gradient: BatchGradient, metrics: Sequence[str], layers: Layers, options: Options, *, rides: bool
) -> Cost:
    """Time one pass, count what it keeps, and multiply.

    Args:
        gradient: of a batch of the size that will be measured. It makes three passes over it, and one over a sample.
        metrics: names of the metrics.
        layers: of the model.
        options: how they are measured.
        rides: whether the Gram matrix comes from the loop's own pass.

    Returns:
        The prediction.
    """
    kept = _kept_bytes(gradient)
    pass_s = _seconds(gradient)
    b, parameters = gradient.num_samples, list(layers.parameters.values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    sources = {METRICS[name] for name in metrics}
    if not any(METRICS[name] == "gram" and name != "gradient_norm" for name in metrics):
        sources.discard("gram")
    seconds: dict[str, float] = {}
    needed: dict[str, int] = {}
    inputs = sum(x.numel() * x.element_size() for x in tree_leaves(gradient.batch.inputs) if isinstance(x, Tensor))
    num_moves = 2 if options.perturbations == "batch_gradient" else options.num_perturbations
    for source in sources:
        if source == "gram":
            seconds[source] = pass_s * (_GRAM_RIDING if rides else _GRAM_ALONE)
            needed[source] = (2 + len(parameters)) * 4 * b * b + WORKSPACE_BYTES + (0 if rides else kept)
        elif source == "step":
            seconds[source] = 0.0
            needed[source] = int(weights * (1 + (options.mask_fraction or 1.0)))
        elif source == "moves":
            samples = num_moves if options.perturbations == "sample_gradients" else 0
            seconds[source] = pass_s * (1 + num_moves + samples)
            needed[source] = kept + weights * (4 + samples)
        elif source == "inputs":
            seconds[source] = pass_s
            needed[source] = kept + 2 * inputs
        elif source == "input_moves":
            one = gradient.on(Batch(*_first(gradient.batch)))
            m, n = min(options.num_input_samples, b), min(options.num_input_perturbations, b)
            seconds[source] = pass_s + m * (n + 1) * _seconds(one)
            needed[source] = kept + 2 * inputs + 3 * weights
        elif source == "hessian":
            seconds[source] = pass_s * (2 + _PRODUCT * options.curvature_products)
            needed[source] = 3 * kept + 6 * weights
        elif source == "spectrum":
            n = min(options.spectrum_samples, b)
            rows = n * gradient.num_outputs()
            seconds[source] = pass_s * 2 * rows / b + 2e-10 * rows**3
            needed[source] = 2 * (kept * rows // b + weights) + 3 * 8 * rows**2
    return Cost(seconds, needed, pass_s)


def _seconds(gradient: BatchGradient) -> float:
    gradient()
    start = time.perf_counter()
    for h in gradient().values():
        h.sum().item()  # waits for the device
        break
    return time.perf_counter() - start


def _kept_bytes(gradient: BatchGradient) -> int:
    """What a forward pass keeps for its backward pass, storages counted once."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in gradient.model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gradient()
    return sum(storages.values())


def _first(batch: Batch) -> tuple[Any, Any]:
    one = batch.map(lambda x: x[:1])
    return one.inputs, one.targets
