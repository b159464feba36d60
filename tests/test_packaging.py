"""What is packaged is what exists, and imports run one way."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings this one there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = SETTINGS["tool"]["setuptools"]["packages"]
# Where the sources of a package lie, longest name first so that the first match is the one that counts.
FOLDERS = dict(sorted(SETTINGS["tool"]["setuptools"]["package-dir"].items(), key=lambda item: -len(item[0])))

CORE = {"torch", "numpy"} | sys.stdlib_module_names
# Room -> what it may import besides itself. `_optional` stands below all, geometry below the three middle rooms.
ARROWS = {
    "torchgeom_optim._optional": sys.stdlib_module_names,
    "torchgeom_optim.geometry": CORE,
    "torchgeom_optim.optimizers": CORE | {"torchgeom_optim.geometry", "torchgeom_optim._optional"},
    "torchgeom_optim.diagnostics": CORE | {"torchgeom_optim.geometry", "torchgeom_optim._optional"},
    "torchgeom_optim.models": CORE | {"torchgeom_optim.geometry", "torchgeom_optim._optional"},
    "torchgeom_optim": {"torchgeom_optim.geometry", "torchgeom_optim.optimizers", "importlib.metadata"},
    # An example imports what its reader would; what it takes is in the extras.
    "examples": CORE | {"torchgeom_optim", "lightning", "sklearn", "torchvision", "tqdm", "transformers"},
    "benchmarks": None,  # stands above all but the tests
}


def folder_of(package: str) -> Path:
    """The folder of a package as ``package-dir`` has it."""
    root = next(name for name in FOLDERS if package == name or package.startswith(name + "."))
    return ROOT / FOLDERS[root] / Path(*package.removeprefix(root).strip(".").split("."))


def room_of(module: str) -> str | None:
    return next((room for room in sorted(ARROWS, key=len, reverse=True) if f"{module}.".startswith(room + ".")), None)


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the project but the tests: dotted name and file."""
    for package in PACKAGES:
        for path in sorted(folder_of(package).glob("*.py")):
            yield (package if path.stem == "__init__" else f"{package}.{path.stem}"), path
    for name in ("examples", "benchmarks"):
        for path in sorted((ROOT / name).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports_of(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that a source imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            # `from torchgeom_optim import models` imports torchgeom_optim.models
            found |= {f"{base}.{alias.name}" if base in ("torchgeom_optim", "") else base for alias in node.names}
    return found


def forbidden_imports(source: str, module: str, is_package: bool = False) -> set[str]:
    room = room_of(module)
    assert room is not None, f"{module} lies in no room of ARROWS"
    allowed = ARROWS[room]
    wrong = set()
    for name in imports_of(source, module, is_package):
        target = room_of(name)
        if name.split(".")[0] == "tests":
            wrong.add(name)
        elif target == room or allowed is None:
            continue
        elif not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed):
            wrong.add(name)
    return wrong


MODULES = dict(sources())


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    path = MODULES[module]
    assert forbidden_imports(path.read_text(encoding="utf-8"), module, path.stem == "__init__") == set()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        (
            "torchgeom_optim.geometry.gram",
            "from torchgeom_optim.optimizers import WhiteningSGD",
            "torchgeom_optim.optimizers",
        ),
        ("torchgeom_optim.geometry.gram", "def f():\n    import scipy.linalg", "scipy.linalg"),
        ("torchgeom_optim.geometry.gram", "from .._optional import optional_import", "torchgeom_optim._optional"),
        ("torchgeom_optim.models.gradnet", "from torchgeom_optim import optimizers", "torchgeom_optim.optimizers"),
        ("torchgeom_optim.models.gradnet", "from ..diagnostics import hook", "torchgeom_optim.diagnostics"),
        ("torchgeom_optim.models.gradnet", "import torchvision", "torchvision"),
        ("torchgeom_optim.optimizers.whitening", "from torchgeom_optim.models import lenet", "torchgeom_optim.models"),
        ("torchgeom_optim.diagnostics.hook", "import benchmarks.harness", "benchmarks.harness"),
        ("torchgeom_optim", "from torchgeom_optim.models import lenet", "torchgeom_optim.models"),
        ("examples.quickstart", "from benchmarks.harness import start", "benchmarks.harness"),
        ("benchmarks.harness", "from tests.oracles import tolerance", "tests.oracles"),
    ],
)
def test_an_arrow_that_points_up_is_found(module, source, wrong):
    assert forbidden_imports(source, module) == {wrong}


