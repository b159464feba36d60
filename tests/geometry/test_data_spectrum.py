"""The spectrum of the data against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import tolerance
from torchgeom_optim.geometry.data_spectrum import data_spectrum


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", [(20, 2, 3), (4, 9)], ids=["more samples", "more features"])
def test_the_autocorrelation(shape: tuple[int, ...], centred: bool) -> None:
    x = 3 + torch.randn(shape, dtype=torch.float64)
    X = x.reshape(len(x), -1)
    # torch.cov divides by N too with correction=0.
    matrix = torch.cov(X.T, correction=0) if centred else sum(torch.outer(row, row) for row in X) / len(X)
    spectrum = data_spectrum(x, centred=centred)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(spectrum.eigenvalues, expected[: len(spectrum.eigenvalues)], **tolerance(condition=1e3))
    torch.testing.assert_close(spectrum.trace.value, float(matrix.trace()), **tolerance(condition=1e2))
    assert (spectrum.variant, spectrum.size, spectrum.complete) == ("data", X.shape[1], True)
    assert ("centred" in spectrum.matrix) == centred
    V = spectrum.eigenvectors(2)
    torch.testing.assert_close(matrix @ V, V * spectrum.eigenvalues[:2], **tolerance(condition=1e3))
    other = data_spectrum(x, centred=not centred)
    assert not torch.allclose(other.eigenvalues[:2], spectrum.eigenvalues[:2])


def test_mini_batches_are_the_same_as_the_whole() -> None:
    x = torch.randn(10, 3)
    parts = data_spectrum([(x[:4], torch.zeros(4)), (x[4:], torch.zeros(6))])
    torch.testing.assert_close(parts.eigenvalues, data_spectrum(x).eigenvalues, **tolerance())


@given(seed=st.integers(0, 99), num=st.integers(2, 12), features=st.integers(1, 9))
def test_order_and_rotation_do_not_matter(seed: int, num: int, features: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, features, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    other = data_spectrum(x[torch.randperm(num, generator=generator)] @ Q)
    torch.testing.assert_close(other.eigenvalues, data_spectrum(x).eigenvalues, **tolerance(condition=1e2))


def test_condition_numbers_are_not_squared() -> None:
    scales = torch.logspace(0, -11, 12, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(30, 12, dtype=torch.float64))[0]
    numbers = data_spectrum(Q * scales).sloppiness()
    assert numbers.rank == 12
    assert abs(numbers.decades - 22) < 0.1  # a Gram matrix ends at 15


def test_equal_inputs() -> None:
    x = torch.full((5, 3), 0.1)
    spectrum = data_spectrum(x)
    assert (spectrum.rank, spectrum.sloppiness().decades) == (1, 0.0)
    with pytest.raises(ValueError, match="all 5 inputs are equal"):
        data_spectrum(x, centred=True)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        data_spectrum(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match=r"inputs of .*torch.int64"):
        data_spectrum(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="one floating-point tensor per sample"):
        data_spectrum((torch.ones(3, 2), torch.ones(3, 2)))
    with pytest.raises(TypeError, match="list_iterator"):
        data_spectrum(iter([torch.ones(3, 2)]))
