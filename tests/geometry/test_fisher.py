"""The variants of the Fisher matrix against sums over all classes, each told from the others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.oracles import tolerance
from torchgeom_optim.geometry.fisher import fisher_jacobian, fisher_spectrum

CLOSE = tolerance(condition=1e3)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(num_samples: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(num_samples, 4, dtype=torch.float64), torch.randint(3, (num_samples,))


def scores(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """grad log p_c of every sample and class [N, C, P], and p [N, C]."""
    rows, p = [], []
    for sample in x:
        log_p = F.log_softmax(model(sample), 0)
        grads = [torch.autograd.grad(entry, list(model.parameters()), retain_graph=True) for entry in log_p]
        rows.append(torch.stack([torch.cat([g.reshape(-1) for g in grad]) for grad in grads]))
        p.append(log_p.exp().detach())
    return torch.stack(rows), torch.stack(p)


def top(matrix: Tensor, num: int) -> Tensor:
    return torch.linalg.eigvalsh(matrix).flip(0)[:num]


def test_the_exact_one_is_the_sum_over_all_classes() -> None:
    model, (x, _) = network(), data()
    s, p = scores(model, x)
    fisher = torch.einsum("nc,nci,ncj->ij", p, s, s) / len(x)
    spectrum = fisher_spectrum(model, x)
    assert spectrum.variant == "exact"
    assert "2 sqrt" in spectrum.matrix or "sqrt_probabilities" in spectrum.matrix
    assert "mean over N = 6" in spectrum.normalisation
    torch.testing.assert_close(spectrum.eigenvalues, top(fisher, 12), **CLOSE)
    torch.testing.assert_close(fisher_spectrum(model, x, None, 5).eigenvalues, top(fisher, 5), rtol=0.0, atol=1e-7)
    V = spectrum.eigenvectors(5)
    torch.testing.assert_close(fisher @ V, V * spectrum.eigenvalues[:5], **tolerance(condition=1e4))
    for wrong in (torch.einsum("nci,ncj->ij", s, s), 6 * fisher):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(spectrum.eigenvalues, top(wrong, 12), **CLOSE)


def test_the_four_variants_are_four_matrices() -> None:
    model, (x, y) = network(), data()
    s, p = scores(model, x)
    given = s[torch.arange(6), y]
    outputs = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)), argnums=0)(
        {name: value.detach() for name, value in model.named_parameters()}
    )
    rows = torch.cat([j.reshape(18, -1) for j in outputs.values()], 1)
    expected = {
        "exact": torch.einsum("nc,nci,ncj->ij", p, s, s) / 6,
        "empirical": given.T @ given / 6,
        "outputs": rows.T @ rows / 6,
    }
    spectra = {
        variant: fisher_spectrum(model, x, y if variant == "empirical" else None, variant=variant)  # type: ignore[arg-type]
        for variant in ("exact", "drawn", "empirical", "outputs")
    }
    for variant, matrix in expected.items():
        values = spectra[variant].eigenvalues
        torch.testing.assert_close(values, top(matrix, len(values)), **CLOSE)
    assert [spectrum.variant for spectrum in spectra.values()] == list(spectra)
    largest = torch.stack([spectrum.eigenvalues[:4] for spectrum in spectra.values()])
    assert bool(((largest[:, None] - largest).norm(dim=2) + torch.eye(4) > 1e-3).all())
    assert (len(spectra["drawn"].eigenvalues), len(spectra["empirical"].eigenvalues)) == (6, 6)


def test_drawn_labels_are_drawn_from_the_model() -> None:
    model, (x, _) = network(), data(3)
    s, p = scores(model, x)
    exact = torch.einsum("nc,nci,ncj->ij", p, s, s) / 3
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(200):
        rows = fisher_jacobian(model, x, variant="drawn", generator=generator).dense()
        torch.testing.assert_close((rows[:, None] - s).abs().sum(2).min(1).values, torch.zeros(3).double(), **CLOSE)
        draws.append(rows.T @ rows / 3)
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / math.sqrt(200)
    assert bool(((mean - exact).abs() <= 5 * error + 1e-12).all())
    uniform = torch.einsum("nci,ncj->ij", s, s) / 9
    assert not bool(((mean - uniform).abs() <= 5 * error + 1e-12).all())


def test_draws_follow_the_generator_and_leave_the_global_one_alone() -> None:
    model, (x, _) = network(), data(20)
    before = torch.get_rng_state()
    one, same, other, default, again = (
        fisher_jacobian(model, x, variant="drawn", generator=generator).gram()
        for generator in [*(torch.Generator().manual_seed(seed) for seed in (1, 1, 2)), None, None]
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert torch.equal(default, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("variant", ["exact", "drawn", "empirical", "outputs"])
def test_a_loader_is_the_same_as_the_whole(variant: str) -> None:
    model, (x, y) = network(), data(7)
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    whole = fisher_spectrum(model, x, y if variant == "empirical" else None, variant=variant)  # type: ignore[arg-type]
    parts = fisher_spectrum(model, loader, variant=variant)  # type: ignore[arg-type]
    torch.testing.assert_close(parts.eigenvalues, whole.eigenvalues, **CLOSE)


def test_labels_are_drawn_for_inputs_of_any_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, None]:
            return self.linear(a + b).movedim(-1, 1), None

    model = Two().double()
    a, b = torch.randn(2, 5, 2, 4, dtype=torch.float64)  # two positions per sample, classes along axis 1
    options = {"variant": "drawn", "select": lambda output: output[0], "class_dim": 1}
    whole = fisher_jacobian(model, (a, b), **options)  # type: ignore[arg-type]
    named = fisher_jacobian(model, {"b": b, "a": a}, **options)  # type: ignore[arg-type]
    parts = fisher_jacobian(model, [((a[:3], b[:3]), None), [(a[3:], b[3:])]], **options)  # type: ignore[arg-type]
    assert whole.shape == (5, 15)
    torch.testing.assert_close(named.dense(), whole.dense(), **CLOSE)
    torch.testing.assert_close(parts.dense(), whole.dense(), **CLOSE)


def test_float32_where_it_is_asked_for() -> None:
    model, (x, _) = network().float(), data()
    x = x.float()
    assert fisher_spectrum(model, x).dtype == torch.float64
    single = fisher_spectrum(model, x, dtype=None)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.eigenvalues, fisher_spectrum(model, x).eigenvalues, rtol=1e-3, atol=1e-5)


def test_what_is_refused() -> None:
    model, (x, y) = network(), data()
    with pytest.raises(ValueError, match="variant='true': must be one of 'exact'"):
        fisher_spectrum(model, x, variant="true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only 'empirical' takes the given labels"):
        fisher_spectrum(model, x, y)
    with pytest.raises(ValueError, match="targets are NoneType"):
        fisher_spectrum(model, x, variant="empirical")
    with pytest.raises(ValueError, match="no class axis"):
        fisher_spectrum(model, x, variant="drawn", select=lambda z: z[:, 0])
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan  # type: ignore[index]
    for variant in ("exact", "drawn", "outputs"):
        with pytest.raises(ValueError, match="not finite"):
            fisher_spectrum(model, x, variant=variant)  # type: ignore[arg-type]
