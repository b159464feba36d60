r"""What several processes have seen of a layer during a step, as one call.

With N_k samples in process k, s_k positions of a weight per sample, and means over what each has seen,

    N = mean_k N_k,    s = \sum_k N_k s_k / \sum_k N_k,    E[x], E[(x - E[x])^2], E[g^2] over the samples of all

so that whatever is computed from a layer's calls comes out as if one process had seen all of them. N is what undoes
the division of the loss by the number of samples: data parallelism averages the gradients of the processes, which is
the mean over all samples if process k weighs its loss by N_k / N (equal batches: by 1). As with gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from torchgeom_optim.geometry.moments import Moments
from torchgeom_optim.optimizers.distributed import Ranks
from torchgeom_optim.optimizers.layers import AffineLayer, SeenCall

__all__ = ["Quantity", "Wanted", "calls_of_all_ranks"]

Quantity = tuple[Tensor, float]  # a mean, and the number of observations that it is over


class Wanted(NamedTuple):
    """A layer, and what is to be known of it.

    Attributes:
        layer: with the calls of this process, or none.
        moments: whether its inputs' moments are wanted; likewise the next. The same in all processes.
        output_grads: whether E[g^2] is, as autograd scaled g.
        past_mean: a vector near the inputs' mean, equal in all processes, if one is known: it keeps the digits of
            the variance, which otherwise take a second collective.
        extras: other means, of the same shapes in all processes.
    """

    layer: AffineLayer
    moments: bool
    output_grads: bool
    past_mean: Tensor | None
    extras: list[Quantity]

    @property
    def dtype(self) -> torch.dtype:
        """Of all means."""
        return torch.promote_types(self.layer.weight.dtype, torch.float32)


def calls_of_all_ranks(ranks: Ranks, wanted: Sequence[Wanted]) -> list[tuple[SeenCall, list[Tensor]]]:
    """Take the means over all processes.

    Args:
        ranks: the processes.
        wanted: of the same layers, in the same order, in all of them; at least one.

    Returns:
        For each layer a call, whose counts are tensors so that nothing waits for the device, and the extra means. Where
        no process has seen anything N is 0 and the rest means nothing.

    Raises:
        RuntimeError: another process has failed, or trains another model.
    """
    layout = [(*row.layer.weight.shape, row.moments, row.output_grads, len(row.extras)) for row in wanted]
    ranks.require_agreement(layout, wanted[0].layer.weight.device)
    references = _references(ranks, wanted)
    rows = [_means_of_calls(row, reference) for row, reference in zip(wanted, references, strict=True)]
    means, counts = zip(*chain.from_iterable(rows), strict=True)
    found = iter(ranks.means(means, counts))
    calls = [_call_from_means(row, reference, found) for row, reference in zip(wanted, references, strict=True)]
    return calls


def _references(ranks: Ranks, wanted: Sequence[Wanted]) -> list[Tensor | None]:
    """What the moments are taken about: the past mean, or the batch's own the first time."""
    references = [row.past_mean if row.past_mean is None else row.past_mean.to(row.dtype) for row in wanted]
    new = [k for k, row in enumerate(wanted) if row.moments and references[k] is None]
    means = [_moments(wanted[k]) for k in new]
    for k, mean in zip(new, ranks.means([m.mean for m in means], [m.count for m in means]), strict=True):
        references[k] = mean
    return [reference if row.moments else None for row, reference in zip(wanted, references, strict=True)]


def _moments(row: Wanted) -> Moments:
    layer = row.layer
    if layer.calls:
        count, mean, variance = layer.batch_moments()
        return Moments(count, mean.to(row.dtype), variance.to(row.dtype))
    zeros = torch.zeros(layer.num_inputs, dtype=row.dtype, device=layer.weight.device)
    return Moments(0, zeros, zeros)


def _means_of_calls(row: Wanted, reference: Tensor | None) -> list[Quantity]:
    layer, calls = row.layer, row.layer.calls
    scalars = torch.tensor([float(layer.num_samples()), float(layer.sharing()) if calls else 0.0], dtype=row.dtype)
    scalars = scalars.to(layer.weight.device)
    means: list[Quantity] = [(scalars[0], 1.0)]
    if layer.spatial_axes:
        means.append((scalars[1], float(sum(call.num_samples for call in calls))))
    if reference is not None:
        count, mean, variance = _moments(row)
        shift = mean - reference
        means += [(shift, count), (torch.addcmul(variance, shift, shift), count)]
    if row.output_grads:
        if calls:
            applications = float(sum(call.num_applications for call in calls))
            means.append((layer.output_grad_sq(mean_reduction=False).to(row.dtype), applications))
        else:
            means.append((torch.zeros(layer.num_units, dtype=row.dtype, device=layer.weight.device), 0.0))
    return means + row.extras


def _call_from_means(row: Wanted, reference: Tensor | None, means: Iterator[Tensor]) -> tuple[SeenCall, list[Tensor]]:
    """The reverse; takes as many means as that has made."""
    moments = output_grad_sq = None
    num_samples = next(means)
    num_applications = num_samples * next(means) if row.layer.spatial_axes else num_samples
    if reference is not None:
        shift, square = next(means), next(means)
        variance = torch.addcmul(square, shift, shift, value=-1).clamp_(min=0)
        moments = Moments(0, reference + shift, variance)  # their number is no longer needed
    if row.output_grads:
        output_grad_sq = next(means)
    call = SeenCall(moments, output_grad_sq, num_samples, num_applications, -1)
    return call, [next(means) for _ in row.extras]
