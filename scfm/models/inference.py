"""Batches of tokens and the progress bar of a forward pass over many cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

TOKENS_PER_BATCH = 16_384  # more tokens are not faster, and need more memory


def cell_bar(n_cells: int, title: str | None, *, progress: bool | tqdm = True) -> AbstractContextManager[tqdm]:
    """Return a bar that shows cells per second and appears if the work takes more than a second, or the one that is given."""
    if isinstance(progress, bool):
        return tqdm(total=n_cells, desc=title, unit="cell", delay=1, disable=not progress)
    return nullcontext(progress)


def runs_of_tokens(cu_seqlens: NDArray[np.integer], budget: int) -> Iterator[slice]:
    """Divide consecutive cells into slices of at most `budget` tokens, with at least one cell each."""
    start, n_cells = 0, len(cu_seqlens) - 1
    while start < n_cells:
        stop = int(np.searchsorted(cu_seqlens, cu_seqlens[start] + budget, side="right")) - 1
        stop = min(max(stop, start + 1), n_cells)
        yield slice(start, stop)
        start = stop
