"""Many files as one data set: counts and columns are those of the concatenated AnnData, or a sentence says why not."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scfm
from scfm.data import CountSource, many_files
from scfm.data.many_files import AnnDataFiles, open_data
from scfm.encoding import GeneMap
from scfm.errors import CountsError, LabelsError, VocabularyMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")

GENES = [f"GENE{number}" for number in range(30)]


def write(path, genes, n_cells, seed, **obs):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (n_cells, len(genes))).astype(np.float32)
    counts[:, 0] = 1
    adata = anndata.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=genes))
    adata.obs_names = [f"{path.stem}-{cell}" for cell in range(n_cells)]
    adata.obs = adata.obs.assign(**obs)
    adata.layers["twice"] = adata.X * 2
    adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return adata


@pytest.fixture
def files(tmp_path):
    """Genes overlap and are in other orders; one file is dense, one has no cells."""
    parts = [
        write(tmp_path / "a.h5ad", GENES[:20], 17, 0, kind=pd.Categorical(["x", "y"] * 8 + ["x"]), flag=[True] * 17),
        write(tmp_path / "b.zarr", GENES[:4:-1], 11, 1, kind=pd.Categorical(["z"] * 11), flag=[False] * 11),
        write(
            tmp_path / "c.h5ad", GENES[5:25], 0, 2, kind=pd.Categorical([], categories=["x"]), flag=np.zeros(0, bool)
        ),
        write(tmp_path / "d.h5ad", GENES[:20], 3, 3, kind=pd.Categorical(["x", None, "z"]), flag=[True] * 3),
    ]
    paths = [tmp_path / name for name in ("a.h5ad", "b.zarr", "c.h5ad", "d.h5ad")]
    return paths, anndata.concat(parts, join="outer", fill_value=0)


@pytest.mark.parametrize("layer", [None, "twice"])
def test_counts_and_names_are_those_of_the_concatenated_data(files, layer, caplog):
    paths, joined = files
    with caplog.at_level(logging.INFO):
        counts = CountSource.of(paths, layer=layer)
    assert "The files have 30 genes together, and 15 in common" in caplog.text
    expected = joined[:, counts.var.index].X.toarray() * (1 if layer is None else 2)
    assert sorted(counts.var.index) == sorted(GENES)
    assert counts.obs_names.tolist() == joined.obs_names.tolist()
    for size in (1, 7, 100):
        blocks = list(counts.blocks(size))
        np.testing.assert_array_equal(np.vstack([block.toarray() for _, block, _ in blocks]), expected)
        np.testing.assert_array_equal(np.concatenate([depth_B for *_, depth_B in blocks]), expected.sum(1))
    rows = [30, 2, 16, 17, 18, 27, 28, 0]
    np.testing.assert_array_equal(counts.select(rows).rows(0, 8).toarray(), expected[rows])


def test_tokens_are_those_of_the_concatenated_data(files):
    paths, joined = files
    encoding = scfm.encoding.make_encoding("rank", adata=joined)
    assert scfm.pp.encode([str(path) for path in paths], encoding).gene_ids_T.equal(
        scfm.pp.encode(joined, encoding).gene_ids_T
    )


def test_columns_of_obs_are_read_from_all_files(files):
    paths, joined = files
    obs = open_data(str(paths[0].parent / "*")).obs
    assert len(obs) == 31
    found, expected = (scfm.data.columns.groups(each, "kind") for each in (obs, joined.obs))
    assert found.names == expected.names == ("x", "y", "z")
    assert found.codes.tolist() == expected.codes.tolist()
    assert scfm.data.columns.truth(obs, "flag").tolist() == joined.obs["flag"].tolist()
    write(paths[0].parent / "e.h5ad", GENES, 2, 4)
    with pytest.raises(LabelsError, match=r"1 of 2 files have no column 'kind' in `obs`: e\.h5ad"):
        scfm.data.columns.groups(open_data([paths[0], paths[0].parent / "e.h5ad"]).obs, "kind")


def test_few_files_are_open_at_a_time(files, monkeypatch):
    monkeypatch.setattr(many_files, "MAX_OPEN_FILES", 2)
    data = AnnDataFiles(files[0])
    matrix, _ = data.matrix(None, None)
    for row in (0, 20, 30, 5):
        assert matrix[row : row + 1].shape == (1, 30)
        assert len(matrix._opened) <= 2


def test_two_columns_of_a_gene_in_one_file_are_refused_or_summed(tmp_path):
    write(tmp_path / "a.h5ad", ["A", "B", "A"], 4, 0)
    write(tmp_path / "b.h5ad", ["B", "A"], 4, 1)
    counts = CountSource.of([tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    vocabulary = scfm.Vocabulary.from_genes(["A", "B"], special=["pad"])
    with pytest.raises(VocabularyMismatchError, match="1 genes have several columns each"):
        GeneMap.of(counts, vocabulary)
    genes = GeneMap.of(counts, vocabulary, duplicates="sum")
    assert genes.token_ids.tolist() == [1, 2, 1]


def test_files_with_symbols_and_ensembl_ids_are_one_data_set(tmp_path):
    symbols, ensembl = [f"GENE{n}" for n in range(10)], [f"ENSG{n:011d}" for n in range(10)]
    first = write(tmp_path / "a.h5ad", symbols, 5, 0)
    first.var["gene_ids"] = ensembl
    first.write_h5ad(tmp_path / "a.h5ad")
    second = write(tmp_path / "b.h5ad", ensembl, 5, 1)
    counts = CountSource.of([tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    assert counts.shape == (10, 10)
    np.testing.assert_array_equal(counts.rows(0, 10).toarray(), np.vstack([first.X.toarray(), second.X.toarray()]))
    for names in (symbols, ensembl):
        genes = GeneMap.of(counts, scfm.Vocabulary.from_genes(names, special=["pad"]))
        assert genes.token_ids.tolist() == list(range(1, 11))
    write(tmp_path / "mouse.h5ad", [f"Gene{'abcdefghij'[n]}" for n in range(10)], 5, 2)
    write(tmp_path / "human.h5ad", [f"GENE{'ABCDEFGHIJ'[n]}" for n in range(10)], 5, 2)
    with pytest.raises(VocabularyMismatchError, match="from 2 species"):
        CountSource.of([tmp_path / "human.h5ad", tmp_path / "mouse.h5ad"])


def test_a_file_without_counts_is_named(files, tmp_path):
    adata = anndata.read_h5ad(files[0][0])
    adata.X = adata.X / 3
    adata.write_h5ad(tmp_path / "logged.h5ad")
    counts = CountSource.of([files[0][0], tmp_path / "logged.h5ad"])
    with pytest.raises(CountsError, match=r"logged\.h5ad\.X holds fractions.*scfm\.pp\.check\('.*logged\.h5ad'\)"):
        list(counts.blocks())


def test_depths_are_read_from_all_files_or_asked_for(tmp_path):
    for number, uns in enumerate([{"depth_key": "total"}, {}]):
        adata = write(tmp_path / f"{number}.h5ad", GENES, 4, number, total=[100.0] * 4)
        adata.uns["scfm"] = uns
        adata.write_h5ad(tmp_path / f"{number}.h5ad")
    paths = [tmp_path / "0.h5ad", tmp_path / "1.h5ad"]
    with pytest.raises(CountsError, match="name different columns for the depths"):
        CountSource.of(paths)
    assert CountSource.of(paths, depth_key="total").depth().tolist() == [100.0] * 8
    assert CountSource.of([paths[0], paths[0]]).depth().tolist() == [100.0] * 8
