"""`scfm screen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli._command import command_of
from scfm.cli._effects import rank_genes


@command_of(scfm.tl.screen, leave_out={"key_added"})
def screen(data: Path, table: Path, /, *, model: Path, json: bool = False, **options: Any) -> None:
    """Estimate the effect of deleting every gene of every cell, and verify the largest exactly.

    Parameters
    ----------
    data
        .h5ad or .zarr with the raw counts of the cells to screen.
    table
        .csv or .parquet to write: a row a gene.
    model
        Directory of the model.
    json
        Print the result as one JSON object instead of words.
    """
    rank_genes(scfm.tl.screen, data, table, model=model, as_json=json, **options)
