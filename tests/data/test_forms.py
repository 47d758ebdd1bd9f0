"""Every form in which AnnData holds counts gives the same counts and genes, or is refused."""

import subprocess
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scfm.data import CountSource
from scfm.errors import CountsError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")

COUNTS = np.random.default_rng(0).poisson(0.7, size=(23, 9))
COUNTS[4] = 0
NAMES = [f"G{i}" for i in range(9)]


def make(matrix, **columns):
    adata = anndata.AnnData(matrix, var=pd.DataFrame(index=NAMES))
    adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def read(source):
    """All counts of a source, dense, and the depths; every block has the canonical form."""
    blocks, depths = [np.zeros((0, source.n_vars))], [np.zeros(0)]
    for _, block, depth_B in source.blocks(5):
        assert block.data.dtype.isnative
        assert block.data.dtype.kind in "biuf"
        assert block.indices.dtype in (np.int32, np.int64)
        assert block.has_canonical_format
        assert (block.data != 0).all()
        blocks.append(block.toarray().astype(float))
        depths.append(depth_B)
    return np.vstack(blocks), np.concatenate(depths)


def same(source, counts=COUNTS):
    blocks, depth_B = read(source)
    np.testing.assert_array_equal(blocks, counts)
    np.testing.assert_array_equal(depth_B, counts.sum(1))


def csr(counts=COUNTS, **arrays):
    """A CSR matrix with arrays that scipy would not make itself."""
    matrix = sp.csr_matrix(counts)
    for name, change in arrays.items():
        setattr(matrix, name, change(getattr(matrix, name)))
    return matrix


DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i2", ">i4", ">u8", ">f4", ">f8", "g"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_numbers_of_every_type(dtype, form):
    if form == "dense":
        return same(CountSource.of(make(COUNTS.astype(dtype))))
    matrix = (sp.csr_matrix if form == "csr" else sp.csc_matrix)(COUNTS)
    matrix.data = matrix.data.astype(dtype)
    return same(CountSource.of(make(matrix)))


def test_booleans_count_one():
    for matrix in (COUNTS > 0, sp.csr_matrix(COUNTS > 0)):
        same(CountSource.of(make(matrix)), (COUNTS > 0).astype(int))


INDICES = ["i2", "i4", "i8", "u2", "u4", "u8", ">i4", ">i8"]


@pytest.mark.parametrize("dtype", INDICES)
@pytest.mark.parametrize("array", ["indices", "indptr"])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_indices_and_pointers_of_every_type(dtype, array, form):
    matrix = (sp.csr_matrix if form == "csr" else sp.csc_matrix)(COUNTS)
    setattr(matrix, array, getattr(matrix, array).astype(dtype))
    same(CountSource(matrix))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_counts_of_every_type_are_found_in_another_matrix(dtype, form):
    adata = make(np.log1p(COUNTS))
    matrix = COUNTS if form == "dense" else (sp.csr_matrix if form == "csr" else sp.csc_matrix)(COUNTS)
    if form == "dense":
        adata.layers["raw counts"] = matrix.astype(dtype)
    else:
        matrix.data, matrix.indices = matrix.data.astype(dtype), matrix.indices.astype("u4")
        adata.layers["raw counts"] = matrix
    with pytest.raises(CountsError, match='seem to hold raw counts: pass layer="raw counts"'):
        CountSource.of(adata).check(CountSource.of(adata).rows(0, 23))


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_a_damaged_matrix_holds_no_counts_for_another_to_name(form, array):
    damaged = form(COUNTS)
    bad = {"data": "text", "indices": 10**6, "indptr": 10**6}[array]
    setattr(damaged, array, np.full_like(getattr(damaged, array), bad, dtype=object if array == "data" else None))
    adata = make(np.log1p(COUNTS))
    adata.layers["damaged"] = damaged
    with pytest.raises(CountsError, match=r"No raw counts were found elsewhere \(layer=\"damaged\"\)"):
        CountSource.of(adata).check(CountSource.of(adata).rows(0, 23))


def test_entries_in_any_order():
    matrix = csr()
    for start, stop in zip(matrix.indptr, matrix.indptr[1:]):
        matrix.indices[start:stop] = matrix.indices[start:stop][::-1]
        matrix.data[start:stop] = matrix.data[start:stop][::-1]
    before = matrix.indices.copy(), matrix.data.copy()
    same(CountSource(matrix))
    np.testing.assert_array_equal(matrix.indices, before[0])  # the input is left as it was
    np.testing.assert_array_equal(matrix.data, before[1])


