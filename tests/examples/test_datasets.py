"""Data sets are read from the layouts that they come in; small ones are made here."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from examples import datasets
from examples.datasets import DATASETS, documentation_text, load_dataset, random_windows, stand_in


@pytest.fixture(autouse=True)
def no_data_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHGEOM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_idx(path, array: np.ndarray) -> None:
    """The format of the MNIST files: two zero bytes, 8 for uint8, the number of axes, their lengths, the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def jpeg_archive(path, images: np.ndarray, labels: np.ndarray) -> None:
    image = pytest.importorskip("PIL.Image", reason="the images are JPEG")
    files = []
    for pixels in images:
        buffer = io.BytesIO()
        image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    header, bodies = files[0][:20], [file[20:] for file in files]
    assert all(file.startswith(header) for file in files)
    np.savez(
        path,
        header=np.frombuffer(header, np.uint8),
        data=np.frombuffer(b"".join(bodies), np.uint8),
        offsets=np.cumsum([0, *map(len, bodies)]),
        labels=labels.astype(np.uint8),
    )


def test_digits():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    digits = load_dataset("digits")
    assert digits.train_inputs.shape == (1500, 1, 8, 8)
    assert digits.test_inputs.shape == (297, 1, 8, 8)
    assert (digits.train_inputs.dtype, digits.train_targets.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(digits.train_inputs.mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(digits.train_inputs.std(), torch.tensor(1.0), rtol=1e-5, atol=0)
    assert digits.train_targets.unique().tolist() == list(range(10))
    again = load_dataset("digits", train_limit=7)
    torch.testing.assert_close(again.train_inputs, digits.train_inputs[:7], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files(tmp_path, name, folder):
    pytest.importorskip("torchvision", reason="torchvision reads the files")
    rng = np.random.default_rng(0)
    raw = {}
    for part, count in (("train", 5), ("t10k", 3)):
        raw[part] = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", raw[part][0])
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", raw[part][1])
    data = load_dataset(name, tmp_path, train_limit=4)
    mean, std = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}[name]
    expected = torch.from_numpy((raw["train"][0][:4, None] / 255 - mean) / std).float()
    torch.testing.assert_close(data.train_inputs, expected, rtol=1e-5, atol=1e-6)
    assert data.train_targets.tolist() == raw["train"][1][:4].tolist()
    assert data.test_inputs.shape == (3, 1, 28, 28)
    assert data.test_targets.tolist() == raw["t10k"][1].tolist()


def test_cifar10_in_jpeg_form_is_decoded_once_and_named_so(tmp_path, monkeypatch):
    # Smooth images, which JPEG changes little: the axes and the order of the channels show.
    ramp = np.linspace(0, 255, 32)
    image = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], np.full((32, 32), 90.0)], axis=-1)
    images = np.stack([image, image[::-1]]).astype(np.uint8)
    for split in ("train", "test"):
        jpeg_archive(tmp_path / "cifar10" / f"{split}.npz", images, np.array([3, 8]))
    data = load_dataset("cifar10", tmp_path)
    assert data.title == "CIFAR-10 (JPEG)"
    assert data.train_targets.tolist() == data.test_targets.tolist() == [3, 8]
    mean, std = (torch.tensor(DATASETS["cifar10"].mean), torch.tensor(DATASETS["cifar10"].std))
    pixels = (data.train_inputs * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    torch.testing.assert_close(pixels, torch.from_numpy(images).permute(0, 3, 1, 2).float(), rtol=0, atol=12.0)
    assert len(list((tmp_path / "cache" / "torchgeom_optim").glob("*.npy"))) == 2

    monkeypatch.setattr(datasets, "_decoded", lambda *_: pytest.fail("decoded a second time"))
    torch.testing.assert_close(load_dataset("cifar10", tmp_path).train_inputs, data.train_inputs, rtol=0, atol=0)


def test_boston(tmp_path):
    table = np.random.default_rng(0).normal(3.0, 2.0, (506, 14))
    np.savetxt(tmp_path / "boston_housing.csv", table, delimiter=",", header="columns", comments="")
    data = load_dataset("boston", tmp_path)
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((404, 13), (102, 13))
    assert data.train_targets.dtype == torch.float32
    torch.testing.assert_close(data.train_inputs.mean(0), torch.zeros(13), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.train_targets.std(), torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - {"digits"}))
def test_missing_data_say_what_is_needed_and_what_to_try(name, tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision looks for the files")
    with pytest.raises(FileNotFoundError, match=r"no data folder given: .*--root DIR or set TORCHGEOM_DATA=DIR"):
        load_dataset(name)
    with pytest.raises(FileNotFoundError, match="must be an existing folder; pass --root"):
        load_dataset(name, tmp_path / "nowhere")
    monkeypatch.setenv("TORCHGEOM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no .* must be there.*; pass --root DIR or set TORCHGEOM_DATA"):
        load_dataset(name)


def test_a_name_or_limit_that_does_not_exist():
    with pytest.raises(ValueError, match=r"name='digit': must be one of digits, mnist"):
        load_dataset("digit")
    with pytest.raises(ValueError, match="train_limit=0: must be at least 1"):
        load_dataset("digits", train_limit=0)


@pytest.mark.parametrize("name", DATASETS)
def test_stand_in_has_the_shapes_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    data = stand_in(name, 6, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert data.train_inputs.shape == (6, *DATASETS[name].shape)
    assert (len(data.train_targets), len(data.test_inputs), len(data.test_targets)) == (6, 2, 2)
    torch.testing.assert_close(stand_in(name, 6, 2).test_inputs, data.test_inputs, rtol=0, atol=0)


def test_documentation_text_is_ascii_enough_and_long():
    text = documentation_text()
    assert len(text) > 50_000
    assert text == documentation_text()
    assert sum(map(str.isascii, text)) > 0.99 * len(text)


def test_random_windows_predict_the_next_character():
    text = "".join(chr(32 + k % 90) for k in range(500)) + "é"
    inputs, targets = random_windows(text, 20, 48, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (20, 48)
    torch.testing.assert_close(inputs[:, 1:], targets[:, :-1], rtol=0, atol=0)
    assert "".join(map(chr, inputs[0].tolist())) in text.replace("é", "?")
    every, _ = random_windows("abc", 500, 2, generator=torch.Generator().manual_seed(0))
    assert every.unique(dim=0).shape[0] == 1
    with pytest.raises(ValueError, match="3 characters: must be more than context=3"):
        random_windows("abc", 1, 3, generator=torch.Generator())
