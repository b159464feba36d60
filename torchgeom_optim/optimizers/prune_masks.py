"""Masks as ``torch.nn.utils.prune`` keeps them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import prune

__all__ = ["apply_prune_masks"]


def apply_prune_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on a model's parameters as ``torch.nn.utils.prune.custom_from_mask`` does, in place.

    A masked parameter ``weight`` becomes ``weight_orig`` with the buffer ``weight_mask``; training then leaves the cut
    entries at zero, and ``torch.nn.utils.prune.remove`` makes the zeros permanent. Optimizers that were built before
    hold the same parameters as after.

    Args:
        model: the network.
        masks: by the parameter's name, True (or 1) where a weight stays; see :attr:`GeodesicSparsifier.masks`.

    Raises:
        ValueError: a name or shape that the model does not have, or a parameter that two modules share; nothing was
            changed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> apply_prune_masks(model, {"0.weight": torch.tensor([[1, 0, 1], [0, 1, 1]])})
        >>> prune.is_pruned(model), int((model[0].weight == 0).sum())
        (True, 2)
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses: dict[int, int] = {}
    for parameter in parameters.values():
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, mask in masks.items():
        p = parameters.get(name)
        if p is None or p.shape != mask.shape:
            raise ValueError(
                f"mask of {name!r}, shape {list(mask.shape)}: must be of one of the model's parameters and have its "
                "shape. Are masks there already? Nothing was changed."
            )
        if uses[id(p)] > 1:
            raise ValueError(
                f"mask of {name!r}: the parameter is used under several names, of which torch would mask one and leave "
                "the others. Need a parameter of its own; nothing was changed."
            )
    for name, mask in masks.items():
        module, _, own = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), own, mask.to(parameters[name].dtype))  # type: ignore[no-untyped-call]
