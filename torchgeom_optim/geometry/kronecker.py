r"""Layer by layer: the Kronecker factors of the Fisher matrix, their eigenvectors, its exact diagonal in these.

A layer's parameters are seen as a matrix W [m, n] (outputs by inputs; the bias is an extra column, whose input is 1)
for each of its G groups. The gradient of row c of J is G_c = \sum_t g_ct a_t', over positions t and all uses of W,
with inputs a and gradients g at the outputs. With means E over samples:

    A = E \sum_t a_t a_t'            uncentred                                              [G, n, n]
    B = E \sum_c \sum_t g_ct g_ct'                                                          [G, m, m]
    A = V diag(alpha) V',  B = U diag(beta) U'    (alpha and beta descending)
    C = U'W V                                                                               coordinates of W
    lam_ij = E \sum_c (\sum_t (U'g_ct)_i (V'a_t)_j)^2                                       [G, m, n]

Source of A and B: Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature",
and of lam, the exact diagonal in the basis of B (x) A: George et al. (2018), "Fast approximate natural gradient descent
in a Kronecker-factored eigenbasis" (EKFAC), Eq. (10). Changed: the sum over classes is taken in full through
2 sqrt(p), no label is drawn; positions and uses of a tied weight are summed before squaring.

What is no sum of outer products (norm layers, bare parameters, modules without a rule) has its gradients G_c [m, n]
themselves, n = 1 for vectors: A = E \sum_c G_c'G_c and B = E \sum_c G_c G_c', as Shampoo has it. A parameter that both
an embedding and a linear layer use goes that way too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.factors import Factor, OuterFactor, RowFactor, TokenFactor, pieces
from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.jacobian_gram import Uses, sum_of_rows
from torchgeom_optim.geometry.layers import plain_arithmetic

__all__ = [
    "KroneckerBasis",
    "KroneckerFactors",
    "ParameterMatrix",
    "diagonal_in",
    "kronecker_factors",
    "parameter_matrices",
]


@dataclass(frozen=True)
class ParameterMatrix:
    """How a layer's parameters are seen as matrices [G, m, n], outputs by inputs.

    Attributes:
        weight: its name.
        bias: name of the bias that is the last column; None without.
        groups: G.
        outputs: m, of one group.
        inputs: n, the bias's column included.
        shape: of the weight.
        transposed: the weight is laid out [n, m].
        kind: "outer" products; "tokens" (an embedding, m its width and n its tokens); "rows", gradients themselves.
    """

    weight: str
    bias: str | None
    groups: int
    outputs: int
    inputs: int
    shape: torch.Size
    transposed: bool
    kind: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def numel(self) -> int:
        """G m n."""
        return self.groups * self.outputs * self.inputs

    def matrix(self, named: Mapping[str, Tensor]) -> Tensor:
        """The parameters as matrices.

        Args:
            named: name to tensor; other names are left alone.

        Returns:
            [G, m, n].
        """
        W = named[self.weight]
        W = W.reshape(1, len(W), -1).mT if self.transposed else W.reshape(self.groups, self.outputs, -1)
        return W if self.bias is None else torch.cat([W, named[self.bias].reshape(self.groups, self.outputs, 1)], 2)

    def named(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`matrix`.

        Args:
            matrix: [G, m, n].

        Returns:
            Name to tensor.
        """
        named = {}
        if self.bias is not None:
            named[self.bias] = matrix[:, :, -1].reshape(-1)
            matrix = matrix[:, :, :-1]
        named[self.weight] = (matrix.mT if self.transposed else matrix).reshape(self.shape)
        return named


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """A and B of one layer, means over samples and sums over positions and uses, B over J's outputs too.

    Attributes:
        layout: which parameters, and how.
        inputs: A, [G, n, n]; None if n is beyond ``largest_side`` or inputs are tokens, whose A is diagonal.
        output_grads: B, [G, m, m]; None if m is beyond it.
        num_samples: N.
    """

    layout: ParameterMatrix
    inputs: Tensor | None
    output_grads: Tensor | None
    num_samples: int

    def eigenbasis(self) -> KroneckerBasis:
        """Eigenvectors of both, by descending eigenvalue; the identity in the place of a factor that is missing."""
        return KroneckerBasis(self.layout, _eigenvectors(self.output_grads), _eigenvectors(self.inputs))


