"""`scfm.pp.log_expression`: the log-normalized expression that linear methods use, by the tokens of a model."""

from __future__ import annotations

from typing import Any

from scipy import sparse

from scfm._docs import document
from scfm.data import CountSource
from scfm.data.counts import log_normalize
from scfm.data.matrices import sum_columns
from scfm.encoding import GeneMap
from scfm.pp._encode import encoding_of, open_counts


@document
def log_expression(
    adata: Any,
    model_or_encoding: Any,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000 with one column per token of the vocabulary.

    Each cell is scaled by its total over all genes of the matrix, or by the depth of `depth_key`. Genes that are not in the
    vocabulary are omitted.

    Parameters
    ----------
    adata
        AnnData with raw counts, the path of a file, or any other form that `scfm.pp.encode` accepts.
    model_or_encoding
        A model (or its path) or an encoding, whose vocabulary determines the columns.
    {layer}
    {gene_key}
    {depth_key}

    Returns
    -------
    CSR matrix, shape (n_obs, length of the vocabulary), float32. Columns of special tokens are zero.

    Raises
    ------
    CountsError
        If the matrix does not hold raw counts.
    VocabularyMismatchError
        If no gene is in the vocabulary, or several columns have the same gene and the encoding does not sum them.

    Examples
    --------
    >>> import scfm.datasets, scfm.encoding, scfm.pp
    >>> adata = scfm.datasets.pbmc()
    >>> scfm.pp.log_expression(adata, scfm.encoding.make_encoding("rank", adata=adata)).shape
    (700, 767)
    """
    encoding = encoding_of(model_or_encoding)
    counts = open_counts(adata, encoding, layer=layer, gene_key=gene_key, depth_key=depth_key)
    genes = GeneMap.of(counts, encoding.vocabulary, duplicates=encoding.config.duplicates, min_coverage=0)
    n_tokens = len(encoding.vocabulary)
    parts = [
        log_normalize(sum_columns(block, genes.token_ids, n_tokens), depth_B) for _, block, depth_B in counts.blocks()
    ]
    return sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, n_tokens), dtype="float32")


def log_normalized_counts(
    adata: Any, *, layer: str | None = None, gene_key: str | None = None, depth_key: str | None = None
) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000 by gene of the data, CSR float32; see `CountSource.log_normalized`."""
    return CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key).log_normalized()[0]
