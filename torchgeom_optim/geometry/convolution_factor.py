r"""Per-sample gradients of a convolution's weight, and the routes to their inner products.

A convolution is a linear layer on patches, n = channels * kernel numbers each, which outweigh its input by the kernel's
size: which route is best depends on more than multiplications. Measured on one thread of a shared CPU (float32, 3x3
kernels, N images of H x H, milliseconds, best of 3 to 7 repeats, rows from separate runs), beside a plain backward
pass for the weight, which forms no per-sample gradients:

    N, channels, outputs, H                64, 32, 64, 16   32, 64, 64, 32   32, 256, 256, 8   32, 512, 512, 4
    plain backward for the weight                 9               29                28                 35
    patches, gradients first                     14               48                57                420 (*)
    grouped convolution, gradients first         15               35               176                750
    positions first                               -                -               302                 51
    pixels first                                  -                -               180                 16

(*) with channels first, whole weight at once; not measured again in the present form.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgeom_optim.geometry.factors import WORKSPACE_BYTES, Factor, OuterFactor, pieces

__all__ = ["ConvolutionFactor"]


@dataclass(frozen=True)
class ConvolutionFactor(Factor):
    """A convolution of any dimension; its patches are only taken when a route needs them.

    Args:
        inputs: shape [N, channels, *spatial].
        output_grads: shape [N, C, outputs, *positions].
        kernel_size: per spatial axis, as the four that follow.
        stride: step between positions.
        padding: zeros on either side; other kinds of padding are already part of ``inputs``.
        dilation: step between the kernel's entries.
        groups: number of groups of channels.
    """

    inputs: Tensor
    output_grads: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def device_type(self) -> str:  # noqa: D102
        return self.output_grads.device.type

    @property
    def num_samples(self) -> int:  # noqa: D102
        return self.output_grads.shape[0]

    @property
    def num_grads(self) -> int:  # noqa: D102
        return self.output_grads.shape[1]

    @property
    def num_units(self) -> int:  # noqa: D102
        return self.output_grads.shape[2]

    @property
    def unit_numel(self) -> int:  # noqa: D102
        return self.inputs.shape[1] // self.groups * math.prod(self.kernel_size)

    @property
    def unit_step(self) -> int:  # type: ignore[override]  # noqa: D102
        return self.output_grads.shape[2] // self.groups if self.groups > 1 else 1

    @property
    def num_positions(self) -> int:
        """T."""
        return math.prod(self.output_grads.shape[3:])

    def patches(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What the kernel sees of channels ``start:stop`` of every group: [N, G, T, kernel * channels]."""
        axes = len(self.kernel_size)
        x = self.inputs.view(self.num_samples, self.groups, -1, *self.inputs.shape[2:])[:, :, start:stop]
        x = x.movedim(2, -1)  # channels last: short runs would slow the copy
        x = F.pad(x, [0, 0, *(pad for p in reversed(self.padding) for pad in (p, p))]).contiguous()
        positions, steps = self.output_grads.shape[3:], x.stride()[2 : 2 + axes]
        view = x.as_strided(
            (*x.shape[:2], *positions, *self.kernel_size, x.shape[-1]),
            (
                *x.stride()[:2],
                *(s * step for s, step in zip(self.stride, steps, strict=True)),
                *(d * step for d, step in zip(self.dilation, steps, strict=True)),
                1,
            ),
        )
        return view.reshape(*x.shape[:2], self.num_positions, -1)

    def grads_by_group(self) -> Tensor:
        """Output gradients [N, C, G, m, T]."""
        g = self.output_grads
        return g.reshape(*g.shape[:2], self.groups, -1, self.num_positions)

    def as_outer(self) -> OuterFactor:  # noqa: D102
        return OuterFactor(self._columns().transpose(2, 3), self.grads_by_group().transpose(3, 4))

    def _columns(self) -> Tensor:
        """Patches in the weight's order, positions last, so that the copy is one of whole rows: [N, G, n, T]."""
        x = (
            F.pad(self.inputs, [pad for p in reversed(self.padding) for pad in (p, p)])
            if any(self.padding)
            else self.inputs
        )
        x = x.reshape(self.num_samples, self.groups, -1, *x.shape[2:])
        steps = x.stride()[3:]
        view = x.as_strided(
            (*x.shape[:3], *self.kernel_size, *self.output_grads.shape[3:]),
            (
                *x.stride()[:3],
                *(d * step for d, step in zip(self.dilation, steps, strict=True)),
                *(s * step for s, step in zip(self.stride, steps, strict=True)),
            ),
            x.storage_offset(),
        )
        return view.reshape(*x.shape[:2], self.unit_numel, self.num_positions)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:  # noqa: D102
        if (start, stop) in ((0, None), (0, self.num_units)) and _favours_grouped_convolution(self):
            return _grouped_rows(self, 0, self.num_units // self.groups).view(self.num_samples, 1, -1)
        return self.as_outer().rows(start, stop)

    def products(self, other: Factor) -> Tensor:  # noqa: D102
        if isinstance(other, ConvolutionFactor):
            return _of_convolutions(self, self if other is self else other)
        return super().products(other) if other.as_outer() is None else self.as_outer().products(other)


def _of_convolutions(left: ConvolutionFactor, right: ConvolutionFactor) -> Tensor:
    """Inner products by the route that costs least."""
    # In multiplications, with two constants from measurements on CPU: gradients are formed at half the speed of one
    # large matrix product, and an entry of a product of two images, bound by memory, is worth about 100 of them.
    kernel, positions, pixels = (
        math.prod(left.kernel_size), left.num_positions, math.prod(left.inputs.shape[2:])
    )  # fmt: skip
    same_geometry = left.inputs.shape[1:] == right.inputs.shape[1:] and left.groups == right.groups == 1
    weight = left.num_units * left.unit_numel
    num_rows, num_columns = left.num_samples * left.num_grads, right.num_samples * right.num_grads
    formed = (num_rows + (0 if left is right else num_columns)) * positions * weight
    gradients_first = 2 * formed + num_rows * num_columns * weight
    channels = left.inputs.shape[1]
    of_pixels = left.num_samples * right.num_samples * pixels**2
    of_positions = num_rows * num_columns * positions**2
    pixels_first = of_pixels * channels + of_positions * (left.num_units + 100 * kernel)
    fits = (of_pixels + 2 * of_positions) * left.inputs.element_size() <= 8 * WORKSPACE_BYTES
    if same_geometry and fits and pixels_first < gradients_first:
        return _pixels_first(left, right)
    # Patches are kernel times the input: where they outweigh the gradients, a convolution of the gradients with the
    # inputs, all samples as groups of one call, is faster than taking them.
    if left is right and _favours_grouped_convolution(left):
        return _through_grouped_convolution(left)
    return _through_patches(left, right)


def _through_patches(left: ConvolutionFactor, right: ConvolutionFactor) -> Tensor:
    """Gradients first, a few input channels at a time."""
    kernel, groups = math.prod(left.kernel_size), left.groups
    channels = left.inputs.shape[1] // groups
    num_rows, num_columns = left.num_samples * left.num_grads, right.num_samples * right.num_grads
    samples = max(left.num_samples, right.num_samples)
    bytes_each = kernel * max(
        max(num_rows, num_columns) * left.num_units, samples * groups * left.num_positions
    ) * 4  # fmt: skip
    result: Tensor | None = None
    left_grads = _channels_by_position(left)
    right_grads = left_grads if left is right else _channels_by_position(right)
    for start, stop in pieces(channels, bytes_each):
        rows = _channel_rows(left, left_grads, start, stop)
        columns = rows if left is right else _channel_rows(right, right_grads, start, stop)
        result = rows @ columns.T if result is None else result.addmm_(rows, columns.T)
    assert result is not None
    return result.view(left.num_samples, left.num_grads, right.num_samples, right.num_grads)


def _channels_by_position(factor: ConvolutionFactor) -> Tensor:
    """Output gradients [N * G, C * m, T]."""
    g = factor.grads_by_group().transpose(1, 2)
    return g.reshape(factor.num_samples * factor.groups, -1, factor.num_positions)


def _channel_rows(factor: ConvolutionFactor, grads: Tensor, start: int, stop: int) -> Tensor:
    """Gradients with respect to the weights of some input channels: [N * C, entries], in an order of its own."""
    product = torch.bmm(grads, factor.patches(start, stop).flatten(0, 1))
    product = product.view(factor.num_samples, factor.groups, factor.num_grads, -1)
    return product.transpose(1, 2).reshape(factor.num_samples * factor.num_grads, -1)


def _favours_grouped_convolution(factor: ConvolutionFactor) -> bool:
    weight = factor.num_units * factor.unit_numel
    return factor.num_grads == 1 and factor.inputs.shape[1] >= 16 and factor.num_positions**2 >= weight


def _through_grouped_convolution(factor: ConvolutionFactor) -> Tensor:
    """Gradients first, each sample a group of one convolution; a few output channels at a time."""
    num_samples = factor.num_samples
    per_group = factor.num_units // factor.groups
    result: Tensor | None = None
    for start, stop in pieces(per_group, num_samples * factor.groups * factor.unit_numel * 4):
        rows = _grouped_rows(factor, start, stop)
        result = rows @ rows.T if result is None else result.addmm_(rows, rows.T)
    assert result is not None
    return result.view(num_samples, 1, num_samples, 1)


def _grouped_rows(factor: ConvolutionFactor, start: int, stop: int) -> Tensor:
    """Gradients with respect to output channels ``start:stop`` of every group: [N, entries], one per sample."""
    x, g, num_samples = factor.inputs, factor.output_grads[:, 0], factor.num_samples
    x = x.reshape(1, -1, *x.shape[2:])
    g = g.reshape(num_samples, factor.groups, -1, *g.shape[2:])
    piece = g[:, :, start:stop].reshape(1, -1, *g.shape[3:])
    weight = x.new_empty(()).expand(piece.shape[1], x.shape[1] // (num_samples * factor.groups), *factor.kernel_size)
    grads: Tensor = torch.ops.aten.convolution_backward(
        piece, x, weight, None, factor.stride, factor.padding, factor.dilation, False,
        [0] * len(factor.kernel_size), num_samples * factor.groups, [False, True, False],
    )[1]  # fmt: skip
    return grads.view(num_samples, -1)


def _pixels_first(left: ConvolutionFactor, right: ConvolutionFactor) -> Tensor:
    """Positions first, without patches."""
    # Two patches' inner product is a sum over the kernel of products of pixels, sum_k x_i[t + k] . x_j[t' + k], so one
    # matrix of all pixels' products serves every k: by the kernel's size fewer multiplications.
    axes = len(left.kernel_size)
    x, y = (_positions_outermost(f.inputs, axes) for f in (left, right))
    g, h = (_positions_outermost(f.output_grads.transpose(1, 2), axes) for f in (left, right))
    of_pixels = (x.flatten(0, -2) @ y.flatten(0, -2).T).view(*x.shape[:-1], 1, *y.shape[:-1], 1)
    of_grads = (g.flatten(0, -2) @ h.flatten(0, -2).T).view(*g.shape[:-1], *h.shape[:-1])
    result = of_grads.new_zeros(left.num_samples, left.num_grads, right.num_samples, right.num_grads)
    summed = (*range(axes), *range(axes + 2, 2 * axes + 2))
    for offset in itertools.product(*(range(k) for k in left.kernel_size)):
        places = [
            _inside(k * d - p, s, size, count)
            for k, d, p, s, size, count in zip(
                offset, left.dilation, left.padding, left.stride, x.shape[:axes], g.shape[:axes], strict=True
            )
        ]
        if any(at.start >= at.stop for _, at in places):
            continue  # this entry of the kernel only ever sees padding
        pixels, outputs = (tuple(place[k] for place in places) for k in (0, 1))
        every = (slice(None), slice(None))
        result += (of_grads[(*outputs, *every, *outputs)] * of_pixels[(*pixels, *every, *pixels)]).sum(summed)
    return result


def _positions_outermost(x: Tensor, axes: int) -> Tensor:
    """[N, channels, ..., *spatial] to [*spatial, N, ..., channels], the rows of a matrix product."""
    return x.permute(*range(x.dim() - axes, x.dim()), 0, *range(2, x.dim() - axes), 1).contiguous()


def _inside(offset: int, stride: int, size: int, count: int) -> tuple[slice, slice]:
    """The pixels that one entry of the kernel sees, and the outputs that see them, along one axis."""
    first = max(0, math.ceil(-offset / stride))
    last = min(count, (size - 1 - offset) // stride + 1)
    begin = first * stride + offset
    return slice(begin, begin + (last - first - 1) * stride + 1 if last > first else begin, stride), slice(first, last)
