"""The check of built pages finds the faults that it looks for; `make docs` applies it to every page."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def faults_of():
    spec = importlib.util.spec_from_file_location("check_pages", DOCS / "check_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.faults_of


@pytest.mark.parametrize(
    ("html", "n_faults"),
    [
        ("<p>Text with <code>`a`</code> and <pre>```</pre>.</p>", 0),
        ("<p>Text with `layer`.<br>More.</p>", 1),
        ('<dl><dt class="field-odd">Parameters</dt><dd><ul><li>a</li></ul></dd></dl>', 0),
        ('<dl><dt class="field-even">Returns<span>:</span></dt><dd><ul><li>None, or</li></ul></dd></dl>', 1),
    ],
)
def test_faults_are_found(faults_of, html, n_faults):
    assert len(faults_of(html)) == n_faults


def test_returns_of_public_functions_are_prose():
    """What napoleon makes of the docstrings with the settings of the site: no field, and every line of the text."""
    napoleon = pytest.importorskip("sphinx.ext.napoleon")
    settings = {"napoleon_google_docstring": False, "napoleon_custom_sections": ["Returns"]}
    assert 'napoleon_custom_sections = ["Returns"]' in (DOCS / "conf.py").read_text()

    import scfm

    for name in scfm.tl.__all__:
        docstring = getattr(scfm.tl, name).__doc__
        written = str(napoleon.NumpyDocstring(docstring, napoleon.Config(**settings)))
        assert ":returns:" not in written
        assert "Returns" in written
