"""`scfm embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command


@command(
    example="scfm embed donor1.h5ad donor2.h5ad embedded.h5ad --model pbmc_model", options_of="scfm.tl.embed_files"
)
def embed(*paths: str, model: Path, device: str = "auto", json: bool = False, **options: Any) -> None:
    """Embed every cell of one or many files; a run that was stopped resumes.

    Parameters
    ----------
    paths
        One or many inputs with raw counts (.h5ad, .zarr, URLs, or a .txt file that lists them), and last the output, whose suffix names its format: .h5ad or
        .zarr (the input with the embedding added; of several inputs obs and embedding), .parquet, .csv or .npy.
    model
        Directory of the model.
    device
        Device that computes: "cpu", "cuda", "cuda:1", ... or "auto" for the GPU if there is one.
    json
        Print the result as one JSON object instead of words.
    """
    sources, target = _files.inputs_and_output(paths)
    n_cells = scfm.tl.embed_files(sources, target, scfm.load(model, device=device), **options)
    _files.tell({"output": target, "n_cells": n_cells}, as_json=json, text=f"{n_cells:,} cells written to {target}")
