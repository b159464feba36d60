r"""A network linearised in its weights: f(x) + J(x) dw with dw trained, convex, the network itself untouched.

    logits(x) = f(x; w) + J(x) dw,      dw = U (s V) U',    s = 1 / sqrt(lam + delta mean(lam))

layer by layer, in the eigenbasis of the layer's Kronecker factors, lam the exact diagonal of its Fisher matrix there
(:mod:`torchgeom_optim.geometry.kronecker`): all directions of V then change the predictions alike, up to the damping
delta, which decides how much the directions are trained that the data hardly show.

Source: tangent space of Daroczy et al., "GradNet", section 2, and the Jacobian read as a linear model. Changed: no
candidate label and no gradient is formed, J dw is one forward-mode pass; see :mod:`torchgeom_optim.models.gradnet`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchgeom_optim.geometry.deprecations import without_own_deprecations
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.kronecker import KroneckerBasis, diagonal_in, kronecker_factors
from torchgeom_optim.geometry.per_sample import Batch
from torchgeom_optim.geometry.private_evaluation import private_evaluation
from torchgeom_optim.models.gradnet_gates import GateProgram
from torchgeom_optim.models.gradnet_steps import Layer, Record, UnsupportedBaseError, applied

__all__ = ["LinearisedNetwork"]


class LinearisedNetwork(nn.Module):
    """f(x) + J(x) dw around a network, which is exact at dw = 0 and linear in dw.

    A piecewise linear network goes layer by layer through its gates, any other through ``torch.func.jvp``; ``way`` says
    which.

    Args:
        model: the network, evaluated as in evaluation mode.
        bases: the directions of its layers' parameters.
        scales: s [G, r, r'] for each of them; :meth:`calibrated` takes both from data.

    Raises:
        ValueError: the model has no parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> linearised, x = LinearisedNetwork.calibrated(net, torch.randn(20, 3)), torch.randn(5, 3)
        >>> torch.testing.assert_close(linearised(x), net(x))
    """

    def __init__(self, model: nn.Module, bases: Sequence[KroneckerBasis], scales: Sequence[Tensor]) -> None:
        super().__init__()
        named = dict(model.named_parameters())
        self._model = (model,)  # not a submodule: it belongs to whoever gave it
        self.layouts = [basis.layout for basis in bases]
        self.coordinates = nn.ParameterList()
        for i, (basis, scale) in enumerate(zip(bases, scales, strict=True)):
            like = named[basis.layout.weight].detach()
            self.register_buffer(f"scale{i}", scale.to(like))
            for side, vectors in (("left", basis.left), ("right", basis.right)):
                self.register_buffer(f"{side}{i}", None if vectors is None else vectors.to(like).contiguous())
            self.coordinates.append(nn.Parameter(torch.zeros_like(scale).to(like)))
        try:
            self._program: GateProgram | None = GateProgram(model)
        except UnsupportedBaseError:
            self._program = None

    @classmethod
    def calibrated(cls, model: nn.Module, sample: Any, *, damping: float = 1.0) -> LinearisedNetwork:
        """With bases and scales from the Fisher matrix on a sample.

        Args:
            model: the network. Every floating-point parameter takes part, frozen ones too.
            sample: inputs, some 150 to 500; no labels are needed.
            damping: delta, relative to the mean of lam, in (0, inf). Little follows the data closer.

        Returns:
            The network at dw = 0.

        Raises:
            ValueError: the damping is out of range; the model has no parameters, or outputs other than logits [N, C].
        """
        if not 0.0 < damping < math.inf:
            raise ValueError(f"damping={damping}: must be in (0, inf); 1 is a common start.")
        names = [name for name, p in model.named_parameters() if p.is_floating_point()]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no parameters: a tangent space needs some. Give a trained one."
            )
        batch = Batch(sample)
        data = batch.kwargs or batch.args
        jacobian = Jacobian(
            model, data, of="sqrt_probabilities", parameters=names, batch_size=32, memory_limit=math.inf
        )
        bases = [factors.eigenbasis() for factors in kronecker_factors(jacobian)]
        scales = []
        for lam in diagonal_in(jacobian, bases):
            least = lam + damping * lam.mean()
            # A layer without any effect on the sample has no scale of its own, and stays.
            scales.append(torch.where(least > 0, least, math.inf).rsqrt())
        return cls(model, bases, scales)

    @property
    def way(self) -> str:
        """How J dw is computed."""
        return "torch.func.jvp" if self._program is None else "layer by layer"

    def displacement(self) -> dict[str, Tensor]:
        """Dw by the names of the network's parameters, in their units."""
        named: dict[str, Tensor] = {}
        for i, (layout, V) in enumerate(zip(self.layouts, self.coordinates, strict=True)):
            basis = KroneckerBasis(layout, getattr(self, f"left{i}"), getattr(self, f"right{i}"))
            named |= basis.parameters(V * getattr(self, f"scale{i}"))
        return named

    def record(self, inputs: Any) -> Record:
        """What of the network's own pass the tangent needs; the same for every dw.

        Args:
            inputs: of N samples.

        Returns:
            Tensors with the samples along axis 0. Where the way is torch.func.jvp, the inputs alone.
        """
        try:
            if self._program is not None:
                return self._program.record(Batch(inputs).args, inputs=True)
        except UnsupportedBaseError:  # something that the graph does not show is part of what the network computes
            self._program = None
        return {"x": inputs}

    def logits(self, record: Mapping[str, Any]) -> Tensor:
        """F + J dw [N, C] from a record, differentiable with respect to the coordinates V."""
        dw = self.displacement()
        program, (model,) = self._program, self._model
        if program is None:
            return _by_forward_mode(model, record["x"], dw)
        own = {name: p.detach() for name, p in model.named_parameters()}

        def affine(layer: Layer, a: Tensor | None, b: Tensor | None) -> Tensor:
            assert a is not None
            weight, bias = layer.weight or "", layer.bias or ""
            moved = applied(layer.module, a, dw[weight], dw.get(bias)) if weight in dw else None
            if b is None:
                return torch.zeros_like(applied(layer.module, a, None, None)) if moved is None else moved
            along = applied(layer.module, b, own.get(weight), None)
            return along if moved is None else along + moved

        logits: Tensor = record["logits"]
        return logits + program.carry(record, affine, tangent=True)

    def forward(self, inputs: Any) -> Tensor:
        """f(x) + J(x) dw [N, C]."""
        return self.logits(self.record(inputs))


def _by_forward_mode(model: nn.Module, inputs: Any, dw: Mapping[str, Tensor]) -> Tensor:
    batch = Batch(inputs)
    constants = {name: p.detach() for name, p in model.named_parameters()}
    weights = {name: constants.pop(name) for name in dw}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def f(weights: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(model, {**constants, **weights, **buffers}, batch.args, batch.kwargs)
        return outputs

    differentiable = torch.is_grad_enabled()
    with private_evaluation(model), torch.set_grad_enabled(differentiable), without_own_deprecations():
        pair: tuple[Tensor, ...] = torch.func.jvp(f, (weights,), (dict(dw),))
    return pair[0].detach() + pair[1]
