from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.oracles import jacobian, tolerance
from torchgeom_optim.diagnostics import Diagnostics, Options
from torchgeom_optim.diagnostics.spectrum import SPECTRUM_VALUES, batch_spectra


def problem():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    return model, torch.randn(9, 4, dtype=torch.float64)


def test_against_dense_matrices():
    model, x = problem()
    spectra = batch_spectra(model, x, num_samples=6)
    assert model.training
    model.eval()
    parameters = list(model.parameters())
    J = jacobian(lambda i: 2 * model(x[i : i + 1]).softmax(1).sqrt(), 6, parameters)
    F = J.T @ J / 6
    found = torch.tensor(spectra.eigenvalues["fisher"], dtype=torch.float64)
    expected = torch.linalg.eigvalsh(F).flip(0)[: len(found)]
    assert_close(found[:10], expected[:10], **tolerance(condition=1e4))
    assert spectra.values["fisher_spectrum_trace"] == pytest.approx(float(F.trace()))
    data = torch.linalg.eigvalsh(x[:6].T @ x[:6] / 6).flip(0)
    assert_close(torch.tensor(spectra.eigenvalues["data"], dtype=torch.float64), data, **tolerance(condition=1e3))
    assert spectra.values["data_decades"] == pytest.approx(float((data[0] / data[-1]).log10()))
    ratio = float(expected.sum() ** 2 / expected.square().sum())
    assert spectra.values["fisher_participation_ratio"] == pytest.approx(ratio)
    assert set(spectra.values) == set(SPECTRUM_VALUES)


def test_inputs_without_a_data_spectrum():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    spectra = batch_spectra(model, torch.randint(7, (5, 2)))
    assert "data" not in spectra.eigenvalues
    assert math.isnan(spectra.values["data_decades"])
    assert any("one floating point input" in note for note in spectra.notes)


def test_it_is_a_family_of_the_records():
    model, x = problem()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    diagnostics = Diagnostics(model, nn.CrossEntropyLoss(), metrics="spectrum", options=Options(spectrum_samples=4))
    record = diagnostics.measure(x, y)
    expected = batch_spectra(model, x, num_samples=4)
    assert record.values == pytest.approx(expected.values)
    assert record.spectrum.keys() == expected.eigenvalues.keys()
    for name, eigenvalues in expected.eigenvalues.items():
        assert record.spectrum[name] == pytest.approx(eigenvalues)
    assert any("evaluation mode" in note for note in record.notes)


def test_no_samples_are_refused():
    model, x = problem()
    with pytest.raises(ValueError, match="num_samples=0"):
        batch_spectra(model, x, num_samples=0)
