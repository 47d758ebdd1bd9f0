"""`scfm.tl.annotate`: rejection, majority of clusters, the two ensemble members."""

import copy

import numpy as np
import pytest
from scipy.special import softmax

import scfm
from scfm import baselines, pp
from scfm.annotation.gene_classifier import GeneMembers
from scfm.errors import LabelsError, ModelTaskError
from scfm.models.state import Calibration

N_ROWS_FITTED = []  # of the labeled cells in each fit of the regression on genes


@pytest.fixture(scope="module")
def fitted():
    adata = scfm.datasets.pbmc()[:150].copy()
    rare = adata.obs["bulk_labels"].value_counts()
    adata = adata[adata.obs["bulk_labels"].isin(rare.index[rare >= 10]).to_numpy()].copy()
    config = scfm.FitConfig(n_steps=1, tokens_per_step=2048)
    fit_genes = GeneMembers.fit_genes

    def recorded(members, rows):
        N_ROWS_FITTED.append(len(rows))
        return fit_genes(members, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneMembers, "fit_genes", recorded)
        return adata, scfm.fit(adata, labels_key="bulk_labels", config=config, pretrain_config=config, progress=False)


def test_labels_are_the_most_probable_and_probabilities_add_up(fitted):
    adata, model = fitted
    result = scfm.tl.annotate(adata, model, copy=True)
    proba = result.obsm["scfm_proba"]
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    assert list(result.obs["scfm_label"]) == [model.labels[place] for place in proba.argmax(1)]
    assert "scfm_label" not in adata.obs


def test_members_count_by_their_weights(fitted):
    adata, model = fitted
    cells, expression = pp.encode(adata, model), pp.log_expression(adata, model)
    network = model.predict_proba(cells, calibrated=False)
    genes = softmax(model.network.gene_classifier.logits(expression), axis=1)
    weights = model.network.gene_classifier.ensemble_weights.numpy()
    together = network ** weights[0] * genes ** weights[1]
    expected = together / together.sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(cells, expression, calibrated=False), expected, atol=1e-5)


def test_unsure_and_distant_cells_are_unassigned(fitted):
    adata, model = fitted
    sure = scfm.tl.annotate(adata, model, min_confidence=0.8, copy=True)
    unassigned = (sure.obs["scfm_label"] == "unassigned").to_numpy()
    np.testing.assert_array_equal(unassigned, sure.obs["scfm_confidence"].to_numpy() < 0.8)
    novelty = sure.obs["scfm_novelty"].to_numpy()
    near = scfm.tl.annotate(adata, model, max_novelty=0.5, copy=True)
    np.testing.assert_array_equal(near.obs["scfm_label"] == "unassigned", novelty > 0.5)


def test_novel_cells_are_counted_or_rejected_at_the_calibrated_threshold(fitted, caplog):
    adata, model = fitted
    threshold = model.calibration.novelty_threshold
    with caplog.at_level("INFO", logger="scfm.tl._annotate"):
        novelty = scfm.tl.annotate(adata, model, copy=True).obs["scfm_novelty"].to_numpy()
    n_novel = int((novelty > threshold).sum())
    assert f"{n_novel} of {adata.n_obs} cells" in caplog.text
    rejected = scfm.tl.annotate(adata, model, max_novelty="calibrated", copy=True)
    assert (rejected.obs["scfm_label"] == "unassigned").sum() == n_novel
    uncalibrated = copy.copy(model)
    uncalibrated.calibration = Calibration(n_cells=0)
    with pytest.raises(ModelTaskError, match="no calibrated threshold"):
        scfm.tl.annotate(adata, uncalibrated, max_novelty="calibrated")


def test_the_calibration_cells_are_given_back_to_the_regressions(fitted):
    adata, _ = fitted
    parts = adata.obs["scfm_split"].value_counts()
    assert parts["calibration"] >= 5
    assert [parts["train"], parts["train"] + parts["calibration"]] == N_ROWS_FITTED


def test_cells_get_the_majority_label_of_their_cluster_or_keep_their_own(fitted):
    adata, model = fitted
    adata = adata.copy()
    adata.obs["cluster"] = ["one"] * (adata.n_obs - 3) + [None] * 3
    alone = scfm.tl.annotate(adata, model, copy=True).obs["scfm_label"].astype(str)
    voted = scfm.tl.annotate(adata, model, majority_key="cluster", copy=True).obs["scfm_label"].astype(str)
    assert set(voted[:-3]) == {alone[:-3].mode()[0]}
    assert list(voted[-3:]) == list(alone[-3:])


def test_what_is_missing_is_named(fitted):
    adata, model = fitted
    with pytest.raises(LabelsError, match="majority_key"):
        scfm.tl.annotate(adata, model, majority_key="cluters")
    unlabeled = scfm.fit(adata[:50].copy(), config=scfm.FitConfig(n_steps=1), progress=False)
    with pytest.raises(ModelTaskError, match="not trained to annotate"):
        scfm.tl.annotate(adata, unlabeled)


def test_calibration_error_of_known_cases():
    right = np.array([True] * 7 + [False] * 3)
    assert baselines.expected_calibration_error(np.full(10, 0.7), right) == pytest.approx(0)
    assert baselines.expected_calibration_error(np.full(10, 0.95), right) == pytest.approx(0.25)
