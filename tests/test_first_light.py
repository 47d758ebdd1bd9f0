"""Promises that run through the whole package: same cell, same embedding; results that survive the disk."""

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

import scfm
from scfm import pp

CONFIG = scfm.FitConfig(n_steps=6, tokens_per_step=2048, accelerator="cpu")


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[::5].copy()


@pytest.fixture(scope="module", params=["rank", "bin"])
def model(request, adata):
    return scfm.fit(adata.copy(), encoding=request.param, config=CONFIG, progress=False)


def test_an_embedding_does_not_depend_on_order_batch_size_or_batch_mates(adata, model, monkeypatch):
    """To the bit, on the CPU."""
    whole = model.embed(pp.encode(adata, model))
    order = np.random.default_rng(0).permutation(adata.n_obs)
    assert np.array_equal(model.embed(pp.encode(adata[order], model)), whole[order])
    for cell in (0, 17):
        assert np.array_equal(model.embed(pp.encode(adata[[cell]], model))[0], whole[cell])
    monkeypatch.setattr("scfm.models.model.TOKENS_PER_BATCH", 500)
    assert np.array_equal(model.embed(pp.encode(adata, model)), whole)


def test_an_embedding_does_not_depend_on_the_number_of_threads(adata, model):
    cells = pp.encode(adata[:20], model)
    torch.set_num_threads(1)
    one = model.embed(cells)
    torch.set_num_threads(2)
    two = model.embed(cells)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["csc", "dense", "int64", "layer", "backed", "view"])
def test_every_form_of_input_gives_the_same_embedding(adata, model, form, tmp_path):
    expected = model.embed(pp.encode(adata, model))
    given, layer = adata.copy(), None
    if form == "csc":
        given.X = sparse.csc_matrix(given.X)
    elif form == "dense":
        given.X = given.X.toarray()
    elif form == "int64":
        given.X = given.X.astype(np.int64)
    elif form == "layer":
        given.layers["counts"], layer = given.X.copy(), "counts"
        given.X = np.log1p(given.X.toarray())
    elif form == "backed":
        given.write_h5ad(tmp_path / "backed.h5ad")
        given = anndata.read_h5ad(tmp_path / "backed.h5ad", backed="r")
    else:
        shuffled = given[np.arange(given.n_obs)[::-1]].copy()
        given = shuffled[np.arange(given.n_obs)[::-1]]
    assert np.array_equal(model.embed(pp.encode(given, model, layer=layer)), expected)


def test_a_saved_model_embeds_the_same(adata, model, tmp_path):
    model.save(tmp_path / "model")
    again = scfm.load(tmp_path / "model")
    assert again.id == model.id
    cells = pp.encode(adata, model)
    assert np.array_equal(again.embed(cells), model.embed(cells))


def test_results_survive_the_disk(adata, tmp_path):
    given = adata.copy()
    model = scfm.fit(given, labels_key="bulk_labels", config=CONFIG, pretrain_config=CONFIG, progress=False)
    scfm.tl.annotate(given, model)
    scfm.tl.embed(given, model, key_added="X_again")
    given.write_h5ad(tmp_path / "out.h5ad")
    read = anndata.read_h5ad(tmp_path / "out.h5ad")
    for key in ("X_scfm", "X_again", "scfm_proba"):
        assert np.array_equal(read.obsm[key], given.obsm[key])
    assert list(read.obs["scfm_label"]) == list(given.obs["scfm_label"])
    assert set(read.obs["scfm_split"]) <= {"train", "calibration", "test", "unlabeled"}
    assert read.uns["scfm"]["X_scfm"]["model_id"] == model.id
    np.testing.assert_allclose(given.obsm["scfm_proba"].sum(1), 1, rtol=1e-5)


def test_importing_the_package_loads_neither_torch_nor_scanpy():
    import subprocess
    import sys

    code = "import sys, scfm; assert not {'torch', 'scanpy', 'lightning'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_and_models_need_no_scanpy_and_no_lightning():
    import subprocess
    import sys

    code = (
        "import sys, scfm.ops, scfm.nn, scfm.models; "
        "loaded = {'scanpy', 'anndata', 'lightning'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