@dataclass(frozen=True, eq=False)
class KroneckerBasis:
    """Orthonormal directions u_i v_j' in the space of a layer's parameters.

    Attributes:
        layout: which parameters, and how.
        left: U, [G, m, r]; None for the identity.
        right: V, [G, n, s]; None for the identity.
    """

    layout: ParameterMatrix
    left: Tensor | None
    right: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, r, s), of the coordinates."""
        rows = self.layout.outputs if self.left is None else self.left.shape[2]
        return self.layout.groups, rows, self.layout.inputs if self.right is None else self.right.shape[2]

    def coordinates(self, named: Mapping[str, Tensor]) -> Tensor:
        """C = U'W V.

        Args:
            named: name to tensor, the layer's among them.

        Returns:
            [G, r, s].
        """
        C = self.layout.matrix(named)
        C = C if self.left is None else self.left.to(C).mT @ C
        return C if self.right is None else C @ self.right.to(C)

    def parameters(self, coordinates: Tensor) -> dict[str, Tensor]:
        """W = U C V', the inverse where the basis is complete.

        Args:
            coordinates: [G, r, s].

        Returns:
            Name to tensor.
        """
        W = coordinates if self.left is None else self.left.to(coordinates) @ coordinates
        return self.layout.named(W if self.right is None else W @ self.right.to(coordinates).mT)


def kronecker_factors(jacobian: Jacobian, *, largest_side: int = 4096) -> list[KroneckerFactors]:
    """A and B of every layer: see this module's docstring.

    Args:
        jacobian: J, of 2 sqrt(p) for the Fisher matrix. Sums are taken in float64.
        largest_side: a factor of more rows is not formed.

    Returns:
        One for each layer, in the order of the parameters; together they have each of J's parameters once.

    Raises:
        ValueError: a factor is not finite.

    Example:
        >>> J = Jacobian(nn.Linear(3, 2), torch.randn(50, 3), of="sqrt_probabilities")
        >>> [factors] = kronecker_factors(J)
        >>> factors.inputs.shape, factors.output_grads.shape, factors.layout.names
        (torch.Size([1, 4, 4]), torch.Size([1, 2, 2]), ('weight', 'bias'))
    """
    sums: dict[ParameterMatrix, tuple[Tensor | None, Tensor | None]] = {}
    for layout, uses in _layers(jacobian):
        with plain_arithmetic(jacobian.vectors.device.type):
            terms = _moments(layout, uses, largest_side)
        sums[layout] = _sum_of_pairs(sums[layout], terms) if layout in sums else terms
    num_samples = jacobian.num_samples
    return [
        KroneckerFactors(layout, _mean(layout, A, num_samples), _mean(layout, B, num_samples), num_samples)
        for layout, (A, B) in sums.items()
    ]


def diagonal_in(jacobian: Jacobian, bases: Sequence[KroneckerBasis]) -> list[Tensor]:
    """The diagonal lam of J'J / N in the coordinates of these bases, exactly; its sum is at most the trace.

    Args:
        jacobian: J.
        bases: of some of its layers or all, complete or not.

    Returns:
        lam [G, r, s] in float64 for each of the bases, >= 0, mean over samples, sum over J's outputs.

    Raises:
        ValueError: a basis is of parameters that J does not have that way.

    Example:
        >>> J = Jacobian(nn.Linear(3, 2), torch.randn(50, 3), of="outputs")
        >>> bases = [factors.eigenbasis() for factors in kronecker_factors(J)]
        >>> [lam] = diagonal_in(J, bases)
        >>> torch.testing.assert_close(lam.sum().float(), J.gram().trace() / 50)
    """
    places = {basis.layout: i for i, basis in enumerate(bases)}
    sums: list[Tensor | None] = [None] * len(bases)
    for layout, uses in _layers(jacobian):
        place = places.get(layout)
        if place is None:
            continue
        with plain_arithmetic(jacobian.vectors.device.type):
            term = _squares(bases[place], uses)
        before = sums[place]
        sums[place] = term if before is None else before + term
    if unknown := [basis.layout.weight for basis, total in zip(bases, sums, strict=True) if total is None]:
        raise ValueError(
            f"bases of {unknown}: they must be of parameters that J is with respect to, used by the same layers. Take "
            "bases and diagonal from the same model and choice of parameters."
        )
    return [total / jacobian.num_samples for total in sums if total is not None]


def parameter_matrices(jacobian: Jacobian) -> list[ParameterMatrix]:
    """How the layers' parameters are seen as matrices, from the first mini-batch.

    Args:
        jacobian: J.

    Returns:
        In the order of the parameters; each of J's parameters is there once.
    """
    return [layout for layout, _ in _layers_of(jacobian, next(jacobian.layer_rows()))]


def _layers(jacobian: Jacobian) -> Iterator[tuple[ParameterMatrix, list[Factor]]]:
    """Each layer's uses, mini-batch by mini-batch, as far as they can be with the bias as a column of the inputs."""
    for uses in jacobian.layer_rows():
        yield from _layers_of(jacobian, uses)


