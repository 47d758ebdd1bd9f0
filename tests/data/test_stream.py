import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch.utils.data import DataLoader

from scfm.data import CellBatch, CellStream, TokenBudgetSampler, TokenStore, open_counts
from scfm.encoding import EncodingConfig, Vocabulary, make_encoding
from scfm.errors import CountsError, ModelFileError, VocabularyMismatchError

NAMES = [f"G{place}" for place in range(50)]
ROWS = [230, 57, 1]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")


@pytest.fixture(scope="module")
def encoding():
    return make_encoding(EncodingConfig(kind="bin", context_length=12), vocabulary=Vocabulary.from_genes(NAMES))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three files of different kinds; each cell's counts are its own."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    paths, parts = [], []
    for place, n_rows in enumerate(ROWS):
        counts = rng.poisson(0.6, size=(n_rows, 50)).astype(np.float32)
        counts[:, 0] = 1 + np.arange(n_rows)
        adata = anndata.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=NAMES))
        path = folder / f"part{place}.{'zarr' if place == 1 else 'h5ad'}"
        adata.write_zarr(path) if place == 1 else adata.write_h5ad(path)
        paths.append(path)
        parts.append(adata)
    return paths, anndata.concat(parts, index_unique="-")


def stream(files, encoding, **settings):
    return CellStream(files[0], encoding, **{"batch_cells": 10, "buffer_cells": 64, "block_cells": 16, **settings})


def cells_of(batches):
    return [cell for batch in batches for cell in batch.cell_index_B.tolist()]


def assert_same(one, other):
    assert torch.equal(one.gene_ids_T, other.gene_ids_T)
    assert torch.equal(one.values_T, other.values_T)
    assert one.cu_seqlens.tolist() == other.cu_seqlens.tolist()


def test_in_order_it_is_the_encoding_of_all_files(files, encoding):
    import scfm.pp

    batches = list(stream(files, encoding, shuffle=False))
    assert cells_of(batches) == list(range(sum(ROWS)))
    assert_same(CellBatch.concat(batches), scfm.pp.encode(files[1], encoding))


def test_each_epoch_has_every_cell_once_in_another_order(files, encoding):
    source = stream(files, encoding)
    first, second = list(source), list(source)
    assert len(first) == len(source)
    assert sorted(cells_of(first)) == sorted(cells_of(second)) == list(range(sum(ROWS)))
    assert cells_of(first) != cells_of(second)
    assert cells_of(first) != sorted(cells_of(first))
    assert cells_of(stream(files, encoding)) == cells_of(first)
    assert {len(batch) for batch in first} <= set(range(6, 15))
    again = stream(files, encoding)
    again.set_epoch(1)
    assert cells_of(again) == cells_of(second)


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_do_not_depend_on_the_number_of_threads(files, encoding, shuffle):
    torch.set_num_threads(1)
    one = list(stream(files, encoding, shuffle=shuffle))
    torch.set_num_threads(3)
    three = list(stream(files, encoding, shuffle=shuffle))
    for first, second in zip(one, three, strict=True):
        assert_same(first, second)


