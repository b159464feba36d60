"""The metric of a network's function on some samples: its Jacobian together with its values anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.mini_batches import MiniBatch

__all__ = ["FunctionMetric"]


class FunctionMetric(Jacobian):
    r"""A :class:`Jacobian` that can also evaluate its function f, at weights other than the model's too.

    The metric g = J'J / N measures a move by what it does to the function: theta' g theta = ||J theta||^2 / N is the
    mean over samples of the squared change of f, to first order. With ``of="sqrt_probabilities"`` it is the Fisher
    metric, and ||f(w) - f(w_0)|| the distance along which 2 sqrt(p) has moved.

    The arguments are those of :class:`Jacobian`.

    Example:
        >>> metric = FunctionMetric(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> metric.values(torch.zeros(8)).abs().max()
        tensor(0.)
    """

    @torch.inference_mode(False)
    def values(self, weights: Tensor | None = None) -> Tensor:
        """The values f on all samples.

        Args:
            weights: of the chosen parameters, [P]; None for those that the model has.

        Returns:
            [N C], in the order of the rows of J.
        """
        parts = []
        there = self.vectors.values()
        if weights is not None:
            there = {name: w.to(there[name].dtype) for name, w in self.vectors.named(weights).items()}
        for batch in self._f.parts(self._plan.samples_per_pass("product")):
            with self._f.private(), torch.no_grad():
                parts.append(self._f.on(batch)(there, lambda f: f.detach().reshape(-1)))
        return torch.cat(parts)

    def estimated_diagonal(self, num_probes: int, generator: torch.Generator | None = None) -> Tensor:
        r"""diag(J'J), estimated from random signs.

        For u of independent random signs, E (J'u)_p^2 = (J'J)_pp. From k draws the estimate of one entry has a relative
        standard deviation of at most sqrt(2 / k); the sum over a layer's entries, or over all, trace(J J'), has a far
        smaller one.

        Args:
            num_probes: k.
            generator: on the CPU, from which the signs are drawn; by default one seeded with 0.

        Returns:
            [P].
        """
        generator = generator or torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (self.shape[0], num_probes), generator=generator).mul_(2).sub_(1)
        return self.transposed_product(signs.to(self.vectors.device, self.dtype)).square().mean(1)

    def mini_batches(self) -> Iterator[MiniBatch]:
        """The samples, in mini-batches as large as a product takes them."""
        return self._f.parts(self._plan.samples_per_pass("product"))