@pytest.mark.parametrize("dtype", ["i1", "u1", "f4", "f8", "?"])
def test_entries_of_one_cell_and_gene_are_summed(dtype):
    """The sum of two bytes may need more than a byte; halves may add up to a count."""
    part = np.full(len(sp.csr_matrix(COUNTS).data), {"?": 1, "i1": 100, "u1": 200}.get(dtype, 0.5))
    matrix = csr(
        data=lambda _: np.repeat(part, 2).astype(dtype), indices=lambda x: np.repeat(x, 2), indptr=lambda x: 2 * x
    )
    same(CountSource(matrix), (COUNTS > 0) * 2 * part[0])


@pytest.mark.parametrize("rows", [[], [22], [3, 4, 5, 17, 0, 1, 9], np.arange(23) % 3 > 0])
@pytest.mark.parametrize(
    "form", ["dense", "csr", "csc", "parts", ".h5ad", "csc.h5ad", "dense.h5ad", ".zarr", "collection", "view"]
)
def test_selected_cells(rows, form, tmp_path):
    matrix = {"dense": COUNTS, "csc": sp.csc_matrix(COUNTS)}.get(form.split(".")[0], sp.csr_matrix(COUNTS))
    if form == "parts":
        matrix = csr(data=lambda x: np.repeat(x / 2, 2), indices=lambda x: np.repeat(x, 2), indptr=lambda x: 2 * x)
    adata = make(matrix, total=COUNTS.sum(1) + 5.0)
    data = write(adata, tmp_path / f"a.{form.split('.')[1]}") if "." in form else adata
    data = anndata.experimental.AnnCollection([adata[:9], adata[9:]]) if form == "collection" else data
    data = adata[::-1][::-1] if form == "view" else data
    wanted = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.array(rows, dtype=int)
    counts = CountSource.of(data)
    same(counts.select(rows), COUNTS[wanted])
    assert counts.select(rows).obs_names.tolist() == adata.obs_names[wanted].tolist()
    same(counts)  # is left as it was
    if form != "collection":
        depth_B = CountSource.of(data, depth_key="total").select(rows).depth()
        np.testing.assert_array_equal(depth_B, COUNTS[wanted].sum(1) + 5)


def test_scipys_memory_of_a_matrix_is_not_trusted():
    """scipy keeps `has_canonical_format` when the arrays of a matrix are exchanged."""
    matrix = csr()
    assert matrix.has_canonical_format
    matrix.indices, matrix.data, matrix.indptr = (
        np.repeat(matrix.indices, 2),
        np.repeat(matrix.data, 2),
        matrix.indptr * 2,
    )
    assert matrix.has_canonical_format  # wrong, and the case under test
    same(CountSource(matrix), COUNTS * 2)


def test_explicit_zeros_are_no_counts():
    matrix = csr()
    matrix.data[::2] = 0
    same(CountSource(matrix), matrix.toarray())


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("index", [10**6, -5])
def test_indices_out_of_range_are_refused(form, index):
    matrix = (sp.csr_matrix if form == "csr" else sp.csc_matrix)(COUNTS)
    matrix.indices[3] = index
    with pytest.raises(CountsError, match="the matrix is damaged"):
        read(CountSource(matrix))


def test_masked_values_are_missing():
    masked = np.ma.array(COUNTS, mask=np.zeros(COUNTS.shape, bool))
    same(CountSource(masked))
    masked[0, :3] = np.ma.masked
    with pytest.raises(CountsError, match=r"masked array with 3 masked values, but counts cannot be missing"):
        read(CountSource(masked))
    filled = COUNTS.copy()
    filled[0, :3] = 0
    same(CountSource(masked.filled(0)), filled)  # as the error recommends


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (COUNTS.astype(object), "dtype object"),
        (COUNTS.astype(complex), "dtype complex128"),
        (COUNTS.astype(str), "dtype <U"),
        (np.where(COUNTS == 1, 1e300, COUNTS), r"1e\+300; counts are at most"),
        (np.where(COUNTS == 1, 2.0**53 + 2, COUNTS), "counts are at most"),
    ],
)
def test_what_is_no_count_is_refused(matrix, message):
    with pytest.raises(CountsError, match=message):
        read(CountSource(matrix))


def test_the_largest_counts_are_counts():
    same(CountSource(np.where(COUNTS == 1, 2**40, COUNTS)), np.where(COUNTS == 1, 2**40, COUNTS))


def write(adata, path, **options):
    adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("dtype", ["i1", "u2", "i4", "u8", "f4", "f8", "?"])
