"""`scfm.tl.attention`: how strongly chosen genes attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model


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
        Raw counts, n_obs cells by n_vars genes, of one cell or of the cells of one type.
    model
        From `scfm.fit` or `scfm.load`, with softmax attention.
    genes
        At least two, by the names of the vocabulary.
    hidden_layer
        Layer whose attention is used; -1 for the last.
    {layer}
    {gene_key}
    {depth_key}

    Returns
    -------
    One row per query gene and one column per key gene, in the order of `genes`: attention of the query to the key, times
    the number of tokens, so that 1 is attention at random. NaN on the diagonal, and for genes that no cell expresses
    together.

    Raises
    ------
    ValueError
        If fewer than two genes are given, one is given twice, or the model has linear attention.
    VocabularyMismatchError
        If a gene is not in the vocabulary.

    Notes
    -----
    Only the chosen pairs are computed, by `scfm.ops.attention_scores`, never a whole attention matrix. Attention says what a
    layer reads, not what its output depends on: `scfm.tl.gene_network` has a null, and ``kind="deletion"``.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> b_cells = adata[adata.obs["bulk_labels"] == "CD19+ B"]
    >>> scfm.tl.attention(b_cells, model, ["CD74", "CD79A", "HLA-DRA"]).shape
    (3, 3)
    """
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
