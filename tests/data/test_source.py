import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scfm.data import CountSource
from scfm.errors import CountsError


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(0.7, size=(23, 9)).astype(np.float32)


def make(matrix, **layers):
    obs = pd.DataFrame(
        {"total": np.arange(len(range(matrix.shape[0]))) + 100.0}, index=[f"c{i}" for i in range(matrix.shape[0])]
    )
    return anndata.AnnData(
        matrix, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(matrix.shape[1])]), layers=layers
    )


# Remarks of anndata on formats to come.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")


def joined(matrix, rows=5):
    parts = list(matrix.blocks(rows))
    assert [first for first, _, _ in parts] == list(range(0, matrix.n_obs, rows))
    return np.vstack([block.toarray() for _, block, _ in parts]), np.concatenate([depth for _, _, depth in parts])


FORMS = {
    "dense": np.asarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "int64": lambda counts: sp.csr_matrix(counts.astype(np.int64)),
    "bool": lambda counts: sp.csr_matrix(counts > 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(counts, form):
    expected = counts > 0 if form == "bool" else counts
    blocks, depth = joined(CountSource.of(make(FORMS[form](counts))))
    np.testing.assert_array_equal(blocks, expected)
    np.testing.assert_array_equal(depth, expected.sum(axis=1))


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_backed_files_give_the_same_rows(counts, form, suffix, tmp_path):
    path = tmp_path / f"counts.{suffix}"
    if suffix == "h5ad":
        make(FORMS[form](counts)).write_h5ad(path)
        adata = anndata.read_h5ad(path, backed="r")
    else:
        zarr = pytest.importorskip("zarr")
        make(FORMS[form](counts)).write_zarr(path)
        group = zarr.open(path, mode="r")
        element = group["X"] if form == "dense" else anndata.io.sparse_dataset(group["X"])
        adata = anndata.AnnData(element, obs=pd.DataFrame(index=map(str, range(23))))
    blocks, depth = joined(CountSource.of(adata))
    np.testing.assert_array_equal(blocks, counts)
    np.testing.assert_array_equal(depth, counts.sum(axis=1))


@pytest.mark.parametrize("backed", [False, True])
def test_views_give_their_own_rows(counts, backed, tmp_path):
    adata = make(sp.csr_matrix(counts))
    if backed:
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    blocks, _ = joined(CountSource.of(adata[3:20:2, [4, 1, 7]]))
    np.testing.assert_array_equal(blocks, counts[3:20:2][:, [4, 1, 7]])


def test_csr_rows_share_memory_with_the_matrix(counts):
    matrix = sp.csr_matrix(counts)
    for _, block, _ in CountSource(matrix).blocks(5):
        assert np.shares_memory(block.data, matrix.data)
        assert np.shares_memory(block.indices, matrix.indices)


def test_layer_and_raw_are_found(counts):
    logged = np.log1p(counts)
    adata = make(sp.csr_matrix(logged), counts=sp.csr_matrix(counts))
    np.testing.assert_array_equal(joined(CountSource.of(adata, layer="counts"))[0], counts)
    with_raw = make(sp.csr_matrix(counts))
    with_raw.raw = with_raw.copy()
    with_raw = with_raw[:, :4].copy()
    matrix = CountSource.of(with_raw, layer="raw")
    assert matrix.n_vars == 9
    assert list(matrix.var.index) == [f"G{i}" for i in range(9)]


def test_depth_comes_from_obs_where_it_is_named(counts):
    adata = make(sp.csr_matrix(counts))
    assert CountSource.of(adata, depth_key="total").depth()[3] == 103
    adata.uns["scfm"] = {"depth_key": "total"}
    assert CountSource.of(adata).depth()[3] == 103
    del adata.uns["scfm"]
    np.testing.assert_array_equal(CountSource.of(adata).depth(), counts.sum(axis=1))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: np.where(x == 1, -1, x), r"negative values \(smallest -1\)"),
        (lambda x: np.where(x == 1, np.nan, x), "NaN"),
        (lambda x: np.where(x == 1, np.inf, x), "infinite"),
        (lambda x: np.where(x == 1, -np.inf, x), "infinite"),
        (np.log1p, "log-normalized, and raw counts are needed"),
        (lambda x: x / x.sum() * 1e4 + x / 3, "looks normalized"),
        (lambda x: (x - x.mean()) / x.std(), "scaled"),
    ],
)
def test_what_is_not_counts_is_refused(counts, spoil, message, sparse):
    spoiled = spoil(counts).astype(np.float32)
    adata = make(sp.csr_matrix(spoiled) if sparse else spoiled)
    with pytest.raises(CountsError, match=message):
        joined(CountSource.of(adata))


@pytest.mark.parametrize("with_host", [True, False])
def test_the_error_says_where_counts_hide(counts, with_host, monkeypatch):
    monkeypatch.setenv("SCFM_DISABLE_EXT", "0" if with_host else "1")
    logged = sp.csr_matrix(np.log1p(counts))
    adata = make(logged, spliced=sp.csr_matrix(counts), scaled=logged.copy())
    with pytest.raises(CountsError, match=r'seem to hold raw counts: pass layer="spliced"'):
        joined(CountSource.of(adata))
    adata = make(sp.csr_matrix(counts))
    adata.raw = adata.copy()
    adata.X = logged
    with pytest.raises(CountsError, match=r'pass layer="raw" \(adata.raw\)'):
        joined(CountSource.of(adata))
    with pytest.raises(CountsError, match="No raw counts were found elsewhere"):
        joined(CountSource.of(make(logged)))
    adata = make(sp.csr_matrix(counts), logged=logged)
    with pytest.raises(CountsError, match=r"pass layer=None \(adata.X\)"):
        joined(CountSource.of(adata, layer="logged"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "nowhere"}, r"'nowhere', which does not exist. Layers: \['counts'\]"),
        ({"layer": "raw"}, "`adata.raw`: none"),
        ({"depth_key": "depth"}, "'depth', which is not a column of `adata.obs`. Columns: total"),
    ],
)
def test_missing_places_are_named(counts, arguments, message):
    with pytest.raises(CountsError, match=message):
        CountSource.of(make(counts, counts=counts), **arguments)


@pytest.mark.parametrize("depth", [np.full(23, -1.0), np.full(23, np.nan), np.full(23, 1e300), np.ones(22)])
def test_impossible_depths_are_refused(counts, depth):
    with pytest.raises(CountsError, match="depths"):
        CountSource(counts, depth=depth)


def test_totals_and_survey_agree_with_and_without_compiled_code(counts, monkeypatch):
    from scfm.data.counts import row_totals, survey

    block = sp.csr_matrix(counts)
    block[4] = 0
    block.eliminate_zeros()
    values = np.array([0.5, 3, np.nan], dtype=np.float32)
    compiled = row_totals(block), survey(block.data), survey(values)
    monkeypatch.setenv("SCFM_DISABLE_EXT", "1")
    plain = row_totals(block), survey(block.data), survey(values)
    np.testing.assert_array_equal(compiled[0], plain[0])
    np.testing.assert_array_equal(plain[0], block.toarray().sum(axis=1))
    assert compiled[1] == plain[1] == (1.0, float(block.data.max()), 0)
    np.testing.assert_equal(compiled[2], plain[2])
    np.testing.assert_equal(plain[2], (np.nan, np.nan, 2))
