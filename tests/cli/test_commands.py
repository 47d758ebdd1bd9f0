"""Each command does what the public function of its name does, and leaves whole files or none."""

import dataclasses
import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import scfm
from scfm.cli._messages import as_options
from scfm.cli._options import parameter_help, with_options
from scfm.cli._registry import find_commands
from scfm.ops.backend import choose_backend

COMMANDS = find_commands()


def test_doctor_names_the_active_backend_and_why(result):
    facts = result("doctor")
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["attention"]["available"] == scfm.ops.extension_info()["available"]
    assert facts["attention"]["reason"]
    assert facts["encoder"]["available"] == scfm.data.encoder_info()["available"]
    for dtype in ("float32", "bfloat16", "float16"):
        path = facts["attention_paths"][dtype]
        assert path["backend"] == choose_backend("auto", torch.empty(1, 1, 64, dtype=getattr(torch, dtype)))
        assert path["reason"]


def test_doctor_without_the_extension_says_so_in_words(command, monkeypatch):
    from scfm.ops import extension

    monkeypatch.setenv("SCFM_DISABLE_EXT", "1")
    extension.load_extension.cache_clear()
    code, out, _ = command("doctor")
    extension.load_extension.cache_clear()
    assert code == 0
    assert "turned off by SCFM_DISABLE_EXT" in out
    assert "plain torch" in out


def test_names_of_genes_can_be_separated_by_commas(result, folder, tmp_path):
    for number, genes in enumerate((["CD74", "CST3"], ["CD74,CST3"])):
        options = ["--genes", *genes, "--null-genes", "CD79A", "LYZ"]
        result("perturb", folder / "cells.h5ad", tmp_path / f"{number}.csv", "--model", folder / "model", *options)
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()


def test_embed_writes_what_the_function_computes(result, folder, cells, tmp_path):
    result("embed", folder / "cells.h5ad", tmp_path / "out.h5ad", "--model", folder / "model")
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    expected = scfm.tl.embed(cells, scfm.load(folder / "model"), copy=True)
    np.testing.assert_array_equal(written.obsm["X_scfm"], expected.obsm["X_scfm"])
    assert written.uns["scfm"]["X_scfm"]["model_id"] == expected.uns["scfm"]["X_scfm"]["model_id"]
    np.testing.assert_array_equal(written.X.toarray(), cells.X.toarray())


def test_fit_saves_a_model_and_tells_the_scores(result, folder, tmp_path):
    facts = result(
        "fit", folder / "cells.h5ad", tmp_path / "model",
        "--labels-key", "bulk_labels", "--no-pretrain", "--n-steps", 2, "--seed", 3, "--no-progress",
    )  # fmt: skip
    model = scfm.load(tmp_path / "model")
    assert model.id == facts["model_id"]
    assert [row["method"] for row in facts["report"]] == list(model.report().index)
    config = model.history["stages"][0]["config"]
    assert (config["n_steps"], config["seed"]) == (2, 3)


def test_each_stage_of_fit_has_steps_and_a_rate_of_its_own(command, folder, monkeypatch, tmp_path):
    calls = []
    stub = functools.wraps(scfm.fit)(lambda adata, **options: calls.append(options) or sys.exit(0))
    monkeypatch.setattr(scfm, "fit", stub)
    fit = ["fit", folder / "cells.h5ad", tmp_path / "model", "--labels-key", "bulk_labels"]
    command(*fit)
    command(*fit, "--accelerator", "cpu")
    command(*fit, "--n-steps", 7, "--accelerator", "cpu", "--pretrain-steps", 9, "--pretrain-learning-rate", "0.5")
    plain, machine, both = calls
    assert (plain.get("config"), plain.get("pretrain_config")) == (None, None)
    assert (machine["config"].n_steps, machine.get("pretrain_config")) == (
        None,
        None,
    )  # `scfm.fit` chooses, as without it
    assert (both["config"].n_steps, both["config"].accelerator) == (7, "cpu")
    stage = both["pretrain_config"]
    assert (stage.n_steps, stage.learning_rate, stage.accelerator) == (9, 0.5, "cpu")
    code, _, err = command("fit", folder / "cells.h5ad", tmp_path / "model", "--pretrain-steps", 9)
    assert (code, "--labels-key" in err) == (1, True)


