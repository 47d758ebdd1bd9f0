"""What an import brings with it: counted in modules, since seconds depend on the machine."""

import subprocess
import sys

import pytest

import scfm

# Slow to import, and of use only to training, figures or single functions.
HEAVY = {"lightning", "torchmetrics", "transformers", "sklearn", "matplotlib", "huggingface_hub", "zarr"}


def brought_by(statement):
    """Names of the modules that `statement` loads in a fresh process."""
    script = f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def packages(modules):
    return {module.partition(".")[0] for module in modules}


def test_import_scfm_loads_itself_alone():
    modules = brought_by("import scfm")
    assert {module for module in modules if module.startswith("scfm")} == {"scfm"}
    assert len(modules) < 10


@pytest.mark.parametrize("statement", ["import scfm.ops", "import scfm.ops, scfm.nn, scfm.models"])
def test_the_network_needs_no_single_cell_packages(statement):
    assert packages(brought_by(statement)) & (HEAVY | {"anndata", "scanpy"}) == set()


def test_what_applies_a_model_does_not_wait_for_what_trains_one():
    """Beyond torch and scanpy these imports take 0.3 s of CPU; with Lightning they took 2.7 s."""
    used = "scfm.models, scfm.data, scfm.encoding, scfm.datasets, scfm.pp, scfm.pl, scfm.tl.embed, scfm.tl.perturb"
    brought = packages(brought_by(f"import torch, scanpy\nbefore |= set(sys.modules)\nimport scfm\n{used}"))
    assert brought & (HEAVY - {"sklearn"}) == set()


def test_what_applies_a_model_does_not_wait_for_what_fits():
    """Of 1.4 s of CPU that scikit-learn and scipy.stats took, 0.1 s are left."""
    used = [
        "embed",
        "embed_files",
        "annotate",
        "annotate_files",
        "perturb",
        "screen",
        "gene_network",
        "evaluate_perturbation",
    ]
    brought = brought_by(
        "import scfm, anndata\nscfm.load, scfm.pp.check, " + ", ".join(f"scfm.tl.{name}" for name in used)
    )
    assert packages(brought) & (HEAVY - {"zarr"}) == set()  # anndata imports zarr
    assert "scipy.stats" not in brought


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"], ["fit", "--help"], ["pretrain", "--help"]])
def test_help_of_the_command_line_does_not_load_what_trains(arguments):
    script = f"from scfm.cli._app import run; sys.stdout = sys.stderr; run({arguments}); sys.stdout = sys.__stdout__"
    assert packages(brought_by(script)) & {"lightning", "transformers"} == set()


@pytest.mark.parametrize("module", [scfm, scfm.tl, scfm.pp, scfm.pl])
def test_public_names_are_listed_and_there(module):
    assert set(module.__all__) <= set(dir(module))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name
