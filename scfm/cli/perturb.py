"""`scfm perturb`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli._command import command_of
from scfm.cli._effects import rank_genes


@command_of(scfm.tl.perturb, leave_out={"key_added"})
def perturb(
    data: Path,
    table: Path,
    /,
    *,
    model: Path,
    genes: list[str] | None = None,
    null_genes: list[str] | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Perturb genes in silico, one at a time, and measure how far each cell's embedding moves.

    Parameters
    ----------
    data
        .h5ad or .zarr with the raw counts of the cells to perturb.
    table
        .csv or .parquet to write: a row a gene, the largest shift first.
    model
        Directory of the model.
    genes
        Genes to perturb one at a time, or by --combine N in groups of N; without them every gene that a cell expresses.
    null_genes
        Genes to perturb in the same way as the null of the tests; without them each is tested against all others.
    json
        Print the result as one JSON object instead of words.
    """
    rank_genes(scfm.tl.perturb, data, table, model=model, as_json=json, genes=genes, null_genes=null_genes, **options)