def test_help_has_no_words_that_cannot_be_typed(command):
    code, out, _ = command("fit", "--help")
    assert code == 0
    for word in ("EncodingConfig", "FitConfig", "None:", "None for", "a Model,", "MISSING"):
        assert word not in out


def test_help_names_options_as_they_are_typed():
    for name, command in COMMANDS.items():
        options = inspect.signature(command.build()).parameters
        for option, parameter in options.items():
            words = get_args(parameter.annotation)[1].help
            named = set(re.findall(r"(?<![\w\"'.-])\w+", words)) & {each for each in options if "_" in each}
            assert not named, (name, option, words)
            assert "`" not in words, (name, option)


def test_annotate_writes_labels_and_confidence(result, folder, cells, tmp_path):
    facts = result("annotate", folder / "cells.h5ad", tmp_path / "out.h5ad", "--model", folder / "model")
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    expected = scfm.tl.annotate(cells, scfm.load(folder / "model"), copy=True)
    assert list(written.obs["scfm_label"]) == list(expected.obs["scfm_label"])
    assert sum(facts["labels"].values()) == cells.n_obs


def test_perturb_writes_the_table_of_the_function(result, folder, cells, tmp_path):
    genes = ["CD74", "CST3"]
    result(
        "perturb", folder / "cells.h5ad", tmp_path / "out.csv", "--model", folder / "model",
        "--genes", *genes, "--no-progress",
    )  # fmt: skip
    (tmp_path / "genes.txt").write_text("\n".join(genes) + "\n")
    result(
        "perturb", folder / "cells.h5ad", tmp_path / "file.csv", "--model", folder / "model",
        "--genes-file", tmp_path / "genes.txt", "--no-progress",
    )  # fmt: skip
    assert (tmp_path / "file.csv").read_text() == (tmp_path / "out.csv").read_text()
    written = pd.read_csv(tmp_path / "out.csv", index_col=0)
    expected = scfm.tl.perturb(cells, scfm.load(folder / "model"), genes=genes, progress=False)
    assert list(written.index) == list(expected.index)
    np.testing.assert_allclose(written["shift_mean"], expected["shift_mean"], rtol=1e-12)


def test_check_fails_on_normalized_data_and_says_why(command, folder, cells, tmp_path):
    good = command("check", folder / "cells.h5ad", "--model", folder / "model")
    normalized = cells.copy()
    normalized.X = normalized.X.log1p()
    normalized.write_h5ad(tmp_path / "log.h5ad")
    bad = command("check", tmp_path / "log.h5ad", "--model", folder / "model")
    assert (good[0], bad[0]) == (0, 1)
    assert "not ready" in bad[1]


def test_pretrain_takes_options_vocabulary_and_validation_cells(command, folder, tmp_path):
    arguments = ["pretrain", folder / "cells.h5ad", tmp_path / "run", "--no-progress", "--tokens-per-step", 2000]
    code, _, err = command(*arguments, "--n-steps", 2, "--encoding", "bin", "--validation", 0.1, "--init", "none")
    assert code == 0, err
    model = scfm.load(tmp_path / "run" / "model")
    assert len(model.history["stages"][0]["losses"]) == 2
    assert len(model.history["stages"][0]["validation_losses"]) == 2
    assert model.encoding.config.kind == "bin"
    model.encoding.vocabulary.to_json(tmp_path / "vocabulary.json")
    more = ["pretrain", folder / "cells.h5ad", tmp_path / "more", "--no-progress", "--n-steps", 1]
    code, _, err = command(*more, "--vocabulary", tmp_path / "vocabulary.json", "--validation", folder / "cells.h5ad")
    assert code == 1
    assert "Remove it from one of them" in err
    assert command(*more, "--init", tmp_path / "run" / "model", "--sampling", "balanced:bulk_labels")[0] == 0
    stage = scfm.load(tmp_path / "more" / "model").history["stages"][-1]
    assert stage["config"]["sampling"] == {"name": "balanced", "column": "bulk_labels", "max_repeats": 10}
    assert scfm.load(tmp_path / "more" / "model").encoding.vocabulary == model.encoding.vocabulary


