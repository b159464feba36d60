"""The metric of a reduction is the second order of its divergence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.mini_batches import MiniBatch
from torchgeom_optim.models.reduction_metric import divergence, head_of, probed_jacobian


@pytest.mark.parametrize("metric", ["fisher", "outputs"])
def test_half_of_it_is_the_hessian_of_the_divergence(metric):
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    wanted = model(x).detach()

    def moved(flat: torch.Tensor) -> torch.Tensor:
        weight, bias = flat[:12].view(4, 3), flat[12:]
        return divergence(wanted, x @ weight.T + bias, metric, -1)

    at = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(moved, at)
    J = Jacobian(model, x, of=head_of(metric)).dense()
    torch.testing.assert_close(hessian, J.T @ J / len(x), **tolerance(condition=100))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(hessian, J.T @ J, **tolerance(condition=100))


@pytest.mark.parametrize("metric", ["fisher", "outputs"])
def test_rows_of_random_signs_have_the_diagonal_in_the_mean(metric):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 4, 2)).double()  # classes at several positions
    x = torch.randn(5, 2, 6).double()
    samples, generator = MiniBatch(x, None, 5), torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        J = probed_jacobian(model, samples, metric, generator, class_dim=1)
        assert J.shape[0] == 5
        draws.append(J.dense().square().sum(0))
    draws = torch.stack(draws)
    exact = Jacobian(model, x, of=head_of(metric), class_dim=1).dense().square().sum(0)
    error = draws.std(0) / 20
    assert bool(((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all())
    assert not bool(((2 * draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all())
    assert bool((draws.std(0) <= 2**0.5 * 1.2 * exact).all())  # the bound that the docstring states, for one sample


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric='ficher': must be one of 'fisher', 'outputs'"):
        head_of("ficher")
