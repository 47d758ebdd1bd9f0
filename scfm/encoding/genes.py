"""`GeneMap`: the token of each column of a matrix, and a report on how well data and vocabulary match."""

# Axes: G genes of the matrix.

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from scfm.data.source import CountSource
from scfm.encoding.config import DuplicatePolicy
from scfm.errors import VocabularyMismatchError
from scfm.vocab import IdType, Vocabulary, guess_id_type, guess_species

MIN_COVERAGE = 0.1
_FIRST_ROWS = 200  # cells from which the matched fraction of the counts is estimated


@dataclass(frozen=True, kw_only=True)
class GeneReport:
    """How the genes of the data and those of the vocabulary match.

    Attributes
    ----------
    source
        Where names were found: "var_names" or 'var["column"]'.
    n_vars, n_matched
        Number of genes of the data, and of those that are in the vocabulary.
    n_found, n_vocabulary
        Number of genes of the vocabulary that are in the data, and of all. `n_found` is smaller than `n_matched` if several
        columns are one gene, such as an alias and the symbol.
    n_unnamed
        Number of genes of the data without a name.
    gene_fraction, count_fraction
        Fraction of the genes of the data that are in the vocabulary, and fraction of the counts that these genes hold (None
        if no counts were given).
    id_type, species
        Kind of name and species, guessed from the names; species is "unknown" if they do not show it.
    vocabulary_id_type, vocabulary_species
        The same for the vocabulary.
    n_unversioned, n_aliased
        Number of names found only without their Ensembl version, or through an alias.
    duplicated
        Genes with several columns.
    unmatched
        The first few names that are not in the vocabulary.

    Examples
    --------
    >>> import scfm
    >>> vocabulary = scfm.Vocabulary.from_genes(["CD74", "CST3"], special=("pad",))
    >>> print(scfm.encoding.GeneMap.from_names(["CST3", "INS"], vocabulary, gene_totals=[30, 10]).report)
    1 of 2 genes matched (50.0%, 75.0% of the counts), by names; 1 of the 2 genes of the vocabulary were found
    """

    source: str
    n_vars: int
    n_matched: int
    n_found: int
    n_vocabulary: int
    n_unnamed: int
    gene_fraction: float
    count_fraction: float | None
    id_type: IdType
    species: str
    vocabulary_id_type: IdType
    vocabulary_species: str
    n_unversioned: int
    n_aliased: int
    duplicated: tuple[str, ...]
    unmatched: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """The larger of two fractions: matched counts (or genes) of the data, and matched genes of the vocabulary."""
        matched = self.gene_fraction if self.count_fraction is None else self.count_fraction
        return max(matched, _ratio(self.n_found, self.n_vocabulary))

    def __str__(self) -> str:
        counts = "" if self.count_fraction is None else f", {self.count_fraction:.1%} of the counts"
        several = f", {len(self.duplicated)} of which have several columns" if self.duplicated else ""
        return (
            f"{self.n_matched} of {self.n_vars} genes matched ({self.gene_fraction:.1%}{counts}), by {self.source}; "
            f"{self.n_found} of the {self.n_vocabulary} genes of the vocabulary were found{several}"
        )


