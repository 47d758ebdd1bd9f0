"""`scfm embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._command import command_of


@command_of(scfm.tl.embed, leave_out={"copy"})
def embed(source: Path, target: Path, /, *, model: Path, json: bool = False, **options: Any) -> None:
    """Embed every cell.

    Parameters
    ----------
    source
        .h5ad or .zarr with raw counts.
    target
        .h5ad or .zarr to write.
    model
        Directory of the model.
    json
        Print the result as one JSON object instead of words.
    """
    _files.require_suffix(target, (".h5ad", ".zarr"))
    adata = _files.read(source)
    scfm.tl.embed(adata, scfm.load(model), **options)
    _files.write(adata, target)
    key = options.get("key_added", "X_scfm")
    facts = {"output": target, "n_cells": adata.n_obs, "key": key, "width": adata.obsm[key].shape[1]}
    text = f"{adata.n_obs:,} cells, width {facts['width']}, in obsm[{key!r}] of {target}"
    _files.tell(facts, as_json=json, text=text)
