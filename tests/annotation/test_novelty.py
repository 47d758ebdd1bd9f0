"""The novelty score: Gaussians of classes, and the threshold on held-out cells."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score

from scfm.annotation.novelty import PRIOR_CELLS, fit_gaussians, standardize
from scfm.nn.novelty import KINDS, ClassGaussians

N_GENES = 60


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 800)  # the fourth class is left out of training
    mean = np.where(rng.random((4, N_GENES)) < 0.2, 2.0, 0.3)
    return sp.csr_matrix(np.log1p(rng.poisson(mean[labels])).astype(np.float32)), labels


@pytest.fixture(scope="module")
def fitted(cells):
    expression, labels = cells
    known = np.flatnonzero(labels < 3)
    train, held = known[: len(known) // 2], known[len(known) // 2 :]
    loading = np.linalg.svd(expression[train].toarray(), full_matrices=False)[2][:5].T
    gaussians = ClassGaussians(N_GENES, 3, 5)
    fit_gaussians(
        gaussians, expression_BV=expression[train], labels_B=labels[train], loading_VR=loading, genes=np.arange(N_GENES)
    )
    return gaussians, loading, train, held


def test_distances_are_those_of_scipy(cells, fitted):
    expression, labels = cells
    gaussians, loading, train, _ = fitted
    read = expression.toarray() @ loading
    means = np.stack([read[train][labels[train] == label].mean(0) for label in range(3)])
    within = read[train] - means[labels[train]]
    deviation = within.std(0)
    shrunk = ledoit_wolf(within / deviation, assume_centered=True)[0] * np.outer(deviation, deviation)
    inverse = np.linalg.inv(shrunk)
    dense = expression.toarray()
    centers = np.stack([dense[train][labels[train] == label].mean(0) for label in range(3)])
    variance = (dense[train] - centers[labels[train]]).var(0)
    variance = variance + np.median(variance)
    found = np.exp(gaussians.log_distances(expression[:5])[0])
    for row in range(5):
        expected = min(mahalanobis(read[row], mean, inverse) ** 2 for mean in means)
        assert found[row, 0] == pytest.approx(expected, rel=1e-3)
        genes = min((((dense[row] - center) ** 2) / variance).sum() for center in centers)
        assert found[row, 1] == pytest.approx(genes, rel=1e-3)


def test_a_type_that_was_never_seen_is_novel_and_known_cells_are_kept(cells, fitted):
    expression, labels = cells
    gaussians, _, _, held = fitted
    calibration, test = held[::2], held[1::2]
    threshold = standardize(gaussians, expression[calibration])
    unknown = gaussians(expression[labels == 3])
    known = gaussians(expression[test])
    assert np.mean(known <= threshold) == pytest.approx(0.95, abs=0.05)
    assert roc_auc_score(np.r_[np.zeros(len(known)), np.ones(len(unknown))], np.r_[known, unknown]) > 0.9
    assert np.mean(unknown > threshold) > 0.5


def test_scores_are_standardized_by_the_cells_of_the_nearest_class(cells, fitted):
    expression, _ = cells
    gaussians, _, _, held = fitted
    standardize(gaussians, expression[held])
    log_distances, nearest = gaussians.log_distances(expression[held])
    for kind, label in itertools.product(range(2), range(3)):
        location = getattr(gaussians, f"{KINDS[kind]}_location_C")[label]
        scale = getattr(gaussians, f"{KINDS[kind]}_scale_C")[label]
        values, own = log_distances[:, kind], log_distances[nearest[:, kind] == label, kind]
        mean = (own.sum() + PRIOR_CELLS * values.mean()) / (len(own) + PRIOR_CELLS)
        variance = (((own - mean) ** 2).sum() + PRIOR_CELLS * values.var()) / (len(own) + PRIOR_CELLS)
        assert location == pytest.approx(mean, rel=1e-5)
        assert scale == pytest.approx(np.sqrt(variance), rel=1e-5)


def test_too_few_held_out_cells_give_no_threshold_and_some_give_their_maximum(cells, fitted):
    expression, _ = cells
    gaussians, _, _, held = fitted
    assert standardize(gaussians, expression[held[:9]]) is None
    threshold = standardize(gaussians, expression[held[:15]])
    assert threshold == pytest.approx(float(gaussians(expression[held[:15]]).max()))
