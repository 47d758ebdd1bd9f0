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
    depth_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the edges between genes in a group of cells, and test them against cells with shuffled counts.

    Parameters
    ----------
    adata
        Raw counts of the group, n_obs cells by n_vars genes.
    {model}
    genes
        Genes of the network. None for the 50 that most cells express.
    kind
        "attention": attention of the target's token to the source's, mean of the heads, times the number of tokens (1 is
        attention at random). "deletion": 1 - cosine of the target's state before and after the source is deleted.
    hidden_layer
        Layer whose attention, or whose states, are used; -1 for the last.
    n_shuffles
        Number of shuffled copies of the cells for the null, at least 2: each gene's counts are shuffled among the cells. A
        depth from `depth_key` stays with its cell; otherwise the shuffled counts are summed.
    min_cells
        Edges between genes that fewer cells express together are left out.
    {layer}
    {gene_key}
    {depth_key}
    {uns_key_added}
    {seed}
    {progress}

    Returns
    -------
    One row per edge, the largest `z` first: `source`, `target`, `n_cells`, `weight` (mean over cells), `null` in words,
    `null_mean`, `null_std` (between cells), `z` (the difference in standard errors), `p_value` (Student's, two-sided), `fdr`
    (Benjamini-Hochberg).

    Raises
    ------
    ValueError
        If `kind` is unknown, `n_shuffles` is below 2, or `kind` is "attention" and the model has linear attention.
    CountsError, VocabularyMismatchError
        If the matrix holds no raw counts, or a gene is not in the vocabulary.

    Notes
    -----
    Only pairs of the chosen genes are computed: memory grows with their number squared, not with a cell's length squared.
    An edge says that two genes affect each other in the model, not that one regulates the other. Tests treat cells as
    independent; if they come from few donors, p-values are too small.

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
        depth_key=depth_key,
        seed=seed,
        progress=progress,
    )
    store_table(adata, model, key_added, table, kind=kind, hidden_layer=hidden_layer, n_shuffles=n_shuffles)
    return table
