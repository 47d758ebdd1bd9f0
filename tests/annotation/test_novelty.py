"""The novelty score: Gaussians of classes, and the threshold on held-out cells."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score

from scfm.annotation import novelty as novelty_module
from scfm.annotation.novelty import (
    KEPT_FRACTION,
    MIN_CELLS_OF_CLASS,
    MIN_CELLS_OF_GROUPS,
    N_NEIGHBORS,
    PRIOR_CELLS,
    common_shift,
    consistent_mean,
    fit_gaussians,
    group_novelty,
    group_threshold,
    standardize,
)
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


@pytest.fixture
def standardized(cells, fitted):
    """Gaussians standardized on half of the held-out cells, these cells, and the other half."""
    gaussians, loading, _, held = fitted
    calibration, test = held[::2], held[1::2]
    standardize(gaussians, cells[0][calibration])
    return gaussians, loading, calibration, test


def test_a_shift_of_the_means_is_a_shift_of_the_cells(cells, standardized):
    gaussians = standardized[0]
    dense = cells[0][:50].toarray().astype(np.float64)
    shift = np.random.default_rng(1).normal(size=N_GENES)
    np.testing.assert_allclose(
        gaussians(sp.csr_matrix(dense + shift), shift), gaussians(sp.csr_matrix(dense)), atol=1e-4
    )


def test_group_novelty_is_the_mean_over_the_nearest_cells(cells, standardized):
    expression, _ = cells
    gaussians, loading, _, test = standardized
    read = expression[test].toarray() @ loading
    novelty, nearest = gaussians(expression[test]), gaussians.log_distances(expression[test])[1][:, 0]
    of_classes = np.median([np.median(novelty[nearest == label]) for label in range(3)])
    centered = novelty - min(of_classes, np.median(novelty))
    order = np.argsort(((read[:, None] - read) ** 2).sum(2), axis=1)[:, :N_NEIGHBORS]
    assert (np.bincount(nearest) >= MIN_CELLS_OF_CLASS).all()
    np.testing.assert_allclose(group_novelty(gaussians, expression[test], read), centered[order].mean(1), atol=1e-5)


def test_groups_separate_a_similar_unseen_type_better_than_single_cells(cells, standardized):
    expression, labels = cells
    gaussians, loading, calibration, test = standardized
    threshold = group_threshold(gaussians, expression[calibration], expression[calibration] @ loading)
    unseen = expression[calibration[labels[calibration] == 1]].toarray()
    unseen[:, :8] += 0.5  # a subtype of a known type
    query = sp.csr_matrix(np.vstack([expression[test].toarray(), unseen]))
    is_unseen = np.arange(query.shape[0]) >= len(test)
    centered = query.toarray() - query.toarray().mean(0)
    found = group_novelty(gaussians, query, centered @ np.linalg.svd(centered, full_matrices=False)[2][:5].T)
    assert roc_auc_score(is_unseen, gaussians(query)) < 0.8
    assert roc_auc_score(is_unseen, found) > 0.9
    assert (found[is_unseen] > threshold).mean() > 0.5
    assert (found[~is_unseen] <= threshold).mean() > 0.93


def test_what_all_classes_share_is_not_novel(cells, standardized):
    expression, labels = cells
    gaussians, loading, calibration, test = standardized
    threshold = group_threshold(gaussians, expression[calibration], expression[calibration] @ loading)
    query = np.r_[test, np.flatnonzero(labels == 3)[:30]]
    dense = expression[query].toarray()
    dense[:, ::3] += 0.7  # a third of the genes
    moved, is_unseen = sp.csr_matrix(dense), labels[query] == 3
    predicted = np.where(is_unseen, 1, labels[query])
    shift = common_shift(gaussians, moved, predicted)
    centers = gaussians.mean_CV.numpy()
    differences = np.stack([dense[predicted == label].mean(0) - centers[label] for label in range(3)])
    np.testing.assert_allclose(shift, consistent_mean(differences), atol=1e-5)
    assert shift[::3].mean() == pytest.approx(0.7, abs=0.1)
    found = group_novelty(gaussians, moved, moved @ loading, shift_V=shift)
    assert (gaussians(moved)[~is_unseen] > threshold).mean() > 0.9
    assert (found[~is_unseen] <= threshold).mean() > 0.85
    assert (found[is_unseen] > threshold).mean() > 0.9


def test_cells_of_one_class_have_no_common_shift(cells, standardized):
    expression, labels = cells
    gaussians, loading, _, test = standardized
    one = test[labels[test] == 1]
    assert not common_shift(gaussians, expression[one], labels[one]).any()
    few = np.r_[one, test[labels[test] == 2][: MIN_CELLS_OF_CLASS - 1]]
    assert not common_shift(gaussians, expression[few], labels[few]).any()
    for chosen in (one, one[:1]):
        found = group_novelty(gaussians, expression[chosen], expression[chosen] @ loading)
        assert found.shape == (len(chosen),)
        assert np.isfinite(found).all()


def test_the_threshold_of_groups_keeps_the_calibration_cells_and_needs_enough_of_them(cells, standardized):
    expression, _ = cells
    gaussians, loading, calibration, _ = standardized
    few, enough = calibration[: MIN_CELLS_OF_GROUPS - 1], calibration[:MIN_CELLS_OF_GROUPS]
    assert group_threshold(gaussians, expression[few], expression[few] @ loading) is None
    threshold = group_threshold(gaussians, expression[enough], expression[enough] @ loading)
    assert threshold == group_novelty(gaussians, expression[enough], expression[enough] @ loading).max()
    threshold = group_threshold(gaussians, expression[calibration], expression[calibration] @ loading)
    kept = group_novelty(gaussians, expression[calibration], expression[calibration] @ loading) <= threshold
    assert KEPT_FRACTION <= kept.mean() < KEPT_FRACTION + 0.02


def test_many_cells_search_their_neighbors_among_some(cells, standardized, monkeypatch):
    expression, labels = cells
    gaussians, loading, _, test = standardized
    query = np.r_[test, np.flatnonzero(labels == 3)[:60]]
    read, is_unseen = expression[query] @ loading, labels[query] == 3
    all_of_them = group_novelty(gaussians, expression[query], read)
    monkeypatch.setattr(novelty_module, "MAX_NEIGHBORS_FROM", len(query) // 2)
    some = group_novelty(gaussians, expression[query], read)
    assert (some != all_of_them).any()
    assert roc_auc_score(is_unseen, some) > 0.98
    np.testing.assert_array_equal(some, group_novelty(gaussians, expression[query], read))


def test_the_consistent_mean_ignores_a_difference_of_one_class():
    same, alone = np.full((4, 1), 2.0), np.array([[0.0], [0.0], [3.0], [0.0]])
    opposite = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    found = consistent_mean(np.hstack([same, alone, opposite, [[1.0], [2.0], [1.0], [2.0]]]))
    # 1.5 * (1 - v / 1.5^2) with v = (1 / 3) / 4
    np.testing.assert_allclose(found, [2, 0, 0, 1.5 - (1 / 12) / 1.5], atol=1e-9)


def test_an_unseen_type_beside_one_known_type_is_found(cells, standardized):
    expression, labels = cells
    gaussians, loading, _, test = standardized
    known = test[labels[test] == 0]
    for n_unseen in (10, len(known)):
        query = np.r_[known, np.flatnonzero(labels == 3)[:n_unseen]]
        is_unseen = labels[query] == 3
        predicted = np.where(is_unseen, 1, 0)
        shift = common_shift(gaussians, expression[query], predicted)
        found = group_novelty(gaussians, expression[query], expression[query] @ loading, shift_V=shift)
        assert roc_auc_score(is_unseen, found) > 0.95