def test_files_give_what_was_written(tmp_path, suffix, form, dtype):
    counts = COUNTS.astype(dtype)
    source = CountSource.of(write(make(form(counts)), tmp_path / f"a{suffix}"))
    same(source, counts.astype(int))
    assert list(source.obs_names) == [f"c{i}" for i in range(23)]
    assert source.names()[0] == NAMES


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_compressed_files(tmp_path, compression):
    for matrix in (COUNTS, sp.csr_matrix(COUNTS)):
        same(CountSource.of(write(make(matrix), tmp_path / "a.h5ad", compression=compression)))


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_nullable_strings_in_files(tmp_path, suffix):
    """What anndata writes from pandas 3 on."""
    adata = make(sp.csr_matrix(COUNTS), total=pd.array(COUNTS.sum(1), dtype="Int64"))
    adata.obs.index = pd.Index(adata.obs_names, dtype="string")
    adata.var.index = pd.Index(adata.var_names, dtype="string")
    adata.var["id"] = pd.array([f"X{i}" if i else None for i in range(9)], dtype="string")
    with anndata.settings.override(allow_write_nullable_strings=True):
        path = write(adata, tmp_path / f"a{suffix}")
    source = CountSource.of(path, gene_key="id", depth_key="total")
    same(source)
    assert list(source.obs_names[:2]) == ["c0", "c1"]
    assert source.names() == ([None, *(f"X{i}" for i in range(1, 9))], 'var["id"]')
    assert CountSource.of(path).names()[0] == NAMES


def test_files_of_anndata_06(tmp_path):
    adata = make(sp.csr_matrix(COUNTS.astype(np.float32)))
    text = h5py.special_dtype(vlen=bytes)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        for place, matrix in (("X", adata.X), ("raw.X", adata.X * 2)):
            group = file.create_group(place)
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", np.array(adata.shape)
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(matrix, name)
        for place, index in (("obs", adata.obs_names), ("var", adata.var_names), ("raw.var", adata.var_names)):
            table = np.zeros(len(index), dtype=[("index", text), ("total", "f4")])
            table["index"], table["total"] = [name.encode() for name in index], 50
            file[place] = table
    source = CountSource.of(tmp_path / "old.h5ad")
    same(source)
    assert source.names()[0] == NAMES
    assert list(source.obs_names[:2]) == ["c0", "c1"]
    assert CountSource.of(tmp_path / "old.h5ad", depth_key="total").depth().tolist() == [50] * 23
    same(CountSource.of(tmp_path / "old.h5ad", layer="raw"), COUNTS * 2)


