"""Speed of the encoders: cells a second in memory and from disk, and memory while streaming.

    python benchmarks/encoding.py                 # about two minutes; a table on standard output
    python benchmarks/encoding.py --threads 2 --cells 20000

Goals, on two threads and with 3,000 genes a cell: rank and bin at least 60,000 cells a second in memory; from an
uncompressed .h5ad at least half the speed of bare reading; memory bounded while streaming a file five times the buffer.
Cells a second by the clock depend on what else the machine does; processor time a cell does not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import scfm.pp
from scfm.data import encoder_info
from scfm.data.counts import row_totals
from scfm.encoding import Encoding, EncodingConfig, GeneMap, Vocabulary, make_encoding
from scfm.train.stream import CellStream

N_GENES, GENES_PER_CELL = 24_000, 3_000
BUFFER_CELLS = 4_096


def synthetic(n_cells: int, seed: int = 0) -> anndata.AnnData:
    """Counts with the many ones and few large numbers of real cells; which genes are expressed is uniform."""
    rng = np.random.default_rng(seed)
    indices = np.empty((n_cells, GENES_PER_CELL), dtype=np.int32)
    for cell in range(n_cells):
        indices[cell] = np.flatnonzero(rng.permutation(N_GENES) < GENES_PER_CELL)
    data = (1 + rng.negative_binomial(0.4, 0.25, indices.size)).astype(np.float32)
    counts = sp.csr_matrix((data, indices.ravel(), np.arange(n_cells + 1) * GENES_PER_CELL), shape=(n_cells, N_GENES))
    return anndata.AnnData(counts, var=pd.DataFrame(index=[f"G{gene}" for gene in range(N_GENES)]))


def encodings() -> dict[str, Encoding]:
    """Published settings, with a vocabulary in another order than the data's columns."""
    rng = np.random.default_rng(1)
    vocabulary = Vocabulary.from_genes([f"G{gene}" for gene in rng.permutation(N_GENES)])
    medians = np.exp(rng.normal(0.5, 0.7, len(vocabulary)))
    return {
        "rank (2,048)": make_encoding("rank", vocabulary=vocabulary, medians=medians),
        "rank (4,096)": make_encoding(
            EncodingConfig(kind="rank", context_length=4096, add_cls=True, add_eos=True),
            vocabulary=vocabulary,
            medians=medians,
        ),
        "bin (1,200)": make_encoding("bin", vocabulary=vocabulary),
        "bin (4,096)": make_encoding(EncodingConfig(kind="bin", context_length=4096), vocabulary=vocabulary),
        "bucket (expressed)": make_encoding(EncodingConfig(kind="bucket", include_zeros=False), vocabulary=vocabulary),
    }


def best(run, n_cells: int, repeats: int = 5) -> tuple[float, float]:
    """Cells a second by the clock, and processor microseconds a cell; the best of some runs."""
    clock, processor = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        run()
        clock.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return n_cells / min(clock), min(processor) / n_cells * 1e6


def per_cell_rank(block: sp.csr_matrix, tokens: np.ndarray, medians: np.ndarray) -> list[np.ndarray]:
    """The published way: one cell at a time, divide, argsort, look up."""
    factors = medians[tokens]
    ranked = []
    for cell in range(block.shape[0]):
        span = slice(block.indptr[cell], block.indptr[cell + 1])
        genes, counts = block.indices[span], block.data[span]
        score = counts / counts.sum() * 1e4 / factors[genes]
        ranked.append(tokens[genes[np.argsort(-score)]][:2048])
    return ranked


def per_cell_bin(block: sp.csr_matrix, rng: np.random.Generator) -> list[np.ndarray]:
    """The published way: one cell at a time, quantile, digitize twice, draw."""
    binned = []
    for cell in range(block.shape[0]):
        counts = block.data[block.indptr[cell] : block.indptr[cell + 1]]
        edges = np.quantile(counts, np.linspace(0, 1, 50))
        left, right = np.digitize(counts, edges), np.digitize(counts, edges, right=True)
        binned.append(np.ceil(rng.random(len(counts)) * (right - left) + left).astype(np.int64))
    return binned


