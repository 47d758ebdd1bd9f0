"""`CellStream`: encoded batches from files that are larger than memory, in shuffled order.

scfm has its own loader because no existing one fits. annbatch needs Python 3.12. scDataset 0.3 fetches lists of
rows, cannot save its position, and cannot give every rank the same number of batches.

Cells are encoded anew in every epoch. On an AVX2 machine reading and encoding a cell of 1,500 genes takes 0.05 ms of CPU, and a
store of encoded cells 0.005 ms; a training step of the smallest preset takes some milliseconds a cell there, so a store would
save nothing that is noticed.
"""

# Axes: B cells.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import IterableDataset, get_worker_info

from scfm._docs import document
from scfm._remote import AnyPath, input_paths
from scfm.data.batch import CellBatch
from scfm.data.compiled_encoder import encoder_threads, limit_to_one_thread
from scfm.data.files import count_rows
from scfm.data.sampler import pack
from scfm.encoding import Encoding
from scfm.errors import EmptyCellError
from scfm.train.open_files import OpenFiles
from scfm.train.sampling import Sampling, make_sampling


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of one file. `first` is the number of the first row, counted over all files."""

    source: int
    start: int
    stop: int
    first: int


@document
class CellStream(IterableDataset[CellBatch]):
    """Batches of encoded cells from one or many files, shuffled in each epoch.

    Files are divided into blocks of consecutive rows. In each epoch, the blocks of all files are shuffled and distributed
    among the ranks. A rank reads several blocks at a time into a buffer, with as many threads as torch has; each thread reads
    a block and encodes it. The cells of a buffer are shuffled and packed into batches while the next buffer is read. At most
    two buffers of tokens, and one block of counts per thread, are in memory. All ranks get the same number of batches: a
    rank with fewer batches than others splits some of them in two, or repeats some if it has too few cells.

    The order depends only on the seed and the number of the epoch, and `seek` resumes at any batch. Workers of a
    `torch.utils.data.DataLoader` (with ``batch_size=None``) share the buffers of a rank. Each worker has a copy of the
    stream, so a stream that is used by workers does not advance, and a run with workers cannot be resumed by `seek`.

    Parameters
    ----------
    {paths}
    encoding
        Encoding of the cells.
    batch_cells
        Maximum number of cells in a batch.
    max_tokens
        Maximum number of tokens in a batch, instead of `batch_cells`. A cell with more tokens forms a batch alone. Needs
        `lengths_B`.
    lengths_B
        Number of tokens of each cell of all files, or an upper bound of it, shape (cells,). Cells of length 0 are left out;
        with `max_tokens` also those that turn out to express no gene of the vocabulary.
    buffer_cells
        Number of cells in the buffer that is shuffled. A larger buffer shuffles better and needs more memory.
    block_cells
        Number of consecutive cells that are read together. Smaller blocks shuffle better and are read more slowly.
    sampling
        How often each cell is drawn: "shuffled" for once per epoch, "weighted:COLUMN", "balanced:COLUMN" or "by-file", or an
        object of `scfm.train.sampling`.
    shuffle
        Whether to shuffle cells. False keeps the order of the files, and the encoding draws no random numbers.
    seed
        Seed of the order of the cells and of the random numbers of the encoding.
    rank, world_size
        Rank of this process and number of processes; each process gets its own part of the cells.
    {layer}
    {gene_key}
    {depth_key}

    Notes
    -----
    `cell_index_B` of a batch holds row numbers, counted over all files in order. It can be used to look up labels.

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
        paths: str | AnyPath | Sequence[str | AnyPath],
        encoding: Encoding,
        *,
        batch_cells: int | None = None,
        max_tokens: int | None = None,
        lengths_B: ArrayLike | None = None,
        buffer_cells: int = 16_384,
        block_cells: int = 256,
        sampling: str | Sampling = "shuffled",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        layer: str | None = None,
        gene_key: str | None = None,
        depth_key: str | None = None,
    ) -> None:
        super().__init__()
        if (batch_cells is None) == (max_tokens is None):
            raise ValueError(f"`batch_cells` is {batch_cells} and `max_tokens` {max_tokens}; give one of them.")
        if max_tokens is not None and lengths_B is None:
            raise ValueError("`max_tokens` needs `lengths_B`, the tokens of each cell.")
        if min(batch_cells or 1, max_tokens or 1, buffer_cells, block_cells) < 1:
            raise ValueError("`batch_cells`, `max_tokens`, `buffer_cells` and `block_cells` must be positive.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank}; with `world_size` {world_size} it must be in 0..{world_size - 1}.")
        self.paths = input_paths(paths)
        self.encoding = encoding
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self._where = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
        rows = [count_rows(path) for path in self.paths]
        self.n_obs = sum(rows)
        self._length_B = None if lengths_B is None else self._checked(lengths_B)
        self._by_tokens, self._budget = max_tokens is not None, max_tokens or batch_cells or 1
        used_B = None if self._length_B is None else self._length_B > 0
        self._repeats_B = make_sampling(sampling).repeats(self.paths, rows, used_B)
        first_rows = np.concatenate([[0], np.cumsum(rows)])
        every = [
            block
            for source, n_rows in enumerate(rows)
            for block in _cut(source, n_rows, int(first_rows[source]), block_cells)
        ]
        self._blocks = [block for block in every if len(self._rows_of(block))]
        self._blocks_per_buffer = max(1, buffer_cells // block_cells)
        self.epoch, self._next_buffer, self._next_batch = 0, 0, 0
        self._sizes: tuple[int, list[int]] | None = None
        self._files = OpenFiles(self.paths, encoding, self._where)

    def _checked(self, lengths_B: ArrayLike) -> NDArray[Any]:
        """Return the lengths without a copy of an array: of millions of cells, they are held once."""
        length_B = np.asarray(lengths_B)
        if length_B.shape != (self.n_obs,):
            raise ValueError(f"`lengths_B` has shape {length_B.shape}; the files hold {self.n_obs} cells.")
        return length_B

    def __len__(self) -> int:
        """Number of batches of this rank in the current epoch, over all workers."""
        return sum(self._buffer_sizes())

    def seek(self, step: int) -> None:
        """Go to batch number `step` of this rank, counted from 0 over all epochs, without reading data."""
        self.epoch, self._next_buffer, self._next_batch = 0, 0, 0
        while self._blocks and step >= len(self):
            step -= len(self)
            self.epoch += 1
        ends = np.cumsum(self._buffer_sizes())
        self._next_buffer = int(np.searchsorted(ends, step, side="right"))
        self._next_batch = step - (int(ends[self._next_buffer - 1]) if self._next_buffer else 0)

    def __iter__(self) -> Iterator[CellBatch]:
        """Yield the remaining batches of the epoch, then move on to the next epoch."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        ranks = self._buffers()
        mine = [place for place in range(first, len(ranks[self.rank]), step) if place >= self._next_buffer]
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, ranks[self.rank][mine[0]], mine[0]) if mine else None
            for turn, place in enumerate(mine):
                assert coming is not None
                cells = coming.result()
                if turn + 1 < len(mine):
                    coming = reader.submit(self._read, ranks[self.rank][mine[turn + 1]], mine[turn + 1])
                skipped = self._next_batch if place == self._next_buffer else 0
                batches = self._batches([buffers[place] for buffers in ranks], place)
                batches = self._without_empty_cells(batches, cells) if self._by_tokens else batches
                self._next_buffer = place
                for number in range(skipped, len(batches)):
                    self._next_batch = number + 1
                    yield cells.select(batches[number])
                self._next_buffer, self._next_batch = place + step, 0
        self.epoch, self._next_buffer, self._next_batch = self.epoch + 1, 0, 0

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        self._files.close()

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, *purpose))

    def _buffers(self) -> list[list[list[_Block]]]:
        """Blocks of each rank in this epoch, grouped by buffer. A buffer has the same number of blocks on all ranks."""
        order = self._rng(0).permutation(len(self._blocks)) if self.shuffle else np.arange(len(self._blocks))
        missing = -len(order) % self.world_size
        order = np.concatenate([order, np.resize(order, missing)]) if len(order) else order
        size = self._blocks_per_buffer
        dealt = [[self._blocks[place] for place in order[rank :: self.world_size]] for rank in range(self.world_size)]
        return [[mine[start : start + size] for start in range(0, len(mine), size)] for mine in dealt]

    def _buffer_sizes(self) -> list[int]:
        """Number of batches of each buffer in this epoch, which is the same on all ranks."""
        if self._sizes is None or self._sizes[0] != self.epoch:
            buffers = list(zip(*self._buffers()))
            self._sizes = self.epoch, [self._n_batches(buffer, place) for place, buffer in enumerate(buffers)]
        return self._sizes[1]

    def _n_batches(self, of_ranks: Sequence[list[_Block]], place: int) -> int:
        return max(len(self._packed(buffer, place, rank)) for rank, buffer in enumerate(of_ranks))

    def _batches(self, of_ranks: Sequence[list[_Block]], place: int) -> list[NDArray[np.int64]]:
        """Cells of each batch of this rank from one buffer, as indices into the buffer."""
        batches = self._packed(of_ranks[self.rank], place, self.rank)
        return _extended(batches, self._n_batches(of_ranks, place))

    def _without_empty_cells(self, batches: list[NDArray[np.int64]], cells: CellBatch) -> list[NDArray[np.int64]]:
        """Leave out cells without genes, which an upper bound of their lengths does not show; no batch becomes empty."""
        filled_B = cells.lengths_B.numpy() > self.encoding.config.n_special_tokens
        if filled_B.all():
            return batches
        if not filled_B.any():
            raise EmptyCellError(
                f"{len(filled_B)} cells that were read together express no gene of the vocabulary. Omit their files, or filter "
                "these cells out."
            )
        others = np.flatnonzero(filled_B)[:1]
        kept = [batch[filled_B[batch]] for batch in batches]
        return [batch if len(batch) else others for batch in kept]

    def _packed(self, buffer: list[_Block], place: int, rank: int) -> list[NDArray[np.int64]]:
        blocks = _in_file_order(buffer)
        cost_B = np.concatenate([self._costs_of(block) for block in blocks])
        drawn_N = self._drawn(blocks, len(cost_B))
        order = drawn_N[self._rng(1, rank, place).permutation(len(drawn_N))] if self.shuffle else drawn_N
        return pack(order, cost_B, self._budget)

    def _drawn(self, blocks: list[_Block], n_cells: int) -> NDArray[np.int64]:
        """Return the cells of a buffer that are drawn in this epoch, as indices into the buffer, some of them repeated.

        A cell is drawn as often as the whole part of its expected number says, and with the probability of the rest once more.
        """
        if self._repeats_B is None:
            return np.arange(n_cells)
        expected_B = np.concatenate([self._repeats_B[block.first + self._rows_of(block)] for block in blocks])
        chance_B = np.concatenate([self._rng(3, block.first).random(len(self._rows_of(block))) for block in blocks])
        n_draws_B = np.floor(expected_B) + (chance_B < expected_B % 1)
        if not n_draws_B.any():  # every buffer is at least one batch, so that ranks stay in step
            n_draws_B[expected_B.argmax()] = 1
        return np.repeat(np.arange(n_cells), n_draws_B.astype(np.int64))

    def _rows_of(self, block: _Block) -> NDArray[np.int64]:
        """Rows of a block that are used, counted from its start."""
        cells = slice(block.first, block.first + block.stop - block.start)
        if self._repeats_B is not None:  # 0 for cells of length 0 too
            return np.flatnonzero(self._repeats_B[cells] > 0)
        return (
            np.arange(block.stop - block.start) if self._length_B is None else np.flatnonzero(self._length_B[cells] > 0)
        )

    def _costs_of(self, block: _Block) -> NDArray[np.int64]:
        rows = self._rows_of(block)
        if not self._by_tokens:
            return np.ones(len(rows), dtype=np.int64)
        assert self._length_B is not None
        return self._length_B[block.first + rows].astype(np.int64)

    def _read(self, buffer: list[_Block], place: int) -> CellBatch:
        """Read and encode a buffer, in the order of the files."""
        blocks = _in_file_order(buffer)
        rngs = [self._rng(2, self.rank, place, number) if self.shuffle else None for number in range(len(blocks))]
        with ThreadPoolExecutor(encoder_threads(), initializer=limit_to_one_thread) as pool:
            return CellBatch.concat(list(pool.map(self._encode, blocks, rngs)))

    def _encode(self, block: _Block, rng: np.random.Generator | None) -> CellBatch:
        """Read and encode one block; runs in several threads at once."""
        counts, genes = self._files[block.source]
        kept = self._rows_of(block)
        parts = []
        for first, rows, depth_B in counts.blocks(start=block.start, stop=block.stop):
            offset = first - block.start
            own = kept[(kept >= offset) & (kept < offset + rows.shape[0])] - offset
            if len(own) < rows.shape[0]:
                rows, depth_B = rows[own], depth_B[own]
            cells = self.encoding.encode(rows, genes, depth_B=depth_B, rng=rng)
            parts.append(cells.replace(cell_index_B=torch.from_numpy(block.first + offset + own)))
        return parts[0] if len(parts) == 1 else CellBatch.concat(parts)


def _in_file_order(buffer: list[_Block]) -> list[_Block]:
    return sorted(buffer, key=lambda block: block.first)


def _extended(batches: list[NDArray[np.int64]], n_batches: int) -> list[NDArray[np.int64]]:
    """Extend to `n_batches` batches by splitting the largest in two; if all have one cell, repeat some."""
    batches = list(batches)
    while len(batches) < n_batches:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        if len(batches[largest]) == 1:
            return [batches[number % len(batches)] for number in range(n_batches)]
        batches[largest : largest + 1] = np.array_split(batches[largest], 2)
    return batches


def _cut(source: int, n_rows: int, first_row: int, block_cells: int) -> list[_Block]:
    """Divide a file into blocks of nearly equal size, with at most `block_cells` cells each."""
    edges = np.linspace(0, n_rows, -(-n_rows // block_cells) + 1).astype(int)
    return [_Block(source, int(start), int(stop), first_row + int(start)) for start, stop in pairwise(edges)]
