"""Gene similarity and classification. Oracles: scikit-learn's cosine, classes planted in embeddings or in expression."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics.pairwise import cosine_similarity

import scfm
from scfm.errors import LabelsError, VocabularyMismatchError


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:100, :120].copy()


@pytest.fixture
def embeddings(adata):
    values = np.random.default_rng(0).normal(3, 1, (adata.n_vars, 8))
    return pd.DataFrame(values, index=adata.var_names)


def test_similar_genes_agree_with_scikit_learn(embeddings):
    gene = embeddings.index[7]
    cosine = pd.Series(cosine_similarity(embeddings - embeddings.mean())[7], embeddings.index).drop(gene)
    found = scfm.tl.similar_genes(embeddings, [gene], n_genes=5)
    assert found["similar"].tolist() == cosine.nlargest(5).index.tolist()
    np.testing.assert_allclose(found["cosine"], cosine.nlargest(5), rtol=1e-9)
    assert found["cosine_baseline"][0] == pytest.approx(cosine.mean())
    with pytest.raises(VocabularyMismatchError, match="NO_GENE"):
        scfm.tl.similar_genes(embeddings, ["NO_GENE"])


def test_classes_planted_in_embeddings_are_found_by_them_alone(adata, embeddings):
    labels = {gene: "yes" if place % 2 else "no" for place, gene in enumerate(embeddings.index)}
    planted = embeddings.copy()
    planted[0] += 6.0 * (np.arange(len(planted)) % 2)
    table = scfm.tl.classify_genes(planted, labels, adata)
    assert table.loc["scfm gene embedding", "balanced_accuracy"] > 0.95
    assert table.loc["expression level", "balanced_accuracy"] < 0.75
    assert table.loc["majority class", "balanced_accuracy"] == pytest.approx(0.5)


def test_classes_that_are_expression_levels_are_found_by_the_baseline(adata, embeddings):
    mean = np.asarray(adata.X.mean(0)).ravel()
    labels = dict(zip(adata.var_names, np.where(mean > np.median(mean), "high", "low")))
    table = scfm.tl.classify_genes(embeddings, labels, adata)
    assert table.loc["expression level", "balanced_accuracy"] > 0.85
    assert table.loc["scfm gene embedding", "balanced_accuracy"] < 0.7


def test_too_few_labeled_genes_are_an_error(adata, embeddings):
    with pytest.raises(LabelsError, match="5 folds"):
        scfm.tl.classify_genes(embeddings, {embeddings.index[0]: "a", embeddings.index[1]: "b"}, adata)
