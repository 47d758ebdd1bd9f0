"""A bounded cache of open files with the tokens of their genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scfm._remote import AnyPath
from scfm.data.gene_names import shared_by_names
from scfm.data.many_files import RecentlyOpened
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
        self._opened: RecentlyOpened[tuple[CountSource, GeneMap]] = RecentlyOpened()
        self._maps: dict[str, GeneMap] = {}  # files with the same names share one map

    def __getitem__(self, number: int) -> tuple[CountSource, GeneMap]:
        """Return the counts and the tokens of the genes of file `number`."""
        return self._opened.get(number, self._open)

    def _open(self, number: int) -> tuple[CountSource, GeneMap]:
        counts = CountSource.of(self._paths[number], **self._where)
        return counts, self._genes_of(counts)

    def _genes_of(self, counts: CountSource) -> GeneMap:
        vocabulary, duplicates = self._encoding.vocabulary, self._encoding.config.duplicates
        return shared_by_names(self._maps, counts.var, lambda: GeneMap.of(counts, vocabulary, duplicates=duplicates))

    def close(self) -> None:
        """Close all files that no thread reads; they are opened again when they are needed."""
        self._opened.clear()