def test_convert_writes_what_transformers_opens(result, cells, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = scfm.FitConfig(n_steps=1)
    scfm.fit(cells.copy(), config=config, progress=False).save(tmp_path / "ours")
    result("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "geneformer")
    bert = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs")
    assert bert.config.vocab_size == len(scfm.load(tmp_path / "ours").encoding.vocabulary)


def test_screen_writes_the_table_of_the_function(result, folder, cells, tmp_path):
    cells[:6].write_h5ad(tmp_path / "few.h5ad")
    settings = {"n_verify": 3, "n_check": 2, "n_bootstrap": 0, "progress": False}
    result(
        "screen", tmp_path / "few.h5ad", tmp_path / "out.csv", "--model", folder / "model",
        "--n-verify", 3, "--n-check", 2, "--n-bootstrap", 0, "--no-progress",
    )  # fmt: skip
    written = pd.read_csv(tmp_path / "out.csv", index_col=0)
    expected = scfm.tl.screen(cells[:6].copy(), scfm.load(folder / "model"), **settings)
    assert list(written.index) == list(expected.index)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"Example: scfm {name}" in out


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"doctor"}))
def test_every_option_is_described(name):
    """What `--help` shows comes from docstrings: an option that is not documented there would show nothing."""
    for parameter in inspect.signature(COMMANDS[name].build()).parameters.values():
        words = parameter.annotation.__metadata__[0].help
        assert words, f"{name}: {parameter.name} is not described"
        assert not re.search(r"MISSING|factory|<|`|:class:", words), words


def test_parameters_described_together_are_told_once():
    def documented(start, goal):
        """Do.

        Parameters
        ----------
        start, goal
            States of cells.
        """

    assert parameter_help(documented) == {"start": "States of cells.", "goal": "See --start."}


