"""The examples in the docstrings of the public functions run as they stand."""

import doctest
import importlib
import inspect

import matplotlib
import pytest

import scfm

matplotlib.use("agg")

# Public functions and classes by the name that a user types; each has an example.
MODULES = ("pp", "tl", "pl", "datasets", "models", "models.presets", "data", "encoding", "objectives", "ops", "train")
PUBLIC = sorted(
    {f"scfm.{name}" for name in scfm.__all__ if not inspect.ismodule(getattr(scfm, name))}
    | {f"scfm.{module}.{name}" for module in MODULES for name in importlib.import_module(f"scfm.{module}").__all__}
    | {f"scfm.baselines.{name}" for name in ("annotation_baselines", "log_normalize", "scores")}
    | {f"scfm.Model.{name}" for name in ("from_pretrained", "push_to_hub", "report", "save", "save_pretrained")}
)
# What functions return or raise, protocols and types: explained where they are met.
RESULTS = {
    "scfm.data.Split",
    "scfm.objectives.Loss",
    "scfm.objectives.Objective",
    "scfm.objectives.Targets",
    "scfm.objectives.Term",
    "scfm.pp.DataCheck",
    "scfm.train.NonFiniteLossError",
}
# Owed; take a name out when its docstring has an example, or says what each parameter is.
WITHOUT_EXAMPLE = {
    "scfm.FitConfig",
    "scfm.data.CellStream",
    "scfm.encoding.BinEncoding",
    "scfm.encoding.BucketEncoding",
    "scfm.encoding.ContinuousEncoding",
    "scfm.encoding.Encoding",
    "scfm.encoding.GeneMap",
    "scfm.encoding.GeneReport",
    "scfm.encoding.RankEncoding",
    "scfm.encoding.build_vocabulary",
    "scfm.encoding.encoding_from_dict",
    "scfm.encoding.read_aliases",
    "scfm.encoding.read_medians",
    "scfm.encoding.read_vocabulary",
    "scfm.models.generate",
    "scfm.objectives.Generative",
    "scfm.objectives.Integration",
    "scfm.objectives.MaskedBuckets",
    "scfm.objectives.MaskedValues",
    "scfm.objectives.ReadDepth",
    "scfm.objectives.at_step",
    "scfm.objectives.total",
    "scfm.ops.AttentionPlan",
    "scfm.ops.attention_reference",
    "scfm.ops.attention_scores",
    "scfm.ops.deletion_effects",
    "scfm.ops.extension_info",
    "scfm.ops.linear_attention",
    "scfm.ops.make_plan",
    "scfm.ops.random_projection",
    "scfm.train.FitConfig",
    "scfm.train.PretrainConfig",
    "scfm.train.TrainingModule",
    "scfm.train.merge",
    "scfm.train.pretrain",
    "scfm.train.set_trainable",
    "scfm.train.train",
}
UNDESCRIBED = {
    "scfm.baselines.annotation_baselines",
    "scfm.baselines.log_normalize",
    "scfm.baselines.scores",
    "scfm.encoding.build_vocabulary",
    "scfm.encoding.encoding_from_dict",
    "scfm.models.presets.own_preset",
    "scfm.models.presets.preset",
    "scfm.objectives.at_step",
    "scfm.objectives.class_weights",
    "scfm.objectives.total",
    "scfm.ops.attention_reference",
    "scfm.pp.log_expression",
    "scfm.train.merge",
    "scfm.train.train",
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
@pytest.mark.parametrize("path", sorted(set(PUBLIC) - RESULTS - WITHOUT_EXAMPLE))
def test_public_functions_have_an_example_that_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tests = [test for test in examples_of(path) if test.examples]
    assert tests, f"{path} has no example in its docstring"
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(test)
        assert result.failed == 0, f"the example of {path} does not give what it says (see stdout)"


@pytest.mark.parametrize("path", sorted(set(PUBLIC) - RESULTS - UNDESCRIBED))
def test_public_functions_say_what_each_parameter_is(path):
    from scfm.cli._command import parameter_help

    named = public(path)
    if inspect.isclass(named):
        assert inspect.getdoc(named)
        return
    described = parameter_help(named)
    assert set(inspect.signature(named).parameters) - {"self", "options"} <= set(described)


@pytest.mark.parametrize("path", sorted(WITHOUT_EXAMPLE))
def test_what_is_owed_is_still_owed(path):
    """A name whose example was written leaves the list, so that the example is run."""
    assert not any(test.examples for test in examples_of(path))
