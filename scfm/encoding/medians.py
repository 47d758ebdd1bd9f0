"""Medians of normalized counts of each gene, and their dispersion, in one pass over the cells and in bounded memory."""

# Axes: T packed tokens, V tokens of the vocabulary, N histogram bins.

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.encoding.config import EncodingConfig
from scfm.encoding.genes import GeneMap
from scfm.encoding.ragged import boundaries, expressed

MAX_EXACT_VALUES = 1 << 24  # values that are kept and sorted: 16.8 million, about 10,000 cells, 200 MB
# Bins of the histogram: 64 per factor of two, from 1/256 to 16,384 counts per 10,000. A bin is at most 1/64 of its lower
# edge wide, so its middle differs from any value in it by less than 0.8 %.
_OCTAVES, _BINS_PER_OCTAVE, _LOWEST = 22, 64, -8
N_BINS = _OCTAVES * _BINS_PER_OCTAVE
MAX_RELATIVE_ERROR = 0.5 / _BINS_PER_OCTAVE
TARGET_SUM = 1e4


class GeneMedians:
    """Medians of each gene over the cells that express it, of counts normalized to `target_sum`.

    The first 16.8 million values are kept, so that medians of small data are exact. With more values, a histogram of each gene
    on a logarithmic scale (at most 5.6 kB per gene) replaces them, and a median is the middle of the bin that holds it. Its
    relative error is below 0.8 % for medians between 1/256 and 16,384 counts per 10,000. t-digest and similar sketches need
    more memory per gene for the same error, and sort each block.

    If the settings limit the number of genes (`n_dispersed_genes`), only the genes with the largest dispersion get a median:
    the variance of normalized counts over all cells, divided by their mean.

    Parameters
    ----------
    n_tokens
        Length of the vocabulary V.
    config
        Settings of the encoding: the target sum, and what the depth of a cell is summed over.

    Examples
    --------
    >>> import scipy.sparse as sp, numpy as np
    >>> from scfm.encoding import EncodingConfig, GeneMap, Vocabulary
    >>> vocabulary = Vocabulary.from_genes(["A", "B"], special=["pad", "mask"])
    >>> medians = GeneMedians(4, EncodingConfig(kind="rank"))
    >>> genes = GeneMap.from_names(["A", "B"], vocabulary)
    >>> medians.add(sp.csr_matrix([[1.0, 1.0], [4.0, 0.0]]), genes, np.array([2.0, 4.0]))
    >>> medians.result().tolist()
    [nan, nan, 7500.0, 5000.0]
    """

    def __init__(self, n_tokens: int, config: EncodingConfig) -> None:
        self._n_tokens, self._over_vocabulary = n_tokens, config.depth_over == "vocabulary"
        self._target_sum = config.target_sum or TARGET_SUM
        self._tokens: list[NDArray[np.int32]] = []
        self._values: list[NDArray[np.float64]] = []
        self._n_kept = self._n_cells = 0
        self._n_dispersed = config.n_dispersed_genes
        self._sum_V, self._squares_V = np.zeros(n_tokens), np.zeros(n_tokens)
        self._counts_VN: NDArray[np.uint32] | None = None

    def add(self, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64]) -> None:
        """Add the cells of a block of counts with their depths."""
        cells = expressed(block, genes)
        total_B = cells.totals_B() if self._over_vocabulary else depth_B
        value_T = cells.count_T / total_B[cells.cell_T] * self._target_sum
        if self._n_dispersed is not None:
            self._n_cells += len(depth_B)
            self._sum_V += np.bincount(cells.token_T, value_T, self._n_tokens)
            self._squares_V += np.bincount(cells.token_T, value_T**2, self._n_tokens)
        if self._counts_VN is None:
            self._tokens.append(cells.token_T)
            self._values.append(value_T)
            self._n_kept += len(value_T)
            if self._n_kept > MAX_EXACT_VALUES:
                self._start_histogram()
        else:
            self._count(cells.token_T, value_T)

    def merge(self, other: GeneMedians) -> None:
        """Add the cells of another object; the result is the same as if all cells had been added to one object."""
        self._n_kept += other._n_kept
        if self._counts_VN is None and other._counts_VN is None and self._n_kept <= MAX_EXACT_VALUES:
            self._tokens, self._values = [*self._tokens, *other._tokens], [*self._values, *other._values]
            return
        if self._counts_VN is None:
            self._start_histogram()
        assert self._counts_VN is not None
        if other._counts_VN is not None:
            self._counts_VN += other._counts_VN
        for token_T, value_T in zip(other._tokens, other._values):
            self._count(token_T, value_T)

    def result(self) -> NDArray[np.float64]:
        """Return the median of each token, shape (V,), float64; NaN for tokens that do not occur or are not offered."""
        if self._counts_VN is None:
            medians = nonzero_medians(
                np.concatenate([np.zeros(0, np.int32), *self._tokens]),
                np.concatenate([np.zeros(0), *self._values]),
                n_tokens=self._n_tokens,
            )
        else:
            medians = self._histogram_medians(self._counts_VN)
        if self._n_dispersed is not None:
            medians[np.argsort(-self._dispersion_V(), kind="stable")[self._n_dispersed :]] = np.nan
        return medians

    def _dispersion_V(self) -> NDArray[np.float64]:
        mean_V = self._sum_V / max(self._n_cells, 1)
        variance_V = self._squares_V / max(self._n_cells, 1) - mean_V**2
        return np.divide(variance_V, mean_V, out=np.zeros_like(mean_V), where=mean_V > 0)

    def _histogram_medians(self, counts_VN: NDArray[np.uint32]) -> NDArray[np.float64]:
        medians = np.full(self._n_tokens, np.nan)
        for token, counts_N in enumerate(counts_VN):
            ends_N = np.cumsum(counts_N, dtype=np.int64)
            if total := int(ends_N[-1]):
                low, high = np.searchsorted(ends_N, [(total - 1) // 2, total // 2], side="right")
                medians[token] = (_middle(low) + _middle(high)) / 2 * self._target_sum / TARGET_SUM
        return medians

    def _start_histogram(self) -> None:
        self._counts_VN = np.zeros((self._n_tokens, N_BINS), dtype=np.uint32)
        for token_T, value_T in zip(self._tokens, self._values):
            self._count(token_T, value_T)
        self._tokens, self._values = [], []

    def _count(self, token_T: NDArray[np.int32], value_T: NDArray[np.float64]) -> None:
        assert self._counts_VN is not None
        fraction_T, exponent_T = np.frexp(value_T * (TARGET_SUM / self._target_sum))  # value = fraction * 2^exponent
        # A fraction is in [0.5, 1), so value = (2 * fraction) * 2^(exponent - 1).
        bin_T = (exponent_T - 1 - _LOWEST) * _BINS_PER_OCTAVE + ((2 * fraction_T - 1) * _BINS_PER_OCTAVE).astype(int)
        place_T = token_T.astype(np.int64) * N_BINS + np.clip(bin_T, 0, N_BINS - 1)
        np.add.at(self._counts_VN.reshape(-1), place_T, np.uint32(1))


def _middle(number: int) -> float:
    """The middle of a bin, in counts per 10,000."""
    octave, part = divmod(int(number), _BINS_PER_OCTAVE)
    return float(2.0 ** (octave + _LOWEST) * (1 + (part + 0.5) / _BINS_PER_OCTAVE))


def nonzero_medians(token_T: NDArray[np.int32], value_T: NDArray[np.float64], *, n_tokens: int) -> NDArray[np.float64]:
    """Return the median of the values of each token, shape (n_tokens,), float64; NaN for tokens that do not occur."""
    value_T = value_T[np.lexsort((value_T, token_T))]
    lengths = np.bincount(token_T, minlength=n_tokens)
    starts = boundaries(lengths)[:-1]
    medians = np.full(n_tokens, np.nan)
    seen = lengths > 0
    low = value_T[starts[seen] + (lengths[seen] - 1) // 2]
    high = value_T[starts[seen] + lengths[seen] // 2]
    medians[seen] = (low + high) / 2
    return medians
