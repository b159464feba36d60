"""Models that compute with their samples in another order."""

import pytest
import torch
from torch import Tensor, nn

from tests.geometry.oracles_gram import assert_grams_close, expected_grams, expected_input_gram, gram_of
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_recorder import GramRecorder
from torchgeom_optim.geometry.jacobian import Jacobian


class MovesRows(nn.Module):
    """A model that computes with its samples in another order and puts them back, unless the loss is to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        if self.how == "permutes the input":
            return self.head(torch.tanh(self.norm(self.first(x[order]))))[order.argsort()]
        hidden = torch.tanh(self.first(x))
        if self.how == "flips":
            return self.head(self.norm(hidden.flip(0)).flip(0))
        if self.how == "rolls":
            return self.head(self.norm(hidden.roll(1, 0)).roll(-1, 0))
        if self.how == "swaps halves":
            return self.head(self.norm(torch.cat([hidden[1:], hidden[:1]]))).roll(1, 0)
        if self.how == "stacks rows":
            return self.head(self.norm(torch.stack([hidden[i] for i in order.tolist()])))[order.argsort()]
        if self.how == "scatters":
            back = torch.zeros_like(hidden).index_copy(0, order, self.norm(hidden[order]))
            return self.head(back)
        return self.head(self.norm(hidden[order]))[order.argsort()]


MOVES = ["flips", "sorts and unsorts", "permutes the input", "rolls", "swaps halves", "stacks rows", "scatters"]


@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("num_samples", [2, 5])
def test_models_that_move_rows(how: str, num_samples: int):
    model, loss_fn = MovesRows(how).double(), nn.CrossEntropyLoss()
    inputs = torch.randn(num_samples, 5, dtype=torch.float64)
    inputs[:, 0] = torch.tensor([0.3, -1.0, 2.0, 0.1, -3.0], dtype=torch.float64)[:num_samples]
    targets = torch.tensor([0, 2, 1, 0, 1])[:num_samples]
    expected = expected_grams(model, inputs, targets)
    own = per_sample_gram(model, loss_fn, inputs, targets, per_parameter=True, of_inputs=True)
    assert_grams_close(own.parameters, expected)
    assert_grams_close({"": own.inputs}, {"": expected_input_gram(model, inputs, targets)})
    with GramRecorder(model, per_parameter=True) as recorder:
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        recorded = recorder.result(loss=loss, loss_fn=loss_fn, targets=targets)
    assert_grams_close(recorded.parameters, expected)
    rows = []
    for x in inputs:
        for output in model(x[None])[0]:
            grads = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = Jacobian(model, inputs)
    assert_grams_close({"": jacobian.gram()}, {"": gram_of(torch.stack(rows))})


def test_inputs_in_another_order_that_nobody_restores_are_refused():
    model = MovesRows("").double()
    forward = model.forward
    model.forward = lambda x: forward(x.flip(0))
    inputs, targets = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="differ from those of its samples alone"):
        per_sample_gram(model, nn.CrossEntropyLoss(reduction="none"), inputs, targets)


class PicksEntries(nn.Module):
    """Looks up, flips, rolls and slices along other axes than the samples'."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc(x))
        x = x.flip(1).roll(1, -2)[:, torch.tensor([2, 0, 1])]
        x = torch.cat([x[:, :1], x[..., 1:, :]], 1).sort(-1)[0]
        return self.head(
            x[torch.arange(len(x)), torch.full((len(x),), 1)] + x.gather(1, torch.zeros_like(x).long())[:, 0]
        )


def test_moves_along_other_axes_stay_on_the_fast_route():
    model, inputs, targets = PicksEntries().double(), torch.randn(5, 3, 4).double(), torch.tensor([0, 2, 1, 0, 1])

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.log_softmax(1)[[4, 3, 2, 1, 0], targets.flip(0)].flip(0)

    result = per_sample_gram(model, loss_fn, inputs, targets, per_parameter=True)
    assert set(result.routes.values()) == {"rule"}
    assert_grams_close(result.parameters, expected_grams(model, inputs, targets))
