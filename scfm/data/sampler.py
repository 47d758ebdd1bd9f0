"""`TokenBudgetSampler`: batches of about equal work from cells of unequal length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Cells are sorted by length inside windows of this many batches: near-equal lengths in a batch, random batches.
_WINDOW_BATCHES = 50


class TokenBudgetSampler:
    """Yields rows of cells, batch by batch, each batch within a budget of tokens.

    Every cell comes once an epoch; where the batches do not divide among the ranks, some come again to fill the last
    round. An epoch's order is a function of the seed and the number of the epoch, so any rank can compute that of every
    other, and `seek` resumes at any batch.

    Parameters
    ----------
    lengths_B
        Tokens of each cell, shape (n_cells,).
    max_tokens
        Most tokens of a batch; a longer cell gets a batch of its own.
    max_cells
        Most cells of a batch; None for no limit.
    shuffle
        Whether epochs are shuffled; without, cells come in their order.
    seed
        Seed of the shuffle.
    rank, world_size
        Which part of each epoch is this process's: batches rank, rank + world_size, ...

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
        """Go to the batch of this rank that comes `step` batches after its first one, over all epochs."""
        self.epoch, self._next = 0, step
        while batches := self.batches():
            if self._next < len(batches):
                break
            self.epoch, self._next = self.epoch + 1, self._next - len(batches)

    def __len__(self) -> int:
        """Batches of this rank in the current epoch."""
        return len(self.batches())

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """Yield the rows of each remaining batch of the epoch, then move on to the next epoch."""
        batches = self.batches()
        while self._next < len(batches):
            self._next += 1
            yield batches[self._next - 1]
        self.epoch, self._next = self.epoch + 1, 0

    def batches(self) -> list[NDArray[np.int64]]:
        """All batches of this rank in the current epoch."""
        if self._planned is None or self._planned[0] != self.epoch:
            every = self._plan()
            if short := -len(every) % self.world_size:
                every += [every[place % len(every)] for place in range(short)] if every else []
            self._planned = self.epoch, every[self.rank :: self.world_size]
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
        return [batches[place] for place in rng.permutation(len(batches))]

    def _pack(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return pack(order, self.lengths_B, self.max_tokens, self.max_cells)


def pack(
    order: NDArray[np.int64], lengths_B: NDArray[np.int64], max_tokens: int, max_cells: int | None = None
) -> list[NDArray[np.int64]]:
    """Cut an order of cells before each cell that would exceed a limit; a cell longer than the limit stands alone."""
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
