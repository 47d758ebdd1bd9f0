"""`scfm.tl.map_reference` and `scfm.tl.integrate`."""

import anndata
import numpy as np
import pytest

import scfm
from scfm.errors import EmptyCellError, LabelsError, ModelTaskError
from scfm.tl._integrate import _with_integration_heads
from scfm.tl._map_reference import _shares

SHORT = scfm.FitConfig(n_steps=2, tokens_per_step=2048)


@pytest.fixture(scope="module")
def blood():
    return scfm.datasets.pbmc()[:120].copy()


@pytest.fixture(scope="module")
def rank_model(blood):
    return scfm.fit(blood.copy(), config=SHORT, progress=False)


@pytest.fixture(scope="module")
def bin_model(blood):
    return scfm.fit(blood.copy(), encoding="bin", config=SHORT, progress=False)


def test_a_reference_cell_finds_itself_and_a_sole_neighbor_decides(blood, rank_model):
    mapped = scfm.tl.map_reference(blood, blood, rank_model, labels_key="bulk_labels", n_neighbors=1, copy=True)
    np.testing.assert_array_equal(mapped.obsm["scfm_mapped_neighbors"][:, 0], np.arange(blood.n_obs))
    assert list(mapped.obs["scfm_mapped_label"]) == list(blood.obs["bulk_labels"])
    np.testing.assert_allclose(mapped.obs["scfm_mapped_distance"], 0, atol=1e-5)
    np.testing.assert_allclose(mapped.obs["scfm_mapped_confidence"], 1)


def test_reference_cells_without_a_label_are_never_neighbors(blood, rank_model, tmp_path):
    reference = blood.copy()
    reference.obs["bulk_labels"] = reference.obs["bulk_labels"].astype(object)
    reference.obs.iloc[::2, reference.obs.columns.get_loc("bulk_labels")] = np.nan
    query = blood[:10].copy()
    scfm.tl.map_reference(query, reference, rank_model, labels_key="bulk_labels", n_neighbors=5)
    assert (query.obsm["scfm_mapped_neighbors"] % 2 == 1).all()
    query.write_h5ad(tmp_path / "query.h5ad")
    read = anndata.read_h5ad(tmp_path / "query.h5ad")
    np.testing.assert_array_equal(read.obsm["scfm_mapped_neighbors"], query.obsm["scfm_mapped_neighbors"])


def test_more_neighbors_than_labeled_cells_is_an_error(blood, rank_model):
    with pytest.raises(LabelsError, match="`n_neighbors` is 500, and 120 reference cells"):
        scfm.tl.map_reference(blood[:5].copy(), blood, rank_model, labels_key="bulk_labels", n_neighbors=500)


def test_a_query_without_cells_is_an_error(blood, rank_model):
    with pytest.raises(EmptyCellError, match="hold no cells"):
        scfm.tl.map_reference(blood[:0].copy(), blood, rank_model, labels_key="bulk_labels")


def test_nearer_neighbors_weigh_more():
    share = _shares(np.array([[1.0, 2.0, 3.0]]), np.array([[1, 0, 0]]), 2)
    near, middle, far = np.exp([-1 / 8, -1 / 2, -9 / 8])  # the median distance is 2
    np.testing.assert_allclose(share, [[(middle + far) / (near + middle + far), near / (near + middle + far)]])


def test_integration_leaves_the_model_alone_and_moves_the_embedding(blood, bin_model):
    adata = blood.copy()
    adata.obs["donor"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    before = bin_model.id
    scfm.tl.integrate(adata, bin_model, batch_key="donor", config=SHORT, progress=False)
    assert bin_model.id == before
    plain = scfm.tl.embed(adata, bin_model, copy=True).obsm["X_scfm"]
    integrated = adata.obsm["X_scfm_integrated"]
    assert integrated.shape == plain.shape
    assert np.isfinite(integrated).all()
    assert not np.allclose(integrated, plain, atol=1e-3)


def test_integration_starts_from_the_weights_of_the_model(bin_model):
    start = _with_integration_heads(bin_model, 3, seed=0).state_dict()
    body = {name for name in start if name.startswith(("embedding", "blocks"))}
    assert body
    for name in body:
        np.testing.assert_array_equal(start[name], bin_model.network.state_dict()[name])


def test_integration_needs_values_and_two_batches(blood, rank_model, bin_model):
    adata = blood.copy()
    adata.obs["donor"] = "a"
    with pytest.raises(ModelTaskError, match='encoding="bin"'):
        scfm.tl.integrate(adata, rank_model, batch_key="donor")
    with pytest.raises(LabelsError, match="only one batch"):
        scfm.tl.integrate(adata, bin_model, batch_key="donor")
    with pytest.raises(LabelsError, match=r"doner.*donor"):
        scfm.tl.integrate(adata, bin_model, batch_key="doner")
