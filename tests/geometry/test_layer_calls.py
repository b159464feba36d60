"""Which calls of a model's layers can be taken for the samples' own."""

import pytest
import torch
from torch import Tensor, nn

from tests.geometry.oracles_gram import (
    assert_grams_close,
    expected_grams,
)
from tests.zoo import Recurrent
from torchgeom_optim.geometry.gram import per_sample_gram


def test_overwritten_inputs_are_refused():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.fc(x)
            x.zero_()
            return y

    with pytest.raises(RuntimeError, match="modified in place"):
        per_sample_gram(Overwrites(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3))


def test_a_model_of_fixed_batch_size_is_refused():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(4, 3))

    with pytest.raises(RuntimeError, match="any number of samples"):
        per_sample_gram(Fixed(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3))


@pytest.mark.parametrize("length", [3, 4])
def test_time_first_is_noticed_at_every_length(length: int):
    """With as many steps as samples, shapes alone do not tell."""
    model = Recurrent(nn.GRU, False).double()
    model.head_of_steps = nn.Linear(5, 5).double()
    plain = model.forward

    def forward(x: Tensor) -> Tensor:
        outputs, _ = model.rnn(x.transpose(0, 1))
        return model.head(torch.tanh(model.head_of_steps(outputs)).mean(0))

    assert plain is not forward
    model.forward = forward
    inputs, targets = torch.randn(4, length, 4).double(), torch.tensor([0, 1, 2, 0])
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    assert result.routes["head_of_steps.weight"] in ("vmap", "loop")
    assert result.routes["head.weight"] == "rule"
    assert_grams_close(result.parameters, expected_grams(model, inputs, targets))


def test_a_hook_that_the_model_needs_is_called():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].register_forward_pre_hook(lambda module, args: (args[0].flatten(1),))
    inputs, targets = torch.randn(4, 3, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    assert set(result.routes.values()) == {"rule"}
    assert_grams_close(result.parameters, expected_grams(model, inputs, targets))
