"""`scfm.pp.encode`: all cells of an AnnData to packed tokens."""

# Axes: B cells.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm._docs import document
from scfm.data.ahead import one_ahead
from scfm.data.batch import CellBatch
from scfm.data.counts import log_normalize
from scfm.data.matrices import require_adata, sum_columns
from scfm.data.source import BLOCK_ROWS, CountSource
from scfm.encoding.base import Backend, Encoding
from scfm.encoding.genes import GeneMap
from scfm.errors import EmptyCellError
from scfm.families.loading import opened

BLOCK_CELLS = 2048  # that are encoded and given to a network at once


@document
def encode(
    adata: Any,
    model_or_encoding: Any,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    empty: Literal["error", "keep"] = "error",
    rng: np.random.Generator | None = None,
    backend: Backend = "auto",
) -> CellBatch:
    """Convert every cell to tokens.

    Parameters
    ----------
    adata
        Raw counts of n_obs cells by n_vars genes: an AnnData (in memory, backed, lazy, or a view), the path of a file, or
        any other form that `scfm.data.CountSource.of` accepts. It is not changed.
    model_or_encoding
        An encoding, or a model (or its path) whose encoding is used.
    {layer}
    {gene_key}
    {depth_key}
    empty
        What to do with cells that express no gene of the vocabulary: "error" to raise, or "keep" to return them without
        gene tokens.
    rng
        Random generator for training. The bin encoding uses it to break ties, and to choose genes of cells with more genes
        than the context length. None for deterministic tokens.
    backend
        "auto", "compiled" or "numpy"; their results are bitwise identical.

    Returns
    -------
    A `CellBatch` of n_obs cells in their order, with `gene_ids_T`, `values_T`, `cu_seqlens` (int64), `cell_index_B` and
    `depth_B`.

    Raises
    ------
    CountsError
        If the matrix does not hold raw counts.
    VocabularyMismatchError
        If the genes do not match the vocabulary.
    EmptyCellError
        If a cell expresses no gene of the vocabulary and `empty` is "error".
    ValueError
        If `empty` or `backend` is unknown.
    TypeError
        If `adata` or `model_or_encoding` is of another type.
    OSError
        If `adata` is a file that is missing or damaged.

    Examples
    --------
    >>> import scfm.datasets, scfm.encoding, scfm.pp
    >>> adata = scfm.datasets.pbmc()
    >>> cells = scfm.pp.encode(adata, scfm.encoding.make_encoding("rank", adata=adata))
    >>> cells.n_cells, cells.n_tokens
    (700, 174400)
    """
    if empty not in ("error", "keep"):
        raise ValueError(f"`empty` is {empty!r}; it must be 'error' or 'keep'.")
    encoding = encoding_of(model_or_encoding)
    counts = open_counts(adata, encoding, layer=layer, gene_key=gene_key, depth_key=depth_key)
    genes = gene_map(counts, encoding)
    parts, empty_B = [], np.zeros(counts.n_obs, dtype=bool)
    for first, block, depth_B in counts.blocks(BLOCK_ROWS):
        empty_B[first : first + block.shape[0]] = empty_cells(block, genes, encoding)
        parts.append(encoding.encode(block, genes, depth_B=depth_B, rng=rng, backend=backend))
    if empty == "error":
        refuse_empty(empty_B, counts)
    if len(parts) == 1:
        cells = parts[0]
    else:
        cells = CellBatch.concat(parts) if parts else encoding.encode(np.zeros((0, counts.n_vars)), genes)
    return cells.replace(cu_seqlens=cells.cu_seqlens.long(), cell_index_B=torch.arange(cells.n_cells))


@dataclass(frozen=True, eq=False)
class EncodedBlock:
    """Cells of a block of rows, as tokens and as log-expression; both are made when they are first used.

    Attributes
    ----------
    encoding, genes
        The encoding of a model, and the token of each column.
    first
        Row of the first cell.
    block, depth_B
        Checked counts and depths of the cells.
    """

    encoding: Encoding
    genes: GeneMap
    first: int
    block: sparse.csr_matrix
    depth_B: NDArray[np.float64]

    @cached_property
    def cells(self) -> CellBatch:
        return self.encoding.encode(self.block, self.genes, depth_B=self.depth_B)

    @cached_property
    def expression_BV(self) -> sparse.csr_matrix:
        """log1p of counts per 10,000 by token, as `scfm.pp.log_expression` returns it."""
        by_token = sum_columns(self.block, self.genes.token_ids, len(self.encoding.vocabulary))
        return log_normalize(by_token, self.depth_B)

    def made(self, *, expression: bool) -> EncodedBlock:
        """Return the block after its tokens, and its log-expression if wanted, were made."""
        _ = self.cells, expression and self.expression_BV
        return self


