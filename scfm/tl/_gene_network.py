"""`scfm.tl.gene_network`: edges between genes of a group of cells, tested against shuffled counts."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.tl._record import store_table


@document
def gene_network(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    genes: list[str] | None = None,
    kind: str = "attention",
    hidden_layer: int = -1,
    n_shuffles: int = 5,
    min_cells: int = 5,
    layer: str | None = None,
    gene_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Table of the edges between genes in a group of cells, tested against cells with shuffled counts.

    Parameters
    ----------
    {adata}
    {model}
    genes
        Genes of the network. None for the 50 genes that are expressed in most cells.
    kind
        "attention": attention of the target's token to the source's token, averaged over heads and multiplied by the number
        of tokens (1 is uniform attention). "deletion": 1 - cosine of the target's state before and after the source is
        deleted.
    hidden_layer
        Layer whose attention or states are used. -1 is the last.
    n_shuffles
        Number of shuffled copies of the cells for the null: the counts of each gene are permuted among the cells.
    min_cells
        Edges between genes that fewer cells express together are left out.
    {layer}
    {gene_key}
    {uns_key_added}
    seed
        Seed of the shuffles.
    {progress}

    Returns
    -------
    One row per edge, the most significant first: `source`, `target`, `n_cells`, `weight` (mean over cells), `null` (a
    description), `null_mean`, `null_std` (between cells), `z` (the difference in standard errors), `p_value` (Student's test,
    two-sided), `fdr` (Benjamini-Hochberg).

    Notes
    -----
    Only pairs of the chosen genes are computed, so memory grows with the square of their number, not of the length of a
    cell. An edge describes the model; it does not say that one gene regulates the other. The test treats cells as
    independent; if they come from few donors, the p-values are too small.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> b_cells = adata[adata.obs["bulk_labels"] == "CD19+ B"]
    >>> genes = ["CD74", "CD79A", "CD79B"]
    >>> edges = scfm.tl.gene_network(b_cells, model, genes=genes, n_shuffles=2, progress=False)
    >>> len(edges)
    6
    """
    model = opened(model)
    table = perturbation.gene_network(
        adata,
        model,
        genes=genes,
        kind=kind,
        hidden_layer=hidden_layer,
        n_shuffles=n_shuffles,
        min_cells=min_cells,
        layer=layer,
        gene_key=gene_key,
        seed=seed,
        progress=progress,
    )
    store_table(adata, model, key_added, table, kind=kind, hidden_layer=hidden_layer, n_shuffles=n_shuffles)
    return table
