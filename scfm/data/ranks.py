"""Processes started by torchrun: the rank of this one, its part of the work, and exchange of results."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from scfm.errors import ScfmError

T = TypeVar("T")

MAX_WAIT = timedelta(days=7)  # for the slowest rank; torchrun stops all ranks if one fails


def torchrun_rank() -> tuple[int, int]:
    """Return rank and number of processes from the environment variables of torchrun; (0, 1) without torchrun."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def range_of_rank(n_items: int, rank: int, world_size: int) -> range:
    """Return the items of a rank. The ranges of all ranks are disjoint, cover all items, and differ by at most one in length.

    Examples
    --------
    >>> [list(range_of_rank(5, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(n_items * rank // world_size, n_items * (rank + 1) // world_size)


def gather_to_first(compute: Callable[[], T]) -> list[T] | None:
    """Compute a value on every rank, and return those of all ranks on the first rank; None on the others.

    Raises
    ------
    ScfmError
        On every rank, if `compute` failed on another one.
    """
    rank, world_size = torchrun_rank()
    if world_size == 1:
        return [compute()]
    from torch import distributed

    try:
        value = compute()
    except BaseException as error:
        gather(f"{type(error).__name__}: {error}")
        raise
    if failures := [failure for failure in gather(None) if failure is not None]:
        raise ScfmError(f"Another process failed: {failures[0]}")
    values: list[Any] | None = [None] * world_size if rank == 0 else None
    distributed.gather_object(value, values, group=_group())
    return values


def gather(value: Any = None) -> list[Any]:
    """Wait for all ranks, and return the values of all of them in the order of ranks, on every rank."""
    _, world_size = torchrun_rank()
    if world_size == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * world_size
    distributed.all_gather_object(values, value, group=_group())
    return values


@cache
def _group() -> Any:
    """Return a group of all ranks that uses gloo; it is created once and kept until the process ends."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=MAX_WAIT)
        return distributed.group.WORLD
    return distributed.new_group(backend="gloo", timeout=MAX_WAIT)
