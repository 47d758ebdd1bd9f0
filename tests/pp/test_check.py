import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

import scfm.datasets
import scfm.pp
from scfm.encoding import EncodingConfig, make_encoding


@pytest.fixture(scope="module")
def pbmc():
    return scfm.datasets.pbmc()


@pytest.fixture(scope="module")
def encoding(pbmc):
    return make_encoding("rank", adata=pbmc)


def verdicts(report):
    return dict(zip(report.table["what"], report.table["verdict"]))


def test_good_data_are_ready(pbmc, encoding):
    report = scfm.pp.check(pbmc, encoding)
    assert report.ok
    assert report.raw_counts
    assert (report.n_cells, report.n_genes) == (700, 765)
    assert report.genes.gene_fraction == 1
    assert report.depth[1] == np.median(pbmc.obs["n_counts"])
    cells = scfm.pp.encode(pbmc, encoding)
    assert report.tokens_per_cell == cells.lengths_B.double().quantile(0.5)
    assert report.memory_bytes == cells.n_tokens * 4
    assert report.empty_fraction == report.truncated_fraction == 0
    assert str(report).endswith("ready")
    assert "<table>" in report._repr_html_()


def test_log_normalized_data_are_not_and_counts_are_pointed_at(pbmc, encoding):
    adata = pbmc.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    report = scfm.pp.check(adata, encoding)
    assert not report.ok
    assert not report.raw_counts
    assert report.counts_elsewhere == ['layer="counts"']
    assert 'layer="counts"' in str(report)
    assert scfm.pp.check(adata, encoding, layer="counts").ok
    assert verdicts(scfm.pp.check(adata, encoding, layer="nowhere"))["counts"] == "problem"


def test_a_mouse_is_recognized(pbmc, encoding):
    mouse = pbmc.copy()
    mouse.var_names = [name.capitalize() for name in mouse.var_names]
    report = scfm.pp.check(mouse, encoding)
    assert verdicts(report)["coverage"] == "problem"
    assert "looks like mouse" in str(report)
    assert report.genes is None


def test_empty_truncated_and_duplicated_are_counted(pbmc, encoding):
    adata = pbmc.copy()
    adata.X[:70] = 0
    adata.X.eliminate_zeros()
    report = scfm.pp.check(adata, encoding)
    assert report.empty_fraction == 0.1
    assert not report.ok
    short = make_encoding(EncodingConfig(kind="rank", context_length=200), adata=pbmc)
    genes = np.diff(pbmc.X.indptr)
    report = scfm.pp.check(pbmc, short)
    assert report.truncated_fraction == np.mean(genes > 200)
    assert verdicts(report)["truncated"] == "note"
    doubled = anndata.concat([pbmc, pbmc], axis=1)
    doubled.obs = pbmc.obs
    report = scfm.pp.check(doubled, encoding, depth_key="n_counts")
    assert report.duplicated_names == 765
    assert verdicts(report)["coverage"] == "problem"


@pytest.fixture(scope="module")
def models(pbmc, encoding):
    """A model without labels, and one with labels."""
    config = scfm.ModelConfig(n_tokens=len(encoding.vocabulary), d_model=16, n_heads=2, n_layers=2)
    networks = [scfm.models.CellTransformer.for_vocabulary(config, encoding.vocabulary) for _ in range(2)]
    networks[1].add_class_head(3)
    return scfm.Model(networks[0], encoding), scfm.Model(networks[1], encoding, labels=("a", "b", "c"))


def test_a_model_gets_time_and_memory_to_expect(pbmc, models):
    plain, labeled = (scfm.pp.check(pbmc, model) for model in models)
    assert plain.ok
    assert plain.annotate_seconds is None
    assert plain.embed_seconds > 0
    assert labeled.annotate_seconds > 0
    assert pbmc.n_obs * 16 * 4 < plain.embed_memory_bytes < 1e9
    assert "embedding" in verdicts(plain)
    assert "annotating" in verdicts(labeled)
    instant = scfm.pp.check(pbmc, models[0], estimate=False)
    assert instant.embed_seconds is None
    assert "embedding" not in verdicts(instant)


