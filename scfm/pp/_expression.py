"""`scfm.pp.log_expression`: what linear methods read of a cell, by the tokens of a model."""

# Axes: B cells, G genes of the matrix, V tokens of the vocabulary.

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from scfm import baselines
from scfm._docs import document
from scfm.data import CountMatrix
from scfm.encoding import GeneMap
from scfm.pp._encode import encoding_of


@document
def log_expression(
    adata: Any, model_or_encoding: Any, *, layer: str | None = None, gene_key: str | None = None
) -> sparse.csr_matrix:
    """Matrix of log1p counts per 10,000 by token id, shape (n_obs, length of the vocabulary), CSR float32.

    Totals are over all genes of the matrix. Genes that are not in the vocabulary are left out.

    Parameters
    ----------
    adata
        Raw counts.
    model_or_encoding
        Model or encoding whose vocabulary gives the columns.
    {layer}
    {gene_key}

    Examples
    --------
    >>> import scfm.datasets, scfm.encoding, scfm.pp
    >>> adata = scfm.datasets.pbmc()
    >>> scfm.pp.log_expression(adata, scfm.encoding.make_encoding("rank", adata=adata)).shape
    (700, 767)
    """
    encoding = encoding_of(model_or_encoding)
    genes = GeneMap.from_var(
        adata.var, encoding.vocabulary, gene_key=gene_key, duplicates=encoding.config.duplicates, min_coverage=0
    )
    expression_BG = log_normalized_counts(adata, layer=layer).tocoo()
    token_N = genes.token_ids[expression_BG.col]
    known_N = token_N >= 0
    return sparse.csr_matrix(
        (expression_BG.data[known_N], (expression_BG.row[known_N], token_N[known_N])),
        shape=(adata.n_obs, len(encoding.vocabulary)),
    )


def log_normalized_counts(adata: Any, *, layer: str | None = None) -> sparse.csr_matrix:
    """log1p of counts per 10,000 by column of the matrix, shape (n_obs, n_vars), CSR float32."""
    blocks, depths = zip(
        *((block, depth_B) for _, block, depth_B in CountMatrix.from_adata(adata, layer=layer).blocks())
    )
    return baselines.log_normalize(sparse.vstack(blocks, format="csr"), np.concatenate(depths))
