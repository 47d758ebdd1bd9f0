"""The examples in the docstrings of the public functions run as they stand."""

import doctest
import importlib
import inspect

import matplotlib
import pytest

import scfm

matplotlib.use("agg")

# Public functions and classes by the name that a user types; each has an example.
PUBLIC = sorted(
    {f"scfm.{name}" for name in ("fit",)}
    | {f"scfm.{module}.{name}" for module in ("pp", "tl", "pl") for name in getattr(scfm, module).__all__}
)
WITHOUT_EXAMPLE = {
    "scfm.pp.DataCheck",  # what `scfm.pp.check` returns
}
UNDESCRIBED = {"scfm.pp.log_expression"}  # owed


def examples_of(path):
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    # Names come from the example's own imports, as for a user who copies it.
    return doctest.DocTestFinder(recurse=False).find(function, path, globs={})


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(set(PUBLIC) - WITHOUT_EXAMPLE))
def test_public_functions_have_an_example_that_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tests = [test for test in examples_of(path) if test.examples]
    assert tests, f"{path} has no example in its docstring"
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(test)
        assert result.failed == 0, f"the example of {path} does not give what it says (see stdout)"


@pytest.mark.parametrize("path", sorted(set(PUBLIC) - UNDESCRIBED))
def test_public_functions_say_what_each_parameter_is(path):
    from scfm.cli._command import parameter_help

    module, _, name = path.rpartition(".")
    public = getattr(importlib.import_module(module), name)
    if inspect.isclass(public):
        assert inspect.getdoc(public)
        return
    described = parameter_help(public)
    assert set(inspect.signature(public).parameters) <= set(described)
