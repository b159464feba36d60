"""With torch and numpy alone, as after ``pip install torchgeom-optim``, the package imports and works."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import torchgeom_optim

# What a program would do with each system, where no extra is installed.
PROGRAM = """
import importlib.util, sys
extras = ("torchvision", "matplotlib", "pandas", "lightning", "transformers", "safetensors", "sklearn", "scipy", "tqdm")
assert not any(importlib.util.find_spec(name) for name in extras), "an extra is on the path"

import torch
from torch import nn
import torchgeom_optim
from torchgeom_optim import BlockNaturalGradient, WhiteningSGD
from torchgeom_optim.diagnostics import Diagnostics
from torchgeom_optim.geometry import fisher_spectrum
from torchgeom_optim.models import GradNet, compact, reduce_model, resnet18
from torchgeom_optim.optimizers import GeodesicSparsifier, Sparsity

model, criterion = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
x, y = torch.randn(24, 4), torch.randint(3, (24,))
for optimizer in (WhiteningSGD(model), BlockNaturalGradient(model, lr=0.01)):
    with Diagnostics(model, criterion, every=1).attach(optimizer) as diagnostics:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert len(diagnostics.history) == 1 and diagnostics.summary()
assert fisher_spectrum(model, x).rank > 0
assert reduce_model(model, x, 0.5)(x).shape == (24, 3)
sparsifier = GeodesicSparsifier(model, target=Sparsity(0.5), steps=1)
sparsifier.step(x)
assert sparsifier.arrived
compact(model, x[:2])
assert GradNet(model, num_classes=3).fit([(x, y)], epochs=1, missing_classes=True).predict(x).shape == (24,)
for needs, call in (("vision", resnet18), ("plots", diagnostics.plot), ("records", diagnostics.history.to_pandas)):
    try:
        call()
    except ImportError as error:
        assert f"torchgeom-optim[{needs}]" in str(error), error
    else:
        raise AssertionError(f"{call} did without the extra {needs}")
print(torchgeom_optim.__version__)
"""


def needed(*names: str) -> set[str]:
    """These distributions and all that they need, extras left out, as far as they are installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found.add(name)
            waiting += [re.split(r"[ ;<>=!~\[(]", text)[0] for text in requirements if "extra ==" not in text]
    return found


def test_works_with_the_core_dependencies_alone(tmp_path):
    for name in needed("torch", "numpy", "torchgeom-optim"):
        files = importlib.metadata.files(name) or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(files[0].locate().parents[len(files[0].parts) - 1] / top))
            if not (tmp_path / top).exists() and source.exists() and source.suffix != ".pth":
                (tmp_path / top).symlink_to(source)
    if not (tmp_path / "torchgeom_optim").exists():  # an editable install has no files of its own
        (tmp_path / "torchgeom_optim").symlink_to(Path(torchgeom_optim.__file__).parent)
    # -S leaves out site-packages, so that the path is the standard library and this folder.
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == importlib.metadata.version("torchgeom-optim")
