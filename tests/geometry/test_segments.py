"""Joined vectors against the vectors one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import tolerance
from torchgeom_optim.geometry.segments import Segments


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_means_and_numbers_of_each_vector(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]
    segments = Segments(tuple(sizes), vectors[0])
    means = torch.stack([vector.mean() for vector in vectors])
    torch.testing.assert_close(segments.means(torch.cat(vectors)), means, **tolerance())
    spread = torch.cat([mean.expand(size) for mean, size in zip(means, sizes, strict=True)])
    torch.testing.assert_close(segments.spread(means), spread, rtol=0, atol=0)
    for part, vector in zip(segments.split(torch.cat(vectors)), vectors, strict=True):
        torch.testing.assert_close(part, vector, rtol=0, atol=0)
