"""Reduced models in files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import tolerance
from torchgeom_optim.models import ReducedModel, decompose, reduce_model
from torchgeom_optim.models.reduction_files import _packed, _unpacked

pytest.importorskip("safetensors", reason="the extra `files` is not installed")
BASES = ["kronecker", "pca", "dct", "pixels", "exact"]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ).eval()  # fmt: skip


def flat_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inputs(num: int = 30) -> Tensor:
    return torch.randn(num, 1, 4, 4, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("basis", BASES)
def test_a_network_comes_back_from_its_file(basis: str, tmp_path: Path) -> None:
    model, x = network(), inputs()
    model[1].running_mean.normal_()
    model[0].bias.requires_grad_(False)
    reduced = reduce_model(model, x, 0.2, basis=basis)
    assert reduced.report is not None
    path = tmp_path / "reduced.safetensors"
    size = reduced.save(path)
    assert size == path.stat().st_size
    assert 0 < size - reduced.report.bytes_stored < 4096  # the header
    other = network()
    state = copy.deepcopy(other.state_dict())
    loaded = ReducedModel.load(path, other)
    torch.testing.assert_close(loaded(x), reduced(x), rtol=0, atol=0)
    assert torch.equal(loaded.coefficients, reduced.coefficients)
    torch.testing.assert_close(loaded.merge()(x), reduced(x))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with torch.no_grad():
        loaded.coefficients[0] += 1
    assert not torch.equal(loaded(x), reduced(x))


def test_about_another_center(tmp_path: Path) -> None:
    start, model, x = network(), network(), inputs()
    reduced = reduce_model(model, x, 0.2, center=start)
    reduced.save(tmp_path / "reduced.safetensors")
    torch.testing.assert_close(ReducedModel.load(tmp_path / "reduced.safetensors", network())(x), reduced(x))


def test_directions_of_the_inputs_are_regenerated(tmp_path: Path) -> None:
    model, x = flat_network(), inputs().double()
    reduced = reduce_model(model, x, 20)
    path, whole = tmp_path / "small.safetensors", tmp_path / "whole.safetensors"
    assert reduced.save(path, regenerate_from=x) < reduced.save(whole)
    loaded = ReducedModel.load(path, flat_network(), regenerate_from=x)
    torch.testing.assert_close(loaded(x), reduced(x), **tolerance(condition=1e4))
    assert reduced.report is not None
    assert reduced.report.bytes_regenerated < reduced.report.bytes_stored
    with pytest.raises(ValueError, match=r"directions of 1.weight are not in the file: .* 30 samples"):
        ReducedModel.load(path, flat_network())
    with pytest.raises(ValueError, match=r"the inputs do not give the directions of 1.weight"):
        ReducedModel.load(path, flat_network(), regenerate_from=x.flip(-1) + 1)
    with pytest.raises(ValueError, match="the data ran dry after 9 samples"):
        ReducedModel.load(path, flat_network(), regenerate_from=x[:9])
    with pytest.raises(ValueError, match="regenerate_from does not give the directions of any layer"):
        reduced.save(path, regenerate_from=x[:5])


def test_bytes_of_what_needs_no_directions() -> None:
    model, x = flat_network().float(), inputs()
    pixels = reduce_model(model, x, 10, basis="pixels").report
    cosines = reduce_model(model, x, 10, basis="dct").report
    assert pixels is not None
    assert cosines is not None
    # Ten coefficients of four bytes; positions among 103 weights, one byte each beside one that says so.
    assert pixels.bytes_stored == cosines.bytes_stored == pixels.bytes_regenerated == 10 * 4 + 10 + 1
    assert pixels.bytes_dense == 4 * 103


@pytest.mark.parametrize(
    ("positions", "size", "length"),
    [
        ([0], 10, 2),
        ([0, 3, 900], 1000, 7),  # two bytes a gap
        ([70000, 70001], 2**20, 9),  # four bytes
        ([9], 10, 2),
        (list(range(0, 80, 2)), 80, 11),  # one bit per weight is shorter
        (list(range(80)), 80, 11),
    ],
)
def test_positions_are_packed(positions: list[int], size: int, length: int) -> None:
    packed = _packed(torch.tensor(positions), size)
    assert len(packed) == length
    assert _unpacked(packed, size).tolist() == positions


def test_trained_coefficients_in_any_order(tmp_path: Path) -> None:
    model, x = flat_network(), inputs().double()
    decomposition = decompose(model, x)
    positions = decomposition.ranked[:15]  # not ascending
    reduced = ReducedModel(model, decomposition.directions, positions, decomposition.coordinates[positions])
    reduced.save(tmp_path / "reduced.safetensors")
    loaded = ReducedModel.load(tmp_path / "reduced.safetensors", flat_network())
    torch.testing.assert_close(loaded(x), reduced(x), **tolerance(condition=1e3))


def test_bad_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is of format None: 'torchgeom_optim\.reduced_model"):
        ReducedModel.load(tmp_path / "other.safetensors", network())
    reduce_model(network(), inputs(), 0.2).save(tmp_path / "reduced.safetensors")
    with pytest.raises(ValueError, match=r"'0\.weight'.*: the model lacks them, or has them in another shape"):
        ReducedModel.load(tmp_path / "reduced.safetensors", flat_network())
    with pytest.raises(ValueError, match=r"coefficients \[2\] for positions \[3\]"):
        ReducedModel(network(), decompose(network(), inputs()).directions, torch.arange(3), torch.ones(2))
