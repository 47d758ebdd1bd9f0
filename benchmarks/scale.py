"""Memory and speed of every command that reads files, on sets of 100,000 and 1,000,000 cells that this script makes.

    python benchmarks/scale.py make FOLDER --cells 1000000 --format h5ad|zarr
    python benchmarks/scale.py measure FOLDER/100000.h5ad FOLDER/1000000.h5ad [--commands statistics pretrain embed annotate fit]
    python benchmarks/scale.py load FOLDER/100000.h5ad

The cells: 24,000 genes, about 1,500 of them expressed, with the skewed counts of a negative binomial model of 20 cell types. A pool of
10,000 cells is drawn; every cell of a set is one of them without a random tenth of its genes, so that no two cells are the same.
`measure` runs each command in a process of its own, and prints its peak memory and cells per second; `load` reads shuffled
blocks with scfm's loader and with others that are installed, in turns in one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

import scfm
from scfm.data.files import count_rows
from scfm.models import CellTransformer, Model
from scfm.pp._encode import encoded_blocks
from scfm.train import CellStream

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


def statistics(path: Path, folder: Path) -> int:
    """The one pass before pretraining."""
    from scfm.encoding import EncodingConfig
    from scfm.train.statistics import Data, Learning

    data = Data(paths=(path,))
    n_cells = data.open(path).n_obs
    config = EncodingConfig(kind="rank", context_length=1024)
    Learning(data=data, config=config, held_out_B=np.zeros(n_cells, dtype=bool), n_components=50).statistics()
    return n_cells


def pretrain(path: Path, folder: Path) -> int:
    """300 steps of 2,048 tokens, after the pass."""
    config = scfm.FitConfig(n_steps=300, tokens_per_step=2048)
    scfm.pretrain(path, folder / "run", config=config, progress=False)
    return count_rows(path)


def embed(path: Path, folder: Path) -> int:
    """All cells, with a network of one narrow layer: what is measured is memory, and the speed of reading and encoding."""
    return scfm.tl.embed_files(path, folder / "out.npy", narrow(folder), progress=False)


def annotate(path: Path, folder: Path) -> int:
    """All cells, with that network and the linear members of the ensemble, into a copy of the input."""
    return int(scfm.tl.annotate_files(path, folder / f"out{path.suffix}", narrow(folder), progress=False).sum())


def embed_small(path: Path, folder: Path) -> int:
    """The first 20,000 cells, with the architecture of the preset "small"."""
    model = scfm.load(folder / "small")
    counts = scfm.data.CountSource.of(path).select(np.arange(20_000))
    for block in encoded_blocks(counts, model.encoding):
        model.embed(block.cells)
    return 20_000


def fit(path: Path, folder: Path) -> int:
    """`scfm.fit` with labels and default settings."""
    print(scfm.fit(path, labels_key="cell_type", progress=False).report().to_string())
    return count_rows(path)


COMMANDS = {each.__name__: each for each in (statistics, pretrain, embed, annotate, embed_small, fit)}


def narrow(folder: Path) -> Path:
    return folder / "narrow"


def make_models(path: Path, folder: Path) -> None:
    """Fit the models of the measurements on the first 2,000 cells."""
    with h5py.File(path) as file:
        rows = file["X/indptr"][2000]
        parts = [file[f"X/{name}"][:rows] for name in ("data", "indices")]
        counts = sparse.csr_matrix((*parts, file["X/indptr"][:2001]), shape=(2000, N_GENES))
        obs, var = (anndata.io.read_elem(file[name]) for name in ("obs", "var"))
    adata = anndata.AnnData(counts, obs=obs[:2000], var=var)
    quick = {"config": scfm.FitConfig(n_steps=1), "baselines": False, "pretrain": False, "progress": False}
    scfm.fit(adata, labels_key="cell_type", context_length=1024, **quick).save(folder / "small")
    model = scfm.fit(adata, labels_key="cell_type", context_length=64, **quick)
    shape = model.network.config.replace(d_model=16, n_heads=1, n_layers=1, d_ff=16)
    network = CellTransformer.for_vocabulary(shape, model.encoding.vocabulary)
    network.gene_classifier, network.novelty = model.network.gene_classifier, model.network.novelty
    Model(network, model.encoding, labels=model.labels, calibration=model.calibration).save(narrow(folder))


def child(name: str, path: Path, folder: Path) -> None:
    """Run one command, and print the seconds and the peak memory of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, worked = time.perf_counter(), time.process_time()
    n_cells = COMMANDS[name](path, folder)
    usage = {
        "cells": n_cells,
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - worked,
        "imports_mb": before / 1000,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }
    print(json.dumps(usage))


