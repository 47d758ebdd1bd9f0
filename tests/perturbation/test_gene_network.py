"""`scfm.tl.gene_network`. Oracles: dense attention matrices, `scfm.tl.perturb`, the marginals of the shuffle."""

import numpy as np
import pytest
import torch
from scipy import stats

import scfm
from scfm.encoding import EncodingConfig, make_encoding
from scfm.families.scfm import ARCHITECTURES
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.perturbation.network import Edges, attention_edges, deletion_edges, edge_table, shuffle_counts
from scfm.perturbation.shifts import cosine_distance


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


def small_model(adata):
    """A random network with weights large enough for cells to differ."""
    fitted = make_encoding(EncodingConfig(kind="rank"), adata=adata)
    torch.manual_seed(0)
    sizes = {"context_length": 1024, "d_model": 32, "n_heads": 2, "n_layers": 1, "d_ff": 48}
    config = scfm.ModelConfig.from_dict(ARCHITECTURES["rank"] | sizes | {"n_tokens": len(fitted.vocabulary)})
    network = CellTransformer.for_vocabulary(config, fitted.vocabulary)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return Model(network, fitted)


def test_attention_edges_agree_with_whole_attention_matrices(model, cells, tokens):
    edges = attention_edges(model, cells, tokens, -1)
    seen = {}
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
                    seen.setdefault((s, t), []).append(probs[place[target], place[source]] * len(one.gene_ids_T))
    assert {pair: edges.n_GG[pair] for pair in zip(*np.nonzero(edges.n_GG))} == {p: len(v) for p, v in seen.items()}
    for pair, values in seen.items():
        assert edges.mean_GG[pair] == pytest.approx(np.mean(values), rel=1e-4)
        assert edges.std_GG[pair] == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0, rel=1e-3, abs=1e-9)


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
    edges = deletion_edges(model, one, tokens, -1)
    found = edges.mean_GG[list(tokens).index(source), list(tokens).index(target)]
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


def test_genes_that_know_nothing_of_each_other_get_uniform_p_values():
    """Cells whose genes are dealt anew are a draw from the null; edges of genes that few, some and most cells express.

    Edges of one draw depend on each other, so the spread between draws is what the shares are held against.
    """
    blood = scfm.datasets.pbmc()[::12].copy()
    model = small_model(blood)
    common = np.argsort(-np.asarray((blood.X > 0).sum(0)).ravel(), kind="stable")
    genes = blood.var_names[common[[*range(5), *range(60, 64), *range(200, 205)]]].tolist()
    draws = []
    for seed in range(20):
        dealt = shuffle_counts(blood, np.random.default_rng(1000 + seed), None)
        draws.append(scfm.tl.gene_network(dealt, model, genes=genes, seed=seed, progress=False))
    for level in (0.05, 0.5):
        share = np.array([(table["p_value"] < level).mean() for table in draws])
        assert abs(share.mean() - level) < 3 * share.std(ddof=1) / np.sqrt(len(draws))
    rare = np.concatenate([table.loc[table["n_cells"] <= 12, "p_value"] for table in draws])
    assert len(rare) > 200
    assert (rare < 0.05).mean() < 0.08
    # In a draw from the null any discovery is a false one.
    assert sum((table["fdr"] < 0.05).any() for table in draws) <= stats.binom.ppf(0.99, len(draws), 0.05)


def test_edges_that_are_heavier_than_by_chance_are_found_at_the_stated_rate_of_false_ones():
    """Simulation: log-normal values a cell, edges in 5 to 80 cells, the first source's three times the others'."""
    rng = np.random.default_rng(0)
    n_genes = 40
    found, null = Edges.none(n_genes), Edges.none(n_genes)
    for source, target in np.ndindex(n_genes, n_genes):
        n_cells = int(rng.integers(5, 80))
        for edges, center, n in ((found, np.log(3) * (source == 0), n_cells), (null, 0, 5 * n_cells)):
            edges.add(np.full(n, source), np.full(n, target), rng.lognormal(center, 0.8, n))
    table = edge_table(found, null, [f"G{gene}" for gene in range(n_genes)], min_cells=5)
    called = table[table["fdr"] < 0.1]
    assert (table["source"] == "G0").sum() == n_genes - 1
    assert (called["source"] == "G0").sum() > 0.8 * (n_genes - 1)
    assert (called["source"] != "G0").mean() < 0.2


def test_edges_are_tested_as_by_scipy_and_those_without_variance_are_not():
    rng = np.random.default_rng(1)
    found, null = Edges.none(3), Edges.none(3)
    values = {(0, 1): (rng.normal(0.3, 1, 9), rng.normal(0, 1, 30)), (1, 2): (rng.normal(0, 2, 6), rng.normal(0, 1, 5))}
    values |= {(2, 0): (np.ones(6), np.ones(12))}
    for (source, target), (own, shuffled) in values.items():
        for edges, drawn in ((found, own), (null, shuffled)):
            edges.add(np.full(len(drawn), source), np.full(len(drawn), target), drawn)
    table = edge_table(found, null, ["G0", "G1", "G2"], min_cells=5).set_index("source")
    for (source, _), (own, shuffled) in list(values.items())[:2]:
        expected = stats.ttest_ind(own, shuffled)
        line = table.loc[f"G{source}"]
        assert (line["z"], line["p_value"]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)
    assert table.loc["G2", ["z", "p_value", "fdr"]].isna().all()
    expected = stats.false_discovery_control(table.loc[["G0", "G1"], "p_value"])
    np.testing.assert_allclose(table.loc[["G0", "G1"], "fdr"], expected)
