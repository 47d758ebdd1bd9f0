"""Where results stand in an AnnData, and what is remembered of how they came there."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import anndata
import pandas as pd

from scfm.models.model import Model


def record(adata: anndata.AnnData, model: Model, result: str, **settings: Any) -> None:
    """Note under `uns["scfm"][result]` the model's id, the version and the settings; survives `write_h5ad`."""
    records = dict(adata.uns.get("scfm", {}))
    records[result] = record_of(model, **settings)
    adata.uns["scfm"] = records


def record_of(model: Model, **settings: Any) -> dict[str, Any]:
    """What is remembered of a result: the model's id, the version and the settings that are not None."""
    entry = {"model_id": model.id, "version": version("single-cell-fm")}
    return entry | {key: value for key, value in settings.items() if value is not None}


def store_table(
    adata: anndata.AnnData, model: Model, key_added: str | None, table: pd.DataFrame, **settings: Any
) -> None:
    """Put a copy of a table into `uns[key_added]` with a record of how it was made; nothing where `key_added` is None."""
    if key_added is not None:
        adata.uns[key_added] = table.copy()
        record(adata, model, key_added, **settings)
