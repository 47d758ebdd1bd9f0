"""Convert counts to ragged rows of tokens in NumPy, the first step of every encoding."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.encoding.genes import GeneMap


@dataclass(frozen=True)
class RaggedCounts:
    """Counts of cells, packed end to end. Tokens within a cell are distinct and in ascending order of their ids.

    Attributes
    ----------
    cell_T
        Cell of each token, shape (T,), int64, ascending.
    token_T
        Token id, shape (T,), int32.
    count_T
        Count, shape (T,), float64.
    n_cells
        Number of cells, including cells without tokens.
    """

    cell_T: NDArray[np.int64]
    token_T: NDArray[np.int32]
    count_T: NDArray[np.float64]
    n_cells: int

    @property
    def cu_seqlens(self) -> NDArray[np.int64]:
        return boundaries(np.bincount(self.cell_T, minlength=self.n_cells))

    def totals_B(self) -> NDArray[np.float64]:
        """Sum of each cell's counts, shape (B,), float64."""
        return np.bincount(self.cell_T, weights=self.count_T, minlength=self.n_cells).astype(np.float64, copy=False)

    def take(self, which_T: NDArray[np.bool_] | NDArray[np.int64]) -> RaggedCounts:
        """Keep some tokens: those of a mask, or those at indices, which must be grouped by cell."""
        return RaggedCounts(self.cell_T[which_T], self.token_T[which_T], self.count_T[which_T], self.n_cells)


def boundaries(lengths_B: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return cell boundaries for lengths, shape (B + 1,), int64."""
    cu_seqlens = np.zeros(len(lengths_B) + 1, dtype=np.int64)
    np.cumsum(lengths_B, out=cu_seqlens[1:])
    return cu_seqlens


def expressed(counts: sp.csr_matrix, genes: GeneMap) -> RaggedCounts:
    """Return the non-zero counts of genes in the vocabulary; several columns or entries of one gene are summed.

    Parameters
    ----------
    counts
        Raw counts, shape (B, n_vars), any numeric dtype. Indices may be in any order, and explicit zeros are allowed.
    genes
        Token of each column.
    """
    cell_T = np.repeat(np.arange(counts.shape[0], dtype=np.int64), np.diff(counts.indptr))
    token_T = genes.token_ids[counts.indices]
    known_T = (token_T >= 0) & (counts.data != 0)
    cell_T, token_T = cell_T[known_T], token_T[known_T]
    count_T = counts.data[known_T].astype(np.float64)
    place_T = cell_T * len(genes.vocabulary) + token_T
    step_T = np.diff(place_T)
    if (step_T < 0).any():
        order = np.argsort(place_T, kind="stable")
        place_T, cell_T, token_T, count_T = place_T[order], cell_T[order], token_T[order], count_T[order]
        step_T = np.diff(place_T)
    if (step_T == 0).any():
        firsts = np.flatnonzero(np.concatenate([[True], step_T != 0]))
        cell_T, token_T, count_T = cell_T[firsts], token_T[firsts], np.add.reduceat(count_T, firsts)
    return RaggedCounts(cell_T, token_T, count_T, counts.shape[0])


def with_zeros(expressed_genes: RaggedCounts, token_ids: NDArray[np.int32]) -> RaggedCounts:
    """Add tokens with count 0, so that every cell has all of `token_ids` (distinct, ascending)."""
    n_cells, n_genes = expressed_genes.n_cells, len(token_ids)
    counts = np.zeros((n_cells, n_genes))
    counts[expressed_genes.cell_T, np.searchsorted(token_ids, expressed_genes.token_T)] = expressed_genes.count_T
    return RaggedCounts(
        np.repeat(np.arange(n_cells, dtype=np.int64), n_genes), np.tile(token_ids, n_cells), counts.ravel(), n_cells
    )


def best_T(ragged: RaggedCounts, score_T: NDArray[np.float64], most: int | None) -> NDArray[np.int64]:
    """Sort the tokens of each cell by descending score, ties by token id, and keep the first `most` of each cell.

    Returns
    -------
    Indices of the kept tokens, cell by cell, shape (T',), int64.
    """
    # Token ids ascend within a cell, so a stable sort breaks ties by token id.
    order = np.lexsort((-score_T, ragged.cell_T))
    if most is None:
        return order
    place_T = np.arange(len(order)) - ragged.cu_seqlens[:-1][ragged.cell_T]
    return order[place_T < most]
