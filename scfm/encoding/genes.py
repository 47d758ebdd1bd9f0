"""`GeneMap`: which token each column of a matrix is, and how well data and vocabulary fit."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from scfm.encoding.config import DuplicatePolicy
from scfm.errors import VocabularyMismatchError
from scfm.vocab import IdType, Vocabulary, guess_id_type, is_ensembl, strip_version

logger = logging.getLogger(__name__)

MIN_COVERAGE = 0.1

# Where data sets keep the other kind of name, most specific first: cellxgene (feature_name, feature_id), 10x through
# scanpy (gene_ids), and common hand-made names.
_COLUMNS = {
    "symbol": ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "hgnc_symbol"),
    "ensembl": ("feature_id", "gene_ids", "ensembl_id", "ensembl_ids", "gene_id", "ensembl", "ensembl_gene_id"),
}
_ENSEMBL_SPECIES = {"ENSG": "human", "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSSSCG": "pig",
                    "ENSMMUG": "macaque", "ENSMFAG": "macaque", "ENSPTRG": "chimpanzee"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GeneReport:
    """How the genes of the data and those of the vocabulary fit together.

    Attributes
    ----------
    source
        Where names were taken from: "var_names" or 'var["column"]'.
    n_vars, n_known, n_vocabulary
        Genes of the data, those of them that the vocabulary knows, and genes of the vocabulary.
    gene_share, count_share
        Share of the data's genes, and of its counts (None where not measured), that is known.
    id_type, species
        What the names look like; species is "unknown" where they do not tell.
    vocabulary_id_type, vocabulary_species
        The same of the vocabulary.
    n_unversioned, n_aliased
        Names known only after dropping an Ensembl version, or through an alias.
    duplicated
        Genes that several columns stand for.
    unknown
        The first few names that are not known.

    Examples
    --------
    >>> import scfm
    >>> vocabulary = scfm.Vocabulary.from_genes(["CD74", "CST3"], special=("pad",))
    >>> print(scfm.encoding.GeneMap.from_names(["CST3", "INS"], vocabulary, gene_totals=[30, 10]).report)
    1 of 2 genes known (50.0%, 75.0% of the counts), by names; 2 genes in the vocabulary
    """

    source: str
    n_vars: int
    n_known: int
    n_vocabulary: int
    gene_share: float
    count_share: float | None
    id_type: IdType
    species: str
    vocabulary_id_type: IdType
    vocabulary_species: str
    n_unversioned: int
    n_aliased: int
    duplicated: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """The larger of two shares: of the data's counts (or genes) that are known, of the vocabulary that is found."""
        known = self.gene_share if self.count_share is None else self.count_share
        return max(known, len_ratio(self.n_known, self.n_vocabulary))

    def __str__(self) -> str:
        counts = "" if self.count_share is None else f", {self.count_share:.1%} of the counts"
        return (
            f"{self.n_known} of {self.n_vars} genes known ({self.gene_share:.1%}{counts}), by {self.source}; "
            f"{self.n_vocabulary} genes in the vocabulary"
        )


