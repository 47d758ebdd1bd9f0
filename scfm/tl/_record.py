"""Records of model and settings of each result, in `adata.uns["scfm"]`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import anndata
import pandas as pd

from scfm.models.model import Model
from scfm.vocab import SYMBOL_COLUMNS

logger = logging.getLogger(__name__)


def record(adata: anndata.AnnData, model: Model, result: str, **settings: Any) -> None:
    """Write the model id, the version and the settings to `uns["scfm"][result]`, in a form that `write_h5ad` accepts."""
    records = records_of(adata.uns)
    records[result] = record_of(model, **settings)
    adata.uns["scfm"] = records


def records_of(uns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the records in `uns["scfm"]`; other content than a mapping is replaced, and a warning is logged."""
    records = uns.get("scfm", {})
    if isinstance(records, Mapping):
        return dict(records)
    logger.warning("`adata.uns['scfm']` held %r, which is replaced by the records of scfm.", records)
    return {}


def record_of(model: Model, **settings: Any) -> dict[str, Any]:
    """Return the record of a result: model id, version, and settings that are not None."""
    entry = {"model_id": model.id, "version": version("single-cell-fm")}
    return entry | {key: value for key, value in settings.items() if value is not None}


def add_symbols(table: pd.DataFrame, model: Model) -> None:
    """Insert a column of gene symbols next to each column (or index) of genes, if the model has Ensembl ids and their symbols.

    The symbol of genes that are perturbed together is joined by "+", as their names are.
    """
    vocabulary = model.encoding.vocabulary
    for number, (column, added) in enumerate(SYMBOL_COLUMNS.items()):
        if column not in table and column != table.index.name:
            continue
        names = table.get(column, table.index).astype(str).str.split("+")
        symbols = vocabulary.symbols([name for group in names for name in group])
        if symbols is None:
            return
        left = iter(symbols)
        joined = ["+".join(next(left) for _ in group) for group in names]
        table.insert(table.columns.get_loc(column) + 1 if column in table else number, added, joined)


def store_table(adata: Any, model: Model, key_added: str | None, table: pd.DataFrame, **settings: Any) -> None:
    """Write a copy of a table to `uns[key_added]`, and its record; do nothing if `key_added` is None."""
    if key_added is not None:
        adata.uns[key_added] = table.copy()
        record(adata, model, key_added, **settings)
