"""Rank encoding: a cell is a list of its genes, in descending order of count over median (Geneformer)."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from types import MappingProxyType, ModuleType

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scfm.encoding.base import CountBlocks, Encoding, Tokens, add_special_tokens, cls_and_eos, csr_arrays
from scfm.encoding.config import EncodingConfig
from scfm.encoding.genes import GeneMap
from scfm.encoding.medians import GeneMedians
from scfm.encoding.ragged import best_T, expressed
from scfm.vocab import Vocabulary


class RankEncoding(Encoding):
    """Sorts the genes of a cell by the ratio of count to the gene's median over non-zero counts, in descending order.

    Notes
    -----
    Geneformer (Theodoris et al. 2023; V2: Chen et al. 2024). Dividing by the total of a cell does not change the order of its
    genes, so counts are not normalized here. Ties are in vocabulary order; the published code uses an unstable sort. V1 is
    ``EncodingConfig(kind="rank")``; V2 adds ``context_length=4096, add_cls=True, add_eos=True, duplicates="sum"``.

    Examples
    --------
    >>> import scfm
    >>> from scfm.encoding import EncodingConfig, GeneMap, RankEncoding
    >>> vocabulary = scfm.Vocabulary.from_genes(["ACTB", "CD74", "GCG"], special=("pad", "mask"))
    >>> encoding = RankEncoding(EncodingConfig(kind="rank"), vocabulary, medians=[float("nan")] * 2 + [40, 2, 1])
    >>> cell = encoding.encode([[50, 6, 0]], GeneMap.from_names(["ACTB", "CD74", "GCG"], vocabulary))
    >>> [vocabulary.tokens[token] for token in cell.gene_ids_T]  # 6 / 2 is more than 50 / 40
    ['CD74', 'ACTB']
    """

    kind = "rank"
    has_values = False
    is_ordered = True
    learns_medians = True
    # Geneformer V1
    defaults = MappingProxyType(
        {
            "context_length": 2048,
            "add_cls": False,
            "add_eos": False,
            "target_sum": 1e4,
            "depth_over": "matrix",
            "log1p": False,
            "include_zeros": False,
        }
    )

    def __init__(self, config: EncodingConfig, vocabulary: Vocabulary, *, medians: ArrayLike | None = None) -> None:
        if medians is None:
            raise ValueError(
                "The rank encoding needs `medians`. Read published ones with `scfm.encoding.read_medians`, or learn them with "
                "`fit`."
            )
        super().__init__(config, vocabulary, medians=medians)
        known = self._medians[vocabulary.gene_ids]
        if (known <= 0).any() or np.isinf(known).any():
            raise ValueError(
                "`medians` holds zero, negative or infinite values for genes. Use NaN for a missing median."
            )

    @property
    def _medians(self) -> NDArray[np.float64]:
        assert self.medians is not None
        return self.medians

    @classmethod
    def fit(cls, blocks: CountBlocks, genes: GeneMap, config: EncodingConfig) -> RankEncoding:
        """Learn the median of each gene over its non-zero counts, normalized to `target_sum`.

        Genes that no cell expresses get no median, and are never encoded. Memory is bounded: see
        `scfm.encoding.medians.GeneMedians`.
        """
        medians = GeneMedians(len(genes.vocabulary), config)
        for block, depth_B in blocks:
            medians.add(block, genes, depth_B)
        return cls(config, genes.vocabulary, medians=medians.result())

    def _encode_numpy(
        self, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        cells = expressed(block, genes)
        cells = cells.take(~np.isnan(self._medians[cells.token_T]))
        kept = cells.take(best_T(cells, cells.count_T / self._medians[cells.token_T], self.config.max_genes))
        front, back = cls_and_eos(self, kept.n_cells)
        values = kept.count_T.astype(np.float32) if self.config.keep_counts else None
        return add_special_tokens(kept.cu_seqlens, kept.token_T, values, front=front, back=back)

    def _is_compiled(self, block: sp.csr_matrix, genes: GeneMap) -> bool:
        return not self.config.keep_counts

    def _encode_compiled(
        self, compiled: ModuleType, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        known = (genes.token_ids >= 0) & ~np.isnan(self._medians[genes.token_ids])
        token_of_column = np.where(known, genes.token_ids, np.int32(-1))
        return compiled.encode_rank(
            *csr_arrays(block), token_of_column, genes.has_duplicates, self._frame(compiled), self._medians
        )
