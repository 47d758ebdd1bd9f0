"""`scfm perturb`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._command import command_of

SHOWN_ROWS = 10


@command_of(scfm.tl.perturb)
def perturb(source: Path, target: Path, /, *, model: Path, json: bool = False, **options: Any) -> None:
    """Perturb genes in silico, one at a time, and measure how far each cell's embedding moves.

    Parameters
    ----------
    source
        .h5ad or .zarr with the raw counts of the cells to perturb.
    target
        .csv or .parquet to write: a row a gene, the largest shift first.
    model
        Directory of the model.
    json
        Print the result as one JSON object instead of words.
    """
    _files.require_suffix(target, (".csv", ".parquet"))
    effects = scfm.tl.perturb(_files.read(source), scfm.load(model), **options)
    _files.write_table(effects, target)
    top = effects.head(SHOWN_ROWS)
    facts = {"output": target, "n_genes": len(effects), "top": _files.records(top)}
    _files.tell(facts, as_json=json, text=f"{top.to_string(float_format='{:.3g}'.format)}\nwritten to {target}")