def measure(paths: list[Path], commands: list[str]) -> None:
    print("| command | set | peak memory | seconds of CPU | cells per second of CPU |\n| --- | --- | --- | --- | --- |")
    for name in commands:
        for path in paths:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                for model in path.parent.glob("models/*"):
                    (Path(folder) / model.name).symlink_to(model)
                command = [sys.executable, __file__, "child", name, str(path), folder]
                found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            usage = json.loads(found.stdout.splitlines()[-1])
            print(
                f"| {name} | {path.name} | {usage['peak_mb']:,.0f} MB | {usage['cpu_s']:,.0f} | "
                f"{usage['cells'] / usage['cpu_s']:,.0f} |",
                flush=True,
            )


def read_bare(path: Path, n_cells: int) -> int:
    """Blocks of 256 rows in the order of the file, through h5py, into CSR matrices; nothing is shuffled or encoded."""
    counts = scfm.data.CountSource.of(path)
    for start in range(0, n_cells, 256):
        counts.rows(start, start + 256)
    return n_cells


def read_scfm(path: Path, n_cells: int) -> int:
    """Shuffled batches of 64 cells; counts are checked and encoded by rank."""
    model = scfm.load(narrow(path.parent / "models"))
    return taken(CellStream(path, model.encoding, batch_cells=64), n_cells)


def read_annloader(path: Path, n_cells: int) -> int:
    """Shuffled batches of 64 cells of a backed AnnData."""
    from anndata.experimental.pytorch import AnnLoader

    backed = anndata.read_h5ad(path, backed="r")
    return taken(AnnLoader(backed, batch_size=64, shuffle=True), min(n_cells, 640))


def read_scdataset(path: Path, n_cells: int) -> int:
    """Shuffled blocks of 16 cells, 64 of them at a time, as its documentation recommends."""
    from scdataset import BlockShuffling, scDataset

    backed = anndata.read_h5ad(path, backed="r")
    batches = scDataset(
        backed,
        BlockShuffling(block_size=16),
        batch_size=64,
        fetch_factor=64,
        fetch_transform=lambda part: part.to_memory(),
    )
    return taken(batches, n_cells)


def taken(batches: Any, n_cells: int) -> int:
    """Read batches until they hold a number of cells."""
    n_read = 0
    for batch in batches:
        _ = getattr(batch, "X", None)  # views read their counts when they are asked for them
        n_read += len(batch)
        if n_read >= n_cells:
            break
    return n_read


READERS = {"bare read": read_bare, "scfm": read_scfm, "AnnLoader": read_annloader, "scDataset": read_scdataset}


def load(path: Path, n_cells: int, rounds: int) -> None:
    """Compare loaders, in turns in this process, by the time of all its threads on the CPU."""
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(rounds):
        for name, reader in READERS.items():
            started = time.process_time()
            try:
                n_read = reader(path, n_cells)
            except ImportError:
                continue
            rates[name].append(n_read / (time.process_time() - started))
    print("| loader | cells per second of CPU | of the bare read |\n| --- | --- | --- |")
    bare = float(np.median(rates["bare read"]))
    for name, found in rates.items():
        if found:
            print(f"| {name} | {np.median(found):,.0f} | {np.median(found) / bare:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    making = tasks.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--cells", type=int, default=100_000)
    making.add_argument("--format", choices=["h5ad", "zarr"], default="h5ad")
    measuring = tasks.add_parser("measure")
    measuring.add_argument("paths", type=Path, nargs="+")
    measuring.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    loading = tasks.add_parser("load")
    loading.add_argument("path", type=Path)
    loading.add_argument("--cells", type=int, default=20_000)
    loading.add_argument("--rounds", type=int, default=3)
    running = tasks.add_parser("child")
    running.add_argument("name")
    running.add_argument("path", type=Path)
    running.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.task == "make":
        options.folder.mkdir(parents=True, exist_ok=True)
        make(options.folder / f"{options.cells}.{options.format}", options.cells)
    elif options.task == "measure":
        models = options.paths[0].parent / "models"
        if not models.exists():
            make_models(next(path for path in options.paths if path.suffix == ".h5ad"), models)
        measure(options.paths, options.commands)
    elif options.task == "load":
        load(options.path, options.cells, options.rounds)
    else:
        child(options.name, options.path, options.folder)


if __name__ == "__main__":
    main()
