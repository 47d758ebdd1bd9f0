"""`scfm check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._command import as_options, command_of


@command_of(scfm.pp.check)
def check(data: Path, /, *, model: Path, json: bool = False, **options: Any) -> int:
    """Say what a model would make of a data set; exit code 1 when something stands in the way.

    Parameters
    ----------
    data
        .h5ad or .zarr with raw counts.
    model
        Directory of the model.
    json
        Print the result as one JSON object instead of words.
    """
    found = scfm.pp.check(_files.read(data), scfm.load(model), **options)
    _files.tell({"ok": found.ok, "findings": _files.records(found.table)}, as_json=json, text=as_options(str(found)))
    return 0 if found.ok else 1
