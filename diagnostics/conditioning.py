r"""Condition numbers of the gradient: by how much it changes, relatively, when weights or inputs do.

    kappa = lim sup (|h(w + omega) - h(w)| / |h(w)|) / (|omega| / |w|) = |H| |w| / |h|          Def. 2.4, Eq. (2.20)

h is the batch gradient, H the Hessian of the mean loss, |H| its spectral norm. Dimensionless: where it is 10^k, a
change of the weights by a share of 10^-k may change the gradient by all of itself. What finite moves give (Def. 2.5)
differs by O(size of the move) from a lower bound on smooth networks; what two steps give
(:func:`two_step_condition_number`) is no bound at all.

For a layer the number is that of its own part of the gradient: (|change of h_layer| / |h_layer|) / (|omega| / |w|),
with omega and w those of the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torchgeom_optim.diagnostics.batch_gradient import BatchGradient
from torchgeom_optim.diagnostics.scales import squared_norms
from torchgeom_optim.geometry.per_sample import Batch

__all__ = [
    "GradientChanges",
    "batch_gradient_shifts",
    "gradient_changes",
    "input_condition_number",
    "input_gradient_shifts",
    "random_shifts",
    "relative_condition_number",
    "sample_gradient_shifts",
    "two_step_condition_number",
]

Named = dict[str, Tensor]
_Reduce = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class GradientChanges:
    """What is known of n gradients h_k = h(w + omega_k) beside h = h(w), parameter by parameter.

    Args:
        base_norms_sq: |h|^2, [L].
        norms_sq: |h_k|^2, [L, n].
        inner_products: <h_k, h>, [L, n].
        change_norms_sq: |h_k - h|^2, [L, n], from the difference itself.
        sum_norms_sq: |sum_k h_k|^2, [L].
        shift_norms_sq: |omega_k|^2 of the whole network, [n].
        weight_norm_sq: |w|^2 of the whole network.
    """

    base_norms_sq: Tensor
    norms_sq: Tensor
    inner_products: Tensor
    change_norms_sq: Tensor
    sum_norms_sq: Tensor
    shift_norms_sq: Tensor
    weight_norm_sq: Tensor

    def summed(self, members: Tensor) -> GradientChanges:
        """The same for groups of parameters: rows of ``members`` [G, L] are ones at those of a group."""
        members = members.to(self.norms_sq)
        return GradientChanges(
            members @ self.base_norms_sq,
            members @ self.norms_sq,
            members @ self.inner_products,
            members @ self.change_norms_sq,
            members @ self.sum_norms_sq,
            self.shift_norms_sq,
            self.weight_norm_sq,
        )

    def condition_number(self) -> Tensor:
        """Def. 2.5, Eq. (2.24) with i = j: [G]."""
        return relative_condition_number(
            self.change_norms_sq, self.base_norms_sq, self.shift_norms_sq, self.weight_norm_sq
        )


def relative_condition_number(
    change_norms_sq: Tensor, base_norm_sq: Tensor, shift_norms_sq: Tensor, point_norm_sq: Tensor
) -> Tensor:
    r"""max_k (|f(p + s_k) - f(p)| / |f(p)|) / (|s_k| / |p|), the approximate best lower bound of Def. 1.7, Eq. (1.8).

    Args:
        change_norms_sq: |f(p + s_k) - f(p)|^2, [..., n].
        base_norm_sq: |f(p)|^2, [...].
        shift_norms_sq: |s_k|^2, [n].
        point_norm_sq: |p|^2.

    Returns:
        [...].
    """
    relative = change_norms_sq / base_norm_sq.unsqueeze(-1) / (shift_norms_sq / point_norm_sq)
    return relative.amax(-1).sqrt()


def gradient_changes(
    gradient: BatchGradient,
    shifts: Iterable[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    reduce: _Reduce | None = None,
) -> GradientChanges:
    """Evaluate the gradient at w + omega_k for every shift: one forward and backward pass each.

    What is kept is the base, the sum and the gradient at hand, 3 P numbers.

    Args:
        gradient: h.
        shifts: omega_k, name -> tensor; at least one, none of them zero.
        base: h(w).
        reduce: what to keep of each gradient, such as a :class:`~torchgeom_optim.diagnostics.masking.RandomMask`.

    Returns:
        The numbers.

    Raises:
        ValueError: no shift.
    """
    reduce = reduce or (lambda named: named)
    base = reduce(base)
    norms, inner, changes, lengths = [], [], [], []
    total: Named | None = None
    for shift in shifts:
        lengths.append(squared_norms(shift).sum())
        moved = reduce(gradient(shift))
        norms.append(squared_norms(moved))
        inner.append(torch.stack([(moved[name] * h).sum().to(norms[-1].dtype) for name, h in base.items()]))
        changes.append(squared_norms({name: moved[name] - h for name, h in base.items()}))
        total = {name: h + (0 if total is None else total[name]) for name, h in moved.items()}
    if total is None:
        raise ValueError("no shift: at least one is needed; batch_gradient_shifts gives two.")
    weights = {name: p for name, p in gradient.model.named_parameters() if p.requires_grad}
    return GradientChanges(
        squared_norms(base),
        torch.stack(norms, -1),
        torch.stack(inner, -1),
        torch.stack(changes, -1),
        squared_norms(total),
        torch.stack(lengths),
        squared_norms(weights).sum(),
    )


def random_shifts(
    weights: Mapping[str, Tensor], num: int, size: float = 1e-3, generator: torch.Generator | None = None
) -> list[Named]:
    """Random moves: normal with mean and standard deviation of the weights of each parameter, times ``size``.

    Source: the text above Fig. 2.4 of the thesis, which found such moves to change the gradient far less than those
    along gradients.

    Args:
        weights: name -> tensor.
        num: n.
        size: factor.
        generator: on the CPU; by default one of its own, seeded with 0.

    Returns:
        n moves.
    """
    generator = generator or torch.Generator().manual_seed(0)
    shifts = []
    for _ in range(num):
        shift = {}
        for name, w in weights.items():
            noise = torch.randn(w.shape, generator=generator).to(w)
            spread = w.detach().std() if w.numel() > 1 else w.new_zeros(())
            shift[name] = size * (w.detach().mean() + spread * noise)
        shifts.append(shift)
    return shifts


def sample_gradient_shifts(
    gradients: Sequence[Mapping[str, Tensor]], size: float = 1e-3, generator: torch.Generator | None = None
) -> list[Named]:
    """Moves along single samples' gradients, of length ``size`` and random sign: Def. 2.6, Eq. (2.25).

    Args:
        gradients: of some samples, as :meth:`BatchGradient.of_samples` gives them.
        size: eta.
        generator: for the signs, on the CPU; by default one of its own, seeded with 0.

    Returns:
        As many moves.
    """
    generator = generator or torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (len(gradients),), generator=generator) - 1
    lengths = [squared_norms(h).sum().sqrt() for h in gradients]
    return [
        {name: x * (size * sign / length) for name, x in h.items()}
        for h, sign, length in zip(gradients, signs.tolist(), lengths, strict=True)
    ]


def batch_gradient_shifts(gradient: Mapping[str, Tensor], size: float = 1e-3) -> list[Named]:
    """Moves along the batch gradient and against it, the largest entry of each being ``size``: Def. 2.7, Eq. (2.26).

    Args:
        gradient: h.
        size: eta.

    Returns:
        Two moves.
    """
    largest = torch.stack([h.detach().abs().max() for h in gradient.values() if h.numel()]).max()
    return [{name: h * (sign * size / largest) for name, h in gradient.items()} for sign in (1, -1)]


def two_step_condition_number(
    previous_weights: Mapping[str, Tensor],
    previous_gradient: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    members: Tensor,
    reduce: _Reduce | None = None,
) -> Tensor:
    r"""The nearly free form: the move is the training step, and the second gradient is the next batch's.

        |h(w + omega, next batch) - h(w, batch)| |w| / (|omega| |h(w, batch)|)          after Def. 2.5

    It needs no further pass. The difference of the two batches is in it too, divided by |omega|: with a small step it
    measures the noise of the gradient, and is no bound of anything.

    Args:
        previous_weights: w, name -> tensor.
        previous_gradient: h(w, batch), as far as it was kept.
        weights: w + omega.
        gradient: h(w + omega, next batch), in full.
        members: [G, L], ones at the parameters of each group.
        reduce: what was kept of the previous gradient, and is to be taken of this one.

    Returns:
        [G]; inf where the weights did not move.
    """
    reduced = gradient if reduce is None else reduce(gradient)
    base = members.to(squared_norms(previous_gradient)) @ squared_norms(previous_gradient)
    change = members.to(base) @ squared_norms({name: reduced[name] - h for name, h in previous_gradient.items()})
    shift = squared_norms({name: weights[name] - w for name, w in previous_weights.items()}).sum()
    return relative_condition_number(change[:, None], base, shift[None], squared_norms(previous_weights).sum())


def input_gradient_shifts(
    input_gradients: Sequence[Tensor], num: int, size: float = 1e-3, generator: torch.Generator | None = None
) -> list[list[Tensor]]:
    """Moves of an input along the first samples' input gradients, of length ``size`` and random sign: Def. 3.5.

    Args:
        input_gradients: one [b, ...] for each input, as :meth:`BatchGradient.of_inputs` gives them.
        num: n, at most b.
        size: eta.
        generator: for the signs, on the CPU; by default one of its own, seeded with 0.

    Returns:
        n moves, each with one tensor for each input.
    """
    generator = generator or torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (num,), generator=generator) - 1
    lengths = _sample_norms_sq(input_gradients).sqrt()
    return [
        [g[k : k + 1] * (size * int(signs[k]) / lengths[k]).to(g.dtype) for g in input_gradients] for k in range(num)
    ]


def input_condition_number(
    gradient: BatchGradient, shifts: Sequence[Sequence[Tensor]], num_samples: int, members: Tensor
) -> Tensor:
    r"""How much single samples' gradients change when their inputs do, relatively; a mean over samples.

        1/m sum_i max_k |h(w, x_i + delta_k) - h(w, x_i)| |x_i| / (|delta_k| |h(w, x_i)|)     Def. 3.3, 3.4, Eq. (3.16)

    It takes m (n + 1) passes of one sample each. A sample is by itself in them, so batch normalization must take its
    running statistics: give a gradient that freezes them.

    Args:
        gradient: of the batch.
        shifts: delta_k, one tensor [1, ...] for each floating point input; the same for all samples.
        num_samples: m, in [1, b]: the first of the batch.
        members: [G, L], ones at the parameters of each group.

    Returns:
        [G].

    Raises:
        ValueError: m is out of range.
    """
    if not 1 <= num_samples <= gradient.num_samples:
        raise ValueError(f"num_samples={num_samples}: must be in [1, {gradient.num_samples}], the batch; try 8.")
    shifts_sq = torch.stack([_sample_norms_sq(shift).sum() for shift in shifts])
    numbers = []
    for i in range(num_samples):
        one = gradient.batch.map(lambda x, i=i: x[i : i + 1])  # type: ignore[misc]
        base = gradient.on(one)()
        changes = []
        for shift in shifts:
            moved = gradient.on(_moved(one, shift))()
            changes.append(squared_norms({name: moved[name] - h for name, h in base.items()}))
        base_sq, change_sq = squared_norms(base), torch.stack(changes, -1)
        groups = members.to(base_sq)
        input_sq = _sample_norms_sq([x for x in tree_leaves(one.inputs) if x.is_floating_point()]).sum()
        numbers.append(relative_condition_number(groups @ change_sq, groups @ base_sq, shifts_sq, input_sq))
    return torch.stack(numbers).mean(0)


def _moved(one: Batch, shift: Sequence[Tensor]) -> Batch:
    leaves, spec = tree_flatten(one.inputs)
    moves = iter(shift)
    return Batch(tree_unflatten([x + next(moves) if x.is_floating_point() else x for x in leaves], spec), one.targets)


def _sample_norms_sq(tensors: Sequence[Tensor]) -> Tensor:
    """Squared norms of the rows of several tensors together: [b]."""
    rows = [x.detach().reshape(len(x), math.prod(x.shape[1:])) for x in tensors]
    return torch.stack([r.to(torch.promote_types(r.dtype, torch.float32)).square().sum(1) for r in rows]).sum(0)
