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


def test_genes_are_embedded_by_the_depth_that_is_named_and_by_a_path(adata, tmp_path):
    settings = scfm.EncodingConfig(kind="bucket", depth_over="matrix")  # values depend on depth
    encoding = scfm.encoding.make_encoding(settings, adata=adata)
    vocabulary = encoding.vocabulary
    config = scfm.families.preset("scbert").model_config(
        n_tokens=len(vocabulary), pad_id=vocabulary.pad_id, context_length=len(vocabulary), d_model=16, n_heads=2, n_layers=1,
        d_ff=16, attention={"head_width": 8, "n_random_features": 8},
    )  # fmt: skip
    model = scfm.Model(scfm.models.CellTransformer.for_vocabulary(config, vocabulary), encoding)
    deep = adata.copy()
    deep.obs["deep"] = np.asarray(deep.X.sum(1)).ravel() * np.linspace(1, 50, deep.n_obs)
    labels = {gene: "yes" if place % 2 else "no" for place, gene in enumerate(adata.var_names)}
    embeddings = scfm.tl.gene_embeddings(deep, model, depth_key="deep")
    assert not embeddings.equals(scfm.tl.gene_embeddings(deep, model))
    expected = scfm.tl.classify_genes(embeddings, labels, deep, depth_key="deep")
    model.save(tmp_path / "model")
    for given in (model, tmp_path / "model"):
        found = scfm.tl.classify_genes(None, labels, deep, model=given, depth_key="deep")
        pd.testing.assert_frame_equal(found, expected)


def test_a_text_in_place_of_a_list_of_genes_is_named(embeddings):
    with pytest.raises(ValueError, match=r"pass a list of names, such as \['CD74'\]"):
        scfm.tl.similar_genes(embeddings, "CD74")
