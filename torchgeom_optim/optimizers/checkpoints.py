"""States of an optimizer to go back to: what a checkpoint has to be like, and the state before a step that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["STATE_VERSION", "back_on_error", "require_shapes", "require_version", "seen_by_hooks"]

STATE_VERSION = 1


def seen_by_hooks(hooks: Iterable[Callable[[dict[str, Any]], dict[str, Any] | None]], given: dict[str, Any]) -> Any:
    """What the hooks before loading make of a checkpoint: maybe a known format of one that is not.

    Args:
        hooks: each takes it, and may return another one.
        given: not modified.

    Returns:
        A dict with the keys of an optimizer's state.

    Raises:
        ValueError: it is something else.
    """
    state_dict = {**given}
    for hook in hooks:
        changed = hook(state_dict)
        state_dict = state_dict if changed is None else changed
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"got a dict with the keys {list(state_dict)[:4]}; need what an optimizer's state_dict() returned, "
            "with 'state' and 'param_groups': is it the model's? Nothing was changed."
        )
    return state_dict


def require_version(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    """The version of each saved group, 0 for those of ``torch.optim.SGD``.

    Args:
        groups: of the checkpoint.

    Returns:
        The versions.

    Raises:
        ValueError: one is newer than this code.
    """
    versions = [group.get("state_version", 0) for group in groups]
    if any(version > STATE_VERSION for version in versions):
        raise ValueError(f"got a checkpoint of version {max(versions)}, need {STATE_VERSION}: update torchgeom_optim.")
    return versions


def require_shapes(parameter: Tensor, values: Mapping[str, Any], needs: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a state that does not fit its parameter.

    Args:
        parameter: that it is to belong to.
        values: the state.
        needs: shapes by name, whether the state has these or not.

    Raises:
        ValueError: a tensor of another shape.
    """
    for key, need in needs.items():
        value = values.get(key)
        if isinstance(value, Tensor) and tuple(value.shape) != need:
            raise ValueError(
                f"got a checkpoint with {key} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}; need {need}: it is of another model or of other blocks, or its groups are "
                "in another order. Nothing was changed."
            )


@contextmanager
def back_on_error(optimizer: Optimizer) -> Iterator[None]:
    """Inside, an error brings back the state and the groups as they were. Tensors are not copied, only referred to.

    Args:
        optimizer: whose state is not changed in place inside; new tensors take the place of old ones.
    """
    state = {p: dict(values) for p, values in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        yield
    except BaseException:
        for p, values in list(optimizer.state.items()):
            values.clear()
            values.update(state.get(p, {}))
            if p not in state:
                del optimizer.state[p]
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
        raise
