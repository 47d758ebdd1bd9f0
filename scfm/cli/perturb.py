"""`scfm perturb`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import scfm
from scfm.cli._command import command_of
from scfm.cli._effects import rank_genes


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
    ranking = partial(scfm.tl.perturb, **options)
    rank_genes(ranking, source, target, model=model, as_json=json)