def test_files_of_anndata_07(tmp_path):
    """Tables of the first encoding keep categories in a group of their own."""
    path = write(make(sp.csr_matrix(COUNTS)), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        for place in ("obs", "var"):
            file[place].attrs["encoding-version"] = "0.1.0"
    source = CountSource.of(path)
    same(source)
    assert list(source.obs_names[:2]) == ["c0", "c1"]


@pytest.mark.parametrize("n_rows", [20, 26])
@pytest.mark.parametrize("form", ["dense", "csr"])
def test_files_with_other_rows_than_cells_are_refused(tmp_path, n_rows, form):
    """Missing cells would be embedded as zeros."""
    rows = np.resize(COUNTS, (n_rows, 9))
    path = write(make(COUNTS if form == "dense" else sp.csr_matrix(COUNTS)), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X"]
        anndata.io.write_elem(file, "X", rows if form == "dense" else sp.csr_matrix(rows))
    with pytest.raises(CountsError, match=rf"X has {n_rows} rows and 9 columns, but there are 23 cells and 9 genes"):
        CountSource.of(path)


def test_files_with_damaged_pointers_are_refused(tmp_path):
    path = write(make(sp.csr_matrix(COUNTS)), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indptr"][5] = 10**9
    with pytest.raises(CountsError, match="row pointers"):
        CountSource.of(path)


def test_a_file_that_another_program_writes_is_refused_by_name(tmp_path):
    path = write(make(sp.csr_matrix(COUNTS)), tmp_path / "a.h5ad")
    script = (
        f"import h5py, sys\nwith h5py.File({str(path)!r}, 'r+'):\n    print('open', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(BlockingIOError, match="is locked: another program has it open for writing"):
            CountSource.of(path)
    same(CountSource.of(path))


@pytest.mark.parametrize("join_vars", ["inner", None])
def test_collections_of_adatas(join_vars):
    adata = make(sp.csr_matrix(COUNTS), total=COUNTS.sum(1))
    adata.layers["twice"] = adata.X * 2
    collection = anndata.experimental.AnnCollection([adata[:9].copy(), adata[9:].copy()], join_vars=join_vars)
    same(CountSource.of(collection))
    same(CountSource.of(collection, layer="twice"), COUNTS * 2)
    assert CountSource.of(collection, depth_key="total").depth().tolist() == COUNTS.sum(1).tolist()


def test_lazy_adatas(tmp_path):
    pytest.importorskip("dask")
    pytest.importorskip("xarray")
    adata = make(sp.csr_matrix(COUNTS), total=COUNTS.sum(1))
    adata.var["id"] = [f"X{i}" for i in range(9)]
    lazy = anndata.experimental.read_lazy(write(adata, tmp_path / "a.h5ad"))
    source = CountSource.of(lazy, gene_key="id", depth_key="total")
    same(source)
    assert source.names()[0] == [f"X{i}" for i in range(9)]


def test_multimodal_data_are_refused_with_their_modalities(tmp_path):
    mudata = pytest.importorskip("mudata")
    data = mudata.MuData({"rna": make(COUNTS), "protein": make(COUNTS)})
    with pytest.raises(TypeError, match=r"is a MuData with the modalities rna, protein. .*mdata\['rna'\]"):
        CountSource.of(data)
    same(CountSource.of(data["rna"]))
    data.write(tmp_path / "a.h5mu")
    with pytest.raises(OSError, match="holds a MuData with the modalities"):
        CountSource.of(tmp_path / "a.h5mu")


def test_other_features_are_neither_columns_nor_depth(tmp_path):
    """Antibodies of CITE-seq in one matrix with the genes."""
    adata = make(sp.csr_matrix(COUNTS))
    kinds = ["Gene Expression"] * 9
    kinds[2] = kinds[5] = "Antibody Capture"
    kinds[7] = "CRISPR Guide Capture"
    adata.var["feature_types"] = pd.Categorical(kinds)
    genes = [0, 1, 3, 4, 6, 8]
    for source in (CountSource.of(adata), CountSource.of(write(adata, tmp_path / "a.h5ad"))):
        same(source, COUNTS[:, genes])
        assert source.columns.tolist() == genes
        assert source.names()[0] == [NAMES[i] for i in genes]
        assert source.omitted == {"Antibody Capture": 2, "CRISPR Guide Capture": 1}
    adata.var["feature_types"] = [None, *kinds[1:]]  # a feature of no stated type is a gene
    same(CountSource.of(adata), COUNTS[:, genes])
    adata.var["feature_types"] = "protein_coding"  # nothing says what is not a gene
    same(CountSource.of(adata))


def test_raw_has_its_own_genes(tmp_path):
    full = make(sp.csr_matrix(COUNTS))
    few = full[:, [7, 1, 4]].copy()
    few.raw = full
    few.X = few.X.log1p()
    for source in (CountSource.of(few, layer="raw"), CountSource.of(write(few, tmp_path / "a.h5ad"), layer="raw")):
        same(source)
        assert source.names()[0] == NAMES


@pytest.mark.parametrize("content", ["text", 3, {"depth_key": 3}, {"other": "tool"}, ["a"]])
def test_what_others_keep_under_our_key_is_left_alone(content):
    adata = make(sp.csr_matrix(COUNTS))
    adata.uns["scfm"] = content
    same(CountSource.of(adata))
    assert adata.uns["scfm"] == content


def test_a_cell_with_counts_has_a_depth():
    adata = make(sp.csr_matrix(COUNTS), total=COUNTS.sum(1))
    same(CountSource.of(adata, depth_key="total"))  # cell 4 has neither
    adata.obs["total"] = 0
    with pytest.raises(CountsError, match=r"Cell 0 of adata.X has counts, but its depth is 0"):
        read(CountSource.of(adata, depth_key="total"))


def test_columns_of_one_gene_are_summed_before_the_logarithm():
    """Oracle: scanpy on the summed counts."""
    scanpy = pytest.importorskip("scanpy")
    adata = make(sp.csr_matrix(COUNTS[:, [0, 1, 2, 3, 3, 4, 0, 5, 6]]))
    adata.var["id"] = ["ENSG00000000000.1", "B", "C", "D", "D", "E", "ENSG00000000000.2", None, "G"]
    expression, genes = CountSource.of(adata, gene_key="id").log_normalized()
    assert genes == ["ENSG00000000000", "B", "C", "D", "E", "G"]
    whole = adata.X.toarray()
    summed = np.stack(
        [whole[:, [0, 6]].sum(1), whole[:, 1], whole[:, 2], whole[:, [3, 4]].sum(1), whole[:, 5], whole[:, 8]], 1
    )
    oracle = anndata.AnnData(np.c_[summed, whole[:, 7]].astype(np.float32))
    scanpy.pp.normalize_total(oracle, target_sum=1e4)
    scanpy.pp.log1p(oracle)
    np.testing.assert_allclose(expression.toarray(), oracle.X[:, :-1], rtol=1e-6)


def test_a_source_is_its_own_source():
    source = CountSource.of(make(COUNTS))
    assert CountSource.of(source) is source
    with pytest.raises(TypeError, match="already chosen"):
        CountSource.of(source, layer="raw")
