"""Reduced models against dense projections, closed forms, and plain networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import jacobian as oracle
from tests.oracles import tolerance
from tests.zoo import ZOO, Case
from torchgeom_optim.models import decompose, reduce_model

CLOSE = tolerance(condition=1e3)
SOME = [
    c for c in ZOO if c.name in ("mlp", "cnn1d", "resnet18_narrow", "tied_embedding", "frozen", "lstm", "attention")
]
BASES = ["kronecker", "pca", "dct", "pixels"]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def inputs(num: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def dense_fisher(model: nn.Module, x: Tensor) -> Tensor:
    """J'J / N of 2 sqrt(p) by one backward pass per row: [P, P]."""
    rows = oracle(lambda i: 2 * model(x[i : i + 1]).softmax(-1).sqrt(), len(x), list(model.parameters()))
    return rows.T @ rows / len(x)


@pytest.mark.parametrize("case", SOME, ids=repr)
@pytest.mark.parametrize("basis", ["kronecker", "pixels"])
def test_all_directions_give_the_network_back_and_merged_models_agree(case: Case, basis: str) -> None:
    model, x = case.model(), case.batch(6)[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    decomposition = decompose(model, x, basis=basis)
    whole = decomposition.reduced(1.0)
    torch.testing.assert_close(whole(x), model(x), **CLOSE)
    part = decomposition.reduced(0.3)
    merged = part.merge()
    torch.testing.assert_close(merged(x), part(x), **CLOSE)
    assert type(merged) is type(model)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    trainable = [p for p in part.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(part.coefficients)]
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for name, p in merged.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name])
            assert not p.requires_grad
    gone = decomposition.reduced(1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gone(x), model(x), **CLOSE)


@pytest.mark.parametrize("importance", ["eigenvalue", "loss"])
def test_the_exact_basis_is_the_projection_on_eigenvectors_of_the_dense_fisher_matrix(importance: str) -> None:
    model, x = network(), inputs()
    values, vectors = torch.linalg.eigh(dense_fisher(model, x))
    values, vectors, w = values.flip(0), vectors.flip(1), weights(model)
    rank = 12 * 2
    c = vectors[:, :rank].T @ w
    ranked = (values[:rank] * (c.square() if importance == "loss" else 1)).argsort(descending=True)
    for k in (1, 5, rank):
        reduced = reduce_model(model, x, k, basis="exact", importance=importance)
        V = vectors[:, ranked[:k]]
        found = torch.cat([value.reshape(-1) for value in reduced.weights().values()]).detach()
        torch.testing.assert_close(
            found, V @ (V.T @ w), **tolerance(condition=1e8)
        )  # of the small eigenvalues' vectors
        # Idempotent: what is projected once is not changed by the same projection.
        torch.testing.assert_close(V @ (V.T @ found), found, **tolerance(condition=1e8))
        assert reduced.report is not None
        share = float(found.norm() / w.norm())
        torch.testing.assert_close(reduced.report.at.norm_share, share, **tolerance(condition=1e8))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found, w, **CLOSE)


def test_as_many_exact_directions_as_the_rank_reproduce_the_image_of_j() -> None:
    model, x = network(), inputs(8)
    rows = oracle(lambda i: 2 * model(x[i : i + 1]).softmax(-1).sqrt(), len(x), list(model.parameters()))
    reduced = reduce_model(model, x, 8 * 2, basis="exact", importance="eigenvalue")
    found = torch.cat([value.reshape(-1) for value in reduced.weights().values()]).detach()
    torch.testing.assert_close(rows @ found, rows @ weights(model), **tolerance(condition=1e6))
    fewer = reduce_model(model, x, 8 * 2 - 8, basis="exact", importance="eigenvalue")
    found = torch.cat([value.reshape(-1) for value in fewer.weights().values()]).detach()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rows @ found, rows @ weights(model), **tolerance(condition=1e6))
    assert decompose(model, x, basis="exact", max_directions=5).directions.num_directions == 5
    assert decompose(model, x, basis="exact", max_directions=1.0).directions.num_directions == 16  # the rank


@pytest.mark.parametrize("basis", BASES)
def test_directions_are_orthonormal_and_their_diagonal_is_that_of_the_dense_matrix(basis: str) -> None:
    model, x = network(), inputs()
    decomposition = decompose(model, x, basis=basis)
    directions = decomposition.directions
    size = directions.num_weights
    E = []
    for row in torch.eye(size, dtype=torch.float64):
        named = directions(row)
        E.append(torch.cat([named[name].reshape(-1) for name, _ in model.named_parameters()]))
    E = torch.stack(E)
    torch.testing.assert_close(E @ E.T, torch.eye(size, dtype=torch.float64), **CLOSE)
    F = dense_fisher(model, x)
    torch.testing.assert_close(decomposition.diagonal, (E @ F @ E.T).diagonal(), **CLOSE)
    torch.testing.assert_close(decomposition.coordinates, E @ weights(model), **CLOSE)
    # Ranked by what dropping one alone costs to second order, half of c^2 lam.
    costs = 0.5 * (E @ weights(model)).square() * (E @ F @ E.T).diagonal()
    kept = decomposition.ranked[:10]
    torch.testing.assert_close(costs[kept], costs.sort(descending=True).values[:10], **CLOSE)


