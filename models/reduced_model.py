"""A network whose trainable parameters are k coefficients of fixed directions in its weight space."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from torchgeom_optim.models.reduction_basis import Directions

if TYPE_CHECKING:
    from torchgeom_optim.models.reduction_report import ReductionReport

__all__ = ["ReducedModel"]


class ReducedModel(nn.Module):
    r"""w = center + \sum_{i <= k} c_i e_i: computes what the network computes at these weights.

    ``coefficients`` [k] is its one trainable parameter, for any optimizer. :meth:`merge` gives a plain network with the
    same weights. Buffers (running statistics) and frozen parameters are the network's own, copied. Made by
    :func:`~torchgeom_optim.models.reduction.reduce_model`.

    Args:
        model: the network; it is copied and stays as it is.
        directions: what the weights are written in; they have all trainable parameters that are reduced.
        positions: of the k directions among these, [k].
        coefficients: c, [k].
        center: name to tensor; None for the origin.

    Attributes:
        report: what was kept, and what it cost; None where nobody has measured it.

    Raises:
        ValueError: not as many coefficients as positions, or none.
    """

    coefficients: nn.Parameter
    positions: Tensor

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        positions: Tensor,
        coefficients: Tensor,
        center: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if positions.shape != coefficients.shape or positions.dim() != 1 or len(positions) == 0:
            raise ValueError(
                f"coefficients {list(coefficients.shape)} for positions {list(positions.shape)}: both must be [k], "
                "k at least 1. Use reduce_model, which chooses them."
            )
        self.report: ReductionReport | None = None
        self.directions, positions = directions.kept(positions)
        self.register_buffer("positions", positions)
        self.coefficients = nn.Parameter(coefficients.detach().clone())
        names = list(self.directions(self._spread(self.coefficients.detach())))
        self._places = _places(model, names)
        self._orders = {m: list(model.get_submodule(m)._parameters) for m, _, _ in self._places}
        self.model = _without(model, self._places)
        self._center = [] if center is None else names
        for i, name in enumerate(self._center):
            assert center is not None
            self.register_buffer(f"center_{i}", center[name].detach().clone())
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.training = model.training

    @property
    def num_directions(self) -> int:
        """The number of coefficients, k."""
        return len(self.coefficients)

    @property
    def center(self) -> dict[str, Tensor]:
        """Name to tensor; empty for the origin."""
        return {name: self.get_buffer(f"center_{i}") for i, name in enumerate(self._center)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives for these arguments."""
        return functional_call(self.model, self.weights(), args, kwargs)

    def weights(self) -> dict[str, Tensor]:
        """The weights, by the network's names; a tied one is there once. Differentiable in the coefficients."""
        weights = self.directions(self._spread(self.coefficients))
        return {name: weights[name] + value for name, value in self.center.items()} if self._center else weights

    def merge(self) -> nn.Module:
        """A plain network with these weights, in the present mode.

        Returns:
            A module of the original class with parameters of its own, tied where they were; nothing of this is shared.
        """
        model = copy.deepcopy(self.model)
        weights = self.weights()
        parameters = {name: nn.Parameter(w.detach().clone()) for name, w in weights.items()}
        for module_name, key, name in self._places:
            setattr(model.get_submodule(module_name), key, parameters[name])
        for module_name, order in self._orders.items():
            own = model.get_submodule(module_name)._parameters
            for key in order:  # as in the original: optimizers number parameters
                own[key] = own.pop(key)
        for name, p in model.named_parameters():
            p.requires_grad_(name in self._trainable)
        return model

    def keep(self, positions: Tensor) -> None:
        """Drop all directions but some, which get coefficients of a new parameter with the same values.

        Args:
            positions: into ``coefficients``, [k'].
        """
        self.directions, places = self.directions.kept(self.positions[positions])
        self.positions = places
        self.coefficients = nn.Parameter(self.coefficients.detach()[positions].clone())

    def save(self, path: str | Path, *, regenerate_from: Any = None) -> int:
        """Write a safetensors file: see :func:`~torchgeom_optim.models.reduction_files.save_reduced`."""
        from torchgeom_optim.models.reduction_files import save_reduced

        return save_reduced(self, path, regenerate_from=regenerate_from)

    @staticmethod
    def load(path: str | Path, model: nn.Module, *, regenerate_from: Any = None) -> ReducedModel:
        """Read one: see :func:`~torchgeom_optim.models.reduction_files.load_reduced`."""
        from torchgeom_optim.models.reduction_files import load_reduced

        return load_reduced(path, model, regenerate_from=regenerate_from)

    def extra_repr(self) -> str:
        """Numbers for ``repr``."""
        directions = self.directions
        return f"{self.num_directions} directions, basis {directions.kind!r}, of {directions.num_weights} weights"

    def _spread(self, coefficients: Tensor) -> Tensor:
        """Coordinates in all of the directions' columns, zero but for the kept ones."""
        return coefficients.new_zeros(self.directions.num_directions).index_copy(0, self.positions, coefficients)


def _places(model: nn.Module, names: list[str]) -> list[tuple[str, str, str]]:
    """Module, key and canonical name of every place where one of the named parameters is."""
    parameters = dict(model.named_parameters())
    name_of = {id(parameters[name]): name for name in names}
    return [
        (module_name, key, name_of[id(p)])
        for module_name, module in model.named_modules()
        for key, p in module._parameters.items()
        if id(p) in name_of
    ]


def _without(model: nn.Module, places: list[tuple[str, str, str]]) -> nn.Module:
    """A copy with buffers that hold nothing in the places of these parameters, which a functional call fills."""
    parameters = dict(model.named_parameters())
    empty = {name: p.new_zeros(()).expand(p.shape) for name, p in parameters.items()}
    # In the memo, so that no weight is ever copied.
    copied = copy.deepcopy(model, {id(parameters[name]): empty[name] for _, _, name in places})
    for module_name, key, name in places:
        module = copied.get_submodule(module_name)
        del module._parameters[key]
        module.register_buffer(key, empty[name], persistent=False)
    return copied.requires_grad_(False)
