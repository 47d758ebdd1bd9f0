"""The examples in the docstrings of the public functions run as they stand."""

import doctest
import importlib
import inspect
import re

import docstring_parser
import matplotlib
import pytest

import scfm

matplotlib.use("agg")

# Public functions and classes by the name that a user types; each has an example.
MODULES = ("pp", "tl", "pl", "datasets", "models", "families", "data", "encoding", "objectives", "ops", "train")
PUBLIC = sorted(
    {f"scfm.{name}" for name in scfm.__all__ if not inspect.ismodule(getattr(scfm, name))}
    | {f"scfm.{module}.{name}" for module in MODULES for name in importlib.import_module(f"scfm.{module}").__all__}
    | {f"scfm.baselines.{name}" for name in ("annotation_baselines", "log_normalize", "scores")}
    | {f"scfm.Model.{name}" for name in ("from_pretrained", "push_to_hub", "report", "save", "save_pretrained")}
)
# What functions return or raise, protocols, types and registries: explained where they are used.
RESULTS = {
    "scfm.data.Split",
    "scfm.encoding.ENCODINGS",
    "scfm.families.FAMILIES",
    "scfm.families.Family",
    "scfm.families.Preset",
    "scfm.families.add_family",
    "scfm.objectives.GeneClassification",
    "scfm.objectives.OBJECTIVES",
    "scfm.objectives.PretrainingObjective",
    "scfm.objectives.Loss",
    "scfm.objectives.Objective",
    "scfm.objectives.Targets",
    "scfm.objectives.Term",
    "scfm.pp.DataCheck",
    "scfm.train.NonFiniteLossError",
}


def public(path):
    """What a user finds under a dotted name."""
    found = scfm
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found


def examples_of(path):
    # Names come from the example's own imports, as for a user who copies it.
    return doctest.DocTestFinder(recurse=False).find(public(path), path, globs={})


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(set(PUBLIC) - RESULTS))
def test_public_functions_have_an_example_that_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tests = [test for test in examples_of(path) if test.examples]
    assert tests, f"{path} has no example in its docstring"
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(test)
        assert result.failed == 0, f"the example of {path} does not give what it says (see stdout)"


@pytest.mark.parametrize("path", sorted(set(PUBLIC) - RESULTS))
def test_public_functions_say_what_each_parameter_is(path):
    from scfm.cli._options import parameter_help

    named = public(path)
    if inspect.isclass(named):
        assert inspect.getdoc(named)
        return
    described = parameter_help(named)
    missing = [
        name
        for name in inspect.signature(named).parameters
        if name not in ("self", "options") and not described.get(name)
    ]
    assert missing == []


def test_shared_descriptions_are_complete_entries():
    from scfm._docs import SHARED

    for entry in SHARED.values():
        parsed = docstring_parser.parse(f"Parameters\n----------{entry}", docstring_parser.DocstringStyle.NUMPYDOC)
        assert all(parameter.description.endswith(".") for parameter in parsed.params)


def test_a_shared_description_that_does_not_exist_is_refused():
    from scfm._docs import document

    def misspelt():
        """Embed.

        Parameters
        ----------
        {progess}
        """

    with pytest.raises(KeyError, match="progess"):
        document(misspelt)


@pytest.mark.parametrize("path", PUBLIC)
def test_no_description_refers_to_another_docstring(path):
    """`help` of one function is complete."""
    assert not re.search(r"As in `", inspect.getdoc(public(path)) or "")
