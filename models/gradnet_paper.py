r"""The paper's GradNet: a shallow network on sparsified per-sample gradients for candidate labels.

    h(x, c) = W concat_l relu(W_l n(grad_l loss(x, c)) + b_l) + b,       logits(x) = sum_c h(x, c)

one hidden block for each layer l of the network. In training c is drawn uniformly at random and the target is the true
label; the prediction is the argmax of the logits.

Source: Daroczy et al., "GradNet", Algorithm 1, Fig. 3 and the appendix (blocks 5 + 100 + 25, 85th percentile, scale
norm and then power norm 1/2, no regularization, SGD). What the paper leaves out is set here: no biases among the
features, hidden units are ReLUs, blocks are concatenated; statistics are those of a few hundred samples with a random
label each, and what lies beyond their range counts as its end (:func:`normalize`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from torchgeom_optim.geometry.heads import LossFunction
from torchgeom_optim.geometry.per_sample import Batch
from torchgeom_optim.models.gradnet_features import (
    CandidateGradients,
    Normalization,
    above_percentile,
    hidden_units,
    important_coordinates,
    normalize,
    statistics_of,
)

__all__ = ["CandidateNetwork"]

_STATISTICS = ("minimum", "maximum", "mean", "deviation")
PAPER_UNITS = (5, 100, 25)


class CandidateNetwork(nn.Module):
    """The shallow network and its features.

    Args:
        model: the network whose gradients are the features; it stays as it is.
        num_classes: C.
        hidden: units of each layer's block, or of all together. By default the paper's 5 + 100 + 25 where the network
            has three layers of weights, else 130 in all.
        percentile: q in [0, 100), see :func:`above_percentile`.
        normalization: see :func:`normalize`.
        power: exponent of the power norm.
        label_share: keep only the most important coordinates of each label, this share of them; None for all.
        dropout: of hidden units, in [0, 1).
        batch_norm: of hidden units, before the ReLU.
        loss_fn: of the gradients; cross-entropy by default.
        memory_limit: bytes of features held at a time when predicting.
        generator: of the first weights.

    Raises:
        ValueError: a setting is out of range, or the number of blocks is not that of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        hidden: int | Sequence[int] | None = None,
        percentile: float = 85.0,
        normalization: Normalization = "scale_power",
        power: float = 0.5,
        label_share: float | None = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
        loss_fn: LossFunction | None = None,
        memory_limit: int = 2**28,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: must be in [0, 1); 0 is the paper's best, 0.5 is common.")
        if not memory_limit > 0:
            raise ValueError(f"memory_limit={memory_limit}: must be positive, in bytes; 2**28 is the default.")
        self._gradients = CandidateGradients(model, loss_fn)
        sizes = self._gradients.sizes
        if hidden is None:
            hidden = PAPER_UNITS if len(sizes) == len(PAPER_UNITS) else sum(PAPER_UNITS)
        units = hidden_units(sizes, hidden) if isinstance(hidden, int) else list(hidden)
        if len(units) != len(sizes) or not all(count >= 1 for count in units):
            raise ValueError(
                f"hidden={units}: one positive number for each of the layers {self._gradients.names} is needed, or one "
                "number for all together, such as 130."
            )
        self.num_classes, self.percentile, self.power = num_classes, percentile, power
        self.normalization: Normalization = normalization
        self._memory_limit = memory_limit
        like = next(p for p in model.parameters() if p.is_floating_point())
        nothing = torch.zeros(1, 1)
        above_percentile(nothing, percentile)  # refuses what is out of range
        normalize(nothing, nothing, dict.fromkeys(_STATISTICS, nothing), normalization, power)
        self.label_share = label_share
        for i, size in enumerate(sizes):
            for key in _STATISTICS:
                self.register_buffer(f"{key}{i}", like.new_zeros(size))
            if label_share is not None:
                self.register_buffer(f"labels{i}", torch.ones(num_classes, size, dtype=torch.bool, device=like.device))
        self.blocks = nn.ModuleList(_linear(p, m) for p, m in zip(sizes, units, strict=True))
        self.norm = nn.BatchNorm1d(sum(units)) if batch_norm else nn.Identity()
        self.dropout = dropout
        self.output = _linear(sum(units), num_classes)
        for layer, share in [*((b, 1 - percentile / 100) for b in self.blocks), (self.output, 1.0)]:
            assert isinstance(layer, nn.Linear)
            bound = (6 / max(1.0, share * layer.in_features)) ** 0.5  # He et al., of the entries that are kept
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
        self.to(like)

    @torch.no_grad()
    def calibrate(self, inputs: Any, generator: torch.Generator) -> None:
        """Take the statistics of the normalisation, and the labels' coordinates, on some samples.

        Args:
            inputs: of M samples.
            generator: of a candidate label for each.
        """
        num_samples = Batch(inputs).num_samples
        labels = torch.randint(self.num_classes, (num_samples,), generator=generator).to(self.output.weight.device)
        gradients, _ = self._gradients(inputs, labels[:, None])
        for i, g in enumerate(gradients):
            for key, value in statistics_of(g[:, 0]).items():
                getattr(self, f"{key}{i}").copy_(value)
            if self.label_share is not None:
                chosen = important_coordinates(g[:, 0], labels, self.num_classes, self.label_share)
                getattr(self, f"labels{i}").copy_(chosen)

    @torch.no_grad()
    def record(self, inputs: Any, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The features.

        Args:
            inputs: of N samples.
            labels: K candidates of each, [N, K]; all C by default.

        Returns:
            "features", [N, K, P] with the layers in a row.
        """
        if labels is None:
            every = torch.arange(self.num_classes, device=self.output.weight.device)
            labels = every.expand(Batch(inputs).num_samples, -1)
        gradients, _ = self._gradients(inputs, labels)
        parts = []
        for i, g in enumerate(gradients):
            if self.label_share is not None:
                g = g * getattr(self, f"labels{i}")[labels]
            statistics = {key: getattr(self, f"{key}{i}") for key in _STATISTICS}
            parts.append(normalize(g, above_percentile(g, self.percentile), statistics, self.normalization, self.power))
        return {"features": torch.cat(parts, 2)}

    def training_record(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The features for one label per sample, drawn at random, and which hidden units dropout keeps."""
        shape = (Batch(inputs).num_samples, 1)
        labels = torch.randint(self.num_classes, shape, generator=generator)
        return self.with_dropout(self.record(inputs, labels.to(self.output.weight.device)), generator)

    def training_view(self, record: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The same of a record that has all labels."""
        features = record["features"]
        drawn = torch.randint(features.shape[1], (len(features),), generator=generator).to(features.device)
        chosen = features[torch.arange(len(features), device=features.device), drawn][:, None]
        return self.with_dropout({"features": chosen}, generator)

    def with_dropout(self, record: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The record, with the hidden units that dropout keeps."""
        if not self.dropout:
            return record
        features = record["features"]
        drawn = torch.rand(len(features), self.output.in_features, generator=generator)
        return {**record, "kept": (drawn >= self.dropout).to(features) / (1 - self.dropout)}

    def logits(self, record: Mapping[str, Tensor]) -> Tensor:
        """Sum over the candidate labels of h, [N, C]; with dropout where the record says so."""
        features = record["features"]
        parts = torch.split(features.flatten(0, 1), self._gradients.sizes, 1)
        hidden = torch.cat([block(part) for block, part in zip(self.blocks, parts, strict=True)], 1)
        hidden = torch.relu(self.norm(hidden))
        if "kept" in record:
            hidden = hidden * record["kept"]
        result: Tensor = self.output(hidden).view(*features.shape[:2], -1).sum(1)
        return result

    def forward(self, inputs: Any) -> Tensor:
        """Logits [N, C] over all candidate labels, a few samples at a time."""
        batch = Batch(inputs)
        bytes_each = 4 * self.num_classes * sum(self._gradients.sizes) * self.output.weight.element_size()
        size = max(1, self._memory_limit // bytes_each)
        pieces = [
            self.logits(self.record(batch.map(lambda x, i=i: x[i : i + size]).inputs))  # type: ignore[misc]
            for i in range(0, batch.num_samples, size)
        ]
        return torch.cat(pieces)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Without weights yet: the layer's own would be drawn from the global generator."""
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    return layer
