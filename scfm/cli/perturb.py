"""`scfm perturb`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._effects import rank_genes
from scfm.cli._registry import command


@command(
    example="scfm perturb b_cells.h5ad effects.csv --model pbmc_model --genes CD74 CST3",
    options_of="scfm.tl.perturb",
    leave_out={"key_added"},
)
def perturb(
    *paths: str,
    model: Path,
    genes: list[str] | None = None,
    genes_file: Path | None = None,
    null_genes: list[str] | None = None,
    device: str = "auto",
    json: bool = False,
    **options: Any,
) -> None:
    """Perturb genes in silico, one at a time, and measure how far each cell's embedding moves.

    Parameters
    ----------
    paths
        One or many inputs with the raw counts of the cells to perturb (.h5ad, .zarr, URLs, or a .txt file that lists them), and
        last the .csv or .parquet to write: one row per gene, the largest shift first.
    model
        Directory of the model.
    genes
        Genes to perturb one at a time, or with --combine N in groups of N, separated by spaces or commas. By default, every
        gene that a cell expresses.
    genes_file
        Text file with one gene per line, in place of --genes.
    null_genes
        Genes that are perturbed in the same way, and whose effects are the null distribution of the tests. By default, about
        100 genes that are expressed in a similar number of cells, if --genes has fewer than 100 genes; otherwise all others.
    device
        Device that computes: "cpu", "cuda", "cuda:1", ... or "auto" for the GPU if there is one.
    json
        Print the result as one JSON object instead of words.
    """
    if genes_file is not None:
        if genes is not None:
            raise ValueError("`genes` and `genes_file` both name genes; give one of them.")
        genes = _files.read_names(genes_file)
    genes = None if genes is None else [name for entry in genes for name in entry.split(",") if name]
    options |= {"genes": genes, "null_genes": null_genes}
    rank_genes(scfm.tl.perturb, paths, model=model, as_json=json, device=device, **options)
