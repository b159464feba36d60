"""Spectra through J J' against dense matrices in the space of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import jacobian as oracle
from tests.oracles import tolerance
from tests.zoo import ZOO, Case
from torchgeom_optim.geometry.jacobian import Jacobian, JacobianMemoryError
from torchgeom_optim.geometry.spectrum import (
    _rows_are_cheaper,
    _through_rows,
    jacobian_density,
    jacobian_spectrum,
)

CLOSE = tolerance(condition=1e3)
SOME = [c for c in ZOO if c.name in ("mlp", "cnn", "tied_embedding", "lstm", "frozen")]


def dense(case: Case, num_samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, inputs, and J'J / N of the outputs by one backward pass per row."""
    model = case.model()
    x, _ = case.batch(num_samples)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = oracle(lambda i: model(x[i : i + 1]), len(x), parameters)
    return model, x, rows.T @ rows / len(x)


def linear(inputs: int = 6, outputs: int = 1, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).double()


@pytest.mark.parametrize("case", SOME, ids=repr)
def test_the_whole_spectrum_is_that_of_the_dense_matrix(case: Case) -> None:
    model, x, matrix = dense(case, 4)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    spectrum = jacobian_spectrum(Jacobian(model, x))
    k = len(spectrum.eigenvalues)
    assert k == min(4 * 3, len(matrix))
    assert (spectrum.size, spectrum.num_samples, spectrum.variant) == (len(matrix), 4, "outputs")
    torch.testing.assert_close(spectrum.eigenvalues, expected[:k], **CLOSE)
    torch.testing.assert_close(spectrum.trace.value, float(matrix.trace()), **CLOSE)
    assert (spectrum.trace.standard_error, spectrum.complete, spectrum.converged) == (0.0, True, True)
    assert float(spectrum.residuals.max()) < 1e-13 * float(expected[0])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(4 * spectrum.eigenvalues, expected[:k], **CLOSE)
    summed = jacobian_spectrum(Jacobian(model, x), normalisation="sum")
    torch.testing.assert_close(summed.eigenvalues, 4 * expected[:k], **CLOSE)
    torch.testing.assert_close(summed.roundoff, 4 * spectrum.roundoff, rtol=1.0, atol=0.0)


def test_it_prints_in_words() -> None:
    x = torch.randn(20, 6, dtype=torch.float64)
    whole, few = jacobian_spectrum(Jacobian(linear(), x)), jacobian_spectrum(Jacobian(linear(), x), 2)
    assert str(whole).splitlines()[0] == "J'J, J of outputs"
    assert str(whole).splitlines()[1].startswith(f"all 6 eigenvalues, {float(whole.eigenvalues[0]):.4g} to ")
    assert "6 above round-off" in str(whole)
    assert str(few).splitlines()[1].startswith("the largest 2 eigenvalues, ")
    assert "mean over N = 20 samples" in str(few)


