from __future__ import annotations

import math

import pytest
import torch

from torchgeom_optim.diagnostics import agreement
from torchgeom_optim.diagnostics.masking import RandomMask

SHAPES = {"a.weight": torch.Size([40, 50]), "a.bias": torch.Size([40]), "b.scale": torch.Size([3]), "c": torch.Size([])}


def vectors(num: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) + mean[i] for name, shape in SHAPES.items()}
        for i in range(num)
    ]


def gram(rows):
    flat = torch.stack([torch.cat([x.reshape(-1) for x in row.values()]) for row in rows])
    return flat @ flat.T


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 1.0])
def test_each_layers_share_is_rounded_up_and_drawn_without_repetition(fraction):
    mask = RandomMask(SHAPES, fraction, torch.Generator().manual_seed(1))
    places = {name: torch.arange(shape.numel()).reshape(shape) for name, shape in SHAPES.items()}
    kept = mask(places)
    for name, index in kept.items():
        assert len(index.unique()) == len(index)
        assert index.numel() == 0 or int(index.max()) < SHAPES[name].numel()
    assert len(kept["a.weight"]) + len(kept["a.bias"]) == math.ceil(2040 * fraction)
    assert len(kept["b.scale"]) == math.ceil(3 * fraction)
    assert len(kept["c"]) == 1
    assert mask.size == sum(len(index) for index in kept.values())


def test_the_same_coordinates_of_every_vector():
    mask = RandomMask(SHAPES, 0.1)
    (row,) = vectors(1)
    assert all(torch.equal(3 * mask(row)[name], mask({k: 3 * v for k, v in row.items()})[name]) for name in SHAPES)
    assert all(torch.equal(x, mask(row)[name]) for name, x in mask(row).items())


def test_metrics_on_a_mask_come_within_its_error():
    rows = vectors(8)
    exact = gram(rows)
    errors = []
    for seed in range(20):
        mask = RandomMask(SHAPES, 0.2, torch.Generator().manual_seed(seed))
        K = gram([mask(row) for row in rows])
        estimate = float(agreement.gradient_coherence(K))
        errors.append(estimate - float(agreement.gradient_coherence(exact)))
        norm = K[0, 0] * 2044 / mask.size
        assert abs(float(norm / exact[0, 0]) - 1) < 5 * mask.relative_error(rows[0])
    assert abs(sum(errors) / 20) < 0.05
    full = RandomMask(SHAPES, 1.0)
    for metric in (agreement.gradient_confusion, agreement.gradient_coherence, agreement.effective_rank):
        torch.testing.assert_close(metric(gram([full(row) for row in rows])), metric(exact))


@pytest.mark.parametrize("fraction", [0.0, 1.1, math.nan])
def test_shares_out_of_range_are_refused(fraction):
    with pytest.raises(ValueError, match="fraction="):
        RandomMask(SHAPES, fraction)
