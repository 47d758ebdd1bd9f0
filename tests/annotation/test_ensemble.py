"""Ensemble members: which genes the components are made of, and how the members are weighted."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp

from scfm.annotation.ensemble import fit_ensemble_weights
from scfm.annotation.gene_classifier import N_DISPERSED, gene_scales
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


def ensemble_weights(features, components, labels):
    network = SimpleNamespace(gene_classifier=GeneClassifier(4, int(labels.max()) + 1))
    fit_ensemble_weights(network, features.astype(np.float32), components.astype(np.float64), labels)
    return network.gene_classifier.ensemble_weights.numpy()


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    labels = np.r_[rng.integers(0, 3, 300), 3]  # the fourth class has one cell, which cannot be scored
    return labels, np.eye(4)[labels] + rng.normal(0, 0.3, (301, 4)), rng.normal(0, 1, (301, 4))


def test_a_confident_member_without_information_loses_its_weight(cells):
    labels, informative, noise = cells
    network, genes = ensemble_weights(
        informative, 30 * noise, labels
    )  # so large that the penalty does not hold it back
    assert network > 5 * genes


def test_members_with_the_same_information_have_the_same_weight(cells):
    labels, informative, _ = cells
    standardized = (informative - informative.mean(0)) / informative.std(0)
    network, genes = ensemble_weights(informative, standardized, labels)
    assert network == pytest.approx(genes, rel=1e-3)


def test_classes_of_one_cell_leave_the_weights_equal():
    labels = np.arange(4)
    np.testing.assert_array_equal(ensemble_weights(np.eye(4), np.eye(4), labels), [1, 1])
