"""Small data sets as tensors, for the examples and benchmarks; nothing is ever downloaded.

``load_dataset("digits")`` needs scikit-learn alone, which ships its 1,797 images. The others are read from a folder,
given as ``root`` or by the environment variable ``TORCHGEOM_DATA``:

========================  =======================================================================
``mnist``                 ``MNIST/raw/*-ubyte``, as torchvision lays it out
``fashion-mnist``         ``FashionMNIST/raw/*-ubyte``, as torchvision lays it out
``cifar10``               ``cifar-10-batches-py/`` as torchvision lays it out, or else
                          ``cifar10/{train,test}.npz`` with JPEG images, then named "CIFAR-10 (JPEG)"
``boston``                ``boston_housing.csv``
========================  =======================================================================
"""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchgeom_optim._optional import optional_import

__all__ = ["DATASETS", "Dataset", "data_root", "documentation_text", "load_dataset", "random_windows", "stand_in"]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, inputs normalised.

    Attributes:
        title: name to print beside a figure.
        train_inputs: float32, [N, channels, H, W] for images and [N, features] otherwise.
        train_targets: int64 classes [N], or float32 values [N].
        test_inputs: as ``train_inputs``.
        test_targets: as ``train_targets``.
        num_classes: classes; 0 for values.
    """

    title: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    num_classes: int


@dataclass(frozen=True)
class _Kind:
    title: str
    shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


DATASETS = {
    "digits": _Kind("digits", (1, 8, 8), 10),
    "mnist": _Kind("MNIST", (1, 28, 28), 10, (0.1307,), (0.3081,)),
    "fashion-mnist": _Kind("Fashion-MNIST", (1, 28, 28), 10, (0.2860,), (0.3530,)),
    "cifar10": _Kind("CIFAR-10", (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "boston": _Kind("Boston Housing", (13,), 0),
}


def load_dataset(name: str, root: str | Path | None = None, *, train_limit: int | None = None) -> Dataset:
    """Load a data set by name.

    MNIST, Fashion-MNIST and CIFAR-10 keep their own split and order, and are normalised per channel with the usual
    constants. Digits (1,500 + 297) and Boston (404 + 102) have no split: a fixed permutation makes one, and the mean
    and standard deviation are those of the training part, over all pixels (digits) or per column (Boston, whose
    target is standardised as well: 1 is then some 9,000 dollars).

    Args:
        name: a key of ``DATASETS``.
        root: folder with the data; see :func:`data_root`.
        train_limit: keep only the first so many training samples.

    Returns:
        The data set.

    Raises:
        ValueError: unknown name, or a limit below 1.
        FileNotFoundError: the data are not there.
        ImportError: a library that reads them is not installed; the message names the extra.
    """
    if name not in DATASETS:
        raise ValueError(f"name={name!r}: must be one of {', '.join(DATASETS)}; 'digits' needs no files.")
    if train_limit is not None and train_limit < 1:
        raise ValueError(f"train_limit={train_limit}: must be at least 1; None keeps all samples.")
    kind = DATASETS[name]
    if name == "digits":
        return _digits(train_limit)
    folder = data_root(root)
    if name == "boston":
        return _boston(folder, train_limit)
    title = kind.title
    if name == "cifar10" and not (folder / "cifar-10-batches-py").is_dir():
        title += " (JPEG)"
        train, test = (_jpeg_cifar10(folder, split) for split in ("train", "test"))
    else:
        train, test = (_torchvision_set(name, folder, train=flag) for flag in (True, False))
    return Dataset(
        title,
        _normalised(train[0][:train_limit], kind),
        torch.as_tensor(train[1][:train_limit], dtype=torch.int64),
        _normalised(test[0], kind),
        torch.as_tensor(test[1], dtype=torch.int64),
        kind.num_classes,
    )


def stand_in(name: str, num_train: int = 256, num_test: int = 64, *, seed: int = 0) -> Dataset:
    """Random numbers in the shape of a data set, where only the shape matters (``--smoke``, timing).

    Args:
        name: a key of ``DATASETS``.
        num_train: training samples.
        num_test: test samples.
        seed: seed of a generator of its own.

    Returns:
        Standard normal inputs with random targets.
    """
    kind = DATASETS[name]
    generator = torch.Generator().manual_seed(seed)

    def targets(count: int) -> Tensor:
        if kind.num_classes:
            return torch.randint(kind.num_classes, (count,), generator=generator)
        return torch.randn(count, generator=generator)

    return Dataset(
        f"random numbers in the shape of {kind.title}",
        torch.randn(num_train, *kind.shape, generator=generator),
        targets(num_train),
        torch.randn(num_test, *kind.shape, generator=generator),
        targets(num_test),
        kind.num_classes,
    )


def data_root(root: str | Path | None = None) -> Path:
    """The folder that data sets lie in: ``root``, or else the environment variable ``TORCHGEOM_DATA``.

    Args:
        root: what the user gave, if anything.

    Returns:
        An existing folder.

    Raises:
        FileNotFoundError: neither is given, or there is no such folder.
    """
    given = root if root is not None else os.environ.get("TORCHGEOM_DATA")
    if not given:
        raise FileNotFoundError(
            "no data folder given: this data set is read from files; pass --root DIR or set TORCHGEOM_DATA=DIR, "
            "or take the data set 'digits', which needs none."
        )
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"root={folder}: must be an existing folder; pass --root DIR or set TORCHGEOM_DATA=DIR."
        )
    return folder


def documentation_text() -> str:
    """Text that Python ships: the documentation strings of the standard library's modules, in the order of their names.

    The modules' sources are parsed, not imported. The text depends on the version of Python: state it.

    Returns:
        Some 10^5 characters.
    """
    strings = []
    for name in sorted(sys.stdlib_module_names):
        spec = importlib.util.find_spec(name) if name != "__main__" else None
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue  # built in, frozen without a source, or of another platform
        strings.append(ast.get_docstring(ast.parse(Path(spec.origin).read_bytes())) or "")
    return "\n\n".join(filter(None, strings))


def random_windows(text: str, count: int, context: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows of a text as token indices, with the next character as target.

    Args:
        text: at least ``context + 1`` characters; other than ASCII ones count as "?".
        count: number of windows, N.
        context: length of a window, T.
        generator: where the windows begin is drawn from it.

    Returns:
        inputs [N, T] and targets [N, T], int64 in 0..127.

    Raises:
        ValueError: the text is too short.
    """
    tokens = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
    if len(tokens) <= context:
        raise ValueError(f"{len(tokens)} characters: must be more than context={context}; take a longer text.")
    begins = torch.randint(len(tokens) - context, (count, 1), generator=generator)
    windows = tokens[begins + torch.arange(context + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _digits(train_limit: int | None) -> Dataset:
    bunch = optional_import("sklearn.datasets", "the data set 'digits'").load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    classes = torch.as_tensor(bunch.target, dtype=torch.int64)
    train, test = _split(len(images), 1500)
    images = (images - images[train].mean()) / images[train].std()
    train = train[:train_limit]
    return Dataset("digits", images[train], classes[train], images[test], classes[test], 10)


def _boston(folder: Path, train_limit: int | None) -> Dataset:
    path = _existing(folder / "boston_housing.csv", "Boston Housing")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1))
    train, test = _split(len(table), 404)
    table = ((table - table[train].mean(0)) / table[train].std(0)).float()
    train = train[:train_limit]
    return Dataset("Boston Housing", table[train, :13], table[train, 13], table[test, :13], table[test, 13], 0)


