"""`scfm.tl.gene_network`. Oracles: dense attention matrices, `scfm.tl.perturb`, the marginals of the shuffle."""

import numpy as np
import pytest
import torch

import scfm
from scfm.tl._gene_network import attention_edges, deletion_edges, shuffle_counts
from scfm.tl._perturb.shifts import cosine_distance


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:12].copy()


@pytest.fixture(scope="module")
def model(adata):
    return scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=2, tokens_per_step=1024), progress=False)


@pytest.fixture(scope="module")
def cells(adata, model):
    return scfm.pp.encode(adata, model)


@pytest.fixture(scope="module")
def tokens(cells):
    values, counts = np.unique(cells.gene_ids_T.numpy(), return_counts=True)
    return np.sort(values[np.argsort(-counts)[:6]]).astype(np.int64)


def test_attention_edges_agree_with_whole_attention_matrices(model, cells, tokens):
    weight, count = attention_edges(model, cells, tokens, -1)
    total, seen = np.zeros((6, 6)), np.zeros((6, 6))
    config = model.network.config
    for cell in range(len(cells)):
        one = cells.select([cell])
        with torch.inference_mode():
            hidden = list(model.network.hidden_states(one))[-2]
            q, k, _ = (
                model.network.blocks[-1].attention.qkv(hidden).view(-1, 3, config.n_heads, config.d_head).unbind(1)
            )
            probs = torch.softmax(torch.einsum("ihk,jhk->hij", q, k) * config.d_head**-0.5, -1).mean(0).numpy()
        place = {int(token): p for p, token in enumerate(one.gene_ids_T)}
        for s, source in enumerate(tokens):
            for t, target in enumerate(tokens):
                if s != t and source in place and target in place:
                    total[s, t] += probs[place[target], place[source]] * len(one.gene_ids_T)
                    seen[s, t] += 1
    np.testing.assert_array_equal(count, seen)
    np.testing.assert_allclose(weight, total / np.maximum(seen, 1), rtol=1e-4)


def test_deletion_edges_agree_with_states_by_hand(model, cells, tokens):
    one = cells.select([0])
    ids = one.gene_ids_T
    present = [token for token in tokens if token in ids]
    source, target = present[0], present[1]
    with torch.inference_mode():
        before = model.network(one)[ids == target].numpy()
        kept = ids[ids != source]
        less = scfm.CellBatch(gene_ids_T=kept, cu_seqlens=torch.tensor([0, len(kept)]))
        after = model.network(less)[kept == target].numpy()
    weight, _ = deletion_edges(model, one, tokens, -1)
    found = weight[list(tokens).index(source), list(tokens).index(target)]
    assert found == pytest.approx(cosine_distance(before, after)[0], rel=1e-3)


def test_shuffling_keeps_what_each_gene_has_and_loses_which_cell_has_it(adata):
    shuffled = shuffle_counts(adata, np.random.default_rng(0), None)
    before, after = adata.X.toarray(), shuffled.X.toarray()
    np.testing.assert_array_equal(np.sort(before, 0), np.sort(after, 0))
    assert (before != after).any()


@pytest.mark.parametrize("kind", ["attention", "deletion"])
def test_edges_name_their_null(adata, model, kind):
    table = scfm.tl.gene_network(adata, model, kind=kind, n_shuffles=2, min_cells=8, progress=False)
    assert set(table["null"]) == {"2 shuffles of each gene's counts among the cells"}
    assert (table["source"] != table["target"]).all()
    assert table["n_cells"].min() >= 8
    assert table["p_value"].between(0, 1).all()
    assert (table["fdr"] >= table["p_value"] - 1e-12).all()
