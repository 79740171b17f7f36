"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html`."""

import importlib.util
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

import racecore

project = "racecore"
author = copyright = "The racecore developers"
version = release = racecore.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "numpydoc", "myst_parser", "mathml"]
exclude_patterns = [
    "_build",
    "performance_table.md",
    "socket_study_tables.md",
]  # parts of other pages
default_role = "literal"  # docstrings quote names in single backquotes

html_theme = "alabaster"
html_theme_options = {
    "description": "RACE attention over millions of tokens",
    "fixed_sidebar": True,
    "page_width": "1240px",
    "font_family": "Georgia, serif",
}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["gallery.css"]
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types and shapes in words
autodoc_mock_imports = [
    name for name in ("jax",) if importlib.util.find_spec(name) is None
]  # the adapters' frameworks
numpydoc_show_class_members = False
numpydoc_validation_checks = {
    "GL03",
    "PR02",
    "PR03",
}  # a documented parameter exists, in this order

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
