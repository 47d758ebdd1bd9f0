"""`scfm.tl.map_reference` and `scfm.tl.integrate`."""

import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tqdm.auto import tqdm

import scfm
from scfm.annotation.discriminant import DiscriminantSpace
from scfm.annotation.harmony import corrected_by_harmony
from scfm.annotation.mapping import HeldOut, Mapping, hub_fraction, shares
from scfm.data.columns import Labels
from scfm.errors import EmptyCellError, LabelsError, ModelTaskError
from scfm.tl._integrate import _components, _crossed, _with_integration_heads

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


def test_a_reference_cell_finds_itself(blood, rank_model):
    mapped = scfm.tl.map_reference(blood, blood, rank_model, labels_key="bulk_labels", n_neighbors=1, copy=True)
    np.testing.assert_array_equal(mapped.obsm["scfm_mapped_neighbors"][:, 0], np.arange(blood.n_obs))
    assert (mapped.obs["scfm_mapped_label"].astype(str) == blood.obs["bulk_labels"].astype(str)).mean() > 0.95
    np.testing.assert_allclose(mapped.obs["scfm_mapped_distance"], 0, atol=1e-5)
    assert mapped.obs["scfm_mapped_confidence"].between(0, 1).all()
    assert 0.05 <= mapped.uns["scfm"]["scfm_mapped"]["hub_fraction"] < 0.2


def test_progress_bars_count_the_cells_of_reference_and_query_unless_they_are_turned_off(
    blood, rank_model, monkeypatch
):
    bars = []
    monkeypatch.setattr("scfm.models.inference.tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    how = {"labels_key": "bulk_labels", "baselines": False}
    for progress in (True, False):
        scfm.tl.map_reference(blood[:10].copy(), blood[10:], rank_model, progress=progress, **how)
    assert [bar.n for bar in bars] == [blood.n_obs - 10, 10, 0, 0]
    assert {bar.unit for bar in bars[:2]} == {"cell"}


def test_discriminant_analysis_agrees_with_scikit_learn_on_many_cells():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 2000)
    cells = rng.normal(size=(3, 6))[labels] + rng.normal(size=(6000, 6)) * [1, 2, 1, 0.5, 1, 1.5]
    space = DiscriminantSpace.of(cells, labels)
    expected = LinearDiscriminantAnalysis(solver="lsqr", priors=np.ones(3) / 3).fit(cells, labels)
    found = np.exp(space.log_proba(space.coordinates(cells)))
    np.testing.assert_allclose(found, expected.predict_proba(cells), atol=0.02)
    within = space.coordinates(cells) - space.center_CK[labels]
    assert space.projection_XK.shape == (6, 2)
    np.testing.assert_allclose(np.cov(within.T), np.eye(2), atol=0.05)


def test_one_reference_cell_that_all_query_cells_choose_is_a_hub():
    spread = np.arange(100)[:, None]
    hub = np.zeros((100, 1), dtype=np.int64)
    assert hub_fraction(spread, 100) == pytest.approx(0.05)
    assert hub_fraction(np.hstack([spread, hub]), 100) > 0.5


def test_labels_that_are_all_the_same_are_an_error(blood, rank_model):
    reference = blood.copy()
    reference.obs["same"] = "a"
    with pytest.raises(LabelsError, match="at least two are needed"):
        scfm.tl.map_reference(blood[:5].copy(), reference, rank_model, labels_key="same")


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
    with pytest.raises(LabelsError, match="`n_neighbors` is 500, but only 120 reference cells"):
        scfm.tl.map_reference(blood[:5].copy(), blood, rank_model, labels_key="bulk_labels", n_neighbors=500)


def test_adapt_ignores_what_all_classes_have_in_common():
    rng = np.random.default_rng(0)
    centers = rng.normal(0, 3, (4, 5))
    codes_R, codes_Q = np.repeat(np.arange(4), 50), np.r_[np.repeat(np.arange(3), [100, 40, 20]), [3, 3, 3]]
    mapping = Mapping.of(centers[codes_R] + rng.normal(size=(200, 5)), codes_R, 10)
    move = 2 * (centers[1] - centers[0]) / 3  # toward another class
    query_QK = mapping.space.coordinates(centers[codes_Q] + move + rng.normal(size=(163, 5)))
    shift_K = mapping.common_shift(query_QK)
    np.testing.assert_allclose(shift_K, move @ mapping.space.projection_XK, atol=0.6)
    right = [(mapping.predict(query_QK - part)[0].argmax(1) == codes_Q).mean() for part in (0, shift_K)]
    assert right[0] < 0.8
    assert right[1] > 0.95
    # Three cells of the last class do not count; cells of one class alone have no common difference.
    assert not mapping.common_shift(query_QK[codes_Q == 0] - shift_K).any()


