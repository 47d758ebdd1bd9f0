"""Functions take a model or its path, and say what they take if they get something else."""

import numpy as np
import pytest

import scfm


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:30].copy()


@pytest.fixture(scope="module")
def path(adata, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=1), progress=False).save(path)
    return path


def test_a_path_gives_what_its_model_gives(adata, path):
    model = scfm.load(path)
    np.testing.assert_array_equal(
        scfm.tl.embed(adata, str(path), copy=True).obsm["X_scfm"], scfm.tl.embed(adata, model, copy=True).obsm["X_scfm"]
    )
    assert scfm.pp.check(adata, path).ok
    assert scfm.tl.gene_embeddings(adata, path).equals(scfm.tl.gene_embeddings(adata, model))


@pytest.mark.parametrize("call", [scfm.tl.embed, scfm.tl.perturb, scfm.tl.gene_embeddings, scfm.tl.denoise])
def test_what_is_not_a_model_is_named(adata, call):
    with pytest.raises(scfm.errors.ModelFileError, match="no/such/model"):
        call(adata, "no/such/model")
    with pytest.raises(TypeError, match="`model` is a AnnData; pass a model"):
        call(adata, adata)


def test_one_path_is_a_list_of_one(adata, path, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert scfm.tl.embed_files(str(tmp_path / "cells.h5ad"), tmp_path / "out.npy", path, progress=False) == adata.n_obs
    expected = scfm.tl.embed(adata, path, copy=True).obsm["X_scfm"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
