"""A common kind of gene name for many files, if some use symbols and others Ensembl ids."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import starmap

import pandas as pd

from scfm.data.gene_names import choose_names, names_of_kind, shared_by_names
from scfm.errors import VocabularyMismatchError
from scfm.vocab import IdType, guess_id_type, guess_species, strip_version

logger = logging.getLogger(__name__)

MIN_TRANSLATED = 0.5  # minimum fraction of the names of a file
KINDS: tuple[IdType, ...] = ("symbol", "ensembl")
DESCRIPTIONS = {"symbol": "gene symbols", "ensembl": "Ensembl ids", "other": "other names"}


@dataclass(frozen=True)
class CommonNames:
    """The kind of gene name that several files are converted to.

    Attributes
    ----------
    id_type
        Kind of name.
    aliases
        Mapping of other names to names of that kind, from files whose `var` holds both.
    gene_key
        Column of `var` with the names.
    all_names
        All names of that kind of all files, in the order of the files.
    """

    id_type: IdType
    aliases: dict[str, str] = field(default_factory=dict)
    gene_key: str | None = None
    all_names: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of_files(
        cls, files: Iterable[tuple[str, pd.DataFrame]], *, gene_key: str | None = None, id_type: IdType | None = None
    ) -> CommonNames:
        """Choose the kind of name that most files have, and collect translations from files that have both kinds.

        Parameters
        ----------
        files
            Name and `var` of each file.
        gene_key
            Column of `var` with the gene names. None for `var_names`, or for a common column if `var_names` are of the
            other kind.
        id_type
            The kind of name, if a vocabulary determines it.

        Raises
        ------
        VocabularyMismatchError
            If files have genes of different species, or fewer than half of the names of a file can be translated.
        """
        distinct: dict[str, _FileNames] = {}  # hundreds of files often have the same names
        found = []
        for name, var in files:
            each = shared_by_names(distinct, var, partial(_names_of, name, var, gene_key))
            found.append(replace(each, file=name))
        _refuse_species(list(distinct.values()))
        kind = id_type or _most_common(found)
        aliases = _translations(list(distinct.values()), kind)
        for each in found:
            each.require(kind, aliases, found)
        every = (name for each in distinct.values() for name in each.in_kind(kind, aliases) if name is not None)
        return cls(kind, aliases, gene_key, dict.fromkeys(every))

    def of(self, var: pd.DataFrame) -> list[str | None]:
        """Return the name of each gene of a file; None for a gene without a translation."""
        return _names_of("", var, self.gene_key).in_kind(self.id_type, self.aliases)


@dataclass(frozen=True)
class _FileNames:
    """The names of the genes of one file, by kind."""

    file: str
    primary: list[str | None]
    by_kind: dict[IdType, list[str | None]]

    @property
    def kind(self) -> IdType:
        return guess_id_type(self.primary)

    def in_kind(self, kind: IdType, aliases: dict[str, str]) -> list[str | None]:
        """Return the name of each gene of a kind; None for a gene without a translation."""
        if kind in self.by_kind:
            return list(self.by_kind[kind])
        return [None if name is None else aliases.get(name) for name in self.primary]

    def require(self, kind: IdType, aliases: dict[str, str], others: Sequence[_FileNames]) -> None:
        """Raise if too few names of the file can be translated; warn if some cannot."""
        if kind in self.by_kind:
            return
        n_known, n_names = sum(name in aliases for name in self.primary), len(self.primary)
        said = (
            f"{self.file} names genes by {DESCRIPTIONS[self.kind]}, and "
            f"{sum(kind in other.by_kind for other in others)} of {len(others)} files by {DESCRIPTIONS[kind]}; "
            f"{n_known:,} of its {n_names:,} names can be translated by the `var` columns of the other files"
        )
        if n_known < MIN_TRANSLATED * n_names:
            raise VocabularyMismatchError(
                f"{said}. Add a `var` column with {DESCRIPTIONS[kind]} to it, such as "
                f"{'feature_name' if kind == 'symbol' else 'feature_id'!r}, or omit this file."
            )
        if n_known < n_names:
            warnings.warn(f"{said}; the other genes of this file are omitted.", stacklevel=4)
        else:
            logger.info("%s.", said)


def _names_of(file: str, var: pd.DataFrame, gene_key: str | None) -> _FileNames:
    primary = _without_versions(choose_names(var, gene_key=gene_key)[0])
    by_kind: dict[IdType, list[str | None]] = {guess_id_type(primary): primary}
    for kind in KINDS:
        if kind not in by_kind and (names := names_of_kind(var, kind)) is not None:
            by_kind[kind] = _without_versions(names)
    return _FileNames(file, primary, by_kind)


def _without_versions(names: Sequence[str | None]) -> list[str | None]:
    return [None if name is None else strip_version(name) for name in names]


def _most_common(found: Sequence[_FileNames]) -> IdType:
    """Return the kind that most files have; ties go to the kind that most files use, then to that of the first file."""
    have = Counter(kind for each in found for kind in each.by_kind)
    use = Counter(each.kind for each in found)
    return max(have, key=lambda kind: (have[kind], use[kind], kind == found[0].kind))


def _translations(found: Sequence[_FileNames], kind: IdType) -> dict[str, str]:
    """Return a one-to-one mapping of other names to names of `kind`; of contradictory pairs, the first file's is used."""
    aliases: dict[str, str] = {}
    taken: set[str] = set()
    for each in found:
        for other, names in each.by_kind.items():
            if other == kind or kind not in each.by_kind:
                continue
            for alias, name in zip(names, each.by_kind[kind]):
                if alias is not None and name is not None and alias not in aliases and name not in taken:
                    aliases[alias] = name
                    taken.add(name)
    return aliases


def _refuse_species(found: Sequence[_FileNames]) -> None:
    species = {each.file: guess_species(each.primary) for each in found}
    if len(known := set(species.values()) - {"unknown"}) > 1:
        raise VocabularyMismatchError(
            f"According to their gene names, the files are from {len(known)} species: "
            f"{', '.join(starmap('{} ({})'.format, species.items()))}. Map the genes to those of one species first."
        )
