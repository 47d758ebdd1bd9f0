"""`scfm screen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli._effects import rank_genes
from scfm.cli._registry import command


@command(
    example="scfm screen b_cells.h5ad screen.csv --model pbmc_model",
    options_of="scfm.tl.screen",
    leave_out={"key_added"},
)
def screen(*paths: str, model: Path, device: str = "auto", json: bool = False, **options: Any) -> None:
    """Estimate the effect of deleting every gene of every cell, and verify the largest exactly.

    Parameters
    ----------
    paths
        One or many inputs with the raw counts of the cells to screen (.h5ad, .zarr, URLs, or a .txt file that lists them), and
        last the .csv or .parquet to write: one row per gene.
    model
        Directory of the model.
    device
        Device that computes: "cpu", "cuda", "cuda:1", ... or "auto" for the GPU if there is one.
    json
        Print the result as one JSON object instead of words.
    """
    rank_genes(scfm.tl.screen, paths, model=model, as_json=json, device=device, **options)
