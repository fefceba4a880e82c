"""Sphinx: `make docs` builds these pages, warnings are errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stf_kernels

project = "stf-kernels"
author = copyright = "The stf-kernels contributors"
version = release = stf_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code with single backticks

html_theme = "furo"
html_title = f"stf-kernels {release}"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
napoleon_use_rtype = False


def _stars_are_stars(app, what, name, obj, options, lines):
    """Docstrings write M*C and r*r for products; reStructuredText would read emphasis. *optional* is transformers'."""
    lines[:] = [line.replace("*", "\\*").replace("\\*optional\\*", "*optional*") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _stars_are_stars, priority=1)
