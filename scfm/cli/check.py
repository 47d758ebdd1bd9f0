"""`scfm check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._messages import as_options
from scfm.cli._registry import command


@command(example="scfm check new.h5ad --model pbmc_model", options_of="scfm.pp.check")
def check(data: Path, /, *, model: Path, device: str = "auto", json: bool = False, **options: Any) -> int:
    """Check whether a model can use a data set; exit code 1 if it cannot.

    Parameters
    ----------
    data
        .h5ad or .zarr with raw counts.
    model
        Directory of the model.
    device
        Device that computes: "cpu", "cuda", "cuda:1", ... or "auto" for the GPU if there is one.
    json
        Print the result as one JSON object instead of words.
    """
    found = scfm.pp.check(data, scfm.load(model, device=device), **options)
    _files.tell({"ok": found.ok, "findings": _files.records(found.table)}, as_json=json, text=as_options(str(found)))
    return 0 if found.ok else 1
