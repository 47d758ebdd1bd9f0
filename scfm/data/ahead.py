"""`one_ahead`: prepare the next item in a thread while the caller works on the present one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_END = object()


@contextmanager
def one_ahead(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Iterate over `items` with one item ahead, which a thread computes; with one processor, no thread is started.

    Items come in the same order, and an error comes in the place of its item. When the context is left, also by an error or an
    interruption, the item that is being computed is finished, and the thread has ended.
    """
    iterator = iter(items)
    if _n_processors() < 2:
        yield iterator
        return
    with ThreadPoolExecutor(1, thread_name_prefix="scfm-ahead") as thread:
        yield _results(iterator, thread)


def _results(iterator: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    coming = thread.submit(next, iterator, _END)
    while (item := coming.result()) is not _END:
        coming = thread.submit(next, iterator, _END)
        yield item  # type: ignore[misc]


def _n_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
