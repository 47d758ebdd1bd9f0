"""`scfm screen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._command import command_of
from scfm.cli.perturb import SHOWN_ROWS


@command_of(scfm.tl.screen, leave_out={"key_added"})
def screen(source: Path, target: Path, /, *, model: Path, json: bool = False, **options: Any) -> None:
    """Estimate the effect of deleting every gene of every cell, and verify the largest exactly.

    Parameters
    ----------
    source
        .h5ad or .zarr with the raw counts of the cells to screen.
    target
        .csv or .parquet to write: a row a gene.
    model
        Directory of the model.
    json
        Print the result as one JSON object instead of words.
    """
    _files.require_suffix(target, (".csv", ".parquet"))
    effects = scfm.tl.screen(_files.read(source), scfm.load(model), **options)
    _files.write_table(effects, target)
    top = effects.head(SHOWN_ROWS)
    facts = {"output": target, "n_genes": len(effects), "top": _files.records(top)}
    _files.tell(facts, as_json=json, text=f"{top.to_string(float_format='{:.3g}'.format)}\nwritten to {target}")
