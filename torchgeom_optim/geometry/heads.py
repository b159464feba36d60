"""What the rows of a Jacobian are of: a network's outputs, or a function of them, sample by sample.

Each function turns outputs [N, ...] into values [N, C] of which row i depends on sample i alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "HeadName",
    "flat_outputs",
    "head_values",
    "label_log_probabilities",
    "needs_targets",
    "sample_losses",
    "sqrt_probabilities",
]

HeadName = Literal["outputs", "loss", "log_probabilities", "sqrt_probabilities"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


def flat_outputs(outputs: Tensor) -> Tensor:
    """Outputs [N, ...] as [N, C], C the number of output entries of one sample."""
    return outputs.reshape(len(outputs), -1)


def label_log_probabilities(outputs: Tensor, labels: Tensor, class_dim: int = -1) -> Tensor:
    """Log-probability of each sample's given labels under softmax(outputs): [N, 1].

    Where a sample has several positions (sequences, images) their log-probabilities are added: the
    logarithm of the probability of the sample's whole labelling.

    Args:
        outputs: logits [N, ..., K, ...], the K classes along ``class_dim``.
        labels: integers in [0, K), the shape of ``outputs`` without ``class_dim``.
        class_dim: the axis of the classes.

    Returns:
        [N, 1], in nats.

    Raises:
        ValueError: the shape of the labels does not fit.
    """
    log_p = torch.log_softmax(outputs, class_dim).movedim(class_dim, -1)
    if labels.shape != log_p.shape[:-1]:
        raise ValueError(
            f"labels of shape {list(labels.shape)}: outputs {list(outputs.shape)} with classes along axis {class_dim} "
            f"need {list(log_p.shape[:-1])}. Give one integer per position, or another class_dim."
        )
    return log_p.gather(-1, labels.long().unsqueeze(-1)).reshape(len(outputs), -1).sum(1, keepdim=True)


def sqrt_probabilities(outputs: Tensor, class_dim: int = -1) -> Tensor:
    r"""2 sqrt(p), p = softmax(outputs), flattened to [N, C].

    With J its Jacobian, J'J = sum over samples and classes of p_c grad(log p_c) grad(log p_c)', the Fisher
    matrix times N, exactly and without drawing labels. Positions count as independent.

    Args:
        outputs: logits [N, ..., K, ...], the K classes along ``class_dim``.
        class_dim: the axis of the classes.

    Returns:
        [N, C], in the order of the outputs.
    """
    # exp(log(p) / 2), not sqrt(p): the derivative sqrt(p) dlog p stays finite where p underflows.
    return 2 * torch.exp(torch.log_softmax(outputs, class_dim) / 2).reshape(len(outputs), -1)


def sample_losses(outputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
    """The loss of each sample by itself, loss_fn(outputs[i:i+1], targets[i:i+1]): [N, 1].

    A mean over the one sample changes nothing, so losses with ``reduction`` "mean", "sum" and "none" agree
    where a sample has one target; with several, the loss's own mean or sum over positions is kept.

    Args:
        outputs: [N, ...].
        targets: [N, ...].
        loss_fn: called with a batch of one.

    Returns:
        [N, 1].

    Raises:
        ValueError: the loss of one sample is not one number.
    """

    def loss_of_one(output: Tensor, target: Tensor) -> Tensor:
        loss = loss_fn(output.unsqueeze(0), target.unsqueeze(0))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"loss_fn gave {got} for one sample: one number is needed. Try reduction='mean' or 'sum' in the loss."
            )
        return loss.reshape(1)

    try:
        losses: Tensor = torch.vmap(loss_of_one)(outputs, targets)
    except RuntimeError:  # vmap cannot follow this loss; whatever else is wrong is raised again by the loop
        losses = torch.stack([loss_of_one(o, t) for o, t in zip(outputs, targets, strict=True)])
    return losses


def needs_targets(of: HeadName) -> bool:
    """Whether the values depend on targets."""
    return of in ("loss", "log_probabilities")


def head_values(
    of: HeadName, loss_fn: LossFunction | None, class_dim: int
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The function of that name.

    Args:
        of: its name.
        loss_fn: the loss, for "loss" alone.
        class_dim: axis of the classes, for the heads of probabilities.

    Returns:
        (outputs, targets) -> values [N, C].

    Raises:
        ValueError: unknown name; ``loss_fn`` missing where it is needed, or given where it has no meaning.
    """
    if of not in get_args(HeadName):
        raise ValueError(f"of={of!r}: must be one of {', '.join(map(repr, get_args(HeadName)))}.")
    if (loss_fn is not None) != (of == "loss"):
        raise ValueError(
            f"of={of!r} with loss_fn={loss_fn!r}: a loss_fn belongs to of='loss', and to it alone. "
            "Give both, for example of='loss', loss_fn=nn.CrossEntropyLoss(), or neither."
        )

    def values(outputs: Tensor, targets: Tensor | None) -> Tensor:
        if of == "outputs":
            return flat_outputs(outputs)
        if of == "sqrt_probabilities":
            _check_classes(outputs, class_dim)
            return sqrt_probabilities(outputs, class_dim)
        assert targets is not None  # checked where the data is taken in
        if of == "log_probabilities":
            _check_classes(outputs, class_dim)
            return label_log_probabilities(outputs, targets, class_dim)
        assert loss_fn is not None
        return sample_losses(outputs, targets, loss_fn)

    return values


def _check_classes(outputs: Tensor, class_dim: int) -> None:
    if outputs.dim() < 2 or not -outputs.dim() <= class_dim < outputs.dim() or class_dim % outputs.dim() == 0:
        raise ValueError(
            f"outputs of shape {list(outputs.shape)} have no class axis {class_dim}: probabilities need logits "
            "[N, K], or further axes with class_dim naming that of the K classes. Try another class_dim."
        )
    if outputs.shape[class_dim] < 2:
        raise ValueError(
            f"outputs of shape {list(outputs.shape)} have one class along axis {class_dim}, whose probability is 1 "
            "whatever the weights: two or more are needed. For a single logit z, give the model the outputs [0, z]."
        )
