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
_BothMoments = tuple[Moments | None, Moments | None]  # of inputs and outputs, where they are wanted
_References = tuple[Tensor | None, Tensor | None]


class Wanted(NamedTuple):
    """A layer, and what is to be known of it.

    Attributes:
        layer: with the calls of this process, or none.
        moments: whether its inputs' moments are wanted; likewise the next. The same in all processes.
        output_grads: whether E[g^2] is, as autograd scaled g.
        output_moments: whether its outputs' moments are.
        past_mean: a vector near the inputs' mean, equal in all processes, if one is known: it keeps the digits of
            the variance, which otherwise take a second collective.
        past_output_mean: the same of the outputs.
        extras: other means, of the same shapes in all processes.
    """

    layer: AffineLayer
    moments: bool
    output_grads: bool
    output_moments: bool
    past_mean: Tensor | None
    past_output_mean: Tensor | None
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
    layout = [
        (*row.layer.weight.shape, row.moments, row.output_grads, row.output_moments, len(row.extras)) for row in wanted
    ]
    ranks.require_agreement(layout, wanted[0].layer.weight.device)
    moments = [_own_moments(row) for row in wanted]
    references = _references(ranks, wanted, moments)
    rows = [_means_of_calls(*row) for row in zip(wanted, moments, references, strict=True)]
    means, counts = zip(*chain.from_iterable(rows), strict=True)
    found = iter(ranks.means(means, counts))
    calls = [_call_from_means(row, reference, found) for row, reference in zip(wanted, references, strict=True)]
    return calls


def _references(ranks: Ranks, wanted: Sequence[Wanted], moments: Sequence[_BothMoments]) -> list[_References]:
    """What the moments are taken about: the past mean, or the batch's own the first time."""
    pasts = [(row.past_mean, row.past_output_mean) for row in wanted]
    new = [own for pair, both in zip(pasts, moments, strict=True) for past, own in zip(pair, both, strict=True)
           if past is None and own is not None]  # fmt: skip
    means = iter(ranks.means([own.mean for own in new], [own.count for own in new]))

    def reference(past: Tensor | None, own: Moments | None) -> Tensor | None:
        if own is None:
            return None
        return next(means) if past is None else past.to(own.mean.dtype)

    return [(reference(past[0], own[0]), reference(past[1], own[1])) for past, own in zip(pasts, moments, strict=True)]


def _own_moments(row: Wanted) -> _BothMoments:
    """Of inputs and outputs in this process; None where they are not wanted."""
    layer = row.layer
    of_inputs = _filled(layer.batch_moments() if layer.calls else None, layer.num_inputs, row) if row.moments else None
    of_outputs = _filled(layer.output_moments(), layer.num_units, row) if row.output_moments else None
    return of_inputs, of_outputs


def _filled(moments: Moments | None, size: int, row: Wanted) -> Moments:
    """The moments, or what stands for them where this process has seen nothing."""
    if moments is None:
        zeros = torch.zeros(size, dtype=row.dtype, device=row.layer.weight.device)
        return Moments(0, zeros, zeros)
    return Moments(moments.count, moments.mean.to(row.dtype), moments.variance.to(row.dtype))


def _means_of_calls(row: Wanted, moments: _BothMoments, references: _References) -> list[Quantity]:
    layer, calls = row.layer, row.layer.calls
    scalars = torch.tensor([float(layer.num_samples()), float(layer.sharing()) if calls else 0.0], dtype=row.dtype)
    scalars = scalars.to(layer.weight.device)
    means: list[Quantity] = [(scalars[0], 1.0)]
    if layer.spatial_axes:
        means.append((scalars[1], float(sum(call.num_samples for call in calls))))
    for own, reference in zip(moments, references, strict=True):
        if own is not None and reference is not None:
            # About a point near the mean: E[y^2] - E[y]^2 loses the digits of the variance where the mean is large.
            shift = own.mean - reference
            means += [(shift, own.count), (torch.addcmul(own.variance, shift, shift), own.count)]
    if row.output_grads:
        if calls:
            applications = float(sum(call.num_applications for call in calls))
            means.append((layer.output_grad_sq(mean_reduction=False).to(row.dtype), applications))
        else:
            means.append((torch.zeros(layer.num_units, dtype=row.dtype, device=layer.weight.device), 0.0))
    return means + row.extras


def _call_from_means(row: Wanted, references: _References, means: Iterator[Tensor]) -> tuple[SeenCall, list[Tensor]]:
    """The reverse; takes as many means as that has made."""
    output_grad_sq = None
    num_samples = next(means)
    num_applications = num_samples * next(means) if row.layer.spatial_axes else num_samples
    of_inputs, of_outputs = (None if reference is None else _about(reference, means) for reference in references)
    if row.output_grads:
        output_grad_sq = next(means)
    probes = tuple(chain.from_iterable(call.probes for call in row.layer.calls))  # stay this process's own
    call = SeenCall(of_inputs, output_grad_sq, num_samples, num_applications, -1, of_outputs, probes)
    return call, [next(means) for _ in row.extras]


def _about(reference: Tensor, means: Iterator[Tensor]) -> Moments:
    shift, square = next(means), next(means)
    variance = torch.addcmul(square, shift, shift, value=-1).clamp_(min=0)
    return Moments(0, reference + shift, variance)  # their number is no longer needed
