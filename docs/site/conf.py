"""How Sphinx builds the site; ``build.py`` lays out the pages and calls it."""

from pathlib import Path

import fusedloss

project, author = "fusedloss", "the authors of fusedloss"
version = release = fusedloss.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "docs.site.formulas",
]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the table of options has them
autosummary_generate = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100
highlight_language = "text"  # an indented block is a formula or what a program printed

# A reference of the docstrings to this package must have an end. Those to others name torch's classes and functions,
# whose pages a reader without a network could not open; a private class has no page.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!fusedloss\b).*|.*\._.*")]

html_theme = "furo"
html_title = "fusedloss"
html_math_renderer = "drawn"
html_static_path = [str(Path(__file__).parent / "site.css")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
