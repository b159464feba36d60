"""Patches of convolutions: times the weights they are what torch's convolution returns, at the positions looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim.optimizers import layer_rows
from torchgeom_optim.optimizers.layers import find_affine_layers

F64 = torch.float64

CONVOLUTIONS = [
    (nn.Conv1d(3, 4, 3, padding=1), (9,)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (7, 8)),
    (nn.Conv2d(2, 3, (2, 3), dilation=(2, 1), bias=False), (8, 6)),
    (nn.Conv2d(3, 3, 2, stride=(3, 2), groups=3, padding=(0, 2)), (8, 5)),
    (nn.Conv2d(2, 2, 4, padding="same", dilation=2), (9, 9)),
    (nn.Conv2d(2, 2, 3, padding=2, padding_mode="reflect"), (6, 6)),
    (nn.Conv3d(2, 3, 2, stride=2), (4, 5, 6)),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("enough", [1000, 6])
@pytest.mark.parametrize(("module", "size"), CONVOLUTIONS, ids=str)
def test_patches_times_the_weights_are_the_outputs(module, size, enough, layout, monkeypatch):
    if layout == torch.channels_last and len(size) != 2:
        pytest.skip("of images only")
    monkeypatch.setattr(layer_rows, "_ENOUGH_POSITIONS", enough)
    monkeypatch.setattr(layer_rows, "_POSITIONS_PER_ENTRY", 0)
    module = module.to(F64)
    x = torch.randn(3, module.in_channels, *size, dtype=F64).to(memory_format=layout)
    y = module(x).detach()
    ((layer,), _) = find_affine_layers(module, lambda p: True)
    rows = layer_rows.input_rows(layer, x, y.shape)
    weight = module.weight.detach().flatten(1).unflatten(0, (module.groups, -1))
    if module.bias is not None:
        weight = torch.cat([weight, module.bias.detach().view(module.groups, -1, 1)], 2)
    found = rows.values @ weight.transpose(1, 2)  # [groups, n, m / groups]
    positions = y.shape[2:]
    num_samples, num_positions = len(x), y[0, 0].numel()
    every = max(1, round((num_samples * num_positions / enough) ** (1 / len(positions))))
    some = y[(..., *(slice(min((every - 1) // 2, n - 1), None, every) for n in positions))]
    assert (some.numel() < y.numel()) == (every > 1) == (enough == 6)
    expected = some.flatten(2).unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(found, expected, **tolerance(condition=100))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, 1.001 * expected, **tolerance(condition=100))
    assert rows.share == pytest.approx(num_positions / found.shape[1])