def _layers_of(jacobian: Jacobian, uses: Uses) -> Iterator[tuple[ParameterMatrix, list[Factor]]]:
    shapes = jacobian.vectors.shapes
    bias_of = _biases(jacobian.model, uses)
    joined = set(bias_of.values())
    for name, factors in uses.items():
        if name in joined:
            continue
        outer = [use for factor in factors if (use := factor.as_outer()) is not None]
        if len(outer) == len(factors) and len({(use.inputs.shape[1], use.transposed) for use in outer}) == 1:
            bias = bias_of.get(name)
            with_ones = outer if bias is None else [_with_ones(use) for use in outer]
            groups, _, n = with_ones[0].inputs.shape[1:]
            m = outer[0].output_grads.shape[4]
            yield ParameterMatrix(name, bias, groups, m, n, shapes[name], outer[0].transposed, "outer"), [*with_ones]
        elif all(isinstance(factor, TokenFactor) for factor in factors):
            tokens, width = shapes[name]
            yield ParameterMatrix(name, None, 1, width, tokens, shapes[name], True, "tokens"), factors
        else:
            m = shapes[name][0] if shapes[name] else 1
            rows = RowFactor(sum_of_rows(factors), shapes[name][1:].numel())
            n = shapes[name].numel() // m
            yield ParameterMatrix(name, None, 1, m, n, shapes[name], False, "rows"), [rows]


def _biases(model: nn.Module, uses: Uses) -> dict[str, str]:
    """Weight to bias, where exactly the same layers have the one and the other and call them as often."""
    names = {id(p): name for name, p in model.named_parameters()}
    partners: dict[str, set[str | None]] = {}
    for module in model.modules():
        own = {key: names.get(id(p)) for key, p in module._parameters.items() if p is not None}
        weight, bias = own.get("weight"), own.get("bias")
        for name in own.values():
            if name is not None:
                pair = weight is not None and bias is not None and weight != bias and name in (weight, bias)
                partners.setdefault(name, set()).add((bias if name == weight else weight) if pair else None)
    found = {}
    for name, others in partners.items():
        other = next(iter(others))
        if len(others) > 1 or other is None or partners[other] != {name} or name not in uses or other not in uses:
            continue
        outer = all(factor.as_outer() is not None for factor in uses[name])
        rows = all(isinstance(factor, RowFactor) and factor.unit_numel == 1 for factor in uses[other])
        if outer and rows and len(uses[name]) == len(uses[other]):
            found[name] = other
    return found


def _with_ones(use: OuterFactor) -> OuterFactor:
    return replace(use, inputs=torch.cat([use.inputs, use.inputs.new_ones(*use.inputs.shape[:3], 1)], 3))


def _moments(layout: ParameterMatrix, uses: list[Factor], largest_side: int) -> tuple[Tensor | None, Tensor | None]:
    """Sums over the mini-batch, A and B."""
    inputs: Tensor | None = None
    output_grads: Tensor | None = None
    for use in uses:
        if layout.kind == "rows":
            G = use.rows().double().reshape(-1, layout.outputs, layout.inputs)
            wide, tall = G.reshape(-1, layout.inputs)[None], G.transpose(0, 1).flatten(1).T[None]
        elif isinstance(use, TokenFactor):
            wide, tall = None, use.output_grads.double().flatten(0, 2)[None]
        else:
            outer = use.as_outer()
            assert outer is not None
            wide = outer.inputs.double().transpose(0, 1).flatten(1, 2)
            tall = outer.output_grads.double().permute(2, 0, 1, 3, 4).flatten(1, 3)
        if wide is not None and layout.inputs <= largest_side:
            inputs = wide.mT @ wide if inputs is None else inputs + wide.mT @ wide
        if layout.outputs <= largest_side:
            output_grads = tall.mT @ tall if output_grads is None else output_grads + tall.mT @ tall
    return inputs, output_grads