@dataclass(frozen=True, eq=False)
class GeneMap:
    """Token id of each column of a matrix.

    Attributes
    ----------
    vocabulary
        The vocabulary that the ids belong to.
    token_ids
        Token of each column, shape (n_vars,), int32; -1 for a gene that is not in the vocabulary.
    report
        How well data and vocabulary match.

    Examples
    --------
    >>> import scfm
    >>> vocabulary = scfm.Vocabulary.from_genes(["CD74", "CST3"], special=("pad",))
    >>> genes = scfm.encoding.GeneMap.from_names(["CST3", "Cst3", "CD74"], vocabulary)  # case is never changed
    >>> genes.token_ids.tolist()
    [2, -1, 1]
    """

    vocabulary: Vocabulary
    token_ids: NDArray[np.int32]
    report: GeneReport

    def __post_init__(self) -> None:
        ids = self.token_ids
        if len(ids) and not -1 <= ids.min() <= ids.max() < len(self.vocabulary):
            raise ValueError(
                f"`token_ids` are between {ids.min()} and {ids.max()}; they must be -1 or a token of {self.vocabulary}."
            )

    @property
    def n_vars(self) -> int:
        return len(self.token_ids)

    @property
    def has_duplicates(self) -> bool:
        return bool(self.report.duplicated)

    @classmethod
    def from_names(
        cls,
        names: Sequence[str | None],
        vocabulary: Vocabulary,
        *,
        duplicates: DuplicatePolicy = "error",
        gene_totals: ArrayLike | None = None,
        min_coverage: float = MIN_COVERAGE,
        source: str = "names",
    ) -> GeneMap:
        """Look up each name: as written, as an alias, and without its Ensembl version. Case is never changed.

        Parameters
        ----------
        names
            Names of the columns; None for a gene without a name.
        vocabulary
            Vocabulary in which names are looked up.
        duplicates
            Whether several columns of one gene raise an error ("error") or are summed ("sum").
        gene_totals
            Total counts of each column over some or all cells, shape (n_vars,). Used for the matched fraction of the counts.
        min_coverage
            Minimum `GeneReport.coverage`. With 0, one matched gene is enough.
        source
            Where the names were found, for error messages.

        Raises
        ------
        VocabularyMismatchError
            If the species differ, coverage is below `min_coverage`, or names are duplicated and `duplicates` is "error".
        """
        names = [None if name is None else str(name) for name in names]
        ids, n_unversioned = vocabulary.find(names)
        report = _report(names, ids, vocabulary, gene_totals, source)
        report = dataclasses.replace(report, n_unversioned=n_unversioned)
        _refuse_misfit(report, names, vocabulary, min_coverage)
        if report.duplicated and duplicates == "error":
            raise VocabularyMismatchError(several_columns(names, ids.tolist(), source))
        return cls(vocabulary, ids, report)

    @classmethod
    def of(
        cls,
        source: CountSource,
        vocabulary: Vocabulary,
        *,
        duplicates: DuplicatePolicy = "error",
        min_coverage: float = MIN_COVERAGE,
    ) -> GeneMap:
        """Map the genes of a `CountSource`.

        Names are read from its `gene_key` if it has one. Otherwise `var_names` are used if they are of the kind that the
        vocabulary uses. If they are not (Ensembl ids for a vocabulary of symbols, or the reverse), columns of `var` that
        commonly hold the other kind are tried, first `feature_name` of CELLxGENE; the report and the log name the column.
        The matched fraction of the counts is estimated from the first cells.

        Raises
        ------
        CountsError
            If the first cells do not hold raw counts.
        VocabularyMismatchError
            In the same cases as `from_names`.
        """
        names, place = source.names(vocabulary)
        first = source.check(source.rows(0, min(source.n_obs, _FIRST_ROWS)))
        return cls.from_names(
            names,
            vocabulary,
            duplicates=duplicates,
            gene_totals=np.bincount(first.indices, weights=first.data, minlength=source.n_vars) if first.nnz else None,
            min_coverage=min_coverage,
            source=place,
        )


