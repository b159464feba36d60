"""The metric of a reduction is the second order of its divergence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.oracles import tolerance
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.models.reduction_metric import divergence, head_of


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


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric='ficher': must be one of 'fisher', 'outputs'"):
        head_of("ficher")
