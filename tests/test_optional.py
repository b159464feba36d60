"""A missing optional library is named together with the extra that brings it."""

from __future__ import annotations

import sys

import pytest

from torchgeom_optim._optional import optional_import


def test_a_library_that_is_there():
    assert optional_import("xml.dom", "a test").__name__ == "xml.dom"


@pytest.mark.parametrize(
    ("name", "remedy"), [("matplotlib.pyplot", r"torchgeom-optim\[plots\]"), ("tqdm", r"\[demo\]")]
)
def test_a_missing_library_names_its_extra(monkeypatch, name, remedy):
    monkeypatch.setitem(sys.modules, name.partition(".")[0], None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"no module named '{name.split('.')[0]}': the curve needs it; .*{remedy}"):
        optional_import(name, "the curve")


def test_a_library_without_an_extra():
    with pytest.raises(ImportError, match=r"pip install no_such_library brings it"):
        optional_import("no_such_library.part", "a test")


def test_a_library_that_lacks_a_module_of_its_own_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import what_it_stands_on\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_stands_on") as caught:
        optional_import("half_installed", "a test")
    assert "needs it" not in str(caught.value)
