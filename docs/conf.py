"""Sphinx: `python -m sphinx -W docs docs/_build/html`, or `make docs`."""

import shutil
import sys
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path

warnings.filterwarnings("ignore")  # of packages imported by autodoc; Sphinx's own warnings are errors

HERE = Path(__file__).parent

# Notebooks live in tutorials/, where they are run; the site shows copies with their stored outputs.
copies = HERE / "_tutorials"
shutil.rmtree(copies, ignore_errors=True)
copies.mkdir()
for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
    shutil.copy(notebook, copies)

# The options of the command line, from its registry of commands.
sys.path.insert(0, str(HERE))
from commands import page  # noqa: E402

(HERE / "_commands.md").write_text(page(), encoding="utf-8")

project = "scfm"
author = "The scfm developers"
project_copyright = "the scfm developers"
version = release = installed_version("single-cell-fm")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "images", "jupyter_execute", "_commands.md"]
templates_path = ["_templates"]

autosummary_generate = True
autodoc_default_options = {"members": True, "inherited-members": False, "show-inheritance": False}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Returns"]  # prose, as the signature has the types; by default its lines become a list
default_role = "code"
smartquotes_action = "qe"  # quotes and ellipses; `--` of an option is not a dash

nb_execution_mode = "off"
nb_output_stderr = "remove"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "scfm"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}


def setup(app):
    """A bar in a docstring is a bar (|x|, `A | None`), not the reStructuredText substitution that it could begin."""

    def escape_bars(app, what, name, obj, options, lines):
        lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", "\\|") for line in lines]

    app.connect("autodoc-process-docstring", escape_bars, priority=400)  # before napoleon's 500
