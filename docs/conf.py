"""How Sphinx builds these pages: ``make docs``, warnings as errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_extensions")]

from importlib.metadata import version as version_of  # noqa: E402

project = "torchgeom-optim"
author = copyright = "The torchgeom-optim authors"
version = release = version_of("torchgeom-optim")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "drawn_math",
    "measured",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
suppress_warnings = ["myst.xref_missing"]  # links within benchmarks/README.md lead to files of the repository

html_theme = "furo"
html_title = "torchgeom-optim"
html_static_path = ["_static"]
html_css_files = ["tables.css", "formulas.css"]
html_math_renderer = "drawn"
exclude_patterns = ["_build"]