@contextmanager
def encoded_blocks(
    adata: Any, encoding: Encoding, *, expression: bool = False, **where: str | None
) -> Iterator[Iterator[EncodedBlock]]:
    """Iterate over all cells in blocks, so that memory does not grow with the cells; the next block is made in a thread.

    All cells are checked before the first block is returned, as `encode` does. `expression` makes log-expression ahead too.
    """
    counts = open_counts(adata, encoding, **where)
    genes = gene_map(counts, encoding)
    refuse_empty(
        np.concatenate([np.zeros(0, bool), *(empty_cells(block, genes, encoding) for _, block, _ in counts.blocks())]),
        counts,
    )
    made = (
        EncodedBlock(encoding, genes, first, block, depth_B).made(expression=expression)
        for first, block, depth_B in counts.blocks(BLOCK_CELLS)
    )
    with one_ahead(made) as blocks:
        yield blocks


def require_cells(adata: Any) -> None:
    """Raise `EmptyCellError` if there are no cells, `TypeError` if `adata` is not an AnnData."""
    require_adata(adata)
    if not adata.n_obs:
        raise EmptyCellError(f"The data hold no cells ({adata.n_obs} x {adata.n_vars}). Was every cell filtered out?")


def encoding_of(model_or_encoding: Any) -> Encoding:
    """Return the encoding of a model or of the path of one, or an encoding as it is."""
    if isinstance(model_or_encoding, (str, Path)):
        return opened(model_or_encoding).encoding
    encoding = getattr(model_or_encoding, "encoding", model_or_encoding)
    if not isinstance(encoding, Encoding):
        raise TypeError(
            f"`model_or_encoding` is a {type(model_or_encoding).__name__}; pass a model, which `scfm.fit` and "
            "`scfm.load` return, its path, or an encoding from `scfm.encoding.make_encoding`."
        )
    return encoding


def open_counts(adata: Any, encoding: Encoding, **where: str | None) -> CountSource:
    """Open the counts of cells for an encoding, with their depths from the column that it was learned with."""
    return CountSource.of(adata, **where, usual_depth_key=encoding.config.depth_key)


def gene_map(counts: CountSource, encoding: Encoding) -> GeneMap:
    """Map the genes of `counts` to the tokens of `encoding`."""
    return GeneMap.of(counts, encoding.vocabulary, duplicates=encoding.config.duplicates)


def empty_cells(block: sparse.csr_matrix, genes: GeneMap, encoding: Encoding) -> NDArray[np.bool_]:
    """Which cells of a checked block express no gene that the encoding can encode, shape (B,)."""
    return n_encodable(block, genes, encoding) == 0


def n_encodable(block: sparse.csr_matrix, genes: GeneMap, encoding: Encoding) -> NDArray[np.integer]:
    """How many genes that the encoding can encode each cell of a checked block expresses, shape (B,)."""
    counted_N = encoding.encodes(genes)[block.indices]
    sums_N = np.zeros(len(counted_N) + 1, dtype=np.int64 if len(counted_N) > np.iinfo(np.int32).max else np.int32)
    np.cumsum(counted_N, out=sums_N[1:])
    return np.diff(sums_N[block.indptr])


def refuse_empty(empty_B: NDArray[np.bool_], counts: CountSource, first: int = 0) -> None:
    """Raise `EmptyCellError` if one of the cells from row `first` on is empty."""
    if empty_B.any():
        rows = first + np.flatnonzero(empty_B)
        shown = ", ".join(repr(str(name)) for name in counts.obs_names[rows[:5]])
        raise EmptyCellError(
            f"{len(rows)} of {len(empty_B)} cells express no gene of the vocabulary: {shown}. Filter them out: "
            "`scanpy.pp.filter_cells(adata, min_genes=1)`, after leaving out other genes if they express some."
        )
