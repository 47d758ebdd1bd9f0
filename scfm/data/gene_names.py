"""Choose the names of the genes of a data set: `var_names`, or a column of `var` with the kind of name that is needed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TypeVar

import pandas as pd

from scfm.data import columns
from scfm.vocab import IdType, Vocabulary, guess_id_type

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Columns with the other kind of name, most specific first: CELLxGENE (feature_name, feature_id), 10x files read by scanpy
# (gene_ids), and other common names.
_COLUMNS = {
    "symbol": ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "hgnc_symbol"),
    "ensembl": ("feature_id", "gene_ids", "ensembl_id", "ensembl_ids", "gene_id", "ensembl", "ensembl_gene_id"),
}


def choose_names(
    var: pd.DataFrame, *, gene_key: str | None = None, vocabulary: Vocabulary | None = None
) -> tuple[list[str | None], str]:
    """Return the names of the genes of `var`, and where they were found ("var_names" or 'var["column"]').

    Parameters
    ----------
    var
        `adata.var`.
    gene_key
        Column with the names; None to choose.
    vocabulary
        A column is used instead of `var_names` only if `var_names` are of another kind than the genes of the vocabulary, and
        more names of the column are in the vocabulary. None for `var_names`.
    """
    if gene_key is not None:
        return columns.gene_names(var, gene_key), f'var["{gene_key}"]'
    best, source = columns.as_names(var.index), "var_names"
    if vocabulary is None or vocabulary.id_type == "other" or guess_id_type(best) == vocabulary.id_type:
        return best, source
    n_best = int((vocabulary.find(best)[0] >= 0).sum())
    for column in _COLUMNS[vocabulary.id_type]:
        if column not in var:
            continue
        names = columns.gene_names(var, column)
        n_found = int((vocabulary.find(names)[0] >= 0).sum())
        if n_found > n_best:
            best, source, n_best = names, f'var["{column}"]', n_found
    if source != "var_names":
        logger.info("genes are named by %s (var_names are not %s ids)", source, vocabulary.id_type)
    return best, source


def names_key(var: pd.DataFrame) -> str:
    """Return a digest of all that can name the genes of `var`: tables with equal digests have equal names."""
    digest = hashlib.sha256("\n".join(map(str, var.index)).encode())
    for name in var.columns:
        if not pd.api.types.is_numeric_dtype(var[name]):
            digest.update("\n".join([str(name), *map(str, var[name])]).encode())
    return digest.hexdigest()


def shared_by_names(results: dict[str, T], var: pd.DataFrame, make: Callable[[], T]) -> T:
    """Return the result of `make` for the names of `var`; tables with equal names share one, which is kept in `results`."""
    key = names_key(var)
    if key not in results:
        results[key] = make()
    return results[key]


def names_of_kind(var: pd.DataFrame, kind: IdType) -> list[str | None] | None:
    """Return `var_names` or the first common column whose names are of a kind; None if there are none."""
    candidates = [columns.as_names(var.index)]
    candidates += [columns.gene_names(var, column) for column in _COLUMNS.get(kind, ()) if column in var]
    return next((names for names in candidates if guess_id_type(names) == kind), None)
