"""Fine-tuning that classifies genes. Oracles: classes that can, and that cannot, be read off a cell."""

import numpy as np
import pytest
import torch

import scfm
from scfm.annotation import genes

CONFIG = scfm.FitConfig(n_steps=30, tokens_per_step=4096, learning_rate=1e-3, trainable="last:1")


@pytest.fixture(scope="module")
def adata():
    adata = scfm.datasets.pbmc()[::6]
    n_cells_G = np.asarray((adata.X > 0).sum(0)).ravel()
    return adata[:, n_cells_G >= 30].copy()


@pytest.fixture(scope="module")
def model(adata):
    return scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=2), context_length=128, progress=False)


@pytest.fixture(scope="module")
def lineage_labels(adata):
    """Whether a gene is expressed more in myeloid cells than in lymphocytes: the cells around it show that."""
    expression_BG = scfm.baselines.log_normalize(adata.X)
    is_myeloid_B = adata.obs["bulk_labels"].isin(["CD14+ Monocyte", "Dendritic"]).to_numpy()
    gain_G = np.asarray(expression_BG[is_myeloid_B].mean(0) - expression_BG[~is_myeloid_B].mean(0)).ravel()
    return dict(zip(adata.var_names, np.where(gain_G > np.median(gain_G), "myeloid", "lymphoid")))


def test_genes_of_the_test_fold_have_no_label_in_training(adata, model, lineage_labels, monkeypatch):
    seen = []

    def record(network, objective, *arguments, **options):
        seen.append(objective.labels_V.clone())

    monkeypatch.setattr(genes.train, "train", record)
    scfm.tl.classify_genes(None, lineage_labels, adata, model=model, finetune=True, n_folds=3, progress=False)
    labeled_FV = torch.stack(seen) >= 0
    gene_ids = torch.from_numpy(model.encoding.vocabulary.require(list(adata.var_names))).long()
    assert len(seen) == 3
    assert (labeled_FV[:, gene_ids].sum(0) == 2).all()  # tested once, trained on in the two other folds
    assert int(labeled_FV.sum()) == 2 * len(gene_ids)


@pytest.mark.slow
def test_a_class_that_cells_show_is_learned_and_one_at_random_is_not(adata, model, lineage_labels):
    before = model.id
    table = scfm.tl.classify_genes(
        None, lineage_labels, adata, model=model, finetune=True, config=CONFIG, n_folds=2, progress=False
    )
    assert list(table.index) == ["scfm fine-tuned", "scfm gene embedding", "expression level", "majority class"]
    assert table.loc["scfm fine-tuned", "balanced_accuracy"] > 0.7
    random = dict(zip(lineage_labels, np.random.default_rng(0).permutation(list(lineage_labels.values()))))
    table = scfm.tl.classify_genes(
        None, random, adata, model=model, finetune=True, config=CONFIG, n_folds=2, progress=False
    )
    assert table.loc["scfm fine-tuned", "balanced_accuracy"] < 0.6
    assert model.id == before


def test_fine_tuning_starts_from_the_linear_probe(adata, model, monkeypatch):
    monkeypatch.setattr(genes.train, "train", lambda *arguments, **options: None)
    cells = scfm.pp.encode(adata, model)
    gene_ids_G = model.encoding.vocabulary.require(list(adata.var_names)).astype(np.int64)
    codes_G = (np.arange(len(gene_ids_G)) % 3).astype(np.int64)
    everything = np.arange(len(gene_ids_G))
    predicted_G = genes.cross_validate_genes(
        model, cells, gene_ids_G=gene_ids_G, codes_G=codes_G, folds=[(everything, everything)]
    )
    assert (predicted_G == codes_G).mean() > 0.6  # the probe fits its own training genes, which a random head does not


def test_fine_tuning_without_a_model_is_an_error(adata):
    with pytest.raises(ValueError, match="`model` is None"):
        scfm.tl.classify_genes(None, {}, adata, finetune=True)