def several_columns(names: Sequence[str | None], genes: Sequence[Hashable], source: str) -> str:
    """Return an error text that names genes with several columns, and how to keep one column of each.

    Parameters
    ----------
    names
        Names of the columns in the data.
    genes
        Gene of each column, shape (n_vars,); -1 for columns to ignore.
    source
        Where the names were found.
    """
    table = pd.DataFrame({"name": names, "gene": genes})
    table = table[table["gene"] != -1]
    repeated = table[table["gene"].duplicated(keep=False)]
    shown = [" and ".join(map(repr, group)) for _, group in repeated.groupby("gene", sort=False)["name"]]
    start = (
        f"{repeated['gene'].nunique()} genes have several columns each in {source}: {'; '.join(shown[:3])}"
        f"{'; ...' * (len(shown) > 3)}. "
    )
    sums = 'an encoding that sums them (`encoding=scfm.EncodingConfig(kind=..., duplicates="sum")`)'
    if table.drop_duplicates("name")["gene"].duplicated().any():
        return f"{start}Keep one column of each, or fit with {sums}."
    column = "adata.var_names" if source == "var_names" else f"adata.{source}"
    return f"{start}Keep one column of each (`adata[:, ~{column}.duplicated()]`), or fit with {sums}."


def _ratio(part: int, total: int) -> float:
    return part / total if total else 0.0


def _report(
    names: list[str | None],
    ids_G: NDArray[np.int32],
    vocabulary: Vocabulary,
    gene_totals: ArrayLike | None,
    source: str,
) -> GeneReport:
    matched_G = ids_G >= 0
    count_fraction = None
    if gene_totals is not None:
        total_G = np.asarray(gene_totals, dtype=np.float64)
        count_fraction = float(total_G[matched_G].sum() / total_G.sum()) if total_G.sum() > 0 else 0.0
    tokens, n_columns = np.unique(ids_G[matched_G], return_counts=True)
    return GeneReport(
        source=source,
        n_vars=len(names),
        n_matched=int(matched_G.sum()),
        n_found=len(tokens),
        n_vocabulary=vocabulary.n_genes,
        n_unnamed=sum(name is None for name in names),
        gene_fraction=_ratio(int(matched_G.sum()), len(names)),
        count_fraction=count_fraction,
        id_type=guess_id_type(names),
        species=guess_species(names),
        vocabulary_id_type=vocabulary.id_type,
        vocabulary_species=vocabulary.species,
        n_unversioned=0,
        n_aliased=sum(name in vocabulary.aliases and name not in vocabulary for name in names),
        duplicated=tuple(vocabulary.tokens[token] for token in tokens[n_columns > 1]),
        unmatched=tuple(name for name, token in zip(names, ids_G) if token < 0 and name is not None)[:10],
    )


def _refuse_misfit(report: GeneReport, names: list[str | None], vocabulary: Vocabulary, min_coverage: float) -> None:
    if report.n_matched and report.coverage >= min_coverage:
        return
    if not names:
        raise VocabularyMismatchError(
            "The data have no genes (n_vars is 0). Check whether all genes were filtered out."
        )
    found = "None" if not report.n_matched else f"Only {report.n_matched} ({report.gene_fraction:.1%})"
    of_counts = "" if report.count_fraction is None else f", {report.count_fraction:.1%} of the counts"
    species = {report.species, report.vocabulary_species}
    if len(species) == 2 and "unknown" not in species:
        remedy = (
            f"The data look like {report.species}, but the vocabulary is {report.vocabulary_species}. Map the genes to "
            f"{report.vocabulary_species} orthologs first; changing the case of symbols is not a mapping."
        )
    elif report.id_type != report.vocabulary_id_type:
        remedy = f"Pass `gene_key=` to name the `var` column that holds {_KIND_NAMES[vocabulary.id_type]}."
    else:
        remedy = (
            "Pass `gene_key=` if another `var` column holds the names, or use a model whose vocabulary has these genes; "
            f"at least {min_coverage:.0%} must match."
        )
    raise VocabularyMismatchError(
        f"{found} of the {report.n_vars} genes in {report.source} are in the vocabulary{of_counts} (first: {names[0]!r}; the "
        f"vocabulary uses {_KIND_NAMES[vocabulary.id_type]} such as "
        f"{vocabulary.genes[0] if vocabulary.genes else ''!r}). {remedy}"
    )


_KIND_NAMES = {"symbol": "gene symbols", "ensembl": "Ensembl ids", "other": "other names"}