def in_memory(n_cells: int) -> list[tuple[str, float, float]]:
    adata = synthetic(n_cells)
    depth_B = row_totals(adata.X)
    rows = []
    for name, encoding in encodings().items():
        genes = GeneMap.from_names(list(adata.var_names), encoding.vocabulary)
        rows.append(
            (f"{name}, encode", *best(lambda e=encoding, g=genes: e.encode(adata.X, g, depth_B=depth_B), n_cells))
        )
        rows.append((f"{name}, pp.encode with checks", *best(lambda e=encoding: scfm.pp.encode(adata, e), n_cells)))
    few = adata.X[:500]
    encoding = encodings()["rank (2,048)"]
    tokens = encoding.vocabulary.token_ids(adata.var_names)
    rows.append(("rank, NumPy twin", *best(lambda: scfm.pp.encode(adata[:500], encoding, backend="numpy"), 500, 2)))
    rows.append(
        ("rank, cell by cell as published", *best(lambda: per_cell_rank(few, tokens, encoding.medians), 500, 2))
    )
    rows.append(("bin, cell by cell as published", *best(lambda: per_cell_bin(few, np.random.default_rng(0)), 500, 2)))
    return rows


def bare_read(path: Path, block_rows: int = 256) -> None:
    """Read every block of rows once, in order, and do nothing with it."""
    import h5py

    with h5py.File(path) as file:
        pointers = file["X/indptr"][:]
        for start in range(0, len(pointers) - 1, block_rows):
            stop = min(start + block_rows, len(pointers) - 1)
            file["X/data"][pointers[start] : pointers[stop]]
            file["X/indices"][pointers[start] : pointers[stop]]


def forget(path: Path) -> None:
    """Make the system drop its copy of a file, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stream(path: Path, encoding: Encoding) -> CellStream:
    return CellStream([path], encoding, batch_cells=64, buffer_cells=BUFFER_CELLS)


def from_disk(path: Path, n_cells: int) -> list[tuple[str, float, float]]:
    chosen = {name: encoding for name, encoding in encodings().items() if name in ("rank (2,048)", "bin (1,200)")}
    rows = []
    for where, prepare in (("from disk", lambda: forget(path)), ("from the page cache", lambda: None)):

        def measure(name: str, run) -> None:
            rows.append((f"{name}, {where}", *best(lambda: (prepare(), run()), n_cells, 3)))  # noqa: B023

        measure("bare read of the .h5ad", lambda: bare_read(path))
        for name, encoding in chosen.items():
            source = CellStream([path], encoding, batch_cells=64, buffer_cells=BUFFER_CELLS, shuffle=False)
            measure(f"{name}, CellStream in order", lambda s=source: [None for _ in s])
            source = stream(path, encoding)
            measure(f"{name}, CellStream shuffled", lambda s=source: [None for _ in s])
    return rows


def resident() -> int:
    """Memory that this process holds now, KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def peak_memory(path: Path) -> str:
    """Peak memory of a process that streams the file, above what it had before the first batch was asked for."""
    source = stream(path, encodings()["rank (2,048)"])
    # Not getrusage's high-water mark: a child starts with that of its parent.
    peak = before = resident()
    for _ in source:
        peak = max(peak, resident())
    grown = peak - before
    buffer = BUFFER_CELLS * (GENES_PER_CELL * 8 + 2048 * 4)
    return f"{grown / 1024:,.0f} MiB for a file of {path.stat().st_size / 2**20:,.0f} MiB (buffer {buffer / 2**20:,.0f} MiB)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, default=8192)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(peak_memory(arguments.memory))
        return
    print(f"{os.cpu_count()} processors, {arguments.threads} threads, compiled encoder: {encoder_info()['reason']}")
    print(f"{arguments.cells:,} cells of {GENES_PER_CELL:,} genes\n")
    print("| what | cells a second | processor us a cell |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        for name, speed, cost in in_memory(arguments.cells):
            print(f"| {name} | {speed:,.0f} | {cost:.1f} |", flush=True)
        n_cells = 5 * BUFFER_CELLS
        synthetic(n_cells).write_h5ad(path)
        for name, speed, cost in from_disk(path, n_cells):
            print(f"| {name} | {speed:,.0f} | {cost:.1f} |", flush=True)
        memory = subprocess.run(
            [sys.executable, __file__, "--memory", str(path)], capture_output=True, text=True, check=True
        )
        print(f"\nPeak memory of streaming: {memory.stdout.strip()}")


if __name__ == "__main__":
    main()
