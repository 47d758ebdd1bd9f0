"""Which process of a torchrun this is, its share of the work, and how all processes learn of each other's results."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

LONGEST_WAIT = timedelta(days=7)  # for the slowest rank; one that dies is noticed at once


def torchrun_rank() -> tuple[int, int]:
    """Rank and number of processes, from the environment that torchrun sets; (0, 1) without it."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def share_of(n_items: int, rank: int, world_size: int) -> range:
    """Run of items that is a rank's: together they cover all without overlap, and their lengths differ by one at most.

    Examples
    --------
    >>> [list(share_of(5, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(n_items * rank // world_size, n_items * (rank + 1) // world_size)


def gather(value: Any = None) -> list[Any]:
    """Wait for all ranks, and return what each of them gave, in the order of ranks; on every rank the same."""
    _, world_size = torchrun_rank()
    if world_size == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * world_size
    distributed.all_gather_object(values, value, group=_group())
    return values


@cache
def _group() -> Any:
    """A group of all ranks that talks through gloo, on any device; made once, and kept until the process ends."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        return distributed.group.WORLD
    return distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
