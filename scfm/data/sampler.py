"""`TokenBudgetSampler`: batches with about the same number of tokens, from cells of different lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Cells are sorted by length within windows of this many batches, so that lengths are similar within a batch, and batches
# are still random.
_WINDOW_BATCHES = 50


class TokenBudgetSampler:
    """Yields the rows of the cells of each batch; a batch has at most `max_tokens` tokens.

    Each cell occurs once per epoch. If the number of batches is not a multiple of the number of ranks, some batches are
    repeated at the end of the epoch. The order depends only on the seed and the number of the epoch, so every rank can
    compute it, and `seek` can resume at any batch.

    Parameters
    ----------
    lengths_B
        Number of tokens of each cell, shape (n_cells,).
    max_tokens
        Maximum number of tokens per batch. A cell with more tokens forms a batch alone.
    max_cells
        Maximum number of cells per batch; None for no limit.
    shuffle
        Whether to shuffle every epoch. With False, cells keep their order.
    seed
        Seed of the shuffle.
    rank, world_size
        Rank of this process and number of processes. The process gets batches rank, rank + world_size, ...

    Examples
    --------
    >>> from scfm.data import TokenBudgetSampler
    >>> [rows.tolist() for rows in TokenBudgetSampler([5, 5, 9, 1], max_tokens=10, shuffle=False)]
    [[0, 1], [2, 3]]
    """

    def __init__(
        self,
        lengths_B: ArrayLike,
        *,
        max_tokens: int,
        max_cells: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths_B = np.asarray(lengths_B, dtype=np.int64)
        if max_tokens < 1 or (max_cells is not None and max_cells < 1):
            raise ValueError(f"`max_tokens` is {max_tokens} and `max_cells` {max_cells}; both must be positive.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank}; with `world_size` {world_size} it must be in 0..{world_size - 1}.")
        self.max_tokens, self.max_cells, self.shuffle, self.seed = max_tokens, max_cells, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._next = 0
        self._planned: tuple[int, list[NDArray[np.int64]]] | None = None

    def seek(self, step: int) -> None:
        """Continue with batch `step` of this rank, counted from 0 over all epochs."""
        self.epoch, self._next = 0, step
        while batches := self.batches():
            if self._next < len(batches):
                break
            self.epoch, self._next = self.epoch + 1, self._next - len(batches)

    def __len__(self) -> int:
        """Return the number of batches of this rank in the current epoch."""
        return len(self.batches())

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """Yield the rows of each remaining batch of the epoch, then move on to the next epoch."""
        batches = self.batches()
        while self._next < len(batches):
            self._next += 1
            yield batches[self._next - 1]
        self.epoch, self._next = self.epoch + 1, 0

    def batches(self) -> list[NDArray[np.int64]]:
        """Return all batches of this rank in the current epoch."""
        if self._planned is None or self._planned[0] != self.epoch:
            batches = self._plan()
            if n_missing := -len(batches) % self.world_size:
                batches += [batches[index % len(batches)] for index in range(n_missing)] if batches else []
            self._planned = self.epoch, batches[self.rank :: self.world_size]
        return self._planned[1]

    def _plan(self) -> list[NDArray[np.int64]]:
        n_cells = len(self.lengths_B)
        if not self.shuffle:
            return self._pack(np.arange(n_cells))
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(n_cells)
        mean_length = max(float(self.lengths_B.mean()), 1.0) if n_cells else 1.0
        cells = max(1.0, self.max_tokens / mean_length)
        window = int(min(cells, self.max_cells or cells) * _WINDOW_BATCHES) + 1
        batches: list[NDArray[np.int64]] = []
        for start in range(0, n_cells, window):
            part = order[start : start + window]
            batches += self._pack(part[np.argsort(self.lengths_B[part], kind="stable")])
        return [batches[index] for index in rng.permutation(len(batches))]

    def _pack(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return pack(order, self.lengths_B, self.max_tokens, self.max_cells)


def pack(
    order: NDArray[np.int64], lengths_B: NDArray[np.int64], max_tokens: int, max_cells: int | None = None
) -> list[NDArray[np.int64]]:
    """Divide cells, in the given order, into batches within the limits; a cell longer than `max_tokens` is a batch alone."""
    ends = np.cumsum(lengths_B[order])
    batches, start = [], 0
    while start < len(order):
        used = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, used + max_tokens, side="right"))
        stop = max(stop, start + 1)
        if max_cells is not None:
            stop = min(stop, start + max_cells)
        batches.append(order[start:stop])
        start = stop
    return batches
