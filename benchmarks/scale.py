"""Memory and speed of every command that reads files, on sets of 100,000 and 1,000,000 cells that this script makes.

    python benchmarks/scale.py make FOLDER --cells 1000000 --format h5ad|zarr
    python benchmarks/scale.py measure FOLDER/1000000.h5ad [--commands statistics pretrain embed annotate] [--tiny]
    python benchmarks/scale.py load FOLDER/1000000.h5ad
    python benchmarks/scale.py fit FOLDER/100000.h5ad

The cells: 24,000 genes, about 1,500 of them expressed, with the skewed counts of a negative binomial model of 20 cell types. A pool of
10,000 cells is drawn; every cell of a set is one of them without a random tenth of its genes, so that no two cells are the same.
`measure` runs each command in a process of its own, and prints its peak memory and cells per second; `load` reads shuffled
blocks with scfm's loader and with others that are installed, in turns in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

N_GENES, N_EXPRESSED, N_TYPES, POOL = 24_000, 1_500, 20, 10_000
PIECE = 20_000  # cells that are in memory while a set is written
CHUNK, SHARD = 1 << 17, 1 << 23  # elements


def make_pool(seed: int = 0) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """Draw cells of several types; return their counts (float32) and types."""
    rng = np.random.default_rng(seed)
    base_G = rng.lognormal(0, 2.2, N_GENES)
    profile_CG = base_G * np.where(rng.random((N_TYPES, N_GENES)) < 0.05, rng.lognormal(1.5, 1, (N_TYPES, N_GENES)), 1)
    profile_CG /= profile_CG.sum(1, keepdims=True)
    type_B = np.sort(rng.integers(N_TYPES, size=POOL))
    blocks = []
    for start in range(0, POOL, 500):
        depth_B1 = rng.lognormal(np.log(4_000), 0.4, (500, 1))
        rate_BG = depth_B1 * profile_CG[type_B[start : start + 500]] * rng.gamma(2.0, 0.5, (500, N_GENES))
        blocks.append(sparse.csr_matrix(rng.poisson(rate_BG).astype(np.float32)))
    return sparse.vstack(blocks, format="csr"), type_B


def pieces(n_cells: int, seed: int = 1) -> Iterator[tuple[sparse.csr_matrix, NDArray[np.int64]]]:
    """Yield the cells of a set, piece by piece, with their types."""
    pool, type_B = make_pool()
    rng = np.random.default_rng(seed)
    for start in range(0, n_cells, PIECE):
        rows = rng.integers(POOL, size=min(PIECE, n_cells - start))
        piece = pool[rows]
        kept = rng.random(piece.nnz, dtype=np.float32) < 0.9
        piece.indptr = np.concatenate([[0], np.cumsum(kept)])[piece.indptr]
        piece.data, piece.indices = piece.data[kept], piece.indices[kept].astype(np.int32)
        yield piece, type_B[rows]


def make(path: Path, n_cells: int) -> None:
    """Write a set: `.h5ad` with LZF compression, or `.zarr` of format 3 in shards."""
    if path.suffix == ".zarr":
        import zarr

        file = zarr.open_group(path, mode="w", zarr_format=3)
        anndata.settings.zarr_write_format = 3
        make_array: Callable[..., Any] = lambda group, name, dtype: group.create_array(  # noqa: E731
            name, shape=(0,), dtype=dtype, chunks=(CHUNK,), shards=(SHARD,), compressors=zarr.codecs.ZstdCodec(level=1)
        )
    else:
        file = h5py.File(path, "w")
        make_array = lambda group, name, dtype: group.create_dataset(  # noqa: E731
            name, (0,), dtype=dtype, chunks=(CHUNK,), maxshape=(None,), compression="lzf", shuffle=True
        )
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    group = file.create_group("X")
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, N_GENES]})
    arrays = {"data": make_array(group, "data", np.float32), "indices": make_array(group, "indices", np.int32)}
    types, lengths, waiting = [], [], {"data": np.zeros(0, np.float32), "indices": np.zeros(0, np.int32)}
    for piece, type_B in pieces(n_cells):
        types.append(type_B)
        lengths.append(np.diff(piece.indptr))
        for name, array in arrays.items():  # whole shards at a time: a part of one would be written again
            content = np.concatenate([waiting[name], getattr(piece, name)])
            whole = len(content) // SHARD * SHARD
            append(array, content[:whole])
            waiting[name] = content[whole:]
    for name, array in arrays.items():
        append(array, waiting[name])
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    anndata.io.write_elem(group, "indptr", indptr)
    cell_type = pd.Categorical.from_codes(np.concatenate(types), [f"type {number:02}" for number in range(N_TYPES)])
    obs = pd.DataFrame({"cell_type": cell_type}, index=pd.RangeIndex(n_cells).astype(str))
    anndata.io.write_elem(file, "obs", obs)
    anndata.io.write_elem(file, "var", pd.DataFrame(index=[f"GENE{number}" for number in range(N_GENES)]))
    if path.suffix != ".zarr":
        file.close()
    print(f"{path}: {n_cells:,} cells, {indptr[-1] / n_cells:,.0f} genes per cell, {size_of(path) / 1e9:.1f} GB")


def append(array: Any, content: NDArray[Any]) -> None:
    start = array.shape[0]
    array.resize((start + len(content),))
    if len(content):
        array[start:] = content


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
