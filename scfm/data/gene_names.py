"""Which names the genes of a data set have: `var_names`, or the column of `var` that holds the kind that is wanted."""

from __future__ import annotations

import logging

import pandas as pd

from scfm.data import columns
from scfm.vocab import IdType, Vocabulary, guess_id_type

logger = logging.getLogger(__name__)

# Where data sets keep the other kind of name, most specific first: cellxgene (feature_name, feature_id), 10x through
# scanpy (gene_ids), and common hand-made names.
_COLUMNS = {
    "symbol": ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "hgnc_symbol"),
    "ensembl": ("feature_id", "gene_ids", "ensembl_id", "ensembl_ids", "gene_id", "ensembl", "ensembl_gene_id"),
}


def choose_names(
    var: pd.DataFrame, *, gene_key: str | None = None, vocabulary: Vocabulary | None = None
) -> tuple[list[str | None], str]:
    """Find the names of the genes of `var`, and say where they came from: "var_names" or 'var["column"]'.

    Parameters
    ----------
    var
        `adata.var`.
    gene_key
        Column to take; None to choose.
    vocabulary
        A column is taken in place of `var_names` only if these are of another kind than the genes of the vocabulary, and
        more of the column's names are found in it; None to take `var_names`.
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


def names_of_kind(var: pd.DataFrame, kind: IdType) -> list[str | None] | None:
    """Names of the genes of `var` that are of a kind: `var_names`, or the first known column that holds them; None without."""
    candidates = [columns.as_names(var.index)]
    candidates += [columns.gene_names(var, column) for column in _COLUMNS.get(kind, ()) if column in var]
    return next((names for names in candidates if guess_id_type(names) == kind), None)
