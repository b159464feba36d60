"""Single samples' gradients through one graph, however the loss comes about, against autograd on that very pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import tolerance
from torchgeom_optim.diagnostics.batch_gradient import BatchGradient
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.per_sample import Batch


class OwnLoss(nn.Module):
    """Dropout, a bare parameter that no rule knows, and a loss that the model computes."""

    def __init__(self, returned: str = "logits") -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.randn(8))
        self.drop = nn.Dropout(0.4)
        self.returned = returned

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        hidden = self.drop(torch.tanh(self.first(x) + self.shift))
        logits = self.head(hidden)
        loss = F.cross_entropy(logits, y)
        if self.returned == "penalty":
            loss = loss + self.shift.square().sum()
        elif self.returned == "both":
            loss = loss + hidden.square().sum(1).mean()
        others = {"hidden": hidden, "logits": logits}
        if self.returned in ("logits", "nothing"):
            del others["hidden"]
        return {"loss": loss, **({} if self.returned == "nothing" else others)}


def problem(returned: str = "logits") -> tuple[OwnLoss, dict[str, Tensor]]:
    torch.manual_seed(3)
    return OwnLoss(returned).double(), {"x": torch.randn(5, 4).double(), "y": torch.randint(3, (5,))}


def own_loss(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["loss"]


def gradients(model: nn.Module, inputs: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor]) -> list:
    """Of every sample, in the pass that the present state of the generator brings."""
    losses = loss(model(**inputs))
    return [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]


def cross_entropies(inputs: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda outputs: F.cross_entropy(outputs["logits"], inputs["y"], reduction="none")


@pytest.mark.parametrize("returned", ["logits", "hidden"])
def test_a_loss_of_the_models_own_under_dropout(returned):
    """Where it returns what the logits were made of as well, the loss does not go through that directly."""
    model, inputs = problem(returned)
    torch.manual_seed(4)
    result = per_sample_gram(model, own_loss, inputs, reduction="mean", per_parameter=True)
    torch.manual_seed(4)
    rows = gradients(model, inputs, cross_entropies(inputs))
    assert result.routes["shift"] == "loop"
    for k, name in enumerate(result.parameters):
        own = torch.stack([row[k].flatten() for row in rows])
        torch.testing.assert_close(result.parameters[name], own @ own.T, **tolerance(condition=100))


def test_single_samples_of_a_batch_gradient():
    model, inputs = problem()
    torch.manual_seed(4)
    found = BatchGradient(model, own_loss, Batch(inputs), reduction="mean").of_samples((3, 1))
    torch.manual_seed(4)
    rows = gradients(model, inputs, cross_entropies(inputs))
    for i, gradient in zip((3, 1), found, strict=True):
        for value, expected in zip(gradient.values(), rows[i], strict=True):
            torch.testing.assert_close(value, expected, **tolerance(condition=100))


def test_a_criterion_of_a_model_that_also_returns_a_number():
    model, inputs = problem()
    torch.manual_seed(4)
    criterion = lambda outputs: F.cross_entropy(outputs["logits"], inputs["y"], reduction="sum")  # noqa: E731
    (found,) = BatchGradient(model, criterion, Batch(inputs), reduction="sum").of_samples((2,))
    torch.manual_seed(4)
    rows = gradients(model, inputs, cross_entropies(inputs))
    for value, expected in zip(found.values(), rows[2], strict=True):
        torch.testing.assert_close(value, expected, **tolerance(condition=100))


@pytest.mark.parametrize("returned", ["nothing", "penalty", "both"])
def test_a_loss_that_cannot_be_told_apart_is_refused(returned):
    model, inputs = problem(returned)
    with pytest.raises(RuntimeError, match=r"returns its loss as one number.*5 samples.*return the logits beside"):
        per_sample_gram(model, own_loss, inputs, reduction="mean")
    model.eval()  # then each sample is evaluated alone
    assert per_sample_gram(model, own_loss, inputs, reduction="mean").routes["shift"] == "vmap"
