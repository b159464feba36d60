"""The members of the block natural gradient family that have names, as constructors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

__all__ = ["NamedMembers"]

_T = TypeVar("_T", bound="NamedMembers")


class NamedMembers:
    """Mixin of :class:`~torchgeom_optim.optimizers.natural_gradient.BlockNaturalGradient`.

    Default rates: of the half-decades tried on mlp2, lenet and char_gpt (100 steps, decaying linearly to 0), one that
    is not far from the best on any of them; ``benchmarks/does_the_natural_gradient_lower_the_loss.py``.
    """

    @classmethod
    def rmsprop(
        cls: type[_T],
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.001,
        norm_decay: float = 0.99,
        eps: float = 1e-16,
        **settings: Any,
    ) -> _T:
        """RMSProp (§3.4): w -= lr g / sqrt(eps + R), R the running average of g^2 from zero.

        Equal to ``torch.optim.RMSprop(alpha=norm_decay)`` at eps = 0; torch adds its eps outside of the root.

        Args:
            params: as for the class; needs no model.
            lr: length of the step.
            norm_decay: weight of the past in R; torch's alpha, and 1 - lambda of §3.4.
            eps: under the root.
            **settings: any other of the class.

        Returns:
            The optimizer.
        """
        family = {"metric": "identity", "block": "weight", "norm_start": "zero"}
        return _build(cls, params, lr, norm_decay=norm_decay, eps=eps, **{**family, **settings})

    @classmethod
    def normalized_sgd(
        cls: type[_T],
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.0,
        block: Literal["layer", "network"] = "network",
        **settings: Any,
    ) -> _T:
        """Gradient descent with steps of Euclidean length lr, in every layer or in the network as a whole.

        Args:
            params: as for the class; without a model each parameter is a layer of its own.
            lr: length of the step.
            block: what has this length.
            **settings: any other of the class.

        Returns:
            The optimizer.
        """
        return _build(
            cls, params, lr, **{"metric": "identity", "block": block, "norm_decay": 0.0, "eps": 0.0, **settings}
        )

    @classmethod
    def fan_in(cls: type[_T], params: nn.Module | Iterable[Any], lr: float | Tensor = 3.0, **settings: Any) -> _T:
        """Steps divided by sqrt(n s) (§3.5), n the fan-in and s the positions at which a weight is applied.

        Equal to ``WhiteningSGD(rule="fan_in")``.

        Args:
            params: as for the class; groups need ``model=``, among the settings.
            lr: learning rate.
            **settings: any other of the class.

        Returns:
            The optimizer.
        """
        return _build(cls, params, lr, **{"metric": "identity", "block": "unit", "expectation": "fan_in", **settings})

    @classmethod
    def trpo(cls: type[_T], params: nn.Module | Iterable[Any], lr: float | Tensor = 0.03, **settings: Any) -> _T:
        """Natural gradient with one step length for the whole network: Eq. (9), as in TRPO (Schulman et al. 2015).

        G is block-diagonal over layers: Kronecker factors, or with ``metric="exact"`` each layer's whole matrix.

        Args:
            params: as for the class; groups need ``model=``, among the settings.
            lr: metric length of the step.
            **settings: any other of the class.

        Returns:
            The optimizer.
        """
        family = {"metric": "kronecker", "block": "network", "norm_decay": 0.0, "eps": 0.0}
        return _build(cls, params, lr, **{**family, **settings})

    @classmethod
    def kfac(cls: type[_T], params: nn.Module | Iterable[Any], lr: float | Tensor = 0.03, **settings: Any) -> _T:
        """K-FAC (Martens and Grosse 2015) with a trust region in every layer in place of its rescaling.

        Factors from every step, inverses every 10 steps, unless settings say otherwise.

        Args:
            params: as for the class; groups need ``model=``, among the settings.
            lr: metric length of a layer's step.
            **settings: any other of the class.

        Returns:
            The optimizer.
        """
        return _build(cls, params, lr, **{"metric": "kronecker", "block": "layer", **settings})


def _build(cls: Callable[..., _T], *args: Any, **settings: Any) -> _T:
    return cls(*args, **settings)
