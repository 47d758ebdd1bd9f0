"""A bounded cache of open files with the tokens of their genes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from scfm._remote import AnyPath
from scfm.data.gene_names import shared_by_names
from scfm.data.many_files import MAX_OPEN_FILES
from scfm.data.source import CountSource
from scfm.encoding import Encoding, GeneMap


class OpenFiles:
    """Opens files when they are needed, and keeps the ones used last open; several threads may use it.

    Parameters
    ----------
    paths
        The files.
    encoding
        Encoding with whose vocabulary the genes of all files must match.
    where
        `layer`, `gene_key` and `depth_key` of `CountSource.of`.
    """

    def __init__(self, paths: Sequence[AnyPath], encoding: Encoding, where: dict[str, Any]) -> None:
        self._paths, self._encoding, self._where = paths, encoding, where
        self._opened: OrderedDict[int, tuple[CountSource, GeneMap]] = OrderedDict()
        self._maps: dict[str, GeneMap] = {}  # files with the same names share one map
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> tuple[CountSource, GeneMap]:
        """Return the counts and the tokens of the genes of file `number`."""
        with self._lock:
            if number not in self._opened:
                if len(self._opened) >= MAX_OPEN_FILES:
                    self._opened.popitem(last=False)
                counts = CountSource.of(self._paths[number], **self._where)
                self._opened[number] = counts, self._genes_of(counts)
            self._opened.move_to_end(number)
            return self._opened[number]

    def _genes_of(self, counts: CountSource) -> GeneMap:
        vocabulary, duplicates = self._encoding.vocabulary, self._encoding.config.duplicates
        return shared_by_names(self._maps, counts.var, lambda: GeneMap.of(counts, vocabulary, duplicates=duplicates))

    def close(self) -> None:
        """Close all files that no thread reads; they are opened again when they are needed."""
        with self._lock:
            self._opened.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and lock, which another process cannot use."""
        return {**self.__dict__, "_opened": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