@dataclass(frozen=True, eq=False)
class GeneMap:
    """Token id of each column of a matrix.

    Attributes
    ----------
    vocabulary
        The vocabulary that the ids belong to.
    token_ids
        Shape (n_vars,), int32; -1 where the gene is not known.
    report
        How well the two fit.

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

    @property
    def n_vars(self) -> int:
        return len(self.token_ids)

    @property
    def has_duplicates(self) -> bool:
        return bool(self.report.duplicated)

    @classmethod
    def from_names(
        cls,
        names: Sequence[str],
        vocabulary: Vocabulary,
        *,
        duplicates: DuplicatePolicy = "error",
        gene_totals: ArrayLike | None = None,
        min_coverage: float = MIN_COVERAGE,
        source: str = "names",
    ) -> GeneMap:
        """Look each name up: as written, without its Ensembl version, as an alias; never with its case changed.

        Parameters
        ----------
        names
            Names of the columns.
        vocabulary
            Where to look them up.
        duplicates
            Whether columns that are one gene are refused ("error") or to be summed ("sum").
        gene_totals
            Counts of each column, shape (n_vars,), over some or all cells; for the share of counts that is known.
        min_coverage
            Smallest `GeneReport.coverage` that is not an error; 0 to accept anything but nothing.
        source
            What to call the place where names came from.

        Raises
        ------
        VocabularyMismatchError
            If the species differ, coverage is below `min_coverage`, or names are duplicated against the policy.
        """
        names = [str(name) for name in names]
        ids, n_unversioned = _look_up(names, vocabulary)
        report = _report(names, ids, vocabulary, gene_totals, source)
        report = dataclasses.replace(report, n_unversioned=n_unversioned)
        _refuse_misfit(report, names, vocabulary, min_coverage)
        if report.duplicated and duplicates == "error":
            raise VocabularyMismatchError(
                f"{len(report.duplicated)} genes have several columns each in {source}: "
                f"{', '.join(map(repr, report.duplicated[:5]))}. Keep one column of each "
                "(`adata[:, ~adata.var_names.duplicated()]`), or fit with an encoding that sums them "
                '(`encoding=scfm.EncodingConfig(kind=..., duplicates="sum")`).'
            )
        return cls(vocabulary, ids, report)

    @classmethod
    def from_var(
        cls,
        var: pd.DataFrame,
        vocabulary: Vocabulary,
        *,
        gene_key: str | None = None,
        duplicates: DuplicatePolicy = "error",
        gene_totals: ArrayLike | None = None,
        min_coverage: float = MIN_COVERAGE,
    ) -> GeneMap:
        """Map the genes of an AnnData: by `gene_key`, by `var_names`, or by a column known to hold the right kind.

        `var_names` are used where they are of the vocabulary's kind. Where they are not (Ensembl ids for a vocabulary
        of symbols, or the reverse), the columns in use for the other kind are tried, cellxgene's `feature_name` first;
        the report and the log say which was taken.
        """
        names, source = gene_names(var, gene_key=gene_key, id_type=vocabulary.id_type, vocabulary=vocabulary)
        return cls.from_names(
            names,
            vocabulary,
            duplicates=duplicates,
            gene_totals=gene_totals,
            min_coverage=min_coverage,
            source=source,
        )


def gene_names(
    var: pd.DataFrame,
    *,
    gene_key: str | None = None,
    id_type: IdType | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[list[str], str]:
    """Find the names of the genes of `var`, and say where they came from.

    Parameters
    ----------
    var
        `adata.var`.
    gene_key
        Column to take; None to choose.
    id_type
        The kind of name wanted; None for whatever `var_names` are.
    vocabulary
        Where given, a column is taken in place of `var_names` only if more of its names are known.
    """
    if gene_key is not None:
        if gene_key not in var:
            raise VocabularyMismatchError(
                f"`gene_key` is {gene_key!r}, which is not a column of `var` ({', '.join(map(str, var.columns[:9])) or 'it has none'}). "
                "Name the column that holds gene ids, or pass None to use `var_names`."
            )
        return var[gene_key].astype(str).tolist(), f'var["{gene_key}"]'
    index = var.index.astype(str).tolist()
    if id_type in (None, "other") or guess_id_type(index) == id_type:
        return index, "var_names"
    best, source = index, "var_names"
    n_known = 0 if vocabulary is None else int((_look_up(index, vocabulary)[0] >= 0).sum())
    for column in _COLUMNS[id_type]:
        if column not in var:
            continue
        names = var[column].astype(str).tolist()
        known = guess_id_type(names) == id_type if vocabulary is None else (_look_up(names, vocabulary)[0] >= 0).sum()
        if known > n_known:
            best, source, n_known = names, f'var["{column}"]', int(known)
    if source != "var_names":
        logger.info("genes are named by %s (var_names are not %s ids)", source, id_type)
    return best, source


def guess_species(names: Sequence[str]) -> str:
    """Guess a species from Ensembl prefixes, or from the case of symbols: GAPDH human, Gapdh mouse, gapdh zebrafish."""
    sample = names[:: max(1, len(names) // 2000)]
    if guess_id_type(sample) == "ensembl":
        prefixes = [re.match(r"[A-Z]+", name) for name in sample if is_ensembl(name)]
        votes = pd.Series([match.group() for match in prefixes if match]).value_counts()
        return _ENSEMBL_SPECIES.get(str(votes.index[0]), "unknown")
    forms = {"human": r"[A-Z][A-Z0-9.orf-]*", "mouse": r"[A-Z][a-z][a-z0-9-]*", "zebrafish": r"[a-z][a-z0-9.:-]*"}
    lettered = [name for name in sample if re.match(r"[A-Za-z]{2}", name)]
    stems = {name.rstrip("0123456789") for name in lettered}
    if len(stems) < len(lettered) / 10:  # gene1, gene2, ...: numbered, not named
        return "unknown"
    for species, form in forms.items():
        if lettered and sum(re.fullmatch(form, name) is not None for name in lettered) / len(lettered) > 0.6:
            return species
    return "unknown"


def len_ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _look_up(names: list[str], vocabulary: Vocabulary) -> tuple[NDArray[np.int32], int]:
    """Token ids (-1 unknown or special), and how many needed their version dropped."""
    ids = vocabulary.token_ids(names)
    lost = np.flatnonzero(ids < 0)
    stripped = vocabulary.token_ids(strip_version(names[place]) for place in lost)
    ids[lost] = stripped
    specials = np.setdiff1d(np.arange(len(vocabulary)), vocabulary.gene_ids)
    ids[np.isin(ids, specials)] = -1
    return ids, int((stripped >= 0).sum())


def _report(
    names: list[str], ids: NDArray[np.int32], vocabulary: Vocabulary, gene_totals: ArrayLike | None, source: str
) -> GeneReport:
    known = ids >= 0
    count_share = None
    if gene_totals is not None:
        totals = np.asarray(gene_totals, dtype=np.float64)
        count_share = float(totals[known].sum() / totals.sum()) if totals.sum() > 0 else 0.0
    tokens, columns = np.unique(ids[known], return_counts=True)
    return GeneReport(
        source=source,
        n_vars=len(names),
        n_known=int(known.sum()),
        n_vocabulary=vocabulary.n_genes,
        gene_share=len_ratio(int(known.sum()), len(names)),
        count_share=count_share,
        id_type=guess_id_type(names),
        species=guess_species(names),
        vocabulary_id_type=vocabulary.id_type,
        vocabulary_species=guess_species(vocabulary.genes),
        n_unversioned=0,
        n_aliased=sum(name not in vocabulary and name in vocabulary.aliases for name in names),
        duplicated=tuple(vocabulary.tokens[token] for token in tokens[columns > 1]),
        unknown=tuple(name for name, place in zip(names, ids) if place < 0)[:10],
    )


def _refuse_misfit(report: GeneReport, names: list[str], vocabulary: Vocabulary, min_coverage: float) -> None:
    if report.n_known and report.coverage >= min_coverage:
        return
    if not names:
        raise VocabularyMismatchError("The data hold no genes (n_vars is 0). Was every gene filtered out?")
    found = "None" if not report.n_known else f"Only {report.n_known} ({report.gene_share:.1%})"
    share = "" if report.count_share is None else f", {report.count_share:.1%} of the counts"
    species = {report.species, report.vocabulary_species}
    if len(species) == 2 and "unknown" not in species:
        remedy = (
            f"The data look like {report.species}, the vocabulary is {report.vocabulary_species}. Map them to "
            f"{report.vocabulary_species} orthologues yourself; changing the case of symbols is not a mapping."
        )
    elif report.id_type != report.vocabulary_id_type:
        remedy = f"Pass `gene_key=` to name the `var` column that holds {_KIND_NAMES[vocabulary.id_type]}."
    else:
        remedy = (
            "Pass `gene_key=` if another `var` column holds the names, or a model whose vocabulary has these genes; "
            f"the least share accepted is {min_coverage:.0%}."
        )
    raise VocabularyMismatchError(
        f"{found} of the {report.n_vars} genes in {report.source} are in the vocabulary{share} (first: {names[0]!r}; the "
        f"vocabulary uses {_KIND_NAMES[vocabulary.id_type]} such as "
        f"{vocabulary.genes[0] if vocabulary.genes else ''!r}). {remedy}"
    )


_KIND_NAMES = {"symbol": "gene symbols", "ensembl": "Ensembl ids", "other": "names of its own"}
