import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scfm.datasets
import scfm.pp
from scfm.data import CountSource
from scfm.encoding import EncodingConfig, GeneMap, Vocabulary, encoding_from_dict, make_encoding
from scfm.errors import CountsError, EmptyCellError, ModelFileError, VocabularyMismatchError


@pytest.fixture(scope="module")
def pbmc():
    return scfm.datasets.pbmc()


@pytest.fixture(scope="module")
def encoding(pbmc):
    return make_encoding("rank", adata=pbmc)


def test_medians_are_those_of_nonzero_normalized_counts(pbmc, encoding):
    normalized = pbmc.X.toarray().astype(float) / pbmc.obs["n_counts"].to_numpy(dtype=float)[:, None] * 1e4
    for gene in ("CD3D", "CST3", "NKG7"):
        column = normalized[:, pbmc.var_names.get_loc(gene)]
        median = encoding.medians[encoding.vocabulary.token_ids([gene])[0]]
        np.testing.assert_allclose(median, np.median(column[column > 0]), rtol=1e-12)


def test_depth_is_that_of_the_whole_library(pbmc, encoding):
    cells = scfm.pp.encode(pbmc, encoding)
    np.testing.assert_array_equal(cells.depth_B, pbmc.obs["n_counts"].to_numpy())
    assert cells.cu_seqlens.dtype == torch.int64
    assert cells.cell_index_B.tolist() == list(range(700))


def test_dense_csr_csc_backed_and_views_give_the_same_tokens(pbmc, encoding, tmp_path):
    expected = scfm.pp.encode(pbmc, encoding)
    dense, csc = pbmc.copy(), pbmc.copy()
    dense.X, csc.X = pbmc.X.toarray(), pbmc.X.tocsc()
    pbmc.write_h5ad(tmp_path / "pbmc.h5ad")
    backed = anndata.read_h5ad(tmp_path / "pbmc.h5ad", backed="r")
    for adata in (dense, csc, backed, pbmc[:, :], backed[:, :]):
        cells = scfm.pp.encode(adata, encoding)
        assert torch.equal(cells.gene_ids_T, expected.gene_ids_T)
        assert torch.equal(cells.cu_seqlens, expected.cu_seqlens)
    rows = [5, 3, 600]
    part = scfm.pp.encode(pbmc[rows], encoding)
    assert torch.equal(part.gene_ids_T, expected.select(rows).gene_ids_T)


def test_the_data_stay_unchanged(pbmc, encoding):
    before = pbmc.X.copy()
    scfm.pp.encode(pbmc, encoding)
    assert (before != pbmc.X).nnz == 0


def test_a_model_is_taken_by_its_encoding(pbmc, encoding):
    class Model:
        pass

    model = Model()
    model.encoding = encoding
    assert torch.equal(scfm.pp.encode(pbmc, model).gene_ids_T, scfm.pp.encode(pbmc, encoding).gene_ids_T)
    with pytest.raises(TypeError, match=r"is a int; pass a model, which .*`scfm.load` return"):
        scfm.pp.encode(pbmc, 3)


def test_what_is_no_adata_is_told_what_to_do(pbmc, encoding):
    for other in (pbmc.X, pbmc.to_df(), encoding):
        with pytest.raises(TypeError, match=rf"is a {type(other).__name__}, not an AnnData. Read a file with"):
            scfm.pp.encode(other, encoding)
    with pytest.raises(TypeError, match="not an AnnData"):
        scfm.fit(pbmc.X)
    with pytest.raises(FileNotFoundError, match=r"There is no pbmc\.h5ad"):
        scfm.fit("pbmc.h5ad")  # a path of a file is read


def test_a_layer_is_named_where_there_is_no_x(pbmc, encoding):
    adata = pbmc.copy()
    adata.layers["counts"] = adata.X
    adata.X = None
    with pytest.raises(CountsError, match=r'no X, where counts were expected. Pass one of layer="counts"'):
        scfm.pp.encode(adata, encoding)


def test_empty_cells_are_named_or_kept(pbmc, encoding):
    adata = pbmc.copy()
    adata.X[[3, 7]] = 0
    adata.X.eliminate_zeros()
    with pytest.raises(EmptyCellError, match=rf"2 of 700 cells .*'{adata.obs_names[3]}', '{adata.obs_names[7]}'"):
        scfm.pp.encode(adata, encoding)
    kept = scfm.pp.encode(adata, encoding, empty="keep")
    assert kept.lengths_B[[3, 7]].tolist() == [0, 0]
    assert kept.n_cells == 700
    with pytest.raises(EmptyCellError, match="2 of 700"):
        scfm.pp.encode(adata, make_encoding("bucket", adata=pbmc))
    with pytest.raises(ValueError, match="'error' or 'keep'"):
        scfm.pp.encode(adata, encoding, empty="drop")


def test_log_normalized_data_are_refused_and_the_layer_is_named(pbmc, encoding):
    import scanpy

    adata = pbmc.copy()
    adata.layers["counts"] = adata.X.copy()
    scanpy.pp.normalize_total(adata)
    scanpy.pp.log1p(adata)
    with pytest.raises(CountsError, match=r'log-normalized.*layer="counts"'):
        scfm.pp.encode(adata, encoding)
    assert scfm.pp.encode(adata, encoding, layer="counts").n_tokens == scfm.pp.encode(pbmc, encoding).n_tokens


