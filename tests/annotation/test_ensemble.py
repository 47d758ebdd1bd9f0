"""Ensemble members: which genes the components are made of, and how the members are weighted."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MaxAbsScaler

from scfm.annotation.ensemble import fit_weights, prior_weights
from scfm.annotation.gene_classifier import (
    N_DISPERSED,
    GeneMembers,
    LinearMember,
    choose_n_components,
    component_importance,
    gene_scales,
    max_scales,
)
from scfm.nn import GeneClassifier


def test_scales_are_one_over_the_deviation_of_the_most_dispersed_genes():
    rng = np.random.default_rng(0)
    n_genes = N_DISPERSED + 500
    mean = rng.gamma(1, 1, n_genes)
    spread = rng.uniform(0.1, 3, n_genes)
    counts = rng.poisson(rng.gamma(1 / spread, mean * spread, (60, n_genes)))
    counts[:, 7] = 0  # never seen
    scale = gene_scales(sp.csr_matrix(np.log1p(counts.astype(np.float32))))
    with np.errstate(invalid="ignore"):
        dispersion = np.nan_to_num(counts.var(0) / counts.mean(0))
    chosen = np.flatnonzero(scale)
    assert len(chosen) == N_DISPERSED
    assert dispersion[chosen].min() >= np.delete(dispersion, chosen).max() - 1e-4
    np.testing.assert_allclose(scale[chosen], 1 / np.log1p(counts).std(0)[chosen], rtol=1e-4)


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    return labels, 4 * np.eye(3)[labels] + rng.normal(0, 1, (300, 3)), rng.normal(0, 1, (300, 3))


def test_a_confident_member_without_information_loses_its_weight(cells):
    labels, informative, noise = cells
    good, bad = fit_weights([informative, 30 * noise], labels, np.ones(2))
    assert good > 5 * bad


def test_members_with_the_same_information_have_the_same_weight(cells):
    labels, informative, _ = cells
    first, second = fit_weights([informative, informative + 7], labels, np.ones(2))
    assert first == pytest.approx(second, rel=1e-3)


def test_without_calibration_cells_the_weights_are_the_prior_and_few_cells_stay_near_it(cells):
    labels, informative, noise = cells
    prior = np.array([0.3, 2.0])
    np.testing.assert_allclose(fit_weights([noise[:0], noise[:0]], labels[:0], prior), prior, rtol=1e-4)
    few = fit_weights([informative[:3], noise[:3]], labels[:3], prior)
    assert (np.abs(np.log(few / prior)) < 1).all()


def test_the_sum_of_the_weights_is_the_inverse_of_the_temperature(cells):
    labels, informative, _ = cells
    plain = fit_weights([informative], labels, np.ones(1))
    sharper = fit_weights([4 * informative], labels, np.ones(1) / 4)
    assert sharper == pytest.approx(plain / 4, rel=1e-3)


def test_the_regression_on_all_genes_needs_labels():
    few, many = prior_weights(np.repeat(np.arange(4), 4)), prior_weights(np.repeat(np.arange(4), 4000))
    np.testing.assert_array_equal(few[:2], many[:2])
    assert few[2] < 0.1 * many[2]


@pytest.fixture
def expression():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    rate = np.where(rng.random((3, 200)) < 0.1, 4.0, 0.4)[labels]
    counts = rng.poisson(rate).astype(np.float32)
    return sp.csr_matrix(np.log1p(counts)), labels


def test_members_are_the_regressions_of_scikit_learn_folded_back_to_genes(expression):
    values, labels = expression
    classifier = GeneClassifier(200, 3)
    classifier.scale_V.copy_(torch.from_numpy(max_scales(values)))
    scaled = classifier.scaled(values)
    assert scaled.max() <= 10 + 1e-5
    everything = np.ones(len(labels), dtype=bool)
    importance = component_importance(values, classifier.scale_V.numpy())
    members = GeneMembers(scaled, labels, importance, everything, seed=0)
    train = np.arange(0, 120, 2)
    fractions = MaxAbsScaler().fit_transform(values)
    regression = LogisticRegression(class_weight="balanced", max_iter=2000, tol=1e-8)
    expected = regression.fit(fractions[train].toarray(), labels[train]).predict_proba(fractions.toarray())
    np.testing.assert_allclose(softmax(members.fit_genes(train).logits(scaled), axis=1), expected, atol=2e-3)
    components = members.fit_components(train)
    n_components = choose_n_components(members.component_BR[train], labels[train], 0)
    regression = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
    read = members.component_BR[:, :n_components]
    expected = regression.fit(read[train], labels[train]).predict_proba(read)
    np.testing.assert_allclose(softmax(components.logits(scaled), axis=1), expected, atol=1e-6)


def test_a_weighted_sum_of_members_is_one_linear_classifier(expression):
    values, _ = expression
    rng = np.random.default_rng(1)
    members = [LinearMember(rng.normal(size=(200, 3)), rng.normal(size=3)) for _ in range(2)]
    classifier = GeneClassifier(200, 3)
    network_logits = torch.from_numpy(rng.normal(size=(values.shape[0], 3)))
    classifier.set_members(members, np.array([0.2, 0.5, 0.3]))
    scaled = classifier.scaled(values)
    logits = [network_logits.numpy(), *(member.logits(scaled) for member in members)]
    expected = softmax(sum(weight * part for weight, part in zip((0.2, 0.5, 0.3), logits)), axis=1)
    joined = torch.softmax(classifier.joined_with(network_logits, values), -1)
    np.testing.assert_allclose(joined.numpy(), expected, atol=1e-5)


def test_a_gene_that_exceeds_its_maximum_in_training_counts_as_the_maximum(expression):
    values, _ = expression
    classifier = GeneClassifier(200, 3)
    classifier.scale_V.copy_(torch.from_numpy(max_scales(values)))
    higher = values.copy()
    higher.data = higher.data + 5
    assert classifier.scaled(higher).max() == pytest.approx(10)


def test_more_components_are_used_only_if_they_predict_labels():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    components = rng.normal(size=(200, 100))
    components[:, 0] += 6 * (labels % 2)
    components[:, 1] += 6 * (labels // 2)
    assert choose_n_components(components, labels, 0) == 25
    components[:, 60] += 12 * (labels % 2)
    components[:, 61] += 12 * (labels // 2)
    components[:, :2] = rng.normal(size=(200, 2))
    assert choose_n_components(components, labels, 0) == 100
