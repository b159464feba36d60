"""What is measured on one batch: numbers gathered as tensors, from whatever the metrics need, and read off once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgeom_optim.diagnostics import agreement, conditioning, scales, weight_gradients
from torchgeom_optim.diagnostics.batch_gradient import BatchGradient
from torchgeom_optim.diagnostics.masking import RandomMask
from torchgeom_optim.diagnostics.metrics import METRICS
from torchgeom_optim.diagnostics.spectrum import SPECTRUM_VALUES, batch_spectra
from torchgeom_optim.geometry.fisher import FisherVariant
from torchgeom_optim.geometry.gram_accumulator import GramResult, layer_of

__all__ = ["Layers", "Measurement", "Options"]

_State = tuple[dict[str, Tensor], dict[str, float], dict[str, tuple[float, ...]], list[str]]
Perturbations = Literal["batch_gradient", "sample_gradients", "random"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How metrics are measured, where there is a choice.

    Args:
        groups: take gradient confusion and diversity over so many groups' mean gradients, as the thesis does, not over
            samples.
        perturbations: directions of the moves of the weights: along and against the batch gradient (Def. 2.7; two
            moves), along samples' gradients (Def. 2.6), or random.
        num_perturbations: how many moves, where there is a choice.
        perturbation_size: length of a move (of its largest entry for the batch gradient, relative for random ones).
        mask_fraction: compare moved gradients on a random share of their coordinates (section 1.6); None for all.
        num_input_samples: samples over which the condition number with respect to inputs is averaged.
        num_input_perturbations: moves of each of these.
        curvature_tolerance: residual of the Hessian's end eigenvalue, relative.
        curvature_products: Hessian-vector products at most.
        spectrum_samples: samples for the spectra.
        spectrum_variant: of the Fisher matrix.
        seed: of all that is drawn; each step's draws are its own.

    Raises:
        ValueError: a value out of range.
    """

    groups: int | None = None
    perturbations: Perturbations = "batch_gradient"
    num_perturbations: int = 2
    perturbation_size: float = 1e-3
    mask_fraction: float | None = None
    num_input_samples: int = 8
    num_input_perturbations: int = 2
    curvature_tolerance: float = 1e-2
    curvature_products: int = 40
    spectrum_samples: int = 32
    spectrum_variant: FisherVariant = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.perturbations not in ("batch_gradient", "sample_gradients", "random"):
            raise ValueError(
                f"perturbations={self.perturbations!r}: must be 'batch_gradient', 'sample_gradients' or 'random'; the "
                f"first is the cheapest."
            )
        if self.groups is not None and self.groups < 2:
            raise ValueError(f"groups={self.groups}: must be at least 2, or None for single samples; 4 is common.")
        for name in ("perturbation_size", "curvature_tolerance"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be in (0, inf); leave it out for the default.")
        for name in (
            "num_perturbations",
            "num_input_samples",
            "num_input_perturbations",
            "curvature_products",
            "spectrum_samples",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1; leave it out for the default.")
        if self.mask_fraction is not None and not 0.0 < self.mask_fraction <= 1.0:
            raise ValueError(f"mask_fraction={self.mask_fraction}: must be in (0, 1], or None; 0.05 is common.")


class Layers:
    """Which trainable parameters make up which layer; groups are the whole network, then layer by layer.

    ``vectors`` names the layers without a matrix.

    Args:
        model: the module.
        per_layer: whether layers are wanted beside the whole network.
    """

    def __init__(self, model: nn.Module, per_layer: bool) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        layers: dict[str, list[int]] = {}
        for k, name in enumerate(self.parameters):
            layers.setdefault(layer_of(name), []).append(k)
        self.names = tuple(layers) if per_layer else ()
        device = next((p.device for p in self.parameters.values()), None)
        self.members = torch.zeros(1 + len(self.names), len(self.parameters), device=device)
        self.members[0] = 1
        for row, name in enumerate(self.names, start=1):
            self.members[row, layers[name]] = 1
        numels = [p.numel() for p in self.parameters.values()]
        self.sizes = [sum(numels), *(sum(numels[k] for k in layers[name]) for name in self.names)]
        axes = [p.dim() for p in self.parameters.values()]
        self.vectors = tuple(name for name in self.names if all(axes[k] < 2 for k in layers[name]))

    def stacked(self, total: Tensor, layers: Mapping[str, Tensor] | None) -> Tensor:
        """One Gram matrix for each group: [G, b, b]."""
        if not self.names or layers is None:
            return total.unsqueeze(0)
        return torch.stack([total, *(layers[name].to(total) for name in self.names)])


@dataclass
class Measurement:
    """The numbers of one batch, growing.

    Args:
        metrics: names of the metrics that are wanted.
        layers: of the model.
        options: how to measure.
        step: number of the training step.
        strict: raise what goes wrong, in place of noting it.
    """

    metrics: Sequence[str]
    layers: Layers
    options: Options
    step: int = 0
    strict: bool = False
    loss: float = math.nan
    batch_size: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    spectrum: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _numbers: dict[str, Tensor] = field(default_factory=dict)
    _plain: dict[str, float] = field(default_factory=dict)

    def wants(self, source: str) -> bool:
        """Whether a metric from that source is wanted."""
        return any(METRICS[name] == source for name in self.metrics)

    def put(self, name: str, values: Tensor) -> None:
        """Take in a metric: [G] for the whole network and its layers, or one number; nothing if it is not wanted."""
        if name in self.metrics:
            self._numbers[name] = values.detach().reshape(-1)

    def note(self, text: str) -> None:
        """Tell the reader of the numbers something."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def attempt(self, source: str) -> Iterator[None]:
        """Inside, what goes wrong is noted, and costs the metrics of that source alone."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:
            if self.strict:
                raise
            names = [name for name in self.metrics if METRICS[name] == source and name not in self._numbers]
            self.note(f"{', '.join(names)}: not measured, {type(error).__name__}: {error}")

    def from_gram(self, result: GramResult) -> None:
        """Everything that follows from the Gram matrix of the batch's gradients."""
        if len(result.weights) < 2:
            raise ValueError(
                "a batch of one sample: agreement between gradients needs two samples at least; measure larger "
                "batches, or only 'weight_norm' and the condition numbers."
            )
        self.batch_size = len(result.weights)
        grams = self.layers.stacked(result.weights, result.layers)
        if result.statistics == "batch":
            self.note("batch normalization: gradients are each sample's contribution to the batch gradient")
        groups = self.options.groups
        self.put("gradient_confusion", agreement.gradient_confusion(grams, groups))
        means = grams if groups is None else agreement.group_means(grams, groups)
        self.put("gradient_diversity", agreement.gradient_diversity(means))
        self.put("gradient_coherence", agreement.gradient_coherence(grams))
        if "relative_gradient_rank" in self.metrics:
            sizes = torch.tensor(self.layers.sizes[: len(grams)])
            self.put("relative_gradient_rank", agreement.relative_gradient_rank(grams, sizes))
        if "gradient_noise_scale" in self.metrics:
            noise = agreement.gradient_noise_scale(grams)
            # Where |G|^2 comes out negative the signal is lost in noise, and the scale is beyond what b samples show.
            self.put("gradient_noise_scale", torch.where(noise.norm_sq > 0, noise.value, noise.norm_sq * 0 + math.inf))
        self.put("gradient_norm", scales.gradient_norm(grams))
        self.put("fisher_trace", scales.empirical_fisher_trace(grams))

    def from_weights(self) -> None:
        """The norms of the weights."""
        norms_sq = scales.squared_norms(self.layers.parameters)
        self.put("weight_norm", (self.layers.members.to(norms_sq) @ norms_sq).sqrt())

    def from_gradient(self, gradient: Mapping[str, Tensor]) -> None:
        """What the batch gradient itself tells."""
        norms_sq = scales.squared_norms(gradient)
        self.put("gradient_norm", (self.layers.members.to(norms_sq) @ norms_sq).sqrt())

    def from_moves(self, gradient: BatchGradient, mask: RandomMask | None = None) -> None:
        """Condition number and agreement of the batch gradients at moved weights."""
        base, options = gradient(), self.options
        if options.perturbations == "batch_gradient":
            shifts = conditioning.batch_gradient_shifts(base, options.perturbation_size)
        elif options.perturbations == "sample_gradients":
            indices = range(min(options.num_perturbations, gradient.num_samples))
            samples = gradient.of_samples(indices)
            shifts = conditioning.sample_gradient_shifts(samples, options.perturbation_size, self.generator())
        else:
            shifts = conditioning.random_shifts(
                self.layers.parameters, options.num_perturbations, options.perturbation_size, self.generator()
            )
        changes = conditioning.gradient_changes(gradient, shifts, base, mask).summed(self.layers.members)
        self.put("weight_condition_number", changes.condition_number())
        self.put(
            "weight_gradient_cosine",
            weight_gradients.weight_gradient_cosine(changes.inner_products, changes.norms_sq, changes.base_norms_sq),
        )
        self.put(
            "weight_gradient_diversity",
            weight_gradients.weight_gradient_diversity(changes.norms_sq, changes.sum_norms_sq),
        )
        self.put(
            "weight_gradient_coherence",
            weight_gradients.weight_gradient_coherence(changes.inner_products, changes.norms_sq),
        )
        if "gradient_norm" not in self._numbers:
            self.from_gradient(base)
        if mask is not None:
            self.note(f"moved gradients were compared on {mask.size} coordinates")

    def from_inputs(self, gradient: BatchGradient) -> None:
        """The rank of the input gradients."""
        rows = torch.cat([g.flatten(1) for g in gradient.of_inputs()], 1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.put("relative_input_gradient_rank", agreement.relative_gradient_rank(rows @ rows.T, rows.shape[1]))

    def from_input_moves(self, gradient: BatchGradient) -> None:
        """The condition number with respect to the inputs; the gradient must freeze batch statistics."""
        num = min(self.options.num_input_perturbations, gradient.num_samples)
        shifts = conditioning.input_gradient_shifts(
            gradient.of_inputs(), num, self.options.perturbation_size, self.generator()
        )
        num_samples = min(self.options.num_input_samples, gradient.num_samples)
        members = self.layers.members
        self.put("input_condition_number", conditioning.input_condition_number(gradient, shifts, num_samples, members))

    def from_hessian(self, gradient: BatchGradient) -> None:
        """The ends of the Hessian's spectrum."""
        generator = self.generator()

        def work(product: Callable[[Tensor], Tensor], h: Tensor) -> None:
            start = torch.randn(h.shape, generator=generator).to(h)
            ends = scales.extreme_eigenvalues(
                product,
                start,
                tolerance=self.options.curvature_tolerance,
                max_products=self.options.curvature_products,
            )
            weights = scales.squared_norms(self.layers.parameters).sum().sqrt()
            self.put("weight_condition_number_exact", ends.norm * weights / torch.linalg.vector_norm(h))
            self.put("top_curvature", torch.tensor(ends.largest))
            if not ends.converged:
                self.note(f"curvature: residual {ends.residual:.3g} after {ends.num_products} products, not converged")

        gradient.with_hessian(work)

    def from_spectrum(self, model: nn.Module, inputs: Any, select: Callable[[Any], Tensor] | None) -> None:
        """The Fisher matrix's and the data's spectrum."""
        spectra = batch_spectra(
            model,
            inputs,
            num_samples=self.options.spectrum_samples,
            variant=self.options.spectrum_variant,
            select=select,
        )
        self._plain.update(spectra.values)
        self.spectrum = spectra.eigenvalues
        for text in spectra.notes:
            self.note(text)

    def state(self) -> _State:
        """The numbers so far, for another process."""
        numbers = {name: values.cpu() for name, values in self._numbers.items()}
        return numbers, self._plain, self.spectrum, self.notes

    def load_state(self, state: _State) -> None:
        """Take over another process's numbers."""
        self._numbers, self._plain, self.spectrum, self.notes = state

    def generator(self) -> torch.Generator:
        """Of this step's draws."""
        return torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)

    def numbers(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """All of it as floats, with one transfer from the device.

        Returns:
            Metric -> value for the whole network, nan where a metric is wanted and missing; metric -> layer -> value.
        """
        names = list(self._numbers)
        flat: list[float] = []
        if names:
            wide = torch.promote_types(
                torch.float32, max((self._numbers[n].dtype for n in names), key=lambda d: d.itemsize)
            )
            device = next(iter(self._numbers.values())).device
            flat = torch.cat([self._numbers[name].to(device, wide) for name in names]).tolist()
        values: dict[str, float] = {}
        layers: dict[str, dict[str, float]] = {}
        for name in names:
            size = len(self._numbers[name])
            own, flat = flat[:size], flat[size:]
            values[name] = own[0]
            if size > 1:
                layers[name] = dict(zip(self.layers.names, own[1:], strict=True))
        values.update(self._plain)
        missing = [name for name in self.metrics if name != "spectrum"]
        missing += SPECTRUM_VALUES if "spectrum" in self.metrics else []
        ordered = {name: values.get(name, math.nan) for name in missing}
        if ordered.get("gradient_noise_scale") == math.inf:
            self.note("gradient_noise_scale: the mean gradient is lost in the noise of a batch of this size")
        return ordered, layers