def test_arrows_that_are_allowed():
    assert forbidden_imports("from .capture import Capture", "torchgeom_optim.geometry.gram") == set()
    assert forbidden_imports("from . import capture", "torchgeom_optim.geometry.gram") == set()
    assert forbidden_imports("from .gram import Gram", "torchgeom_optim.geometry", is_package=True) == set()
    assert forbidden_imports("import torch.func, collections.abc", "torchgeom_optim.models.gradnet") == set()


def test_packages_are_the_folders_that_exist():
    found = set()
    for root in FOLDERS:
        for path in folder_of(root).rglob("__init__.py"):
            inner = path.parent.relative_to(folder_of(root)).parts
            found.add(".".join([root, *inner]))
    assert sorted(found) == sorted(PACKAGES)
    for package in PACKAGES:
        python_below = [p.parent for p in folder_of(package).rglob("*.py") if "__pycache__" not in p.parts]
        assert all((folder / "__init__.py").is_file() for folder in python_below), package


@pytest.mark.parametrize("room", ["diagnostics", "models"])
def test_links_lead_to_the_rooms_at_the_top(room):
    link = ROOT / "torchgeom_optim" / room
    # A checkout without symbolic links has a file with the target's name instead; the package works there too.
    target = link.readlink().as_posix() if link.is_symlink() else link.read_text(encoding="utf-8").strip()
    assert target == f"../{room}"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bare_names_never_reach_sys_modules():
    everything = [name for name in MODULES if name.startswith("torchgeom_optim")]
    code = f"import importlib, sys\nfor name in {everything}: importlib.import_module(name)\n"
    assert run(code + "print(sorted({'diagnostics', 'models'} & sys.modules.keys()))") == "[]"
    assert not {"diagnostics", "models"} & sys.modules.keys()


@pytest.mark.parametrize("room", ["diagnostics", "models"])
def test_bare_names_are_refused(room):
    code = f"try:\n    import {room}\nexcept ImportError as error:\n    print(error)"
    assert run(code) == f"'{room}' is not importable by this name; import torchgeom_optim.{room} instead."


def test_import_takes_torch_and_numpy_alone():
    code = """
        import sys, torch, numpy, torch.func, torch.utils.hooks
        before = set(sys.modules)
        import torchgeom_optim, torchgeom_optim.geometry, torchgeom_optim.diagnostics, torchgeom_optim.models
        print(*sorted(set(sys.modules) - before))
    """
    added = run(re.sub(r"^ {8}", "", code, flags=re.MULTILINE)).split()
    foreign = {name.split(".")[0] for name in added} - CORE - {"torchgeom_optim"}
    assert foreign == set()
    # What makes `import torch` slow when it comes along; they are for functions that compile.
    assert not {"torch._dynamo", "torch._inductor", "torch.onnx"} & set(added)


def public_names(package: ModuleType) -> set[str]:
    """Names bound in a package that are neither private nor its own submodules nor ``annotations``."""
    return {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_what_is_public(name):
    package = importlib.import_module(name)
    assert hasattr(package, "__all__"), f"{name} has no __all__"
    assert set(package.__all__) == public_names(package)
    assert len(set(package.__all__)) == len(package.__all__)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("torchgeom_optim")])
def test_every_module_says_what_is_public(module):
    loaded = importlib.import_module(module)
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_optional_libraries_have_their_extra():
    from torchgeom_optim._optional import _EXTRAS

    extras = SETTINGS["project"]["optional-dependencies"]
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn"}
    for library, extra in _EXTRAS.items():
        names = [re.split(r"[<>=\[ ]", requirement)[0] for requirement in extras[extra]]
        assert distributions.get(library, library) in names
    used = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional_import":
                assert isinstance(node.args[0], ast.Constant), f"{path.name}: name the library in the call"
                used.add(node.args[0].value.split(".")[0])
    assert used <= _EXTRAS.keys()


def test_core_dependencies_are_torch_and_numpy():
    names = [re.split(r"[<>=]", requirement)[0] for requirement in SETTINGS["project"]["dependencies"]]
    assert names == ["torch", "numpy"]


def test_package_is_typed():
    assert (ROOT / "torchgeom_optim" / "py.typed").is_file()
    assert SETTINGS["tool"]["setuptools"]["package-data"] == {"*": ["py.typed"]}
