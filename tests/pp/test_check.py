import anndata
import numpy as np
import pandas as pd
import pytest
import torch
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


def test_a_model_gets_a_time_to_expect(pbmc, encoding):
    class Model:
        pass

    model = Model()
    model.encoding = encoding
    model.network = torch.nn.Sequential(torch.nn.Embedding(769, 8), torch.nn.Linear(8, 8))
    report = scfm.pp.check(pbmc, model)
    assert "one pass of the model" in verdicts(report)


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
