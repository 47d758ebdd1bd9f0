"""Ensemble members: which genes the components are made of, and how the members are weighted."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MaxAbsScaler

from scfm.annotation.calibration import fit_temperature
from scfm.annotation.discriminant import DiscriminantSpace
from scfm.annotation.ensemble import SHARES, fit_weights, member_shares
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


def test_without_calibration_cells_the_weights_are_the_shares(cells):
    _, _, noise = cells
    weights = fit_weights([noise[:0], noise[:0]], np.zeros(0, dtype=np.int64), np.array([0.5, 2.0]))
    np.testing.assert_allclose(weights, [0.2, 0.8], rtol=1e-12)


def test_weights_are_shares_divided_by_temperatures_and_calibrated_together(cells):
    labels, informative, noise = cells
    members, shares = [informative, 3 * (informative + noise)], np.array([1.0, 3.0])
    weights = fit_weights(members, labels, shares)
    apart = [fit_temperature(softmax(logits, axis=1), labels) for logits in members]
    assert weights[1] / weights[0] == pytest.approx(3 * apart[0] / apart[1], rel=1e-6)
    joint = softmax(sum(weight * log_softmax(logits, axis=1) for weight, logits in zip(weights, members)), axis=1)
    assert fit_temperature(joint, labels) == pytest.approx(1, abs=0.1)


def test_a_sharper_copy_of_a_member_gets_a_smaller_weight(cells):
    labels, informative, _ = cells
    plain, sharp = fit_weights([informative, 4 * informative], labels, np.ones(2))
    assert plain > 2 * sharp  # not 4: temperatures have a prior


def test_the_shares_of_members_that_need_labels_grow_with_the_labels_per_class():
    few, many = member_shares(np.repeat(np.arange(4), 4)), member_shares(np.repeat(np.arange(4), 4000))
    assert list(SHARES) == ["transformer", "components", "genes", "discriminant"]
    np.testing.assert_array_equal(few[:2], many[:2])
    assert (few[2:] < 0.02 * many[2:]).all()


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


def test_the_discriminant_member_has_the_probabilities_of_the_space_of_components(expression):
    values, labels = expression
    scaled, train = 10 * values / values.max(), np.arange(0, 120, 2)
    members = GeneMembers(sp.csr_matrix(scaled), labels, np.ones(200), np.ones(120, dtype=bool), seed=0)
    space = DiscriminantSpace.of(members.component_BR[train], labels[train])
    expected = space.log_proba(space.coordinates(members.component_BR))
    found = log_softmax(members.fit_discriminant(train).logits(sp.csr_matrix(scaled)), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_classes_of_few_cells_are_not_disadvantaged_by_their_uncertain_means():
    """Cells of a class of 4 and of a class of 400 of one distribution are as often of one class as of the other."""
    rng, found = np.random.default_rng(0), []
    for _ in range(30):
        labels = np.repeat([0, 1], [4, 400])
        space = DiscriminantSpace.of(rng.normal(size=(404, 40)), labels)
        log_proba = space.log_proba(space.coordinates(rng.normal(size=(200, 40))))
        found.append((log_proba[:, 0] > log_proba[:, 1]).mean())
    assert 0.4 < np.mean(found) < 0.6


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
