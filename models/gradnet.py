"""GradNet: a better classifier around a trained network whose weights stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgeom_optim.geometry.heads import LossFunction
from torchgeom_optim.geometry.per_sample import Batch
from torchgeom_optim.models.gated import GatedNetwork
from torchgeom_optim.models.gradnet_cache import RecordCache, fingerprint
from torchgeom_optim.models.gradnet_data import (
    base_outputs,
    check_loss,
    check_outputs,
    first_samples,
    joined,
    length_of,
    moved,
    pair,
)
from torchgeom_optim.models.gradnet_files import layouts_as_text, layouts_from_text, read_tensors, write_tensors
from torchgeom_optim.models.gradnet_fit import DEFAULT_OPTIMIZERS, EpochRow, FitSettings, OptimizerFactory, fit_head
from torchgeom_optim.models.gradnet_paper import CandidateNetwork
from torchgeom_optim.models.tangent import LinearisedNetwork

__all__ = ["GradNet"]

Method = Literal["gated", "linearised", "paper"]


class GradNet(nn.Module):
    """A classifier on the tangent space of a trained network.

    The network (the base) is only ever evaluated, as in evaluation mode: its weights, buffers and modes stay bit for
    bit what they are, ``train()`` does not reach it, and frozen parameters are no obstacle. Three methods:

    - ``"gated"`` (default, the most accurate): a free copy of the weights in the base's own gates, and a shallow ReLU
      block on its last features (:class:`GatedNetwork`). Piecewise linear bases.
    - ``"linearised"``: f(x) + J(x) dw, convex in what is trained (:class:`LinearisedNetwork`). Any base.
    - ``"paper"``: a shallow network on sparsified per-sample gradients for candidate labels, with the paper's settings
      as defaults (:class:`CandidateNetwork`). Any base.

    Where the base may be changed, training it on with the same data is cheaper and as good or better. GradNet is for
    weights that are frozen, certified, shared by several tasks or served behind an interface; against a head on the
    frozen last features, which costs less, it pays where the base was stopped early. Source: Daroczy et al., "GradNet";
    the first two methods are ours.

    Args:
        model: the base, with logits [N, C].
        num_classes: C; taken from the outputs for ``sample`` by default.
        sample: inputs for calibration, some 150 to 500 (statistics, Fisher matrix); by default :meth:`fit` takes the
            first of its data. "gated" needs none.
        method: one of the three.
        loss_fn: any loss of outputs and labels that is a sum or a mean over samples; cross-entropy by default.
        seed: of all that is drawn: first weights, candidate labels, the order of cached data.
        **settings: of the method: ``block``; ``damping``; or those of :class:`CandidateNetwork`.

    Attributes:
        base: the base.
        head: what is trained; None until it is calibrated.
        history: a row for each epoch of the last fit.

    Raises:
        ValueError: a setting out of range, a base without parameters, outputs that are no logits [N, num_classes].
        TypeError: an unknown setting.
        UnsupportedBaseError: "gated", and a base that is not piecewise linear; its message names the layer.

    Example:
        >>> base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> data = [(x, (x[:, 0] > 0).long())]
        >>> gradnet = GradNet(base, num_classes=2).fit(data, epochs=2)
        >>> gradnet(x).shape, gradnet.predict(x).shape
        (torch.Size([64, 2]), torch.Size([64]))
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int | None = None,
        *,
        sample: Any = None,
        method: Method = "gated",
        loss_fn: LossFunction | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: must be one of {', '.join(map(repr, get_args(Method)))}.")
        if num_classes is None and sample is None:
            raise ValueError("neither num_classes nor a sample is given: one of them is needed. Pass num_classes=10.")
        if next((p for p in model.parameters() if p.is_floating_point()), None) is None:
            raise ValueError(
                f"{type(model).__name__} has no parameters: a tangent space needs some. Give a trained one."
            )
        self.base = model
        self.method: Method = method
        self.loss_fn, self.seed, self.settings = loss_fn, seed, settings
        self.head: nn.Module | None = None
        self.history: list[EpochRow] = []
        if sample is not None:
            outputs = base_outputs(model, first_samples(self._moved(sample), 2))
            num_classes = outputs.shape[1] if num_classes is None else num_classes
            check_outputs(outputs, num_classes)
        assert num_classes is not None
        if not num_classes >= 2:
            raise ValueError(f"num_classes={num_classes}: must be at least 2, the classes of the labels.")
        self.num_classes = num_classes
        if method == "gated":
            self.head = GatedNetwork(model, num_classes, generator=self._generator(), **settings)
        elif method == "paper":  # refuses now what is out of range
            CandidateNetwork(model, num_classes, loss_fn=loss_fn, generator=self._generator(), **settings)
        elif unknown := sorted(settings.keys() - {"damping"}):
            raise TypeError(f"settings {unknown}: method='linearised' knows damping alone. Leave them out.")
        if sample is not None and self.head is None:
            self.calibrate(sample)
        self.train(False)

    def train(self, mode: bool = True) -> GradNet:
        """Set the mode of what is trained; the base keeps its own.

        Args:
            mode: training or evaluation.

        Returns:
            Itself.
        """
        self.training = mode
        if self.head is not None:
            self.head.train(mode)
        return self

    def calibrate(self, sample: Any) -> GradNet:
        """Set up what is trained from inputs, anew: :meth:`fit` does it with the first of its data if need be.

        Args:
            sample: some 150 to 500 inputs; labels are not needed.

        Returns:
            Itself.

        Raises:
            ValueError: the base's outputs are no finite logits [N, num_classes].
        """
        sample = self._moved(sample)
        check_outputs(base_outputs(self.base, first_samples(sample, 2)), self.num_classes)
        if self.method == "linearised":
            self.head = LinearisedNetwork.calibrated(self.base, sample, **self.settings)
        elif self.method == "paper":
            generator = self._generator()
            head = CandidateNetwork(
                self.base, self.num_classes, loss_fn=self.loss_fn, generator=generator, **self.settings
            )
            head.calibrate(sample, generator)
            self.head = head
        return self.train(False)

    def fit(
        self,
        data: Iterable[Any] | RecordCache,
        epochs: int,
        *,
        optimizer: OptimizerFactory | None = None,
        schedule: Literal["linear", "constant"] = "linear",
        validation: Iterable[Any] | None = None,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        progress: bool | None = None,
        missing_classes: bool = False,
        batch_size: int = 50,
        calibration_samples: int = 256,
    ) -> GradNet:
        """Train the head; the base stays as it is.

        An interrupted fit (Ctrl-C) leaves the head as it was before: with ``checkpoint`` the same call goes on after
        the last whole epoch, and ends where it would have ended; without, nothing of it is left.

        Args:
            data: mini-batches (inputs, labels) that can be gone through again, such as a DataLoader, with random
                transforms if you like; or what :meth:`cache` returned.
            epochs: passes over it.
            optimizer: from the parameters to their optimizer, such as ``lambda p: Adam(p, 1e-3)``; that is the default
                for "gated", Adam with 3e-3 for "linearised", SGD with 0.05 and momentum for "paper".
            schedule: "linear" decay of the learning rate to 0, or "constant".
            validation: mini-batches for the accuracy after each epoch, in ``history``.
            patience: stop early, see :class:`FitSettings`; needs ``validation``.
            checkpoint: file to write after each epoch and, if it is there, to go on from.
            progress: show a bar; by default where there is a terminal.
            missing_classes: accept data in which declared classes do not occur.
            batch_size: of cached data.
            calibration_samples: of the data, where nothing has been calibrated yet.

        Returns:
            Itself, in evaluation mode.

        Raises:
            ValueError: bad settings, labels, features or losses; the head is then what it was.
            NonFiniteLossError: training diverged; likewise.
            TypeError: data that are no mini-batches, or can be gone through only once; likewise.
            BaseException: whatever the base and the loader raise, and interruptions; likewise.
        """
        make = optimizer or DEFAULT_OPTIMIZERS[self.method]
        if patience is not None and validation is None:
            raise ValueError(
                "patience without validation: early stopping needs data set aside. Pass validation=loader."
            )
        if isinstance(data, Tensor):
            raise TypeError(
                "data is a tensor: mini-batches (inputs, labels) are needed. Try list(zip(x.split(64), y.split(64)))."
            )
        if isinstance(data, Iterator):
            raise TypeError(
                f"data is {type(data).__name__}: mini-batches that can be gone through again are needed. Try list(...)."
            )
        identity = fingerprint(
            self.base, self.method, self.num_classes, self.seed, self._settings_text(), epochs, schedule
        )
        settings = FitSettings(epochs, make, schedule, patience, checkpoint, progress, missing_classes, identity)
        before = self.head
        try:
            if isinstance(data, RecordCache):
                self._check_owner(data)
            else:
                self._look_at(data, calibration_samples)
            head = self._ready()
            generator = self._generator(1)
            num_batches = -(-len(data) // batch_size) if isinstance(data, RecordCache) else length_of(data)

            def batches() -> Iterator[tuple[Mapping[str, Any], Tensor]]:
                if isinstance(data, RecordCache):
                    return self._cached_batches(data, batch_size, generator)
                return self._fresh_batches(data, generator)

            validate = None if validation is None else lambda: self.accuracy(validation)
            self.history = fit_head(
                head, batches, self._loss, self.num_classes, settings, validate, generator, num_batches
            )
        except BaseException:  # whatever a loader raises, and interruptions
            self.head = before
            raise
        return self

    def cache(self, data: Iterable[Any], folder: str | Path | None = None) -> RecordCache:
        """What the base computes on a data set, kept for :meth:`fit`: later epochs then cost no pass of the base.

        Gates for "gated"; layer inputs and gates for "linearised"; for "paper" the features of all candidate labels, C
        times the size of the base for each sample.

        Args:
            data: mini-batches (inputs, labels), gone through once; random transforms are frozen as they are drawn.
            folder: for memory-mapped files; None for memory.

        Returns:
            The cache, good for this base and these settings.

        Raises:
            RuntimeError: nothing is calibrated yet.
            TypeError: the base takes several inputs.
        """
        head = self._ready()

        def records() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for inputs, targets in map(pair, data):
                with torch.no_grad():
                    record = head.record(self._moved(inputs))
                if wrong := [name for name, value in record.items() if not isinstance(value, Tensor)]:
                    raise TypeError(
                        f"records hold {wrong} of several tensors: a cache takes one. Train without a cache."
                    )
                yield record, targets

        return RecordCache.build(records(), self._cache_owner(), folder)

    def forward(self, inputs: Any) -> Tensor:
        """Logits [N, C] for inputs; for "paper" summed over the candidate labels."""
        logits: Tensor = self._ready()(inputs)
        return logits

    @torch.no_grad()
    def predict_proba(self, inputs: Any) -> Tensor:
        """Probabilities.

        Args:
            inputs: of N samples.

        Returns:
            [N, C]; softmax of the logits, for "paper" of their mean over the candidate labels.
        """
        head = self._ready()
        mode = head.training
        head.eval()
        try:
            logits = self(self._moved(inputs))
        finally:
            head.train(mode)
        return torch.softmax(logits / self.num_classes if self.method == "paper" else logits, 1)

    def predict(self, inputs: Any) -> Tensor:
        """The most probable class of each sample, [N]."""
        return self.predict_proba(inputs).argmax(1)

    def accuracy(self, data: Iterable[Any]) -> float:
        """Share of samples that are predicted right.

        Args:
            data: mini-batches (inputs, labels).

        Returns:
            In [0, 1].

        Raises:
            ValueError: there is no sample.
        """
        right, count = 0, 0
        for inputs, targets in map(pair, data):
            predicted = self.predict(inputs)
            right += int((predicted == targets.to(predicted.device)).sum())
            count += len(targets)
        if not count:
            raise ValueError("data gave no sample: at least one is needed. Is the loader empty?")
        return right / count

    def save(self, path: str | Path, *, with_base: bool = False) -> None:
        """Write what is trained to a file.

        Args:
            path: ``*.safetensors`` (extra ``files``), or any other name for torch's own format.
            with_base: the base's parameters and buffers too.
        """
        tensors = {f"head.{name}": t for name, t in self._ready().state_dict().items()}
        if with_base:
            tensors |= {f"base.{name}": t for name, t in self.base.state_dict().items()}
        about = {
            "method": self.method,
            "num_classes": self.num_classes,
            "seed": self.seed,
            "settings": self.settings,
            "base": fingerprint(self.base),
        }
        if isinstance(self.head, LinearisedNetwork):
            about["layouts"] = layouts_as_text(self.head.layouts)
        write_tensors(Path(path), tensors, json.dumps(about))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, *, loss_fn: LossFunction | None = None) -> GradNet:
        """Read a file of :meth:`save`.

        Args:
            path: the file.
            model: the base; where the file has the base's weights they are put into it.
            loss_fn: as it was, which a file cannot hold.

        Returns:
            The GradNet, in evaluation mode.

        Raises:
            ValueError: the file is of another base.
        """
        tensors, text = read_tensors(Path(path))
        about = json.loads(text)
        of_base = {name[5:]: t for name, t in tensors.items() if name.startswith("base.")}
        if of_base:
            model.load_state_dict(of_base)
        if fingerprint(model) != about["base"]:
            raise ValueError(
                f"{Path(path).name} was trained around another base: weights and buffers must be the same. Give that "
                "network, or save with with_base=True."
            )
        told = {key: about[key] for key in ("num_classes", "method", "seed")}
        gradnet = cls(model, loss_fn=loss_fn, **told, **about["settings"])
        of_head = {name[5:]: t for name, t in tensors.items() if name.startswith("head.")}
        if gradnet.method == "paper":
            gradnet.head = CandidateNetwork(model, gradnet.num_classes, loss_fn=loss_fn, **gradnet.settings)
        elif gradnet.method == "linearised":
            gradnet.head = LinearisedNetwork(model, *layouts_from_text(about["layouts"], of_head))
        gradnet._ready().load_state_dict(of_head)
        return gradnet.train(False)

    def _ready(self) -> Any:
        if self.head is None:
            raise RuntimeError(
                f"method={self.method!r} is not calibrated: inputs are needed for that. Call fit, or calibrate(sample)."
            )
        return self.head

    def _generator(self, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(2 * self.seed + stream)

    def _loss(self, record: Mapping[str, Any], targets: Tensor) -> Tensor:
        logits = self._ready().logits(record)
        loss = F.cross_entropy(logits, targets) if self.loss_fn is None else self.loss_fn(logits, targets)
        return loss.mean() if loss.dim() else loss

    def _fresh_batches(
        self, data: Iterable[Any], generator: torch.Generator
    ) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        head = self._ready()
        for inputs, targets in map(pair, data):
            inputs = self._moved(inputs)
            drawn = isinstance(head, CandidateNetwork)
            record = head.training_record(inputs, generator) if drawn else head.record(inputs)
            yield record, targets.to(self._device)

    def _cached_batches(
        self, cache: RecordCache, size: int, generator: torch.Generator
    ) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        head = self._ready()
        for record, targets in cache.batches(size, generator, self._device):
            yield head.training_view(record, generator) if isinstance(head, CandidateNetwork) else record, targets

    def _look_at(self, data: Iterable[Any], samples: int) -> None:
        """Check the first of the data, and calibrate on it if need be."""
        first: list[Any] = []
        for inputs, targets in map(pair, data):
            if not first:
                outputs = base_outputs(self.base, self._moved(inputs))
                check_outputs(outputs, self.num_classes)
                if self.loss_fn is not None:
                    check_loss(self.loss_fn, outputs, targets.to(outputs.device))
            first.append(inputs)
            if self.head is not None or sum(Batch(part).num_samples for part in first) >= samples:
                break
        if self.head is None and first:
            self.calibrate(first_samples(joined(first), samples))

    @property
    def _device(self) -> torch.device:
        return next(self.base.parameters()).device

    def _moved(self, inputs: Any) -> Any:
        return moved(inputs, self._device)

    def _cache_owner(self) -> str:
        head = self._ready()
        calibration = [t for name, t in head.named_buffers() if not name.startswith("norm")]
        marks = [float(t.double().sum()) for t in calibration] if self.method == "paper" else []
        return fingerprint(self.base, self.method, marks, self._settings_text() if self.method == "paper" else "")

    def _check_owner(self, cache: RecordCache) -> None:
        if cache.owner != self._cache_owner():
            raise ValueError(
                "the cache belongs to another base, method or calibration: its records are not this GradNet's. Build "
                "it anew with cache(...)."
            )

    def _settings_text(self) -> str:
        return json.dumps(self.settings, sort_keys=True, default=repr)