def test_time_is_extrapolated_by_the_operations_of_all_cells(pbmc, models, monkeypatch):
    """With a clock that counts the operations that are run, the estimate is the operations of all cells."""
    from scfm.pp import _estimate

    network = models[0].network

    def operations(lengths):
        return sum(n * (2 * (4 * 16 * 16 + 2 * 16 * network.config.d_ff) + 4 * 16 * n) for n in lengths)

    clock = [0.0]
    embed = scfm.Model.embed

    def counting(model, cells, **options):
        clock[0] += operations(cells.lengths_B.tolist()) * 1e-6
        return embed(model, cells, **options)

    monkeypatch.setattr(scfm.Model, "embed", counting)
    monkeypatch.setattr(_estimate.time, "perf_counter", lambda: clock[0])
    expected = operations(scfm.pp.encode(pbmc, models[0]).lengths_B.tolist()) * 1e-6
    assert scfm.pp.check(pbmc, models[0]).embed_seconds == pytest.approx(expected, rel=0.01)


def test_cells_without_genes_are_not_measured(pbmc, models):
    adata = pbmc[:50].copy()
    adata.X = csr_matrix(adata.X.shape, dtype=np.float32)
    report = scfm.pp.check(adata, models[0], depth_key="n_counts")
    assert not report.ok
    assert report.embed_seconds is None


def test_columns_of_one_gene_are_counted_once(pbmc):
    vocabulary = scfm.Vocabulary(
        ["<pad>", "CD74", "CST3", "LYZ"], special={"pad": "<pad>"}, aliases={"OLD1": "CD74", "OLD2": "CST3"}
    )
    names = ["CD74", "OLD1", "CST3", "other"]
    genes = scfm.encoding.GeneMap.from_names(names, vocabulary, duplicates="sum")
    assert (genes.report.n_matched, genes.report.n_found, genes.report.n_vocabulary) == (3, 2, 3)
    assert "2 of the 3 genes of the vocabulary were found, 1 of which have several columns" in str(genes.report)


def test_memory_of_large_data_is_estimated_from_some_cells_and_every_cell_is_checked(encoding):
    import scipy.sparse as sp

    names = encoding.vocabulary.genes
    counts = sp.random(9000, len(names), density=0.05, format="csr", random_state=0, dtype=np.float32)
    counts.data[:] = 1
    adata = anndata.AnnData(counts)
    adata.var_names = names
    report = scfm.pp.check(adata, encoding)
    assert report.ok
    assert abs(report.memory_bytes / (counts.nnz * 4) - 1) < 0.05
    adata.X[8500] = 0
    assert scfm.pp.check(adata, encoding).empty_fraction == 1 / 9000
    adata.X.data[-1] = 0.5
    assert not scfm.pp.check(adata, encoding).raw_counts


def test_the_first_genes_of_deep_cells_are_stable_and_those_of_shallow_cells_are_not():
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(0, 2, (50, 400)))
    genes = pd.DataFrame(index=[f"GENE{n}" for n in range(400)])
    found = {}
    for name, depth in (("deep", 3e5), ("shallow", 400)):
        counts = rng.poisson(rates * depth / rates.sum(1, keepdims=True))
        adata = anndata.AnnData(csr_matrix(counts.astype(np.float32)), var=genes)
        found[name] = scfm.pp.check(adata, scfm.encoding.make_encoding("rank", adata=adata))
    assert found["deep"].token_stability > 0.9
    assert found["shallow"].token_stability < 0.6
    assert "first 64 genes" in str(found["deep"])
    bins = scfm.pp.check(adata, scfm.encoding.make_encoding("bin", adata=adata))
    assert bins.token_stability is None