def test_adapt_of_files_is_adapt_of_their_cells(blood, rank_model, tmp_path):
    how = {"labels_key": "bulk_labels", "n_neighbors": 4, "adapt": True, "progress": False}
    adata = scfm.datasets.pbmc()
    query, reference = adata[:150].copy(), adata[150:400].copy()
    query.X = (query.X * 2).astype(np.float32)
    query.X[:, :40] = 3 * query.X[:, :40]
    query[:70].write_h5ad(tmp_path / "a.h5ad")
    query[70:].write_h5ad(tmp_path / "b.h5ad")
    scfm.tl.map_reference_files(
        [tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "out.csv", reference, rank_model, **how
    )
    found = pd.read_csv(tmp_path / "out.csv", index_col=0)
    plain = scfm.tl.map_reference(query, reference, rank_model, **{**how, "adapt": False}, copy=True).obs
    mapped = scfm.tl.map_reference(query, reference, rank_model, **how, copy=True)
    assert mapped.uns["scfm"]["scfm_mapped"]["adapt"]
    assert found["scfm_mapped_label"].tolist() == mapped.obs["scfm_mapped_label"].astype(str).tolist()
    np.testing.assert_allclose(found["scfm_mapped_confidence"], mapped.obs["scfm_mapped_confidence"], rtol=1e-3)
    assert not np.allclose(plain["scfm_mapped_confidence"], mapped.obs["scfm_mapped_confidence"], rtol=1e-3)
    with pytest.raises(ValueError, match="20 are too few; it needs 100"):
        scfm.tl.map_reference(query[:20].copy(), reference, rank_model, **how)


def test_a_query_without_cells_is_an_error(blood, rank_model):
    with pytest.raises(EmptyCellError, match="hold no cells"):
        scfm.tl.map_reference(blood[:0].copy(), blood, rank_model, labels_key="bulk_labels")


def test_nearer_neighbors_weigh_more():
    share = shares(np.array([[1.0, 2.0, 3.0]]), np.array([[1, 0, 0]]), np.ones(2))
    near, middle, far = np.exp([-1 / 8, -1 / 2, -9 / 8])  # the median distance is 2
    np.testing.assert_allclose(share, [[(middle + far) / (near + middle + far), near / (near + middle + far)]])


def with_donors(blood):
    adata = blood.copy()
    adata.obs["donor"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    adata.obs["chemistry"] = np.where(np.arange(adata.n_obs) < 60, "v2", "v3")
    return adata


def test_training_to_integrate_leaves_the_model_alone_and_moves_the_embedding(blood, bin_model):
    adata = with_donors(blood)
    before = bin_model.id
    scfm.tl.integrate(adata, bin_model, batch_key="donor", method="train", config=SHORT, progress=False)
    assert bin_model.id == before
    plain = scfm.tl.embed(adata, bin_model, copy=True).obsm["X_scfm"]
    integrated = adata.obsm["X_scfm_integrated"]
    assert integrated.shape == plain.shape
    assert np.isfinite(integrated).all()
    assert not np.allclose(integrated, plain, atol=1e-3)


def test_harmony_takes_a_shift_between_batches_away_and_leaves_types_apart():
    pytest.importorskip("harmonypy")
    rng = np.random.default_rng(0)
    types, donors = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    cells = rng.normal(0, 0.1, (400, 3))
    cells[:, 0] += types
    cells[:, 1] += 0.5 * donors
    corrected = corrected_by_harmony(_components(cells, 3), {"donor": donors.astype(str)}, seed=0)
    apart = {name: _gap(values, donors) / _gap(values, types) for name, values in (("raw", cells), ("new", corrected))}
    assert apart["raw"] > 0.4
    assert apart["new"] < 0.15


def _gap(cells, groups):
    return np.linalg.norm(cells[groups == 1].mean(0) - cells[groups == 0].mean(0))


@pytest.mark.parametrize("method", ["harmony", "harmony-embedding"])
def test_harmony_works_for_every_encoding_and_for_several_kinds_of_batch(blood, rank_model, method, tmp_path):
    pytest.importorskip("harmonypy")
    adata = with_donors(blood)
    scfm.tl.integrate(adata, rank_model, batch_key=["donor", "chemistry"], method=method)
    integrated = adata.obsm["X_scfm_integrated"]
    assert integrated.shape == (120, 20 + 40 * (method == "harmony"))
    assert integrated.dtype == np.float32
    assert np.isfinite(integrated).all()
    again = scfm.tl.integrate(adata, rank_model, batch_key=["donor", "chemistry"], method=method, copy=True)
    np.testing.assert_array_equal(again.obsm["X_scfm_integrated"], integrated)
    adata.write_h5ad(tmp_path / "integrated.h5ad")


def test_without_harmonypy_the_error_says_what_to_do(blood, rank_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "harmonypy", None)
    with pytest.raises(ImportError, match=r"`pip install harmonypy`.*method=\"train\""):
        scfm.tl.integrate(with_donors(blood), rank_model, batch_key="donor")


def test_combinations_of_batches_are_batches():
    crossed = _crossed([Labels(("a", "b"), np.array([0, 1, 0, 1])), Labels(("x", "y"), np.array([0, 0, 1, 0]))])
    assert [crossed.names[code] for code in crossed.codes] == ["a x", "b x", "a y", "b x"]


def test_integration_starts_from_the_weights_of_the_model(bin_model):
    start = _with_integration_heads(bin_model, 3, seed=0).state_dict()
    body = {name for name in start if name.startswith(("embedding", "blocks"))}
    assert body
    for name in body:
        np.testing.assert_array_equal(start[name], bin_model.network.state_dict()[name])


def test_integration_needs_values_and_two_batches(blood, rank_model, bin_model):
    adata = blood.copy()
    adata.obs["donor"] = "a"
    with pytest.raises(LabelsError, match="only one batch"):
        scfm.tl.integrate(adata, bin_model, batch_key="donor")
    with pytest.raises(LabelsError, match=r"doner.*donor"):
        scfm.tl.integrate(adata, bin_model, batch_key="doner")
    with pytest.raises(ModelTaskError, match='encoding="bin"'):
        scfm.tl.integrate(with_donors(blood), rank_model, batch_key="donor", method="train")
    with pytest.raises(ValueError, match="`method` is 'scvi'"):
        scfm.tl.integrate(adata, bin_model, batch_key="donor", method="scvi")
    with pytest.raises(ValueError, match="`config`"):
        scfm.tl.integrate(with_donors(blood), bin_model, batch_key="donor", config=SHORT)


def test_the_report_scores_held_out_cells_of_the_reference_beside_simple_methods(
    blood, rank_model, monkeypatch, tmp_path
):
    query = blood[:10].copy()
    scfm.tl.map_reference(query, blood, rank_model, labels_key="bulk_labels")
    report = query.uns["scfm_mapped_report"]
    assert report.index[0] == "scfm.tl.map_reference"
    assert {"logistic regression (balanced)", "SVD-50 + 15 nearest neighbors"} <= set(report.index)
    assert report.drop(columns="setting").apply(lambda column: column.between(0, 1)).all(axis=None)
    query.write_h5ad(tmp_path / "query.h5ad")
    assert anndata.read_h5ad(tmp_path / "query.h5ad").uns["scfm_mapped_report"].equals(report)
    without = blood[:10].copy()
    scfm.tl.map_reference(without, blood, rank_model, labels_key="bulk_labels", baselines=False)
    assert "scfm_mapped_report" not in without.uns


def test_held_out_cells_and_the_rest_are_all_cells_of_the_reference():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(3), 30)
    features = rng.normal(size=(3, 5))[codes] * 4 + rng.normal(size=(90, 5))
    held_out = HeldOut.of(features, codes, 5)
    np.testing.assert_array_equal(np.sort(np.concatenate([held_out.held, held_out.rest])), np.arange(90))
    assert (held_out.log_proba_HC.argmax(1) == codes[held_out.held]).mean() > 0.9
    assert HeldOut.of(features[:4], np.array([0, 0, 1, 1]), 2) is None