def _squares(basis: KroneckerBasis, uses: list[Factor]) -> Tensor:
    """Sum over samples and rows of the squared coordinates of the mini-batch's gradients: [G, r, s]."""
    layout, (groups, r, s) = basis.layout, basis.shape
    if layout.kind == "rows":
        total = torch.zeros(groups, r, s, dtype=torch.float64, device=uses[0].rows(0, 1).device)
        G = uses[0].rows().reshape(-1, 1, layout.outputs, layout.inputs)
        for start, stop in pieces(len(G), layout.numel * 8):
            part = G[start:stop]
            part = part if basis.left is None else basis.left.to(part).mT @ part
            part = part if basis.right is None else part @ basis.right.to(part)
            total += part.double().square().sum(0)
        return total
    if layout.kind == "tokens" and basis.right is None:
        rotated: list[Factor] = [
            replace(use, output_grads=_times(use.output_grads, basis.left))
            for use in uses
            if isinstance(use, TokenFactor)
        ]
        rows = [_squared_rows(rotated, start, stop) for start, stop in _units(rotated)]
        return torch.cat(rows).view(1, s, r).transpose(1, 2)
    outer = [use.as_outer() if not isinstance(use, TokenFactor) else _one_hot(use) for use in uses]
    turned = [OuterFactor(use.inputs, _times(use.output_grads, basis.left)) for use in outer if use is not None]
    T, C, n = sum(use.inputs.shape[2] for use in turned), turned[0].num_grads, layout.inputs
    if basis.right is not None and C * r * n * (T + s) < T * s * (n + C * r):  # multiplications, V after and before
        parts = [_squared_rows(turned, start, stop, basis.right) for start, stop in _units(turned)]
        return torch.cat(parts, 0).view(groups, r, s)
    turned = [replace(use, inputs=_times(use.inputs, basis.right)) for use in turned]
    if len(turned) == 1 and turned[0].inputs.shape[2] == 1:  # one position: the square of a product
        a, g = turned[0].inputs[:, :, 0].double(), turned[0].output_grads[:, :, :, 0].double()
        return torch.einsum("bgm,bgn->gmn", g.square().sum(1), a.square())
    return torch.cat([_squared_rows(turned, start, stop) for start, stop in _units(turned)]).view(groups, r, s)


def _units(uses: Sequence[Factor]) -> Iterator[tuple[int, int]]:
    first = uses[0]
    return pieces(first.num_units, first.num_samples * first.num_grads * first.unit_numel * 8, first.unit_step)


def _squared_rows(uses: Sequence[Factor], start: int, stop: int, right: Tensor | None = None) -> Tensor:
    rows = sum_of_rows(uses, start, stop)
    if right is not None:  # [G, n, s]; units are rows of one group, or whole groups
        num_groups = max(1, (stop - start) * len(right) // uses[0].num_units)
        first = start * len(right) // uses[0].num_units
        rows = rows.view(*rows.shape[:2], num_groups, -1, right.shape[1]) @ right[first : first + num_groups].to(rows)
    return rows.double().square().sum((0, 1)).flatten()


def _one_hot(use: TokenFactor) -> OuterFactor:
    inputs = torch.nn.functional.one_hot(use.tokens, use.num_embeddings).to(use.output_grads)
    return OuterFactor(inputs[:, None], use.output_grads[:, :, None])


def _times(x: Tensor, basis: Tensor | None) -> Tensor:
    """Vectors [..., G, T, n], or [..., T, n] with G = 1, in the coordinates of the basis [G, n, s]."""
    return x if basis is None else x @ basis.to(x)


def _eigenvectors(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else torch.linalg.eigh(matrix)[1].flip(-1)


def _sum_of_pairs(
    left: tuple[Tensor | None, Tensor | None], right: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    (a, b), (c, d) = left, right
    return None if a is None or c is None else a + c, None if b is None or d is None else b + d


def _mean(layout: ParameterMatrix, total: Tensor | None, num_samples: int) -> Tensor | None:
    if total is not None and not bool(torch.isfinite(total).all()):
        raise ValueError(
            f"the Kronecker factors of {layout.weight} are not finite: every entry must be. Look for nan or overflow "
            "in the weights and the data, or compute in torch.float64."
        )
    return None if total is None else total / num_samples
