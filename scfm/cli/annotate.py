"""`scfm annotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command


@command(
    example="scfm annotate donor1.h5ad donor2.h5ad labeled.h5ad --model pbmc_model",
    options_of="scfm.tl.annotate_files",
)
def annotate(*paths: str, model: Path, device: str = "auto", json: bool = False, **options: Any) -> None:
    """Predict the label of every cell of one or many files; a run that was stopped resumes.

    Parameters
    ----------
    paths
        One or many inputs with raw counts (.h5ad, .zarr, URLs, or a .txt file that lists them), and last the output, whose suffix names its format: .h5ad or
        .zarr (the input with labels, confidences and probabilities; of several inputs obs and these), .parquet or .csv.
    model
        Directory of a model that was fitted with labels.
    device
        Device that computes: "cpu", "cuda", "cuda:1", ... or "auto" for the GPU if there is one.
    json
        Print the result as one JSON object instead of words.
    """
    sources, target = _files.inputs_and_output(paths)
    counts = scfm.tl.annotate_files(sources, target, scfm.load(model, device=device), **options)
    labels = {str(name): int(n) for name, n in counts.items()}
    facts = {"output": target, "n_cells": sum(labels.values()), "labels": labels}
    _files.tell(facts, as_json=json, text=f"{counts.to_string()}\nwritten to {target}")