def test_the_documentation_has_every_command_and_option(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs")
    import commands

    page = commands.page()
    for command in COMMANDS.values():
        section = page.partition(f"### `scfm {command.name}`")[2].partition("\n### ")[0]
        assert command.example in section
        options = [p for p in inspect.signature(command.build()).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert [option.name for option in options if f"`--{option.name.replace('_', '-')}`" not in section] == []


TOY = '''
from pathlib import Path
from typing import Any

import scfm
from scfm.cli._registry import command


@command(example="scfm count cells.h5ad", options_of="scfm.pp.log_expression")
def count(data: Path, /, **options: Any) -> None:
    """Count the cells of a file.

    Parameters
    ----------
    data
        .h5ad file.
    """
    print(data.name, options["layer"])
'''


@pytest.mark.parametrize("name", ["annotate", "check", "embed", "perturb", "screen"])
def test_a_command_with_a_model_loads_it_to_the_device_that_is_asked_for(command, folder, tmp_path, monkeypatch, name):
    asked = []

    def load(path, *, device="auto"):
        asked.append(device)
        raise ValueError("loaded")

    monkeypatch.setattr("scfm.load", load)
    outputs = [] if name == "check" else [tmp_path / ("out.csv" if name in ("perturb", "screen") else "out.h5ad")]
    for options in ([], ["--device", "cuda:1"]):
        code, _, err = command(name, folder / "cells.h5ad", *outputs, "--model", folder / "model", *options)
        assert (code, err) == (1, "scfm: loaded\n")
    assert asked == ["auto", "cuda:1"]


def test_a_command_is_one_file_of_any_installed_package(tmp_path):
    """The file registers itself; the package names it in its metadata, as `pip install` writes it."""
    (tmp_path / "toy.py").write_text(TOY)
    metadata = tmp_path / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[scfm.commands]\ncount = toy\n")

    def run(*arguments):
        script = f"import sys; sys.path.append({str(tmp_path)!r}); from scfm.cli import main; main()"
        return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)

    assert "Count the cells of a file." in run("--help").stdout
    assert "--layer" in run("count", "--help").stdout
    assert run("count", "cells.h5ad", "--layer", "counts").stdout == "cells.h5ad counts\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """Inner.

    Attributes
    ----------
    width
        Width.
    """

    width: int = 3
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """Outer.

    Attributes
    ----------
    kind
        Kind.
    seed
        Seed.
    inner
        Inner.
    """

    kind: str
    seed: int = 0
    fast: bool = True
    inner: InnerConfig = dataclasses.field(default_factory=lambda: InnerConfig(width=5))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"encoding": "rank", "seed": 1}),
        ({"width": 7}, {"encoding": OuterConfig(kind="rank", seed=1, inner=InnerConfig(width=7)), "seed": 1}),
        (
            {"fast": False},
            {"encoding": OuterConfig(kind="rank", seed=1, fast=False, inner=InnerConfig(width=5)), "seed": 1},
        ),
    ],
)
def test_fields_of_a_configuration_and_of_those_inside_it_are_options(given, expected):
    def source(*, encoding: str | OuterConfig = "rank", seed: int = 0):
        """Source."""

    def target(**options):
        """Target."""
        return options

    command = with_options(target, source)
    assert set(inspect.signature(command).parameters) == {"encoding", "seed", "fast", "width", "names"}
    assert command(encoding="rank", seed=1, **given) == expected


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ('Pass `layer="counts"`.', "Pass --layer counts."),
        ("Pass `gene_key=` to name the column.", "Pass --gene-key to name the column."),
        ("`labels_key` is 'x'.", "--labels-key is 'x'."),
        ("FitConfig.n_steps is 0.", "--n-steps is 0."),
        ("Load with `strict=False`.", "Load with --no-strict."),
        ('Fit one with `scfm.fit(adata, encoding="bin")`.', "Fit one with `scfm fit --encoding bin`."),
        ("`scfm.tl.annotate` writes it.", "`scfm annotate` writes it."),
        ("Use `scanpy.pp.filter_cells(adata, min_genes=1)`.", "Use `scanpy.pp.filter_cells(adata, min_genes=1)`."),
    ],
)
def test_messages_are_in_the_words_of_the_command_line(message, shown):
    assert as_options(message, commands=COMMANDS, options=["labels_key"]) == shown


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_label_that_stdout_cannot_show_does_not_fail_a_finished_command(encoding):
    script = (
        "from scfm.cli import _app, doctor\ndoctor.describe = lambda facts: '\u03b3\u03b4 T'\n_app.main(['doctor'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u03b3\\u03b4 T\n", b"")


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"convert", "doctor"}))
def test_every_command_that_reads_counts_takes_layer_gene_names_and_depth(name):
    assert {"layer", "gene_key", "depth_key"} <= set(inspect.signature(COMMANDS[name].build()).parameters)


def test_the_depth_of_cells_changes_their_labels_as_in_python(result, folder, cells, tmp_path):
    deep = cells.copy()
    deep.uns["scfm"] = {"depth_key": "deep"}
    deep.obs["deep"] = np.asarray(deep.X.sum(1)).ravel() * np.linspace(2, 9, deep.n_obs)
    expected = scfm.tl.annotate(deep, scfm.load(folder / "model"), copy=True)
    del deep.uns["scfm"]
    deep.write_h5ad(tmp_path / "deep.h5ad")
    arguments = ["annotate", tmp_path / "deep.h5ad", tmp_path / "out.h5ad", "--model", folder / "model"]
    result(*arguments, "--depth-key", "deep")
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(written.obsm["scfm_proba"], expected.obsm["scfm_proba"])
