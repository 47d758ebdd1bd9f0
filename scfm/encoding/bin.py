"""Bin encoding: each gene with the quantile bin of its count in its cell (scGPT)."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType, ModuleType

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.encoding.base import Encoding, Tokens, add_specials, cls_and_eos, csr_arrays, normalized
from scfm.encoding.genes import GeneMap
from scfm.encoding.hashing import hash_pairs, to_unit
from scfm.encoding.ragged import RaggedCounts, best_T, expressed, with_zeros

# What a hash is for, so that two numbers of one gene are not one number.
TIE, SAMPLE = 1, 2


class BinEncoding(Encoding):
    """Gives each gene the quantile bin, 1..n_bins - 1, of its count among the cell's non-zero counts; 0 for none.

    Tokens ascend by id, `cls` first.

    Notes
    -----
    Binning of scGPT (Cui et al. 2024). A tied value spans several bins, of which upstream draws one from a global
    generator, at inference too. Here the draw is a hash of (seed, token id) at inference, so that a cell always gets
    the same bins, spread over its ties as in training; in training it is a hash of (draw, cell, token id). Bins are
    those of the whole cell; a cell longer than the context then keeps its highest counts, ties by vocabulary order
    (in training: a random sample).

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
        return add_specials(cells.cu_seqlens, cells.token_T, bin_T.astype(np.float32), front=front, back=back)

    def _compiled_serves(self, block: sp.csr_matrix, genes: GeneMap) -> bool:
        return self.config.target_sum is None and not self.config.log1p

    def _encode_compiled(
        self, host: ModuleType, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        config = self.config
        return host.encode_bin(
            *csr_arrays(block),
            genes.token_ids,
            genes.has_duplicates,
            self._frame(host),
            n_tokens=len(self.vocabulary),
            quantiles=np.linspace(0, 1, (config.n_bins or 0) - 1),
            unit=None if draw is not None else self._tie_of_token,
            draw=draw or 0,
            zero_tokens=_known_tokens(genes) if config.include_zeros else None,
        )

    @cached_property
    def _tie_of_token(self) -> NDArray[np.float64]:
        """What chooses among the bins of a tie at inference, by token id."""
        return to_unit(hash_pairs(self.config.seed, TIE, np.arange(len(self.vocabulary))))

    def _binned_quantity(self, cells: RaggedCounts, depth_B: NDArray[np.float64]) -> NDArray[np.float64]:
        total_B = cells.totals_B() if self.config.depth_over == "vocabulary" else depth_B
        value_T = normalized(cells.count_T, cells.cell_T, total_B, self.config.target_sum)
        return np.log1p(value_T) if self.config.log1p else value_T

    def _hash(self, cells: RaggedCounts, draw: int | None, purpose: int) -> NDArray[np.uint64]:
        """64 random bits a token: of the gene alone at inference, of cell and gene in training."""
        if draw is None:
            return hash_pairs(self.config.seed, purpose, cells.token_T)
        return hash_pairs(draw, cells.cell_T * 4 + purpose, cells.token_T)

    def _fit_context(self, cells: RaggedCounts, draw: int | None) -> NDArray[np.int64] | NDArray[np.bool_]:
        """Places of the tokens that fit the context, ascending."""
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
        Number of bins, 0 for "not expressed" included.

    Returns
    -------
    Bins in 1..n_bins - 1, shape (T,), float64.

    Notes
    -----
    ``ceil(u (r - l) + l)``, where l and r count the edges up to, and below, a value.
    """
    if not len(value_T):
        return np.zeros(0)
    edges = quantile_edges(np.sort(value_T), n_edges=n_bins - 1)
    upto = np.searchsorted(edges, value_T, side="right")
    below = np.searchsorted(edges, value_T, side="left")
    return np.ceil(unit_T * (below - upto) + upto)


def quantile_edges(sorted_T: NDArray[np.float64], *, n_edges: int) -> NDArray[np.float64]:
    """Quantiles at ``linspace(0, 1, n_edges)``: bitwise what `numpy.quantile` gives with its default method.

    Written out because both backends, and every NumPy, must round alike.
    """
    place = np.linspace(0, 1, n_edges) * (len(sorted_T) - 1)
    low = np.floor(place).astype(np.intp)
    step = place - low
    a, b = sorted_T[low], sorted_T[np.minimum(low + 1, len(sorted_T) - 1)]
    return np.where(step >= 0.5, b - (b - a) * (1 - step), a + (b - a) * step)
