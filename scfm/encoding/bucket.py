"""Bucket encoding: one token per gene of a fixed panel, whose value is the integer part of its log2 expression (scBERT)."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from types import MappingProxyType, ModuleType

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.encoding.base import Encoding, Tokens, add_special_tokens, cls_and_eos, csr_arrays
from scfm.encoding.genes import GeneMap
from scfm.encoding.ragged import best_T, expressed, with_zeros


class BucketEncoding(Encoding):
    """Replaces the normalized count x of each gene of the vocabulary by the bucket ``min(floor(log2(1 + x)), n_bins - 1)``.

    Tokens are in ascending order of their ids. With `add_eos` (the default) scBERT's last position follows, in bucket 0.

    Notes
    -----
    scBERT (Yang et al. 2022). Bucket k starts at x = 2^k - 1 and is found by comparing x with these limits in float64. No
    logarithm is computed, so a value on a limit cannot be rounded into the wrong bucket.

    Examples
    --------
    >>> import scfm
    >>> from scfm.encoding import BucketEncoding, EncodingConfig, GeneMap
    >>> names = ["ACTB", "CD74", "GCG"]
    >>> vocabulary = scfm.Vocabulary.from_genes(names, special=("pad",))
    >>> config = EncodingConfig(kind="bucket", target_sum=10, add_eos=False)
    >>> cell = BucketEncoding(config, vocabulary).encode([[9, 1, 0]], GeneMap.from_names(names, vocabulary))
    >>> cell.values_T.tolist()  # floor(log2(1 + 9)), floor(log2(1 + 1)), 0
    [3.0, 1.0, 0.0]
    """

    kind = "bucket"
    # scBERT
    defaults = MappingProxyType(
        {
            "add_cls": False,
            "add_eos": True,
            "target_sum": 1e4,
            "depth_over": "vocabulary",
            "log1p": True,
            "n_bins": 6,
            "include_zeros": True,
        }
    )

    def _encode_numpy(
        self, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        config = self.config
        cells = expressed(block, genes)
        total_B = cells.totals_B() if config.depth_over == "vocabulary" else depth_B
        if config.include_zeros:
            cells = with_zeros(cells, self.vocabulary.gene_ids)
        if config.max_genes is not None:
            cells = cells.take(np.sort(best_T(cells, cells.count_T, config.max_genes)))
        bucket_T = buckets(cells.count_T, total_B[cells.cell_T], config.target_sum or 1e4, n_bins=config.n_bins or 0)
        front, back = cls_and_eos(self, cells.n_cells)
        return add_special_tokens(cells.cu_seqlens, cells.token_T, bucket_T, front=front, back=back)

    def _is_compiled(self, block: sp.csr_matrix, genes: GeneMap) -> bool:
        return True

    def _encode_compiled(
        self, compiled: ModuleType, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        config = self.config
        return compiled.encode_bucket(
            *csr_arrays(block),
            genes.token_ids,
            genes.has_duplicates,
            self._frame(compiled),
            n_tokens=len(self.vocabulary),
            target_sum=config.target_sum or 1e4,
            n_buckets=config.n_bins or 0,
            totals=depth_B if config.depth_over == "matrix" else None,
            zero_tokens=self.vocabulary.gene_ids if config.include_zeros else None,
        )


def buckets(
    count_T: NDArray[np.float64], total_T: NDArray[np.float64], target_sum: float, *, n_bins: int
) -> NDArray[np.float32]:
    """Integer part of log2(1 + count / total x target_sum), at most n_bins - 1, shape (T,), float32."""
    value_T = count_T / np.where(total_T > 0, total_T, 1.0) * target_sum
    borders = np.exp2(np.arange(1, n_bins)) - 1.0
    return np.searchsorted(borders, value_T, side="right").astype(np.float32)
