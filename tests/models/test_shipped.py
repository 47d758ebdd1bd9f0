"""The models that are part of the package: found by name, small, the same for every kind of gene name, and right about real cells."""

import os
from pathlib import Path

import anndata
import numpy as np
import pytest
from safetensors import safe_open

import scfm
from scfm.cli._app import run
from scfm.errors import ModelFileError
from scfm.models.io.layout import FORMAT_VERSION, WEIGHTS, shipped
from scfm.models.io.load import read_json


def few_genes():
    """Real blood cells with 765 genes: enough to compare numbers, too few for right labels."""
    return scfm.datasets.pbmc()[:60].copy()


@pytest.fixture(scope="module")
def model():
    return scfm.load("blood")


def test_the_folder_is_small_and_complete(model):
    folder = shipped()["blood"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert read_json(folder / "config.json")["format_version"] == FORMAT_VERSION
    with safe_open(folder / WEIGHTS, "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys() if len(file.get_slice(name).get_shape()) > 1}  # noqa: SIM118
    assert dtypes == {"BF16"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(label in card for label in model.labels)
    assert model.id in card


@pytest.mark.slow
def test_a_folder_of_the_same_name_comes_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = scfm.fit(scfm.datasets.pbmc()[:50].copy(), config=scfm.FitConfig(n_steps=1), progress=False)
    other.save("blood")
    assert scfm.load("blood").id == other.id != model.id


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ModelFileError, match=r"in the package \(blood\)"):
        scfm.load("bloood")


@pytest.mark.skipif("SCFM_DATA" not in os.environ, reason="needs the folder SCFM_DATA")
def test_real_blood_cells_get_their_types(model):
    """The file holds cells that the model was fitted on: this finds broken files, and does not estimate accuracy."""
    adata = anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / "pbmc3k_raw_counts_labels.h5ad")[::10].copy()
    types = {
        "B": "B",
        "NK": "NK",
        "CD14+ Mono": "CD14 monocyte",
        "FCGR3A+ Mono": "CD16 monocyte",
        "Naive CD4 T": "CD4 T",
    }
    adata = adata[adata.obs["cell_type_seurat"].isin(types)].copy()
    scfm.tl.annotate(adata, model)
    right_B = adata.obs["scfm_label"].astype(str) == adata.obs["cell_type_seurat"].astype(str).map(types)
    assert right_B.mean() > 0.9
    assert (adata.obs["scfm_novelty"] < model.calibration.novelty_threshold).mean() > 0.8


def test_a_matrix_without_most_genes_is_reported(model, caplog):
    scfm.tl.annotate(few_genes(), model)
    assert "of the 4500 genes of the model" in caplog.text


def test_every_kind_of_gene_name_gives_the_same_numbers(model):
    adata = few_genes()
    ids = {symbol: name for name, symbol in model.encoding.vocabulary.aliases.items() if name.startswith("ENSG")}
    by_id = adata[:, [name in ids for name in adata.var_names]].copy()
    by_symbol = by_id.copy()
    by_id.var_names = [f"{ids[name]}.3" for name in by_id.var_names]
    assert by_id.n_vars > 30
    for each in (by_id, by_symbol):
        scfm.tl.annotate(each, model)
    assert np.array_equal(by_id.obsm["scfm_proba"], by_symbol.obsm["scfm_proba"])
    assert by_id.obs["scfm_novelty"].equals(by_symbol.obs["scfm_novelty"])


def test_predictions_do_not_depend_on_the_other_cells(model):
    adata = few_genes()
    scfm.tl.annotate(adata, model)
    alone = adata[7:8].copy()
    scfm.tl.annotate(alone, "blood")
    assert np.array_equal(alone.obsm["scfm_proba"], adata.obsm["scfm_proba"][7:8])


@pytest.mark.slow
def test_the_name_works_wherever_a_model_does(tmp_path):
    adata = scfm.datasets.pbmc()[:40].copy()
    scfm.tl.embed(adata, "blood")
    assert np.isfinite(adata.obsm["X_scfm"]).all()
    table = scfm.tl.perturb(adata, "blood", genes=["CD74"], kind="delete")
    assert len(table)
    fitted = scfm.fit(
        adata,
        labels_key="bulk_labels",
        model="blood",
        baselines=False,
        config=scfm.FitConfig(n_steps=1),
        progress=False,
    )
    assert set(fitted.labels) == set(adata.obs["bulk_labels"].astype(str))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert (
        run(["annotate", str(tmp_path / "cells.h5ad"), str(tmp_path / "labeled.h5ad"), "--model", "blood", "--json"])
        == 0
    )
    assert "scfm_label" in anndata.read_h5ad(tmp_path / "labeled.h5ad").obs
