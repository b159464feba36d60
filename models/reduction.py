r"""Model reduction: a trained network in few directions of its weight space.

Source: Cowlagi & Chaudhari, "Does the geometry of the data control the geometry of neural predictions?", section
"Model Reduction": w = \sum_i <w, e_i> e_i over the eigenvectors of the Fisher matrix, cut after the k largest
eigenvalues. That is ``basis="exact", importance="eigenvalue"``. Changed by default, for two reasons: the eigenvectors
of a Fisher matrix from N samples span N (C - 1) directions, of the P that weights have; and dropping direction i
changes the predictions by

    KL(p || p_k) = 1/2 \sum_{i dropped} lam_i c_i^2   to second order (off-diagonal terms left out),

not by lam_i. So directions are by default the complete Kronecker-factored eigenbases of the layers
(:mod:`torchgeom_optim.geometry.kronecker`), ranked by lam_i c_i^2 / 2, lam_i the exact diagonal of the Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.jacobian import Jacobian
from torchgeom_optim.geometry.mini_batches import MiniBatch, tensors_of
from torchgeom_optim.geometry.spectrum import jacobian_spectrum
from torchgeom_optim.models.reduced_model import ReducedModel
from torchgeom_optim.models.reduction_basis import BasisName, DenseDirections, Directions, layer_directions
from torchgeom_optim.models.reduction_decomposition import Decomposition, importances, number_of
from torchgeom_optim.models.reduction_metric import MetricName, head_of
from torchgeom_optim.models.reduction_report import outputs_of, take_samples

__all__ = ["ImportanceName", "decompose", "reduce_model"]

ImportanceName = Literal["loss", "eigenvalue", "magnitude"]
_CALIBRATION_SAMPLES = 1024


def reduce_model(
    model: nn.Module,
    data: Any,
    num_directions: int | float,
    targets: Tensor | None = None,
    *,
    test_data: Any = None,
    test_targets: Tensor | None = None,
    basis: BasisName = "kronecker",
    importance: ImportanceName = "loss",
    compensate: int | None = None,
    **options: Any,
) -> ReducedModel:
    """A trained network in its ``num_directions`` most important directions, in one shot.

    No label is needed and nothing is trained; the result's ``coefficients`` can be. For the gradual form see
    :func:`~torchgeom_optim.models.reduction_gradual.reduce_gradually`.

    Args:
        model: any module that :class:`~torchgeom_optim.geometry.jacobian.Jacobian` takes; left as it was.
        data: inputs of the calibration, the first 1024 samples of which are used unless ``num_samples`` says otherwise:
            a tensor, a tuple of arguments, a mapping of keyword arguments, or mini-batches (a loader may shuffle).
        num_directions: k, or a share of the P weights in (0, 1].
        targets: labels beside ``data``, for the accuracy in the report alone.
        test_data: what the report compares predictions on, in the same forms; by default the samples of the
            calibration.
        test_targets: labels beside it.
        basis: see :mod:`torchgeom_optim.models.reduction_basis`.
        importance: "loss", lam c^2 / 2; "eigenvalue", lam; "magnitude", c^2.
        compensate: least-squares steps, at most, in which the kept coefficients make up for what was dropped, without
            labels and without training. By default 3 with ``importance="loss"`` in a complete basis, and 0 with the
            rules of others, which stay what they are. See :mod:`torchgeom_optim.models.reduction_compensation`.
        **options: as for :func:`decompose`.

    Returns:
        The reduced network; its ``report`` says what was kept.

    Raises:
        ValueError: k beyond the rank, with the number of samples that it would take; an argument out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> reduced = reduce_model(model, torch.randn(100, 8), 0.5)
        >>> reduced(torch.randn(2, 8)).shape, len(reduced.coefficients)
        (torch.Size([2, 3]), 98)
    """
    most = num_directions if basis == "exact" and importance == "eigenvalue" else None
    decomposition = decompose(model, data, targets, basis=basis, importance=importance, max_directions=most, **options)
    passes = {key: options[key] for key in ("batch_size", "memory_limit") if key in options}
    return decomposition.reduced(num_directions, test_data, test_targets, compensate=compensate, **passes)


def decompose(
    model: nn.Module,
    data: Any,
    targets: Tensor | None = None,
    *,
    metric: MetricName = "fisher",
    basis: BasisName = "kronecker",
    importance: ImportanceName = "loss",
    center: Literal["origin"] | Mapping[str, Tensor] | nn.Module = "origin",
    num_samples: int | None = None,
    max_directions: int | float | None = None,
    largest_side: int = 4096,
    select: Callable[[Any], Tensor] | None = None,
    class_dim: int = -1,
    **jacobian_options: Any,
) -> Decomposition:
    """A network's weights in a basis, ranked: what every k is a cut of.

    Args:
        model: see :func:`reduce_model`.
        data: see there.
        targets: see there.
        metric: "fisher", J of 2 sqrt(softmax); "outputs", J of the outputs (regression).
        basis: see there.
        importance: see there.
        center: "origin" as in the paper, or the initial weights: a network, or name to tensor.
        num_samples: of the calibration; by default all there are, 1024 at most.
        max_directions: k at most, for ``basis="exact"``, whose directions take k times the network's memory; the
            rank where that is less.
        largest_side: eigenvectors of larger matrices are not taken; that side of a layer keeps its single weights.
        select: picks the outputs out of what the network returns.
        class_dim: axis of the classes in the outputs.
        **jacobian_options: for :class:`~torchgeom_optim.geometry.jacobian.Jacobian`: ``parameters`` (which ones are
            reduced; by default those that are not frozen), ``batch_size``, ``memory_limit``, ``dtype`` (of the products
            for ``basis="exact"``, float64 unless given).

    Returns:
        The decomposition.

    Raises:
        ValueError: an unknown name; weights that are not finite; samples that are all equal; data that run dry.
    """
    head = head_of(metric)
    for name, value, known in (("basis", basis, BasisName), ("importance", importance, ImportanceName)):
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, get_args(known)))}.")
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if bad:
        raise ValueError(f"weights {bad} are not finite: every number must be. Load a checkpoint from before that.")
    samples = take_samples(data, targets, num_samples, _CALIBRATION_SAMPLES)
    _check_that_samples_differ(samples)
    outputs_of(model, samples.part(0, 1), select)  # a refusal names the shapes
    options = {"select": select, "class_dim": class_dim, **jacobian_options}
    if basis == "exact":
        options.setdefault("dtype", torch.float64)
    jacobian = Jacobian(model, samples.inputs, of=head, **options)
    named = {name: p.detach() for name, p in model.named_parameters() if name in jacobian.vectors.shapes}
    origin = _center(center, named)
    offset = named if origin is None else {name: p - origin[name] for name, p in named.items()}
    directions: Directions
    if basis == "exact":
        directions, diagonal = _exact(jacobian, max_directions, next(iter(named.values())).dtype)
    else:
        directions = layer_directions(jacobian, basis, tensors_of(samples.inputs)[0].shape[1:], largest_side)
        diagonal = directions.diagonal(jacobian)
    coordinates = directions.coordinates(offset)
    ranking = importances(importance, coordinates, diagonal)
    return Decomposition(
        model, directions, coordinates, diagonal, ranking.argsort(descending=True, stable=True),
        importance, metric, origin, samples, select, class_dim,
    )  # fmt: skip


def _exact(
    jacobian: Jacobian, max_directions: int | float | None, dtype: torch.dtype
) -> tuple[DenseDirections, Tensor]:
    spectrum = jacobian_spectrum(jacobian)
    rank = spectrum.rank
    if rank == 0:
        raise ValueError(
            "the metric has no eigenvalue above round-off: predictions must depend on the weights. Are they constant?"
        )
    available = DenseDirections(torch.empty(jacobian.shape[1], 0), jacobian.vectors.shapes)
    available.num_directions = jacobian.shape[1]
    k = rank if max_directions is None else min(rank, number_of(max_directions, available, jacobian.num_samples))
    V = spectrum.eigenvectors(k).to(dtype)
    return DenseDirections(V, jacobian.vectors.shapes), spectrum.eigenvalues[:k]


def _center(center: Any, named: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    if isinstance(center, str) and center == "origin":
        return None
    values = dict(center.named_parameters()) if isinstance(center, nn.Module) else center
    if not isinstance(values, Mapping):
        raise ValueError(f"center={center!r}: must be 'origin', a network, or a mapping from names to tensors.")
    wrong = [name for name, p in named.items() if name not in values or values[name].shape != p.shape]
    if wrong:
        raise ValueError(f"center lacks {wrong}, or has them in another shape: the same network's weights are needed.")
    return {name: values[name].detach().to(p) for name, p in named.items()}


def _check_that_samples_differ(samples: MiniBatch) -> None:
    tensors = tensors_of(samples.inputs)
    if samples.size > 1 and all(bool((x == x[:1]).all()) for x in tensors):
        raise ValueError(
            f"all {samples.size} inputs are equal: directions that matter to other inputs would not be seen. Give "
            "samples that differ; a shuffled part of the training data is a common choice."
        )