def test_duplicated_names_are_refused_or_summed(pbmc):
    adata = pbmc.copy()
    adata.var_names = [adata.var_names[0], *adata.var_names[:-1]]
    with pytest.raises(
        VocabularyMismatchError, match=r"1 genes have several columns each in var_names: .HES4. and .HES4."
    ):
        make_encoding("rank", adata=adata)
    summed = make_encoding(EncodingConfig(kind="rank", duplicates="sum"), adata=adata)
    assert summed.vocabulary.n_genes == 764
    strict = make_encoding(EncodingConfig(kind="bin", add_cls=False), vocabulary=summed.vocabulary)
    with pytest.raises(VocabularyMismatchError, match="several columns each in var_names: 'HES4'"):
        scfm.pp.encode(adata, strict)


def test_no_known_gene_is_an_error_that_says_what_is_expected(pbmc):
    human = make_encoding("bin", vocabulary=Vocabulary.from_genes(["ENSG00000000003", "ENSG00000000005"]))
    with pytest.raises(VocabularyMismatchError, match=r"None of the 765 genes.*Ensembl ids such as.*`gene_key=`"):
        scfm.pp.encode(pbmc, human)


def test_mouse_symbols_are_never_upper_cased(pbmc, encoding):
    mouse = pbmc.copy()
    mouse.var_names = [name.capitalize() for name in mouse.var_names]
    with pytest.raises(VocabularyMismatchError, match="look like mouse, but the vocabulary is human"):
        scfm.pp.encode(mouse, encoding)


@pytest.mark.parametrize("column", ["feature_name", "gene_symbols"])
def test_columns_of_the_right_kind_are_found(pbmc, encoding, column):
    adata = pbmc.copy()
    adata.var[column] = pd.Categorical(adata.var_names)
    adata.var_names = [f"ENSG{place:011d}.3" for place in range(765)]
    assert torch.equal(scfm.pp.encode(adata, encoding).gene_ids_T, scfm.pp.encode(pbmc, encoding).gene_ids_T)
    report = GeneMap.of(CountSource.of(adata), encoding.vocabulary).report
    assert report.source == f'var["{column}"]'


def test_gene_key_is_obeyed(pbmc, encoding):
    adata = pbmc.copy()
    adata.var["mine"] = adata.var_names
    adata.var_names = [f"row {place}" for place in range(765)]
    assert torch.equal(
        scfm.pp.encode(adata, encoding, gene_key="mine").gene_ids_T, scfm.pp.encode(pbmc, encoding).gene_ids_T
    )
    with pytest.raises(VocabularyMismatchError, match="'yours', which is not a column"):
        scfm.pp.encode(adata, encoding, gene_key="yours")


def test_coverage_below_the_threshold_is_an_error_and_above_is_reported(pbmc):
    names = list(pbmc.var_names)
    vocabulary = Vocabulary.from_genes([*names[:30], *(f"OTHER{i}" for i in range(1000))])
    with pytest.raises(VocabularyMismatchError, match=r"Only 30 \(3.9%\)"):
        GeneMap.from_names(names, vocabulary)
    totals = np.zeros(765)
    totals[:30] = 1
    report = GeneMap.from_names(names, vocabulary, gene_totals=totals).report
    assert report.count_fraction == 1
    assert "30 of 765 genes matched (3.9%, 100.0% of the counts)" in str(report)


def test_versions_are_stripped():
    vocabulary = Vocabulary.from_genes(["ENSG00000000003", "ENSG00000000005"])
    genes = GeneMap.from_names(["ENSG00000000005.12", "ENSG00000000003"], vocabulary)
    assert genes.token_ids.tolist() == vocabulary.token_ids(["ENSG00000000005", "ENSG00000000003"]).tolist()
    assert genes.report.n_unversioned == 1


def test_special_tokens_are_no_genes():
    vocabulary = Vocabulary.from_genes(["A", "B"])
    assert GeneMap.from_names(["<mask>", "A"], vocabulary).token_ids[0] == -1


@pytest.mark.parametrize("kind", ["rank", "bin", "bucket", "continuous"])
def test_saved_encodings_give_the_same_tokens(pbmc, kind):
    import json

    encoding = make_encoding(kind, adata=pbmc)
    saved = json.loads(json.dumps(encoding.to_dict()))
    vocabulary = Vocabulary.from_dict(encoding.vocabulary.to_dict())
    again = encoding_from_dict(saved, vocabulary, encoding.arrays())
    one, other = scfm.pp.encode(pbmc, encoding), scfm.pp.encode(pbmc, again)
    assert torch.equal(one.gene_ids_T, other.gene_ids_T)
    assert one.values_T is None or torch.equal(one.values_T, other.values_T)
    with pytest.raises(ModelFileError, match="format version 9"):
        encoding_from_dict({**saved, "format_version": 9}, vocabulary)
    with pytest.raises(ModelFileError, match="no field"):
        encoding_from_dict({**saved, "surprise": 1}, vocabulary)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ranks"}, "must be one of rank, bin"),
        (
            {"kind": "rank", "context_length": 2, "add_cls": True, "add_eos": True},
            "2; for kind 'rank' it must exceed",
        ),
        ({"kind": "bin", "n_bins": 1}, "at least 2"),
        ({"kind": "rank", "include_zeros": True}, "zeros have no rank"),
        ({"kind": "bin", "duplicates": "drop"}, "'error' or 'sum'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EncodingConfig(**settings)


def test_an_all_zero_matrix_is_refused():
    adata = anndata.AnnData(sp.csr_matrix((3, 4), dtype=np.float32))
    with pytest.raises(CountsError, match="are zero"):
        make_encoding("rank", adata=adata)


def test_no_cells_give_an_empty_batch(pbmc, encoding):
    assert scfm.pp.encode(pbmc[:0], encoding).n_cells == 0
