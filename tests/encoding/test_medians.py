import numpy as np
import pytest
from scipy import sparse

import scfm
from scfm.encoding import EncodingConfig, GeneMap, Vocabulary, medians

GENES = [f"GENE{number}" for number in range(40)]


def blocks_of(n_cells: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    mean_G = rng.lognormal(0, 2, len(GENES))
    counts_BG = rng.poisson(mean_G * rng.lognormal(0, 0.5, (n_cells, 1)) * rng.gamma(1, 1, (n_cells, len(GENES))))
    for start in range(0, n_cells, 100):
        block = sparse.csr_matrix(counts_BG[start : start + 100].astype(np.float32))
        yield block, np.asarray(block.sum(1), dtype=np.float64).ravel()


def learned(blocks, target_sum: float = 1e4, **settings):
    vocabulary = Vocabulary.from_genes(GENES, special=["pad", "mask"])
    found = medians.GeneMedians(len(vocabulary), EncodingConfig(kind="rank", target_sum=target_sum, **settings))
    genes = GeneMap.from_names(GENES, vocabulary)
    for block, depth_B in blocks:
        found.add(block, genes, depth_B)
    return found.result()[vocabulary.gene_ids]


def exact(blocks, target_sum: float = 1e4):
    """NumPy's median of the values above 0 of each gene."""
    shares = np.concatenate([block.toarray() / np.maximum(depth_B, 1)[:, None] for block, depth_B in blocks])
    return np.array([np.median(column[column > 0]) * target_sum for column in shares.T])


def test_medians_of_few_values_are_exact():
    np.testing.assert_allclose(learned(blocks_of(500)), exact(blocks_of(500)), rtol=1e-12)


@pytest.mark.parametrize("target_sum", [1e4, 1.0])
def test_the_error_of_histograms_is_below_the_bound(monkeypatch, target_sum):
    monkeypatch.setattr(medians, "MAX_EXACT_VALUES", 1000)
    found = learned(blocks_of(3000), target_sum)
    error = np.abs(found / exact(blocks_of(3000), target_sum) - 1)
    assert error.max() < medians.MAX_RELATIVE_ERROR
    assert error.max() > 1e-6  # the histograms were used


def test_histograms_do_not_depend_on_the_order_of_the_cells(monkeypatch):
    monkeypatch.setattr(medians, "MAX_EXACT_VALUES", 1000)
    blocks = list(blocks_of(2000))
    np.testing.assert_array_equal(learned(blocks), learned(blocks[::-1]))


def test_memory_does_not_grow_with_the_cells(monkeypatch):
    monkeypatch.setattr(medians, "MAX_EXACT_VALUES", 1000)
    found = medians.GeneMedians(42, EncodingConfig(kind="rank"))
    genes = GeneMap.from_names(GENES, Vocabulary.from_genes(GENES, special=["pad", "mask"]))
    for block, depth_B in blocks_of(2000):
        found.add(block, genes, depth_B)
        assert sum(map(len, found._values)) <= 1000 + block.nnz


@pytest.mark.parametrize("value", [1e-9, 1e12])
def test_values_beyond_the_scale_are_in_its_outer_bins(monkeypatch, value):
    monkeypatch.setattr(medians, "MAX_EXACT_VALUES", 0)
    found = medians.GeneMedians(3, EncodingConfig(kind="rank"))
    genes = GeneMap.from_names(["A"], Vocabulary.from_genes(["A"], special=["pad", "mask"]))
    found.add(sparse.csr_matrix([[1.0]]), genes, np.array([1e4 / value]))
    assert found.result()[2] == pytest.approx(2.0**-8 if value < 1 else 2.0**14, rel=0.01)


def test_only_the_most_dispersed_genes_get_a_median():
    shares = np.concatenate([block.toarray() / np.maximum(depth_B, 1)[:, None] for block, depth_B in blocks_of(500)])
    dispersion = shares.var(0) / shares.mean(0)
    chosen = np.sort(np.argsort(-dispersion)[:12])
    found = learned(blocks_of(500), n_dispersed_genes=12)
    assert np.flatnonzero(~np.isnan(found)).tolist() == chosen.tolist()
    np.testing.assert_allclose(found[chosen], exact(blocks_of(500))[chosen], rtol=1e-12)


def test_genes_that_are_not_offered_are_no_tokens(tmp_path):
    adata = scfm.datasets.pbmc()
    encoding = EncodingConfig(kind="rank", n_dispersed_genes=200)
    model = scfm.fit(adata, encoding=encoding, config=scfm.FitConfig(n_steps=1), progress=False)
    cells = scfm.pp.encode(adata, model)
    assert len(np.unique(cells.gene_ids_T)) == 200
    model.save(tmp_path / "model")
    assert np.array_equal(scfm.load(tmp_path / "model").embed(cells), model.embed(cells))
    with pytest.raises(ValueError, match="n_dispersed_genes"):
        EncodingConfig(kind="bin", n_dispersed_genes=200)