def test_the_importance_is_the_divergence_to_second_order() -> None:
    model, x = network(), inputs(40)
    decomposition = decompose(model, x)
    step = 1e-3
    for position in decomposition.ranked[:3].tolist():
        c = decomposition.coordinates.clone()
        c[position] *= 1 - step  # a thousandth of the way to dropping it
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in decomposition.directions(c).items():
                changed.get_parameter(name).copy_(value)
            log_p, log_q = model(x).log_softmax(-1), changed(x).log_softmax(-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        cost = float(0.5 * decomposition.diagonal[position] * decomposition.coordinates[position] ** 2) * step**2
        torch.testing.assert_close(divergence, cost, rtol=1e-2, atol=0.0)  # third-order terms, at a step of 1e-3


@given(seed=st.integers(0, 99))
def test_samples_in_another_order_and_turned_inputs_give_the_same_reduction(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model, x = network(), inputs(seed=seed)
    chosen = reduce_model(model, x, 10, compensate=0)  # which would hold out the last samples
    shuffled = reduce_model(model, x[torch.randperm(12, generator=generator)], 10, compensate=0)
    torch.testing.assert_close(shuffled(x), chosen(x), **tolerance(condition=1e6))
    reduced = reduce_model(model, x, 10)
    # Inputs turned, and the first layer's weights turned along: the same function, and the same principal axes.
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    turned = copy.deepcopy(model)
    with torch.no_grad():
        turned[0].weight.copy_(model[0].weight @ Q.T)
    torch.testing.assert_close(reduce_model(turned, x @ Q.T, 10)(x @ Q.T), reduced(x), **tolerance(condition=1e6))


def test_about_the_initial_weights() -> None:
    start, model, x = network(), network(), inputs()
    for center in (start, dict(start.named_parameters())):
        decomposition = decompose(model, x, center=center)
        torch.testing.assert_close(decomposition.reduced(1.0)(x), model(x), **CLOSE)
        nothing = decomposition.reduced(1)
        with torch.no_grad():
            nothing.coefficients.zero_()
        torch.testing.assert_close(nothing(x), start(x), **CLOSE)
    assert nothing.report is not None


def test_a_curve_and_the_smallest_number_that_keeps_an_accuracy() -> None:
    model, x = network(), inputs(60)
    labels = model(x).argmax(1)
    decomposition = decompose(model, x, labels)
    points = decomposition.curve([0.1, 0.5, 1.0])
    assert [p.num_directions for p in points] == [5, 26, 51]
    assert [p.bhattacharyya for p in points] == sorted((p.bhattacharyya for p in points), reverse=True)
    assert points[-1].accuracy == 1.0
    assert points[-1].bhattacharyya < 1e-12
    torch.testing.assert_close(points[-1].norm_share, 1.0, **CLOSE)
    k = decomposition.smallest(0.9)
    assert [p.accuracy >= 0.9 for p in decomposition.curve([k - 1, k])] == [False, True]
    one_by_one = decomposition.reduced(k).report
    assert one_by_one is not None
    assert one_by_one.at == decomposition.curve([k])[0]
    with pytest.raises(ValueError, match=r"wanted_accuracy=1.5: must be in \[0, 1\]"):
        decomposition.smallest(1.5)
    with pytest.raises(ValueError, match="no labels"):
        decompose(model, x).smallest(0.5)
    assert f"accuracy: {one_by_one.accuracy_before:.4f} before" in str(one_by_one)
    assert "accuracy: not known, as no labels were given" in str(decompose(model, x).reduced(k).report)
    with pytest.raises(ValueError, match=r"all 51 directions give 0\.0000"):
        decomposition.smallest(0.5, x, (labels + 1) % 3)


def test_the_report_says_what_was_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model(inputs())  # running statistics of their own
    model[3].weight.requires_grad_(False)
    model.eval()
    reduced = reduce_model(model, inputs(), 0.5)
    assert reduced.report is not None
    text = str(reduced.report)
    assert "not reduced, kept as they are (frozen or not chosen): 3.weight" in text
    assert "running statistics of 1 batch norms kept" in text
    assert torch.equal(reduced.merge().get_buffer("1.running_mean"), model.get_buffer("1.running_mean"))
    assert reduced.report.bytes_dense == sum(x.numel() * x.element_size() for x in model.state_dict().values())
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    tied[2].weight = tied[0].weight
    again = reduce_model(tied, inputs()[:, :3], 0.5)
    assert "tied, reduced once under another name: 2.weight" in str(again.report)
    merged = again.merge()
    assert merged[2].weight is merged[0].weight


def test_parameters_by_name_and_modes_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().train()
    model[1].eval()  # a frozen norm in a network that trains
    reduced = reduce_model(model, inputs(), 0.5, parameters=["0.weight"])
    assert list(reduced.weights()) == ["0.weight"]
    assert [p.shape for p in reduced.parameters() if p.requires_grad] == [(12,)]
    for other in (reduced.model, reduced.merge()):
        assert [m.training for m in other.modules()] == [m.training for m in model.modules()]
    assert all(p.requires_grad for p in reduced.merge().parameters())
    assert torch.equal(reduced.merge()[2].weight, model[2].weight)


def test_regression_by_the_outputs() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), inputs()
    reduced = reduce_model(model, x, 0.9, metric="outputs")
    assert reduced.report is not None
    assert math.isnan(reduced.report.at.bhattacharyya)
    change = float((reduced(x) - model(x)).norm() / model(x).norm())
    torch.testing.assert_close(reduced.report.at.output_change, change, **CLOSE)


def test_predictions_without_overlap_are_clipped_and_counted() -> None:
    model, x = nn.Linear(4, 2, bias=False).double(), inputs()
    with torch.no_grad():
        model.weight.mul_(1e4)
        model.weight[1] = -model.weight[0]
    decomposition = decompose(model, x, metric="outputs")
    reduced = decomposition.reduced(4)
    with torch.no_grad():
        reduced.coefficients.mul_(-1)  # the opposite predictions, with certainty
    measured = decompose(model, x).measured(reduced).report
    assert measured is not None
    assert 0 < measured.at.num_clipped <= 12
    assert 0 < measured.at.bhattacharyya <= -math.log(1e-30) + 1e-9


def test_a_loader_may_shuffle_and_bring_labels() -> None:
    model, x = network(), inputs(20)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, model(x).argmax(1)), batch_size=7, shuffle=True
    )
    reduced = reduce_model(model, loader, 1.0)
    assert reduced.report is not None
    assert (reduced.report.num_samples, reduced.report.at.accuracy) == (20, 1.0)


