"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

from pycloudlib import __version__

project = "pycloudlib"
author = "the pycloudlib contributors"
project_copyright = author
release = __version__
version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"pycloudlib {release}"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]

# Headings are linked to as on the forges that show these files.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

# In docstrings, `names` are code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A prompt is nothing to copy.
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
