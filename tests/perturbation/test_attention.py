"""`scfm.tl.attention`. Oracle: whole attention matrices, made from the queries and keys of the last layer."""

import numpy as np
import pytest
import torch

import scfm
from scfm.errors import VocabularyMismatchError

GENES = ["HLA-DRA", "CD74", "CST3", "NKG7"]  # not in the order of the vocabulary


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:12].copy()


@pytest.fixture(scope="module")
def model(adata):
    return scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=2, tokens_per_step=1024), progress=False)


def whole_matrices(model, cells):
    """(tokens, tokens) of each cell, mean over heads; rows look, columns are looked at."""
    config, block = model.network.config, model.network.blocks[-1]
    with torch.inference_mode():
        for place in range(len(cells)):
            one = cells.select([place])
            hidden = list(model.network.hidden_states(one))[-2]
            q, k, _ = block.attention.qkv(hidden).view(-1, 3, config.n_heads, config.d_head).unbind(1)
            scores = torch.einsum("ihk,jhk->hij", q, k) * config.d_head**-0.5
            yield one.gene_ids_T.numpy(), scores.softmax(-1).mean(0).numpy()


def test_values_are_those_of_whole_attention_matrices(adata, model):
    table = scfm.tl.attention(adata, model, GENES)
    token = dict(zip(GENES, model.encoding.vocabulary.require(GENES)))
    expected = {(a, b): [] for a in GENES for b in GENES if a != b}
    for ids, attention in whole_matrices(model, scfm.pp.encode(adata, model)):
        place = {int(gene): number for number, gene in enumerate(ids)}
        for a, b in expected:
            if token[a] in place and token[b] in place:
                expected[a, b].append(attention[place[token[a]], place[token[b]]] * len(ids))
    for (a, b), values in expected.items():
        if values:
            assert table.loc[a, b] == pytest.approx(np.mean(values), rel=1e-4)
        else:
            assert np.isnan(table.loc[a, b])
    assert np.isnan(np.diag(table)).all()
    assert table.notna().to_numpy().any()


def test_the_order_of_genes_is_that_asked_for(adata, model):
    table, turned = (scfm.tl.attention(adata, model, genes) for genes in (GENES, GENES[::-1]))
    assert list(table.index) == list(table.columns) == GENES
    np.testing.assert_array_equal(turned.loc[GENES, GENES], table)


def test_impossible_genes_are_named(adata, model):
    with pytest.raises(ValueError, match="at least two"):
        scfm.tl.attention(adata, model, ["CD74"])
    with pytest.raises(ValueError, match="each once"):
        scfm.tl.attention(adata, model, ["CD74", "CD74"])
    with pytest.raises(VocabularyMismatchError, match="NOPE"):
        scfm.tl.attention(adata, model, ["CD74", "NOPE"])
