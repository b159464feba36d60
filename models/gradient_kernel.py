"""The kernel that a trained network's gradients and a Riemannian metric induce on its inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.heads import HeadName
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.matrix_metric import ExactMetric
from torchgeom_optim.geometry.metric import DiagonalMetric, LayerVector
from torchgeom_optim.geometry.spectrum import jacobian_spectrum

__all__ = ["GradientKernel", "GradientOf", "MetricName"]

MetricName = Literal["identity", "diagonal", "block", "low_rank"]
GradientOf = HeadName | Literal["candidates"]

_LARGEST_BLOCK = 4096  # parameters of a layer: G and its factor take 2 * 8 * 4096^2 bytes in float64


class GradientKernel:
    r"""The kernel <x, x'> = \sum_c g_c(x)' G^-1 g_c(x'), for methods that need no more than inner products.

    Source: "GradNet", Eqs. (1) to (3): g is the gradient of the loss of one sample, G the mean of g g' over data. What
    g is a gradient of is the choice of ``of``, and with several of them per sample their kernels are added:

    - "candidates" (the default): the cross-entropy -log p_c(x) for every candidate label c; needs no labels, and is
      ours. For networks that return logits [N, C].
    - "loss": the loss with the given labels, ``loss_fn``: Eq. (3) to the letter, where labels are known on both sides.
    - "outputs", "log_probabilities", "sqrt_probabilities": see :class:`Jacobian`. With the last G is the Fisher matrix.

    G = 1/N \sum_i \sum_c g_c(x_i) g_c(x_i)' over ``data``, in one of these forms. The floor that ``damping`` adds is a
    share of the mean of G's own diagonal, layer by layer.

    - "identity": G = I, the tangent kernel. "diagonal": the diagonal.
    - "block": one block per layer (a module's own parameters), of at most 4,096 parameters each.
    - "low_rank": the ``rank`` largest eigenpairs, G^-1 = V (S + damping * mean(S))^-1 V': directions in which
      the data's gradients do not move are left out. With all of them and no damping it is the pseudo-inverse, the
      whole G at any number of parameters; for x among the data, or where the gradients span everything, the kernel is
      then **invariant** under invertible linear changes of the parameters.

    The kernel is a product of features phi = G^(-1/2) g, so it is symmetric and positive semi-definite to rounding. The
    model is evaluated as :class:`Jacobian` evaluates it, in evaluation mode, and left as it was; its weights must not
    change between the calls.

    Args:
        model: any module, with the sample along the first axis.
        data: samples for G, as for :class:`Jacobian`. "identity" has no use for them.
        targets: their labels, for "loss" and "log_probabilities".
        metric: the form of G.
        of: what g is the gradient of.
        damping: in [0, inf), relative.
        rank: for "low_rank", R; None for all above round-off.
        mean_exponent: p in (0, inf), for "diagonal": the quasi-arithmetic mean (mean |g|^2p)^(1/p) of Eq. (2) in the
            place of the arithmetic one, p = 1.
        memory_limit: bytes that one call may hold in features; less of them means more passes.
        **jacobian_options: ``loss_fn``, ``parameters``, ``batch_size``, ``dtype``, ``select`` and others.

    Raises:
        ValueError: a setting out of range or without a use; a layer too large for "block"; as Jacobian has it.
        NotPositiveDefiniteError: G is singular, and damping is 0.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(20, 4)
        >>> kernel = GradientKernel(model, x)
        >>> K = kernel(x)                      # sklearn.svm.SVC(kernel="precomputed").fit(K, labels)
        >>> K.shape, kernel(x[:5], x).shape    # ... .predict(kernel(new, x))
        (torch.Size([20, 20]), torch.Size([5, 20]))
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any = None,
        targets: Tensor | None = None,
        *,
        metric: MetricName = "diagonal",
        of: GradientOf = "candidates",
        damping: float = 0.1,
        rank: int | None = None,
        mean_exponent: float = 1.0,
        memory_limit: float = 2**30,
        **jacobian_options: Any,
    ) -> None:
        if metric not in get_args(MetricName):
            raise ValueError(f"metric={metric!r}: must be one of {', '.join(map(repr, get_args(MetricName)))}.")
        if not 0.0 <= damping < math.inf:
            raise ValueError(f"damping={damping}: must be in [0, inf); 0.1 is a common start.")
        if not memory_limit > 0:
            raise ValueError(f"memory_limit={memory_limit}: must be positive, in bytes; 2**30 is the default.")
        if rank is not None and (metric != "low_rank" or not rank >= 1):
            raise ValueError(f"rank={rank} with metric={metric!r}: at least 1, and for 'low_rank' alone. Leave it out.")
        if not 0.0 < mean_exponent < math.inf or (mean_exponent != 1.0 and metric != "diagonal"):
            raise ValueError(
                f"mean_exponent={mean_exponent} with metric={metric!r}: must be in (0, inf), and is for 'diagonal' "
                "alone. 1, the arithmetic mean, is the default."
            )
        if data is None and metric != "identity":
            raise ValueError(f"no data with metric={metric!r}: samples are needed to average over. Or 'identity'.")
        self.metric, self.memory_limit = metric, memory_limit
        self._model: nn.Module = _LogProbabilities(model) if of == "candidates" else model
        self._of: HeadName = "outputs" if of == "candidates" else of
        self._options = jacobian_options
        self._whiten: _Whitening = _Rows()
        if metric == "identity":
            return
        jacobian = self._jacobian(data, targets)
        if metric == "diagonal":
            self._whiten = _Diagonal(jacobian, damping, mean_exponent)
        elif metric == "block":
            self._whiten = _Blocks(jacobian, damping)
        else:
            self._whiten = _LowRank(jacobian, damping, rank)

    def __call__(
        self, data: Any, others: Any = None, *, targets: Tensor | None = None, other_targets: Tensor | None = None
    ) -> Tensor:
        """The matrix of the kernel between samples.

        Args:
            data: N samples, as for :class:`Jacobian`.
            others: M samples; the same N if None.
            targets: labels of the first, where ``of`` needs them.
            other_targets: labels of the others.

        Returns:
            [N, M], [of]^2 / [G]; exactly symmetric if there are no others.
        """
        left = self._jacobian(data, targets)
        right = left if others is None else self._jacobian(others, other_targets)
        result: Tensor | None = None
        for rows, features in self._held(left):
            if others is None and len(features) == left.num_samples:  # nothing has to be computed twice
                result = features @ features.T
                break
            for columns, block in self._blocks(right):
                product = features @ block.T
                if result is None:
                    result = product.new_empty(left.num_samples, right.num_samples)
                result[rows, columns] = product
        assert result is not None
        return result if others is not None else (result + result.T) / 2

    def features(self, data: Any, targets: Tensor | None = None) -> Tensor:
        """G^(-1/2) g of every sample: the kernel is their inner product.

        Args:
            data: N samples.
            targets: their labels, where ``of`` needs them.

        Returns:
            [N, C F], with F features for each of the C gradients of a sample: F = R for "low_rank", else P.
        """
        return torch.cat([block for _, block in self._blocks(self._jacobian(data, targets))])

    def _jacobian(self, data: Any, targets: Tensor | None) -> Jacobian:
        return Jacobian(self._model, data, targets, of=self._of, **self._options)

    def _blocks(self, jacobian: Jacobian) -> Iterator[tuple[slice, Tensor]]:
        """Features [b, C F] mini-batch by mini-batch, with their place."""
        start = 0
        for block in self._whiten(jacobian):
            features = block.reshape(len(block) // jacobian.num_outputs, -1)
            yield slice(start, start + len(features)), features
            start += len(features)

    def _held(self, jacobian: Jacobian) -> Iterator[tuple[slice, Tensor]]:
        """The same in larger blocks, as many samples as there is room for."""
        held: list[Tensor] = []
        start = num_bytes = 0
        for place, block in self._blocks(jacobian):
            if held and num_bytes + block.nbytes > self.memory_limit:
                yield slice(start, place.start), torch.cat(held)
                held, start, num_bytes = [], place.start, 0
            held.append(block)
            num_bytes += block.nbytes
        yield slice(start, jacobian.num_samples), torch.cat(held)


class _LogProbabilities(nn.Module):
    """-log p_c for all candidate labels c; the sign is of no account in a kernel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.log_softmax(self.model(*args, **kwargs), -1)


class _Whitening(ABC):
    """Rows of a Jacobian, mini-batch by mini-batch, times G^(-1/2)."""

    @abstractmethod
    def __call__(self, jacobian: Jacobian) -> Iterator[Tensor]:
        """Blocks [b C, F]."""


class _Rows(_Whitening):
    def __call__(self, jacobian: Jacobian) -> Iterator[Tensor]:
        return jacobian.rows()


class _Diagonal(_Whitening):
    def __init__(self, jacobian: Jacobian, damping: float, mean_exponent: float) -> None:
        total = torch.zeros(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.vectors.device)
        for rows in jacobian.rows():
            total += rows.abs().pow(2 * mean_exponent).sum(0)
        means = (total / jacobian.num_samples).pow(1 / mean_exponent)
        scales = []
        for layer in _layers(jacobian):
            metric = DiagonalMetric.damped(LayerVector(means[layer]), damping)
            metric.require_positive_definite()
            scales.append(metric.diagonal.weight.rsqrt())
        self._scale = torch.cat(scales)

    def __call__(self, jacobian: Jacobian) -> Iterator[Tensor]:
        for rows in jacobian.rows():
            yield rows * self._scale


class _Blocks(_Whitening):
    def __init__(self, jacobian: Jacobian, damping: float) -> None:
        self._layers = _layers(jacobian)
        sizes = [layer.stop - layer.start for layer in self._layers]
        if (size := max(sizes)) > _LARGEST_BLOCK:
            raise ValueError(
                f"a layer has {size} parameters: metric='block' holds a matrix per layer, of at most {_LARGEST_BLOCK} "
                "rows. Try 'low_rank' or 'diagonal', or choose parameters=."
            )
        totals = [torch.zeros(n, n, dtype=jacobian.dtype, device=jacobian.vectors.device) for n in sizes]
        for rows in jacobian.rows():
            for total, layer in zip(totals, self._layers, strict=True):
                total.addmm_(rows[:, layer].T, rows[:, layer])
        self._factors = []
        for total in totals:
            matrix = total / jacobian.num_samples
            metric = ExactMetric.factorise(matrix[None], damping * torch.diagonal(matrix).mean()[None])
            metric.require_positive_definite()
            self._factors.append(metric.cholesky[0])

    def __call__(self, jacobian: Jacobian) -> Iterator[Tensor]:
        for rows in jacobian.rows():
            parts = [
                torch.linalg.solve_triangular(L, rows[:, layer].T, upper=False).T
                for L, layer in zip(self._factors, self._layers, strict=True)
            ]
            yield torch.cat(parts, 1)


class _LowRank(_Whitening):
    def __init__(self, jacobian: Jacobian, damping: float, rank: int | None) -> None:
        spectrum = jacobian_spectrum(jacobian, rank)
        rank = spectrum.rank if rank is None else min(rank, spectrum.rank)
        if rank == 0:
            raise ValueError(
                "the gradients of all data vanish: there is no metric. Give data that the loss depends on."
            )
        values = spectrum.eigenvalues[:rank]
        scale = (values + damping * values.mean()).rsqrt()
        self._directions = (spectrum.eigenvectors(rank) * scale).to(jacobian.dtype)

    def __call__(self, jacobian: Jacobian) -> Iterator[Tensor]:
        yield jacobian.product(self._directions)


def _layers(jacobian: Jacobian) -> list[slice]:
    """The places of each module's own parameters in a vector."""
    places: list[slice] = []
    last: str | None = None
    start = 0
    for name, shape in jacobian.vectors.shapes.items():
        owner, end = name.rpartition(".")[0], start + shape.numel()
        if owner == last:
            places[-1] = slice(places[-1].start, end)
        else:
            places.append(slice(start, end))
        last, start = owner, end
    return places