@pytest.mark.parametrize("num_samples", [4, 20])  # fewer rows than weights, and more
@pytest.mark.parametrize("num_eigenvalues", [None, 5])
def test_eigenvectors_are_those_of_the_dense_matrix(num_samples: int, num_eigenvalues: int | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(num_samples, 3, dtype=torch.float64)
    rows = oracle(lambda i: model(x[i : i + 1]), len(x), list(model.parameters()))
    assert (len(rows) > rows.shape[1]) == (num_samples == 20)
    matrix = rows.T @ rows / len(x)
    spectrum = jacobian_spectrum(Jacobian(model, x), num_eigenvalues, tolerance=1e-12)
    V, values = spectrum.eigenvectors(5), spectrum.eigenvalues[:5]
    assert V.shape == (26, 5)
    torch.testing.assert_close(V.T @ V, torch.eye(5, dtype=torch.float64), **tolerance(condition=1e4))
    torch.testing.assert_close(matrix @ V, V * values, **tolerance(condition=1e4))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(2 * matrix @ V, V * values, **tolerance(condition=1e4))


def test_eigenvectors_of_a_convolution_come_through_rows() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)).double()
    x = torch.randn(6, 1, 6, 6, dtype=torch.float64)
    rows = oracle(lambda i: model(x[i : i + 1]), len(x), list(model.parameters()))
    J = Jacobian(model, x)
    assert _rows_are_cheaper(J, 12)
    assert not _rows_are_cheaper(J, 1)
    spectrum = jacobian_spectrum(J)
    V = spectrum.eigenvectors(12)
    torch.testing.assert_close(rows.T @ (rows @ V) / 6, V * spectrum.eigenvalues, **tolerance(condition=1e4))
    u = torch.randn(12, 3, dtype=torch.float64)
    torch.testing.assert_close(_through_rows(J, u), rows.T @ u, **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(_through_rows(J, u), -rows.T @ u, **CLOSE)


def test_more_rows_than_weights() -> None:
    model, x = linear(3, 2, bias=True), torch.randn(30, 3, dtype=torch.float64)
    rows = oracle(lambda i: model(x[i : i + 1]), len(x), list(model.parameters()))
    matrix = rows.T @ rows / len(x)
    for num in (None, 8):
        spectrum = jacobian_spectrum(Jacobian(model, x), num)
        torch.testing.assert_close(spectrum.eigenvalues, torch.linalg.eigvalsh(matrix).flip(0), **CLOSE)
        V = spectrum.eigenvectors()
        torch.testing.assert_close(V @ torch.diag(spectrum.eigenvalues) @ V.T, matrix, **CLOSE)
        assert spectrum.complete


def test_linear_regression_has_the_spectrum_of_the_data() -> None:
    x = torch.randn(9, 6, dtype=torch.float64) * torch.logspace(0, -3, 6, dtype=torch.float64)
    expected = torch.linalg.svdvals(x).square() / 9
    torch.testing.assert_close(jacobian_spectrum(Jacobian(linear(), x)).eigenvalues, expected, **CLOSE)
    # With C outputs each eigenvalue is there C times.
    spectrum = jacobian_spectrum(Jacobian(linear(outputs=3), x))
    torch.testing.assert_close(spectrum.eigenvalues, expected.repeat_interleave(3), **CLOSE)


@given(seed=st.integers(0, 99), num_samples=st.integers(2, 8))
def test_samples_in_another_order(seed: int, num_samples: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(num_samples, generator=generator)
    one, other = (jacobian_spectrum(Jacobian(model, data, of="sqrt_probabilities")) for data in (x, x[order]))
    torch.testing.assert_close(other.eigenvalues, one.eigenvalues, **CLOSE)


@given(seed=st.integers(0, 99))
def test_a_rotation_of_the_weights_changes_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rotated inputs and the first layer's weights rotated along compute the same function.
    Q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    before = jacobian_spectrum(Jacobian(model, x, of="sqrt_probabilities")).eigenvalues
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight @ Q.T)
    after = jacobian_spectrum(Jacobian(model, x @ Q.T, of="sqrt_probabilities")).eigenvalues
    torch.testing.assert_close(after, before, **CLOSE)
    stretched = jacobian_spectrum(Jacobian(model, 2 * x @ Q.T, of="sqrt_probabilities")).eigenvalues
    assert not torch.allclose(stretched, before)


def test_the_largest_by_products_with_residuals_and_a_trace() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(40, 8, dtype=torch.float64)
    J = Jacobian(model, x, of="sqrt_probabilities")
    whole = jacobian_spectrum(J)
    for block_size in (1, 8):
        top = jacobian_spectrum(J, 4, block_size=block_size, tolerance=1e-7)
        assert (top.complete, top.converged) == (False, True)
        assert top.num_products < 100
        assert bool((top.residuals <= 1e-7 * top.eigenvalues[0]).all())
        assert bool(((top.eigenvalues - whole.eigenvalues[:4]).abs() <= top.residuals + 1e-14).all())
        assert abs(top.trace.value - whole.trace.value) <= 5 * top.trace.standard_error
        assert 0 < top.trace.standard_error < 0.2 * whole.trace.value
        torch.testing.assert_close(top.trace_share(4), whole.trace_share(4), rtol=0.2, atol=0.0)
    density = jacobian_density(J, num_probes=20)
    assert abs(density.trace.value - whole.trace.value) <= 5 * density.trace.standard_error
    assert density.size == 120


def test_float32_products_are_decomposed_in_float64_and_their_error_is_told() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(30, 8)
    exact = jacobian_spectrum(Jacobian(model, x, dtype=torch.float64))
    single = jacobian_spectrum(Jacobian(model, x))
    assert (single.dtype, single.eigenvalues.dtype) == (torch.float32, torch.float64)
    error = float((single.eigenvalues - exact.eigenvalues).abs().max())
    assert 0 < error < 3 * float(single.residuals[0])
    assert float(single.residuals[0]) < 1e-5 * float(exact.eigenvalues[0])
    assert exact.roundoff < 1e-6 * single.roundoff
    assert single.rank <= exact.rank


def test_eigenvalues_of_many_float32_products_are_computed_in_float32_unless_they_would_drown() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 400, generator=generator) + 0.3
    model = nn.Sequential(nn.Linear(400, 32), nn.Tanh(), nn.Linear(32, 3))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1])
    J, exact = (Jacobian(model, x, of="sqrt_probabilities", dtype=dtype) for dtype in (None, torch.float64))
    single, double = jacobian_spectrum(J), jacobian_spectrum(exact)
    assert (single.eigenvalue_dtype, double.eigenvalue_dtype) == (torch.float32, torch.float64)
    assert len(single.eigenvalues) == single.rank == double.rank == 600
    off = (single.eigenvalues - double.eigenvalues).abs()
    assert bool((off <= single.residuals).all())
    assert 0 < float(off.max())
    assert single.roundoff == float(single.residuals.max()) < 0.2 * float(double.eigenvalues[-1])
    assert float((off / double.eigenvalues)[:10].max()) < 1e-5
    torch.testing.assert_close(single.trace.value, double.trace.value, rtol=1e-6, atol=0.0)
    V = single.eigenvectors(3).float()
    torch.testing.assert_close(J.T @ (J @ V) / 300, V * single.eigenvalues[:3].float(), **tolerance(torch.float32, 10))
    with torch.no_grad():
        model[2].weight.mul_(30)  # sure of itself, as after training
    sure = jacobian_spectrum(Jacobian(model, x, of="sqrt_probabilities"))
    assert sure.eigenvalue_dtype == torch.float64
    assert sure.rank < 600


