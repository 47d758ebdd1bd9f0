import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch.utils.data import DataLoader

import scfm.pp
from scfm.data import TokenBudgetSampler, TokenStore
from scfm.encoding import EncodingConfig, Vocabulary, make_encoding
from scfm.errors import ModelFileError, VocabularyMismatchError

NAMES = [f"G{place}" for place in range(50)]
N_CELLS = 288


@pytest.fixture(scope="module")
def adata():
    counts = np.random.default_rng(0).poisson(0.6, size=(N_CELLS, 50)).astype(np.float32)
    counts[:, 0] = 1 + np.arange(N_CELLS)
    return anndata.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=NAMES))


@pytest.fixture(scope="module")
def encoding():
    return make_encoding(EncodingConfig(kind="bin", context_length=12), vocabulary=Vocabulary.from_genes(NAMES))


def batches_of(adata, encoding):
    """Encoded cells in order, ten at a time."""
    return [scfm.pp.encode(adata[start : start + 10], encoding) for start in range(0, adata.n_obs, 10)]


@pytest.mark.parametrize("kind", ["bin", "rank"])
def test_a_store_gives_back_what_was_written(adata, kind, tmp_path):
    encoding = make_encoding(kind, adata=adata)
    TokenStore.write(tmp_path / "store", iter(batches_of(adata, encoding)), encoding)
    store = TokenStore(tmp_path / "store")
    everything = scfm.pp.encode(adata, encoding)
    assert len(store) == N_CELLS
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
def test_a_store_serves_a_loader_by_token_budget(adata, encoding, workers, tmp_path):
    TokenStore.write(tmp_path / "store", batches_of(adata, encoding), encoding)
    store = TokenStore(tmp_path / "store")
    sampler = TokenBudgetSampler(store.lengths_B, max_tokens=100)
    batches = list(DataLoader(store, sampler=sampler, batch_size=None, num_workers=workers))
    assert sorted(cell for batch in batches for cell in batch.cell_index_B.tolist()) == list(range(N_CELLS))
    assert max(batch.n_tokens for batch in batches) <= 100


def test_a_store_refuses_another_encoding_and_damage(adata, encoding, tmp_path):
    path = tmp_path / "store"
    TokenStore.write(path, batches_of(adata, encoding), encoding)
    TokenStore(path).require_encoding(encoding)
    with pytest.raises(VocabularyMismatchError, match="again"):
        TokenStore(path).require_encoding(encoding.replace(n_bins=7))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        TokenStore.write(path, [], encoding)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="not a token store"):
        TokenStore.write(tmp_path / "mine", [], encoding, overwrite=True)
    content = (path / "values.npy").read_bytes()
    (path / "values.npy").write_bytes(content[:-8])
    with pytest.raises(ModelFileError, match=r"values\.npy"):
        TokenStore(path)
    with pytest.raises(ModelFileError, match="not a token store"):
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
