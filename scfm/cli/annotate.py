"""`scfm annotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm._files import require_writable
from scfm.cli import _files
from scfm.cli._registry import command


@command(
    example="scfm annotate new.h5ad labeled.h5ad --model pbmc_model", options_of="scfm.tl.annotate", leave_out={"copy"}
)
def annotate(
    data: Path, output: Path, /, *, model: Path, device: str = "auto", json: bool = False, **options: Any
) -> None:
    """Predict the label of every cell.

    Parameters
    ----------
    data
        .h5ad or .zarr with raw counts.
    output
        .h5ad or .zarr to write: the input with labels, confidences and probabilities.
    model
        Directory of a model that was fitted with labels.
    device
        Device that computes: "cpu", "cuda", "cuda:1", ... or "auto" for the GPU if there is one.
    json
        Print the result as one JSON object instead of words.
    """
    require_writable(output, (".h5ad", ".zarr"), inputs=[data])
    adata = _files.read(data)
    scfm.tl.annotate(adata, scfm.load(model, device=device), **options)
    _files.write(adata, output)
    counts = adata.obs[f"{options.get('key_added', 'scfm')}_label"].value_counts()
    facts = {"output": output, "n_cells": adata.n_obs, "labels": {str(name): int(n) for name, n in counts.items()}}
    _files.tell(facts, as_json=json, text=f"{counts.to_string()}\nwritten to {output}")
