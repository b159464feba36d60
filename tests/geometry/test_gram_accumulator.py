"""Matrices layer by layer."""

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from tests.zoo import ZOO
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_accumulator import layer_of
from torchgeom_optim.geometry.gram_recorder import GramRecorder


@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_a_layers_matrix_is_the_sum_of_its_parameters_matrices(case):
    model, (inputs, targets) = case.model(), case.batch()
    expected = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    with GramRecorder(model, per_layer=True) as recorder:
        nn.CrossEntropyLoss()(model(inputs), targets).backward()
        recorded = recorder.result(loss_fn=nn.CrossEntropyLoss(), targets=targets)
    alone = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_layer=True)
    for result in (recorded, alone):
        assert result.parameters is None
        assert list(result.layers) == list(dict.fromkeys(layer_of(name) for name in expected.parameters))
        for layer, found in result.layers.items():
            own = [part for name, part in expected.parameters.items() if layer_of(name) == layer]
            torch.testing.assert_close(found, sum(own), **tolerance(condition=1e3))
        torch.testing.assert_close(result.weights, expected.weights, **tolerance(condition=1e3))
    assert [layer_of(name) for name in ("0.weight", "body.2.bias", "scale")] == ["0", "body.2", "scale"]
