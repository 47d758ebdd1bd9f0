"""Depth is part of what a model expects: where it was learned with a column of depths, new cells are read with that too."""

import numpy as np
import pytest

import scfm
from scfm.encoding import EncodingConfig, encoding_from_dict, make_encoding


@pytest.fixture
def adata():
    """Cells whose depth is several times the sum of their counts."""
    cells = scfm.datasets.pbmc()[:40].copy()
    del cells.uns["scfm"]
    cells.obs["deep"] = np.asarray(cells.X.sum(1)).ravel() * np.linspace(2, 9, cells.n_obs)
    return cells


@pytest.fixture
def encoding(adata):
    return make_encoding("rank", adata=adata, depth_key="deep")


def test_the_column_is_found_without_being_named_again(adata, encoding, caplog):
    assert encoding.config.depth_key == "deep"
    named = scfm.pp.encode(adata, encoding, depth_key="deep")
    found = scfm.pp.encode(adata, encoding)
    np.testing.assert_array_equal(found.depth_B, named.depth_B)
    np.testing.assert_allclose(found.depth_B, adata.obs["deep"], rtol=1e-6)
    expression = scfm.pp.log_expression(adata, encoding)
    assert (expression != scfm.pp.log_expression(adata, encoding, depth_key="deep")).nnz == 0
    assert (expression != scfm.pp.log_expression(adata, make_encoding("rank", adata=adata))).nnz > 0
    assert caplog.text == ""


def test_cells_without_the_column_are_summed_and_the_log_says_so(adata, encoding, caplog):
    summed = np.asarray(adata.X.sum(1)).ravel()
    del adata.obs["deep"]
    np.testing.assert_allclose(scfm.pp.encode(adata, encoding).depth_B, summed)
    assert "adata.obs['deep']" in caplog.text
    assert "depth_key" in caplog.text


def test_what_the_data_name_comes_first(adata, encoding):
    adata.obs["other"] = 7.0
    adata.uns["scfm"] = {"depth_key": "other"}
    np.testing.assert_array_equal(scfm.pp.encode(adata, encoding).depth_B, np.full(adata.n_obs, 7.0))


def test_it_is_saved_with_the_encoding_and_absent_where_there_is_none(adata, encoding):
    again = encoding_from_dict(encoding.to_dict(), encoding.vocabulary, encoding.arrays())
    assert again.config == encoding.config
    assert "depth_key" not in EncodingConfig(kind="rank").to_dict()  # ids of models of earlier versions stay the same


def test_a_fitted_model_expects_it(adata):
    short = scfm.FitConfig(n_steps=1, tokens_per_step=1024)
    base = scfm.fit(adata, config=short, context_length=64, progress=False)
    assert base.encoding.config.depth_key is None
    adata.uns["scfm"] = {"depth_key": "deep"}
    assert scfm.fit(adata, config=short, context_length=64, progress=False).encoding.config.depth_key == "deep"
    tuned = scfm.fit(adata, model=base, config=short, progress=False)
    assert tuned.encoding.config.depth_key == "deep"
    assert base.encoding.config.depth_key is None
