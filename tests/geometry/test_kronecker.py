"""Kronecker factors, their eigenbases and the exact diagonal against dense matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import jacobian as oracle
from tests.oracles import tolerance
from tests.zoo import ZOO, Case
from torchgeom_optim.geometry import factors as factors_module
from torchgeom_optim.geometry import kronecker
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.kronecker import (
    KroneckerBasis,
    ParameterMatrix,
    diagonal_in,
    kronecker_factors,
    parameter_matrices,
)

CLOSE = tolerance(condition=1e3)


def roots(outputs: Tensor) -> Tensor:
    return 2 * outputs.softmax(-1).sqrt()


def dense_rows(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """J of 2 sqrt(p) [N C, P] by one backward pass per row, and its columns by name: [N C, *shape]."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = oracle(lambda i: roots(model(x[i : i + 1])), len(x), list(named.values()))
    parts = rows.split([p.numel() for p in named.values()], 1)
    return rows, {name: part.view(-1, *p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_the_diagonal_in_the_eigenbasis_is_that_of_the_dense_matrix(case: Case) -> None:
    model, x = case.model(), case.batch(3)[0]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows, named_rows = dense_rows(model, x)
    J = Jacobian(model, x, of="sqrt_probabilities", batch_size=2)
    bases = [factors.eigenbasis() for factors in kronecker_factors(J)]
    names = [name for basis in bases for name in basis.layout.names]
    assert sorted(names) == sorted(J.vectors.shapes)
    total = 0.0
    for basis, lam in zip(bases, diagonal_in(J, bases), strict=True):
        C = torch.stack([basis.coordinates({n: r[k] for n, r in named_rows.items()}) for k in range(len(rows))])
        expected = C.square().sum(0) / len(x)
        torch.testing.assert_close(lam, expected, **CLOSE)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(lam * len(x), expected, **CLOSE)
        total += float(lam.sum())
        C = basis.coordinates(weights)
        assert C.shape == basis.shape == lam.shape
        assert C.numel() == basis.layout.numel == sum(weights[name].numel() for name in basis.layout.names)
        for name, value in basis.parameters(C).items():
            torch.testing.assert_close(value, weights[name], **CLOSE)
    torch.testing.assert_close(total, float(rows.square().sum()) / len(x), **CLOSE)


def test_the_factors_of_a_linear_layer_are_second_moments() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    first, second = kronecker_factors(Jacobian(model, x, of="sqrt_probabilities"))
    hidden = torch.tanh(model[0](x))
    ones = torch.ones(7, 1, dtype=torch.float64)
    for factors, a in ((first, x), (second, hidden)):
        a = torch.cat([a, ones], 1)
        torch.testing.assert_close(factors.inputs, (a.T @ a / 7)[None], **CLOSE)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(factors.inputs, a.T.cov()[None], **CLOSE)
    _, named = dense_rows(model, x)
    g = named["2.bias"]  # the gradient at the last layer's output
    torch.testing.assert_close(second.output_grads, (g.T @ g / 7)[None], **CLOSE)
    assert first.layout.names == ("0.weight", "0.bias")
    assert (first.layout.kind, first.layout.outputs, first.layout.inputs) == ("outer", 5, 5)


def test_one_sample_makes_the_fisher_block_exactly_diagonal_in_the_eigenbasis() -> None:
    # One output row and one position: the block is (g g') x (a a'), whose eigenvectors are found exactly.
    model = nn.Linear(4, 2, bias=False).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    J = Jacobian(model, x, of="sqrt_probabilities")
    [basis] = [factors.eigenbasis() for factors in kronecker_factors(J)]
    [lam] = diagonal_in(J, [basis])
    assert int((lam > 1e-12 * lam.max()).sum()) == 1  # C - 1
    torch.testing.assert_close(lam[0, 0, 0], J.gram().trace(), **CLOSE)


def test_tied_uses_are_summed_before_squaring() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice().double(), torch.randn(5, 3, dtype=torch.float64)
    J = Jacobian(model, x, of="sqrt_probabilities")
    [layout] = parameter_matrices(J)
    [lam] = diagonal_in(J, [KroneckerBasis(layout, None, None)])
    _, rows = dense_rows(model, x)
    torch.testing.assert_close(lam[0, :, :3], rows["layer.weight"].square().sum(0) / 5, **CLOSE)
    torch.testing.assert_close(lam[0, :, 3], rows["layer.bias"].square().sum(0) / 5, **CLOSE)


def test_a_bias_that_another_layer_shares_stands_by_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].bias = model[0].bias
    layouts = parameter_matrices(Jacobian(model, torch.randn(4, 3).double()))
    assert [layout.names for layout in layouts] == [("0.weight",), ("0.bias",), ("2.weight",)]
    frozen = nn.Linear(3, 2)
    frozen.bias.requires_grad_(False)
    assert [layout.names for layout in parameter_matrices(Jacobian(frozen, torch.randn(4, 3)))] == [("weight",)]


def test_sides_that_are_too_large_keep_their_coordinates() -> None:
    J = Jacobian(nn.Linear(6, 2).double(), torch.randn(5, 6).double(), of="sqrt_probabilities")
    [factors] = kronecker_factors(J, largest_side=5)
    assert factors.inputs is None
    basis = factors.eigenbasis()
    assert basis.right is None
    [lam] = diagonal_in(J, [basis])
    torch.testing.assert_close(lam.sum() * 5, J.gram().trace(), **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", [4, 12])  # few positions and many: inputs are turned first, or gradients afterwards
@pytest.mark.parametrize("workspace", [1, 2**27])  # in pieces, and whole
def test_the_order_of_the_products_changes_nothing(
    groups: int, side: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors_module, "WORKSPACE_BYTES", workspace)
    turned: list[bool] = []
    squared_rows = kronecker._squared_rows
    monkeypatch.setattr(
        kronecker, "_squared_rows", lambda *parts: turned.append(len(parts) == 4) or squared_rows(*parts)
    )
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=groups), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).double()
    x = torch.randn(5, 2, side, side).double()
    J = Jacobian(model, x, of="sqrt_probabilities")
    basis = kronecker_factors(J)[0].eigenbasis()
    assert basis.left is not None
    assert basis.right is not None
    _, rows = dense_rows(model, x)
    for right in (basis.right, basis.right[:, :, 1:]):
        some = replace(basis, right=right)
        turned.clear()
        [lam] = diagonal_in(J, [some])
        assert set(turned) == {side == 12}
        C = torch.stack([some.coordinates({name: r[k] for name, r in rows.items()}) for k in range(25)])
        torch.testing.assert_close(lam, C.square().sum(0) / 5, **CLOSE)


def test_some_columns_of_a_basis() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    J = Jacobian(model, torch.randn(5, 2, 4, 4).double(), of="sqrt_probabilities")
    basis = kronecker_factors(J)[0].eigenbasis()
    assert basis.left is not None
    assert basis.right is not None
    some = KroneckerBasis(basis.layout, basis.left[:, :, :1], basis.right[:, :, 1:4])
    assert some.shape == (2, 1, 3)
    [whole], [part] = diagonal_in(J, [basis]), diagonal_in(J, [some])
    torch.testing.assert_close(part, whole[:, :1, 1:4], **CLOSE)


def test_bad_input() -> None:
    model = nn.Linear(3, 2)
    J = Jacobian(model, torch.randn(4, 3), of="sqrt_probabilities")
    layout = ParameterMatrix("other", None, 1, 2, 3, torch.Size([2, 3]), False, "outer")
    with pytest.raises(ValueError, match=r"bases of \['other'\]: they must be of parameters"):
        diagonal_in(J, [KroneckerBasis(layout, None, None)])
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="factors of weight are not finite"):
        kronecker_factors(J)
