"""`scfm.tl.gene_network`: edges between genes of a group of cells, tested against shuffled counts."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._config import require_seed
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import require_cells
from scfm.tl._record import add_symbols, store_table


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
    """Measure how strongly pairs of genes interact in the model, and test each pair against cells with shuffled counts.

    Parameters
    ----------
    adata
        AnnData with raw counts of the group of cells.
    {model}
    genes
        Genes of the network. None for the 50 genes that most cells express.
    kind
        "attention": attention of the target's token to the source's token, averaged over heads, times the number of tokens,
        so that 1 means uniform attention. "deletion": 1 - cosine similarity of the target's hidden vectors before and after
        the source is deleted.
    hidden_layer
        Index of the layer whose attention or hidden vectors are used; -1 for the last.
    n_shuffles
        Number of shuffled copies of the cells, at least 2. In a copy, the counts of each gene are permuted among the cells.
        Depths of `depth_key` are not permuted; without them, the permuted counts are summed.
    min_cells
        Minimum number of cells that express both genes of an edge. Other edges are omitted.
    {layer}
    {gene_key}
    {depth_key}
    {uns_key_added}
    {seed}
    {progress}

    Returns
    -------
    One row per edge, the largest `z` first:

    - `source`, `target`, `n_cells`, and `weight`, the mean over cells; if the model has Ensembl ids and their symbols, also
      `source_symbol` and `target_symbol`
    - `null`, a description of the null, and `null_mean` and `null_std` of the shuffled cells
    - `z`, the difference of the means in standard errors, `p_value` of Student's two-sided t-test, and `fdr`, the false
      discovery rate (Benjamini-Hochberg)

    Raises
    ------
    ValueError
        If `kind` is unknown, `n_shuffles` is below 2, or `kind` is "attention" and the model has linear attention.
    CountsError, VocabularyMismatchError
        If the matrix does not hold raw counts, or a gene is not in the vocabulary.

    Notes
    -----
    Only pairs of the chosen genes are computed, so memory grows with the square of their number, and not with the square of
    the number of tokens. An edge means that two genes affect each other in the model, and not that one regulates the other.
    Tests treat cells as independent; with cells of few donors, p-values are too small.

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
    require_seed(seed)
    require_cells(adata)
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
    add_symbols(table, model)
    store_table(adata, model, key_added, table, kind=kind, hidden_layer=hidden_layer, n_shuffles=n_shuffles)
    return table