def test_ranks_share_the_cells_and_have_as_many_batches(files, encoding):
    ranks = [list(stream(files, encoding, rank=rank, world_size=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [cell for batches in ranks for cell in cells_of(batches)]
    assert set(seen) == set(range(sum(ROWS)))
    assert len(seen) - len(set(seen)) <= 2 * 16  # blocks that fill the last round


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_the_cells(files, encoding, workers):
    loader = DataLoader(stream(files, encoding), batch_size=None, num_workers=workers)
    assert sorted(cells_of(loader)) == list(range(sum(ROWS)))


@pytest.mark.parametrize("stop", [0, 3, 7, 20])
def test_a_resumed_stream_goes_on_where_it_was(files, encoding, stop):
    whole = stream(files, encoding)
    expected = [*whole, *whole]
    first = stream(files, encoding)
    batches = iter(first)
    seen = [next(batches) for _ in range(stop)]
    resumed = stream(files, encoding)
    resumed.load_state_dict(first.state_dict())
    seen += [*resumed, *resumed]
    assert len(seen) == len(expected)
    for one, other in zip(seen, expected):
        assert_same(one, other)
    with pytest.raises(ValueError, match="seed 0"):
        stream(files, encoding, seed=1).load_state_dict(first.state_dict())


def test_bad_counts_in_a_file_are_an_error_that_names_it(encoding, tmp_path):
    adata = anndata.AnnData(sp.csr_matrix(np.full((5, 50), 0.5, dtype=np.float32)), var=pd.DataFrame(index=NAMES))
    adata.write_h5ad(tmp_path / "logged.h5ad")
    with pytest.raises(CountsError, match=r"logged\.h5ad:X holds fractions"):
        list(CellStream([tmp_path / "logged.h5ad"], encoding, batch_cells=2))


def test_files_open_by_layer_raw_and_depth(tmp_path):
    counts = sp.csr_matrix(np.eye(4, 50, dtype=np.float32))
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=NAMES), layers={"more": counts * 2, "csc": counts.tocsc()})
    adata.raw = anndata.AnnData(counts * 3, var=adata.var)
    adata.obs["depth"] = 7.0
    adata.layers["dense"] = counts.toarray()
    adata.write_h5ad(tmp_path / "a.h5ad")
    for layer, sums in ((None, 1), ("more", 2), ("raw", 3), ("csc", 1), ("dense", 1)):
        assert open_counts(tmp_path / "a.h5ad", layer=layer).depth().tolist() == [sums] * 4
    assert open_counts(tmp_path / "a.h5ad", depth_key="depth").depth().tolist() == [7] * 4
    adata.uns["scfm"] = {"depth_key": "depth"}
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert open_counts(tmp_path / "b.h5ad").depth().tolist() == [7] * 4
    with pytest.raises(CountsError, match="has no layers/none"):
        open_counts(tmp_path / "a.h5ad", layer="none")
    with pytest.raises(CountsError, match="'none', which is not a column"):
        open_counts(tmp_path / "a.h5ad", depth_key="none")
    with pytest.raises(FileNotFoundError):
        open_counts(tmp_path / "none.h5ad")


@pytest.mark.parametrize("kind", ["bin", "rank"])
def test_a_store_gives_back_what_was_written(files, kind, tmp_path):
    encoding = make_encoding(kind, adata=files[1])
    source = stream(files, encoding, shuffle=False)
    TokenStore.write(tmp_path / "store", source, encoding)
    store = TokenStore(tmp_path / "store")
    everything = CellBatch.concat(list(stream(files, encoding, shuffle=False)))
    assert len(store) == sum(ROWS)
    assert store.lengths_B.tolist() == everything.lengths_B.tolist()
    rows = [200, 3, 287, 3]
    one, other = store[rows], everything.select(rows)
    assert torch.equal(one.gene_ids_T, other.gene_ids_T)
    assert (one.values_T is None) == (other.values_T is None) == (kind == "rank")
    assert one.values_T is None or torch.equal(one.values_T, other.values_T)
    assert torch.equal(one.depth_B, other.depth_B)
    assert one.cell_index_B.tolist() == rows
    assert one.gene_ids_T.dtype == one.cu_seqlens.dtype == torch.int32
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_serves_a_loader_by_token_budget(files, encoding, workers, tmp_path):
    TokenStore.write(tmp_path / "store", stream(files, encoding, shuffle=False), encoding)
    store = TokenStore(tmp_path / "store")
    sampler = TokenBudgetSampler(store.lengths_B, max_tokens=100)
    batches = list(DataLoader(store, sampler=sampler, batch_size=None, num_workers=workers))
    assert sorted(cells_of(batches)) == list(range(sum(ROWS)))
    assert max(batch.n_tokens for batch in batches) <= 100


def test_a_store_refuses_another_encoding_and_damage(files, encoding, tmp_path):
    path = tmp_path / "store"
    TokenStore.write(path, stream(files, encoding, shuffle=False), encoding)
    TokenStore(path).require_encoding(encoding)
    with pytest.raises(VocabularyMismatchError, match="anew"):
        TokenStore(path).require_encoding(encoding.replace(n_bins=7))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        TokenStore.write(path, [], encoding)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="no token store"):
        TokenStore.write(tmp_path / "mine", [], encoding, overwrite=True)
    content = (path / "values.npy").read_bytes()
    (path / "values.npy").write_bytes(content[:-8])
    with pytest.raises(ModelFileError, match=r"values\.npy"):
        TokenStore(path)
    with pytest.raises(ModelFileError, match="no token store"):
        TokenStore(tmp_path / "mine")
    TokenStore.write(path, [], encoding, overwrite=True)
    assert len(TokenStore(path)) == 0


def test_a_failed_write_leaves_nothing(encoding, tmp_path):
    def fails():
        raise RuntimeError("halfway")
        yield

    with pytest.raises(RuntimeError, match="halfway"):
        TokenStore.write(tmp_path / "store", fails(), encoding)
    assert list(tmp_path.iterdir()) == []