def test_the_dependent_direction_of_each_sample_is_left_out_where_it_is_one_distribution() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    J = Jacobian(model, x, of="sqrt_probabilities")
    spectrum = jacobian_spectrum(J)
    rows = J.dense()
    assert len(spectrum.eigenvalues) == 5 * 2
    expected = torch.linalg.eigvalsh(rows.T @ rows / 5).flip(0)
    torch.testing.assert_close(spectrum.eigenvalues, expected[:10], **CLOSE)
    V = spectrum.eigenvectors(4)
    torch.testing.assert_close(rows.T @ (rows @ V) / 5, V * spectrum.eigenvalues[:4], **tolerance(condition=1e4))
    positions = Jacobian(nn.Linear(4, 3).double(), torch.randn(2, 2, 4, dtype=torch.float64), of="sqrt_probabilities")
    assert len(jacobian_spectrum(positions).eigenvalues) == 12  # two distributions a sample: all rows are kept


def test_sloppiness_counts_from_the_measured_round_off() -> None:
    x = torch.randn(20, 6, dtype=torch.float64) * torch.logspace(0, -5, 6, dtype=torch.float64)
    x = torch.cat([x, x[:, :2]], 1)  # two features twice: rank 6 of 8
    spectrum = jacobian_spectrum(Jacobian(linear(8), x))
    numbers = spectrum.sloppiness()
    assert (numbers.num_eigenvalues, numbers.rank, spectrum.rank) == (8, 6, 6)
    assert numbers.roundoff == spectrum.roundoff
    assert 9 < numbers.decades < 11


def test_equal_inputs_have_one_direction() -> None:
    x = torch.ones(6, 4, dtype=torch.float64)
    spectrum = jacobian_spectrum(Jacobian(linear(4), x))
    assert spectrum.rank == 1
    torch.testing.assert_close(spectrum.eigenvalues, torch.tensor([4.0, 0, 0, 0], dtype=torch.float64), **CLOSE)
    with pytest.raises(ValueError, match=r"num=2: must be in \[1, 1\].*6 samples. Take more samples"):
        spectrum.eigenvectors(2)


def test_an_incomplete_spectrum_does_not_say_how_sloppy_it_is() -> None:
    J = Jacobian(linear(8), torch.randn(20, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="the 3 largest eigenvalues: all are needed"):
        jacobian_spectrum(J, 3).sloppiness()


def test_eigenvectors_notice_that_the_weights_have_moved() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    spectrum = jacobian_spectrum(Jacobian(model, torch.randn(5, 8, dtype=torch.float64)))
    spectrum.eigenvectors(2)
    with torch.no_grad():
        model[2].weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="not those of the spectrum any more"):
        spectrum.eigenvectors(2)


def test_nothing_is_left_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    x = torch.randn(6, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    jacobian_spectrum(Jacobian(model, x, of="sqrt_probabilities")).eigenvectors(2)
    jacobian_spectrum(Jacobian(model, x, of="sqrt_probabilities"), 2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_bad_input() -> None:
    model, x = linear(3), torch.randn(5, 3, dtype=torch.float64)
    J = Jacobian(model, x)
    with pytest.raises(ValueError, match="normalisation='none'"):
        jacobian_spectrum(J, normalisation="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalisation='none'"):
        jacobian_density(J, normalisation="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num=4: must be in \[1, 3\]"):
        jacobian_spectrum(J, 4)
    with pytest.raises(ValueError, match="tolerance=nan"):
        jacobian_spectrum(J, 1, tolerance=math.nan)
    with pytest.raises(JacobianMemoryError):
        jacobian_spectrum(Jacobian(linear(400), torch.randn(300, 400).double(), memory_limit=2**19))
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        jacobian_spectrum(Jacobian(model, x))
    with pytest.raises(ValueError, match="not finite"):
        jacobian_spectrum(Jacobian(linear(30).float(), 1e25 * torch.ones(5, 30)))
    with torch.no_grad():
        still = jacobian_spectrum(Jacobian(nn.Sequential(linear(3), nn.Hardtanh(5.0, 6.0)).double(), 0 * x))
    assert (still.rank, still.trace.value) == (0, 0.0)
    with pytest.raises(ValueError, match="one above round-off"):
        still.sloppiness()