def _split(count: int, num_train: int) -> tuple[Tensor, Tensor]:
    """A fixed permutation, cut in two. From numpy's legacy generator, whose stream never changes between versions."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(count))
    return order[:num_train], order[num_train:]


def _torchvision_set(name: str, folder: Path, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, channels] in uint8, and classes [N]."""
    title = DATASETS[name].title
    datasets = optional_import("torchvision.datasets", f"the data set {name!r}")
    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        found = kind(str(folder), train=train, download=False)
    except RuntimeError as error:
        layout = "cifar-10-batches-py/" if name == "cifar10" else f"{kind.__name__}/raw/*-ubyte"
        raise FileNotFoundError(
            f"no {title} in {folder}: {layout} must be there, complete, as torchvision lays it out; pass --root DIR or "
            "set TORCHGEOM_DATA=DIR, or take the data set 'digits', which needs no files."
        ) from error
    images = np.asarray(found.data)
    return (images if images.ndim == 4 else images[..., None]), np.asarray(found.targets)


def _jpeg_cifar10(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 whose images were stored as JPEG: decoded once, then kept as an array in the user's cache."""
    path = _existing(folder / "cifar10" / f"{split}.npz", "CIFAR-10")
    with np.load(path) as archive:
        classes = archive["labels"].astype(np.int64)
        cached = _cache_folder() / f"cifar10_jpeg_{split}_{path.stat().st_size}.npy"
        if not cached.exists():
            images = _decoded(archive["header"].tobytes(), archive["data"].tobytes(), archive["offsets"].tolist())
            partial = cached.with_suffix(f".{os.getpid()}.tmp")  # two programs may decode at the same time
            with partial.open("wb") as file:
                np.save(file, images)
            partial.replace(cached)
    return np.load(cached, mmap_mode="r"), classes


def _decoded(header: bytes, data: bytes, offsets: list[int]) -> np.ndarray:
    image = optional_import("PIL.Image", "CIFAR-10 in JPEG form")
    pieces = (data[begin:end] for begin, end in pairwise(offsets))
    return np.stack([np.asarray(image.open(io.BytesIO(header + piece))) for piece in pieces])


def _cache_folder() -> Path:
    preferred = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torchgeom_optim"
    for folder in (preferred, Path(tempfile.gettempdir()) / "torchgeom_optim"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue  # a home that cannot be written to
        if os.access(folder, os.W_OK):
            return folder
    raise PermissionError(
        f"no cache folder: {preferred} or the temporary folder must be writable; set XDG_CACHE_HOME to one that is."
    )


def _normalised(images: np.ndarray, kind: _Kind) -> Tensor:
    """Images [N, H, W, channels] of 0..255 as float32 [N, channels, H, W], normalised per channel."""
    pixels = (
        torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    )
    mean, std = torch.tensor(kind.mean), torch.tensor(kind.std)
    return pixels.div_(255).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _existing(path: Path, title: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"no {title} in this folder: {path} must be there; pass --root DIR or set TORCHGEOM_DATA=DIR, or take the "
            "data set 'digits', which needs no files."
        )
    return path
