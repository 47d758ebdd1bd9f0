"""Bin encoding: one token per gene, whose value is the quantile bin of its count in the cell (scGPT)."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType, ModuleType

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.encoding.base import Encoding, Tokens, add_special_tokens, cls_and_eos, csr_arrays, normalized
from scfm.encoding.genes import GeneMap
from scfm.encoding.hashing import hash_pairs, to_unit
from scfm.encoding.ragged import RaggedCounts, best_T, expressed, with_zeros

# Purposes of a hash: the numbers of one gene for different purposes must be independent.
TIE, SAMPLE = 1, 2


class BinEncoding(Encoding):
    """Replaces counts by their quantile bin, 1..n_bins - 1, among the non-zero counts of the cell. Zeros have bin 0.

    Tokens are in ascending order of their ids, after `cls`.

    Notes
    -----
    Binning of scGPT (Cui et al. 2024). A value that occurs several times in a cell spans several bins. scGPT draws one of
    them from a global generator, at inference too. Here the choice is a hash of (seed, token id) at inference, so that a
    cell always gets the same bins, and a hash of (random number, cell, token id) in training. Bins are computed from the
    whole cell. A cell with more genes than the context then keeps those with the highest counts, ties by vocabulary order
    (in training, a random sample).

    Examples
    --------
    >>> import scfm
    >>> from scfm.encoding import BinEncoding, EncodingConfig, GeneMap
    >>> names = ["ACTB", "CD74", "GCG", "INS"]
    >>> vocabulary = scfm.Vocabulary.from_genes(names, special=("pad",))
    >>> encoding = BinEncoding(EncodingConfig(kind="bin", n_bins=5, add_cls=False), vocabulary)
    >>> cell = encoding.encode([[50, 6, 0, 1]], GeneMap.from_names(names, vocabulary))
    >>> [vocabulary.tokens[token] for token in cell.gene_ids_T], cell.values_T.tolist()
    (['ACTB', 'CD74', 'INS'], [4.0, 2.0, 1.0])
    """

    kind = "bin"
    # Pretraining and embedding of scGPT
    defaults = MappingProxyType(
        {
            "context_length": 1200,
            "add_cls": True,
            "add_eos": False,
            "depth_over": "matrix",
            "log1p": False,
            "n_bins": 51,
            "include_zeros": False,
        }
    )

    def _encode_numpy(
        self, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        config = self.config
        cells = expressed(block, genes)
        value_T = self._binned_quantity(cells, depth_B)
        unit_T = to_unit(self._hash(cells, draw, TIE))
        cu_seqlens = cells.cu_seqlens
        bin_T = np.empty(len(value_T))
        for cell in range(cells.n_cells):
            span = slice(cu_seqlens[cell], cu_seqlens[cell + 1])
            bin_T[span] = bin_values(value_T[span], unit_T[span], n_bins=config.n_bins or 0)
        if config.include_zeros:
            known = _known_tokens(genes)
            cells, bins = with_zeros(cells, known), with_zeros(cells_with(cells, bin_T), known)
            bin_T = bins.count_T
        kept_T = self._fit_context(cells, draw)
        cells, bin_T = cells.take(kept_T), bin_T[kept_T]
        front, back = cls_and_eos(self, cells.n_cells)
        return add_special_tokens(cells.cu_seqlens, cells.token_T, bin_T.astype(np.float32), front=front, back=back)

    def _is_compiled(self, block: sp.csr_matrix, genes: GeneMap) -> bool:
        return self.config.target_sum is None and not self.config.log1p

    def _encode_compiled(
        self, compiled: ModuleType, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        config = self.config
        return compiled.encode_bin(
            *csr_arrays(block),
            genes.token_ids,
            genes.has_duplicates,
            self._frame(compiled),
            n_tokens=len(self.vocabulary),
            quantiles=np.linspace(0, 1, (config.n_bins or 0) - 1),
            unit=None if draw is not None else self._tie_of_token,
            draw=draw or 0,
            zero_tokens=_known_tokens(genes) if config.include_zeros else None,
        )

    @cached_property
    def _tie_of_token(self) -> NDArray[np.float64]:
        """Numbers in [0, 1) that choose among the bins of a tie at inference, by token id."""
        return to_unit(hash_pairs(self.config.seed, TIE, np.arange(len(self.vocabulary))))

    def _binned_quantity(self, cells: RaggedCounts, depth_B: NDArray[np.float64]) -> NDArray[np.float64]:
        total_B = cells.totals_B() if self.config.depth_over == "vocabulary" else depth_B
        value_T = normalized(cells.count_T, cells.cell_T, total_B, self.config.target_sum)
        return np.log1p(value_T) if self.config.log1p else value_T

    def _hash(self, cells: RaggedCounts, draw: int | None, purpose: int) -> NDArray[np.uint64]:
        """Return 64 random bits per token; they depend on the gene at inference, on cell and gene in training."""
        if draw is None:
            return hash_pairs(self.config.seed, purpose, cells.token_T)
        return hash_pairs(draw, cells.cell_T * 4 + purpose, cells.token_T)

    def _fit_context(self, cells: RaggedCounts, draw: int | None) -> NDArray[np.int64] | NDArray[np.bool_]:
        """Return the indices of the tokens that fit the context, ascending."""
        most = self.config.max_genes
        if most is None or len(cells.cell_T) == 0 or np.diff(cells.cu_seqlens).max() <= most:
            return np.ones(len(cells.cell_T), dtype=bool)
        score_T = cells.count_T if draw is None else to_unit(self._hash(cells, draw, SAMPLE))
        return np.sort(best_T(cells, score_T, most))


def _known_tokens(genes: GeneMap) -> NDArray[np.int32]:
    return np.unique(genes.token_ids[genes.token_ids >= 0])


def cells_with(cells: RaggedCounts, value_T: NDArray[np.float64]) -> RaggedCounts:
    return RaggedCounts(cells.cell_T, cells.token_T, value_T, cells.n_cells)


def bin_values(value_T: NDArray[np.float64], unit_T: NDArray[np.float64], *, n_bins: int) -> NDArray[np.float64]:
    """Replace one cell's non-zero values by their quantile bins.

    Parameters
    ----------
    value_T
        Positive values of one cell, shape (T,), float64.
    unit_T
        Numbers in [0, 1) that choose among the bins of a tie, shape (T,), float64.
    n_bins
        Number of bins, including bin 0 for "not expressed".

    Returns
    -------
    Bins in 1..n_bins - 1, shape (T,), float64.

    Notes
    -----
    ``ceil(u (r - l) + l)``, where l is the number of edges up to a value, r that of edges below it, and u is `unit_T`.
    """
    if not len(value_T):
        return np.zeros(0)
    edges = quantile_edges(np.sort(value_T), n_edges=n_bins - 1)
    upto = np.searchsorted(edges, value_T, side="right")
    below = np.searchsorted(edges, value_T, side="left")
    return np.ceil(unit_T * (below - upto) + upto)


def quantile_edges(sorted_T: NDArray[np.float64], *, n_edges: int) -> NDArray[np.float64]:
    """Return the quantiles at ``linspace(0, 1, n_edges)``, bitwise equal to `numpy.quantile` with its default method.

    They are computed here because both backends, and every version of NumPy, must round in the same way.
    """
    position = np.linspace(0, 1, n_edges) * (len(sorted_T) - 1)
    low = np.floor(position).astype(np.intp)
    step = position - low
    a, b = sorted_T[low], sorted_T[np.minimum(low + 1, len(sorted_T) - 1)]
    return np.where(step >= 0.5, b - (b - a) * (1 - step), a + (b - a) * step)
