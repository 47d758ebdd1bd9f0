"""`CellStream`: encoded batches from files that are larger than memory, in shuffled order.

Own code, because no loader at hand fits: annbatch needs Python 3.12; scDataset 0.3 fetches lists of rows, knows no
saved position, and cannot give every rank the same number of batches.
"""

# Axes: B cells.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from scfm._docs import document
from scfm.data.batch import CellBatch
from scfm.data.files import count_rows
from scfm.data.host import host_threads, keep_to_one_thread
from scfm.data.source import CountSource
from scfm.encoding import Encoding, GeneMap


@dataclass(frozen=True)
class _Block:
    """Neighbouring rows of one file."""

    source: int
    start: int
    stop: int


@document
class CellStream(IterableDataset[CellBatch]):
    """Batches of encoded cells from one or many files, shuffled in each epoch.

    Files are cut into blocks of neighbouring rows. Each epoch shuffles the blocks of all files, deals them to the
    ranks, and reads a buffer's worth of them at a time, each block encoded as soon as it is read, as many at once as torch has
    threads; the buffer's cells are shuffled and cut into batches while the next one is read. At most two buffers of
    tokens, and a block of counts a thread, are in memory. Every rank gets the same number of batches.

    The order is a function of the seed and the number of the epoch, and `seek` resumes at any batch. Workers of a
    `torch.utils.data.DataLoader` (with ``batch_size=None``) share the buffers of a rank; each has a copy of the stream, so
    resume without workers.

    Parameters
    ----------
    paths
        `.h5ad` files and `.zarr` folders.
    encoding
        Encoding of the cells.
    batch_cells
        Number of cells in a batch; some batches are smaller or larger, depending on the sizes of the files.
    buffer_cells
        Number of cells in the buffer that is shuffled. A larger buffer shuffles better and needs more memory.
    block_cells
        Number of neighboring cells that are read together. Smaller blocks shuffle better and are read more slowly.
    shuffle
        Whether to shuffle cells. False keeps the order of the files and uses no training randomness.
    seed
        Seed of everything that is random.
    rank, world_size
        Rank of this process and number of processes; each process gets its own part of the cells.
    {layer}
    {gene_key}
    {depth_key}

    Notes
    -----
    `cell_index_B` of a batch numbers the rows of all files in order, so that labels can be added.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> adata.write_h5ad("cells.h5ad")
    >>> encoding = scfm.encoding.make_encoding("rank", adata=adata)
    >>> stream = scfm.train.CellStream(["cells.h5ad"], encoding, batch_cells=100)
    >>> sorted(len(cells) for cells in stream)
    [100, 100, 100, 100, 100, 100, 100]
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        encoding: Encoding,
        *,
        batch_cells: int,
        buffer_cells: int = 16_384,
        block_cells: int = 256,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        layer: str | None = None,
        gene_key: str | None = None,
        depth_key: str | None = None,
    ) -> None:
        super().__init__()
        if min(batch_cells, buffer_cells, block_cells) < 1:
            raise ValueError(f"`batch_cells`, `buffer_cells`, `block_cells` are {batch_cells}, {buffer_cells}, "
                             f"{block_cells}; all must be positive.")  # fmt: skip
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank}; with `world_size` {world_size} it must be in 0..{world_size - 1}.")
        self.paths = [Path(path) for path in paths]
        self.encoding = encoding
        self.batch_cells, self.shuffle, self.seed = batch_cells, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self._where = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
        rows = [count_rows(path) for path in self.paths]
        self.n_obs = sum(rows)
        self._first_row = np.concatenate([[0], np.cumsum(rows)])
        self._blocks = [block for source, n in enumerate(rows) for block in _cut(source, n, block_cells)]
        self._blocks_per_buffer = max(1, buffer_cells // block_cells)
        self.epoch, self._next_buffer, self._next_batch = 0, 0, 0
        self._opened: dict[int, tuple[CountSource, GeneMap]] = {}

    def __len__(self) -> int:
        """Batches of this rank in an epoch, over all workers."""
        return sum(self._batches_of(buffer) for buffer in self._buffers())

    def seek(self, step: int) -> None:
        """Go to the batch of this rank that comes `step` batches after its first one, over all epochs; nothing is read."""
        self.epoch, left = divmod(step, len(self))
        ends = np.cumsum([self._batches_of(buffer) for buffer in self._buffers()])
        self._next_buffer = int(np.searchsorted(ends, left, side="right"))
        self._next_batch = left - (int(ends[self._next_buffer - 1]) if self._next_buffer else 0)

    def __iter__(self) -> Iterator[CellBatch]:
        """Yield the remaining batches of the epoch, then move on to the next epoch."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        buffers = self._buffers()
        mine = [place for place in range(first, len(buffers), step) if place >= self._next_buffer]
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, buffers[mine[0]], mine[0]) if mine else None
            for turn, place in enumerate(mine):
                assert coming is not None
                cells = coming.result()
                if turn + 1 < len(mine):
                    coming = reader.submit(self._read, buffers[mine[turn + 1]], mine[turn + 1])
                skipped = self._next_batch if place == self._next_buffer else 0
                batches = self._cut_batches(cells, buffers[place], place)
                self._next_buffer = place
                for number in range(skipped, len(batches)):
                    self._next_batch = number + 1
                    yield cells.select(batches[number])
                self._next_buffer, self._next_batch = place + step, 0
        self.epoch, self._next_buffer, self._next_batch = self.epoch + 1, 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # open files do not travel to worker processes

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, *purpose))

    def _buffers(self) -> list[list[_Block]]:
        """The blocks of this rank in this epoch, buffer by buffer; every rank has as many in each."""
        order = self._rng(0).permutation(len(self._blocks)) if self.shuffle else np.arange(len(self._blocks))
        missing = -len(order) % self.world_size
        order = np.concatenate([order, np.resize(order, missing)]) if len(order) else order
        mine = [self._blocks[place] for place in order[self.rank :: self.world_size]]
        size = self._blocks_per_buffer
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def _batches_of(self, buffer: list[_Block]) -> int:
        """Batches made of a buffer: by the mean size of blocks, so that it is the same on every rank."""
        return max(1, round(len(buffer) * self.n_obs / len(self._blocks) / self.batch_cells))

    def _cut_batches(self, cells: CellBatch, buffer: list[_Block], place: int) -> list[NDArray[np.int64]]:
        n_cells = cells.n_cells
        order = self._rng(1, self.rank, place).permutation(n_cells) if self.shuffle else np.arange(n_cells)
        return np.array_split(order, self._batches_of(buffer))

    def _read(self, buffer: list[_Block], place: int) -> CellBatch:
        """Read and encode a buffer, in the order of the files."""
        blocks = sorted(buffer, key=lambda block: (block.source, block.start))
        opened = [self._open(block.source) for block in blocks]
        rngs = [self._rng(2, self.rank, place, number) if self.shuffle else None for number in range(len(blocks))]
        with ThreadPoolExecutor(host_threads(), initializer=keep_to_one_thread) as pool:
            return CellBatch.concat(list(pool.map(self._encode, blocks, opened, rngs)))

    def _encode(self, block: _Block, opened: tuple[CountSource, GeneMap], rng: np.random.Generator | None) -> CellBatch:
        """Read and encode a block; several at a time, each in one thread."""
        counts, genes = opened
        parts = []
        for first, rows, depth_B in counts.blocks(start=block.start, stop=block.stop):
            cells = self.encoding.encode(rows, genes, depth_B=depth_B, rng=rng)
            index_B = torch.arange(cells.n_cells) + int(self._first_row[block.source]) + first
            parts.append(cells.replace(cell_index_B=index_B))
        return parts[0] if len(parts) == 1 else CellBatch.concat(parts)

    def _open(self, source: int) -> tuple[CountSource, GeneMap]:
        if source not in self._opened:
            counts = CountSource.of(self.paths[source], **self._where)
            genes = GeneMap.of(counts, self.encoding.vocabulary, duplicates=self.encoding.config.duplicates)
            self._opened[source] = counts, genes
        return self._opened[source]


def _cut(source: int, n_rows: int, block_cells: int) -> list[_Block]:
    """Cut a file into blocks of nearly equal size, none above `block_cells`."""
    edges = np.linspace(0, n_rows, -(-n_rows // block_cells) + 1).astype(int)
    return [_Block(source, int(start), int(stop)) for start, stop in pairwise(edges)]
