"""`scfm.tl.attention`: attention between chosen genes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import require_cells


@document
def attention(
    adata: anndata.AnnData,
    model: Model | str | Path,
    genes: Sequence[str],
    *,
    hidden_layer: int = -1,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
) -> pd.DataFrame:
    """Attention between chosen genes, averaged over heads and over the cells that express both.

    Parameters
    ----------
    adata
        AnnData with raw counts, of one cell or of the cells of one type.
    model
        A model with softmax attention, or its path.
    genes
        At least two genes, with their names in the vocabulary.
    hidden_layer
        Index of the layer whose attention is used; -1 for the last.
    {layer}
    {gene_key}
    {depth_key}

    Returns
    -------
    One row per query gene and one column per key gene, in the order of `genes`. Values are the attention of the query to the
    key times the number of tokens, so 1 means uniform attention. They are NaN on the diagonal, and for pairs of genes that no
    cell expresses together.

    Raises
    ------
    ValueError
        If fewer than two genes are given, one is given twice, or the model has linear attention.
    VocabularyMismatchError
        If a gene is not in the vocabulary.

    Notes
    -----
    Only the chosen pairs are computed (`scfm.ops.attention_scores`), not a complete attention matrix. A large attention does
    not mean that the output of the model depends on the key gene. `scfm.tl.gene_network` tests attention against shuffled
    counts, and its ``kind="deletion"`` measures the effect of deleting a gene.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> b_cells = adata[adata.obs["bulk_labels"] == "CD19+ B"]
    >>> scfm.tl.attention(b_cells, model, ["CD74", "CD79A", "HLA-DRA"]).shape
    (3, 3)
    """
    require_cells(adata)
    model = opened(model)
    return perturbation.attention(
        adata,
        model,
        genes,
        hidden_layer=hidden_layer,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
    )