def test_nothing_is_left_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).double().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    reduced = reduce_model(model, inputs(), 0.5)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert reduced.training
    assert all(p.grad is None for p in model.parameters())


def test_bad_input() -> None:
    model, x = network(), inputs()
    before = weights(model)
    for options, message in (
        ({"num_directions": 52}, r"num_directions=52: must be in \[1, 51\]. The network has 51 weights"),
        ({"num_directions": 0}, r"num_directions=0: must be in \[1, 51\]"),
        ({"num_directions": math.nan}, r"num_directions=nan: must be an integer, or a share"),
        ({"num_directions": 1.5}, r"num_directions=1.5: must be an integer, or a share"),
        ({"num_directions": 30, "basis": "exact"}, r"in \[1, 24\]. That is the rank .* 12 samples; k = 30 would take"),
        ({"num_directions": 30, "basis": "exact", "importance": "eigenvalue"}, "would take at least 15"),
        ({"basis": "wavelet"}, "basis='wavelet': must be one of 'kronecker'"),
        ({"metric": "loss"}, "metric='loss': must be one of 'fisher'"),
        ({"importance": "size"}, "importance='size': must be one of 'loss'"),
        ({"num_samples": 13}, "the data ran dry after 12 samples: 13 must be there"),
        ({"num_samples": 0}, "num_samples=0: must be at least 1"),
        ({"center": "here"}, "center='here': must be 'origin'"),
        ({"center": {"0.weight": torch.zeros(2)}}, "center lacks .*'0.weight'"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"first axes of inputs and targets: \[5, 12\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            reduce_model(model, x, **{"num_directions": 5, **options})
    for data, message in (
        (inputs()[:, :3], r"the model refused samples of shapes \[\[1, 3\]\]"),
        ([], "the data ran dry after 0 samples"),
        (torch.ones(6, 4, dtype=torch.float64), "all 6 inputs are equal"),
        (math.nan * x, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce_model(model, data, 5)
    with pytest.raises(TypeError, match="data is int"):
        reduce_model(model, 3, 5)
    assert torch.equal(weights(model), before)
    with torch.no_grad():
        model[0].bias[0] = math.inf
    with pytest.raises(ValueError, match=r"weights \['0.bias'\] are not finite"):
        reduce_model(model, x, 5)
