"""`scfm.tl.denoise`: predictions follow their genes, and stand beside no change and smoothing."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from tqdm.auto import tqdm

import scfm
from scfm import baselines
from scfm.encoding import make_encoding
from scfm.errors import ModelTaskError
from scfm.families import scfoundation
from scfm.models.config import ModelConfig
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.tl._denoise import evaluate_denoising, own_and_neighbors_weighted, thin_counts


@pytest.fixture(scope="module")
def blood():
    return scfm.datasets.pbmc()[:20, :60].copy()


@pytest.fixture(scope="module")
def model(blood):
    encoding = make_encoding("continuous", adata=blood)
    shape = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "context_length": 80}
    attention = {"kind": "linear", "qkv_bias": False, "head_width": 8, "n_random_features": 8}
    decoder = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 64, "attention": attention}
    parts = {"decoder": decoder, "n_tokens": len(encoding.vocabulary)}
    config = ModelConfig.from_dict({**scfoundation.ARCHITECTURE, **shape, **parts})
    torch.manual_seed(0)
    return Model(CellTransformer.for_vocabulary(config, encoding.vocabulary), encoding)


def test_predictions_follow_the_genes_when_columns_are_shuffled(blood, model):
    order = np.random.default_rng(0).permutation(blood.n_vars)
    plain = scfm.tl.denoise(blood, model, n_neighbors=0, copy=True).layers["scfm_denoised"]
    shuffled = scfm.tl.denoise(blood[:, order].copy(), model, n_neighbors=0, copy=True).layers["scfm_denoised"]
    known = ~np.isnan(plain).any(0)
    assert known.sum() == model.encoding.vocabulary.n_genes
    assert (plain[:, known] >= 0).all()
    np.testing.assert_array_equal(shuffled, plain[:, order])


def test_a_progress_bar_counts_the_cells_unless_it_is_turned_off(blood, model, monkeypatch):
    bars = []
    monkeypatch.setattr("scfm.models.inference.tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    for progress in (True, False):
        scfm.tl.denoise(blood, model, n_neighbors=0, progress=progress, copy=True)
    assert [bar.n for bar in bars] == [blood.n_obs, 0]
    assert bars[0].unit == "cell"


def test_asking_for_more_depth_changes_the_prediction(blood, model):
    shallow, deep = (
        scfm.tl.denoise(blood, model, target_depth=depth, n_neighbors=0, copy=True).layers["scfm_denoised"]
        for depth in (1e2, 1e6)
    )
    assert not np.allclose(shallow, deep, equal_nan=True, atol=1e-7)


def test_models_without_read_depth_are_refused(blood):
    ranked = scfm.fit(blood.copy(), config=scfm.FitConfig(n_steps=1), progress=False)
    with pytest.raises(ModelTaskError, match="rank encoding"):
        scfm.tl.denoise(blood, ranked)


def test_thinning_keeps_the_rate_and_never_adds():
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(20, (50, 40)).astype(np.float32))
    thinned = thin_counts(counts, 0.25)
    assert thinned.sum() / counts.sum() == pytest.approx(0.25, abs=0.01)
    assert ((counts - thinned).toarray() >= 0).all()


def test_smoothing_over_one_neighbor_changes_nothing_and_over_all_gives_the_mean():
    expression = sp.csr_matrix(np.random.default_rng(0).random((12, 8)).astype(np.float32))
    np.testing.assert_allclose(baselines.smooth_over_neighbors(expression, 1), expression.toarray(), rtol=1e-6)
    mean = np.broadcast_to(expression.toarray().mean(0), (12, 8))
    np.testing.assert_allclose(baselines.smooth_over_neighbors(expression, 12), mean, rtol=1e-5)


def test_scores_stand_beside_their_baselines(blood, model):
    table = evaluate_denoising(blood, model, rate=0.5)
    assert list(table.index)[:4] == ["scfm", "scfm, network alone", "no change", "mean of 15 nearest neighbors"]
    assert np.isfinite(table.to_numpy()).all()


def test_weighing_own_counts_and_neighbors_beats_either_alone():
    counts = sp.csr_matrix(scfm.datasets.pbmc()[:300, :60].X)
    thinned = thin_counts(counts, 0.5)
    kept = np.asarray(thinned.sum(1)).ravel() > 0
    shallow, truth = baselines.log_normalize(thinned[kept]), baselines.log_normalize(counts[kept]).toarray()
    alone = shallow.toarray(), baselines.smooth_over_neighbors(shallow, 15)
    weighted = own_and_neighbors_weighted(thinned[kept], rate=0.5, n_neighbors=15, seed=0)
    assert ((weighted - truth) ** 2).mean() < 0.9 * min(((values - truth) ** 2).mean() for values in alone)


def test_an_uninformative_network_leaves_the_weighted_mean_as_it_is(model):
    adata = scfm.datasets.pbmc()[:300, :60].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    table = evaluate_denoising(adata, model, rate=0.5)["mse"]
    assert table["scfm"] <= 1.01 * table["own counts and neighbors, weighted"]
    assert table["scfm"] < 0.9 * table["no change"]


def test_without_neighbors_a_cell_does_not_depend_on_the_others(blood, model):
    alone = scfm.tl.denoise(blood[:3].copy(), model, n_neighbors=0, copy=True).layers["scfm_denoised"]
    together = scfm.tl.denoise(blood, model, n_neighbors=0, copy=True).layers["scfm_denoised"]
    np.testing.assert_array_equal(alone, together[:3])
    with pytest.raises(ValueError, match="`n_neighbors` is -1"):
        scfm.tl.denoise(blood, model, n_neighbors=-1)


@pytest.mark.parametrize("rate", [-0.1, 0, 1, 2, float("nan")])
def test_a_rate_that_is_no_fraction_is_refused(blood, model, rate):
    with pytest.raises(ValueError, match=r"`rate` is .*between 0 and 1"):
        evaluate_denoising(blood, model, rate=rate)
