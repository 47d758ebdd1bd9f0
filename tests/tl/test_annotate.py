"""`scfm.tl.annotate`: rejection, majority of clusters, the two ensemble members."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import scfm
from scfm import baselines, pp
from scfm.annotation.gene_classifier import N_COMPONENTS, N_DISPERSED
from scfm.annotation.probe import INVERSE_PENALTY
from scfm.errors import LabelsError, ModelTaskError


@pytest.fixture(scope="module")
def fitted():
    adata = scfm.datasets.pbmc()[:150].copy()
    rare = adata.obs["bulk_labels"].value_counts()
    adata = adata[adata.obs["bulk_labels"].isin(rare.index[rare >= 10]).to_numpy()].copy()
    config = scfm.FitConfig(n_steps=1, tokens_per_step=2048)
    return adata, scfm.fit(adata, labels_key="bulk_labels", config=config, pretrain_config=config, progress=False)


def test_labels_are_the_most_probable_and_probabilities_add_up(fitted):
    adata, model = fitted
    result = scfm.tl.annotate(adata, model, copy=True)
    proba = result.obsm["scfm_proba"]
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    assert list(result.obs["scfm_label"]) == [model.labels[place] for place in proba.argmax(1)]
    assert "scfm_label" not in adata.obs


def test_the_gene_classifier_is_a_regression_on_components_of_scaled_genes(fitted):
    adata, model = fitted
    train = (adata.obs["scfm_split"] == "train").to_numpy()
    expression = pp.log_expression(adata, model).toarray()
    deviation = expression[train].std(0)
    assert len(deviation) < N_DISPERSED  # here every gene takes part
    scaled = np.minimum(np.divide(expression, deviation, out=np.zeros_like(expression), where=deviation > 0), 10)
    # The whole spectrum by LAPACK; the randomized solver must find its head.
    right = np.linalg.svd(scaled[train], full_matrices=False)[2][:N_COMPONENTS]
    components = scaled @ right.T
    components = components - components[train].mean(0)
    components /= np.sqrt((components[train] ** 2).mean())
    regression = LogisticRegression(class_weight="balanced", C=INVERSE_PENALTY, max_iter=2000)
    regression.fit(components[train], adata.obs["bulk_labels"][train].astype(str))
    logits = model.network.gene_classifier.logits(pp.log_expression(adata, model))
    assert tuple(regression.classes_) == model.labels
    np.testing.assert_allclose(softmax(logits, axis=1), regression.predict_proba(components), atol=2e-2)


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
    near = scfm.tl.annotate(adata, model, max_distance=0.0, copy=True)
    assert (near.obs["scfm_label"] == "unassigned").all()
    assert (near.obs["scfm_distance"] > 0).all()


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
