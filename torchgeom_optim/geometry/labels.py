"""Labels drawn from a model's own predictions, one per sample and position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.mini_batches import MiniBatches
from torchgeom_optim.geometry.parameter_vectors import ParameterVectors
from torchgeom_optim.geometry.sample_function import SampleFunction

__all__ = ["with_drawn_labels"]

_SAMPLES_AT_ONCE = 256


def with_drawn_labels(
    model: nn.Module,
    data: Any,
    generator: torch.Generator,
    *,
    dtype: torch.dtype | None = None,
    select: Callable[[Any], Tensor] | None = None,
    class_dim: int = -1,
    keep_modes: bool = False,
    **unused: Any,
) -> tuple[Any, Tensor | None]:
    """Data with labels drawn from p = softmax(outputs) in the place of whatever targets come with it.

    Args:
        model: evaluated as :class:`Jacobian` evaluates it, and left as it was.
        data: a tensor, tuple or mapping, or mini-batches, as for :class:`Jacobian`.
        generator: of the labels; on any device.
        dtype: of the evaluation.
        select: picks the outputs out of what the model returns.
        class_dim: axis of the classes in the outputs.
        keep_modes: leave the modules in their modes.
        **unused: the Jacobian's other options.

    Returns:
        The data, and the labels [N, ...] beside it where it is a whole; else mini-batches (inputs, labels), made from
        the data's own whenever they are gone through, and None.

    Raises:
        ValueError: the outputs have no class axis, or are not finite.
    """
    vectors = ParameterVectors(model, _any_parameter(model), dtype)
    shape: list[int] = []

    def log_probabilities(outputs: Tensor, _: Tensor | None) -> Tensor:
        if outputs.dim() < 2 or not -outputs.dim() <= class_dim < outputs.dim() or class_dim % outputs.dim() == 0:
            raise ValueError(
                f"outputs of shape {list(outputs.shape)} have no class axis {class_dim}: labels are drawn from logits "
                "[N, K], or further axes with class_dim naming that of the K classes. Try another class_dim."
            )
        log_p = torch.log_softmax(outputs, class_dim).movedim(class_dim, -1)
        shape[:] = log_p.shape[1:]
        return log_p.reshape(len(outputs), -1)

    function = SampleFunction(
        model,
        lambda: MiniBatches(data, None, False, vectors.device, dtype),
        vectors,
        log_probabilities,
        select,
        keep_modes,
    )
    drawn = []
    for batch in function.parts(_SAMPLES_AT_ONCE):
        with function.private(), torch.no_grad():
            log_p = function.on(batch)({}, torch.Tensor.detach)
        p = log_p.reshape(-1, shape[-1]).exp().to(generator.device)
        if not bool(torch.isfinite(p).all()):
            raise ValueError(
                "predicted probabilities are not finite: labels cannot be drawn. Look for nan or huge numbers in the "
                "weights and the data."
            )
        drawn.append(torch.multinomial(p, 1, generator=generator).reshape(batch.size, *shape[:-1]))
    labels = torch.cat(drawn).to(vectors.device)
    if isinstance(data, (Tensor, tuple, Mapping)):
        return data, labels
    return _Labelled(data, labels), None


class _Labelled:
    """Mini-batches whose targets are replaced."""

    def __init__(self, batches: Iterable[Any], labels: Tensor) -> None:
        self._batches, self._labels = batches, labels

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        start = 0
        for item in self._batches:
            inputs = item[0] if isinstance(item, (tuple, list)) else item
            one = inputs
            while not isinstance(one, Tensor):  # any tensor of the inputs tells how many samples there are
                one = next(iter(one.values())) if isinstance(one, Mapping) else one[0]
            yield inputs, self._labels[start : start + len(one)]
            start += len(one)


def _any_parameter(model: nn.Module) -> list[str] | None:
    """One name, so that a model whose parameters are all frozen can be evaluated too."""
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    return names[:1] or None
