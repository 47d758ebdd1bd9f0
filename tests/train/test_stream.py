import resource
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch.utils.data import DataLoader

from scfm.data import CellBatch, many_files
from scfm.encoding import EncodingConfig, Vocabulary, make_encoding
from scfm.errors import CountsError
from scfm.train import CellStream

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
    n_batches = len(source)
    first, second = list(source), list(source)
    assert len(first) == n_batches
    assert sorted(cells_of(first)) == sorted(cells_of(second)) == list(range(sum(ROWS)))
    assert cells_of(first) != cells_of(second)
    assert cells_of(first) != sorted(cells_of(first))
    assert cells_of(stream(files, encoding)) == cells_of(first)
    assert max(len(batch) for batch in first) == 10


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


@pytest.mark.parametrize("step", [0, 3, 7, 20, 33, 58])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_position_is_a_number_of_batches_over_all_epochs(files, encoding, step, world_size):
    settings = {"rank": world_size - 1, "world_size": world_size}
    whole, resumed = stream(files, encoding, **settings), stream(files, encoding, **settings)
    expected = [batch for _ in range(3) for batch in whole]
    resumed.seek(step % len(expected))
    seen: list = []
    while len(seen) < len(expected) - step % len(expected):
        seen += resumed
    for one, other in zip(seen, expected[step % len(expected) :], strict=True):
        assert_same(one, other)


def test_bad_counts_in_a_file_are_an_error_that_names_it(encoding, tmp_path):
    adata = anndata.AnnData(sp.csr_matrix(np.full((5, 50), 0.5, dtype=np.float32)), var=pd.DataFrame(index=NAMES))
    adata.write_h5ad(tmp_path / "logged.h5ad")
    with pytest.raises(CountsError, match=r"logged\.h5ad\.X holds fractions"):
        list(CellStream([tmp_path / "logged.h5ad"], encoding, batch_cells=2))


def test_batches_keep_to_a_token_budget_and_to_the_cells_asked_for_on_every_rank(files, encoding):
    """Cells sorted by length, as cells of one sample often are; a tenth of them is left out."""
    everything = CellBatch.concat(list(stream(files, encoding, shuffle=False)))
    lengths_B = everything.lengths_B.numpy().copy()
    left_out = np.arange(0, sum(ROWS), 10)
    lengths_B[left_out] = 0
    budget = 60
    ranks = [
        list(stream(files, encoding, batch_cells=None, max_tokens=budget, lengths_B=lengths_B, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert max(batch.n_tokens for batches in ranks for batch in batches) <= budget
    assert min(len(batch) for batches in ranks for batch in batches) > 0
    seen = [cell for batches in ranks for cell in cells_of(batches)]
    assert set(seen) == set(range(sum(ROWS))) - set(left_out.tolist())
    for batches in ranks:
        for batch in batches:
            assert batch.lengths_B.tolist() == lengths_B[batch.cell_index_B.numpy()].tolist()


def test_a_rank_of_few_cells_repeats_them(files, encoding):
    """One block of 230 cells and one of a single cell: two ranks, as many batches."""
    paths = [files[0][0], files[0][2]]
    settings = {"batch_cells": 10, "block_cells": 256, "world_size": 2, "shuffle": False}
    large, small = (list(CellStream(paths, encoding, rank=rank, **settings)) for rank in range(2))
    assert len(large) == len(small) == 23
    assert set(cells_of(small)) == {230}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"batch_cells": None}, "give one of them"),
        ({"max_tokens": 5}, "give one of them"),
        ({"batch_cells": None, "max_tokens": 5}, "needs `lengths_B`"),
        ({"lengths_B": [1, 2]}, "the files hold 288 cells"),
        ({"block_cells": 0}, "must be positive"),
    ],
)
def test_settings_that_do_not_fit_are_refused(files, encoding, wrong, match):
    with pytest.raises(ValueError, match=match):
        stream(files, encoding, **wrong)


def test_many_files_are_read_with_few_open_at_a_time(encoding, tmp_path):
    """As many files as in a large study, in a process that may open 128 at once."""
    paths = []
    for number in range(150):
        counts = sp.csr_matrix(np.full((3, 50), 1 + number, dtype=np.float32))
        paths.append(tmp_path / f"{number}.h5ad")
        anndata.AnnData(counts, var=pd.DataFrame(index=NAMES)).write_h5ad(paths[-1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 3 * many_files.MAX_OPEN_FILES + 24, hard))
    try:
        cells = CellStream(paths, encoding, batch_cells=50)
        assert sorted(cells_of(cells)) == list(range(450))
        assert len(cells._files._opened) <= many_files.MAX_OPEN_FILES
        cells.close()
        assert len(list(Path("/proc/self/fd").iterdir())) <= n_open + 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
