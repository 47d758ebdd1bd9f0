"""Continuous encoding: one token per gene with its log-normalized count, and two read-depth tokens (scFoundation)."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scfm.encoding.base import Encoding, Tokens, add_special_tokens, cls_and_eos, normalized
from scfm.encoding.config import EncodingConfig
from scfm.encoding.genes import GeneMap
from scfm.encoding.ragged import best_T, expressed, with_zeros
from scfm.vocab import Vocabulary

DEPTH_ROLES = ("target_depth", "source_depth")


class ContinuousEncoding(Encoding):
    """Replaces each count by log1p(count / total x target_sum), and adds two tokens that hold the read depth.

    Gene tokens are in ascending order of their ids. Two special tokens follow: "target_depth" with log10 of the requested
    total (`EncodingConfig.target_depth`, or the cell's own total), and "source_depth" with log10 of the cell's total.
    With `include_zeros` all genes of the vocabulary get tokens, as scFoundation's decoder needs; without it only the
    expressed genes do, as for scFoundation's encoder.

    Notes
    -----
    scFoundation (Hao et al. 2024). The published code restricts data to its 19,264 genes first, so totals are taken over the
    vocabulary unless `depth_over="matrix"`. A cell with a total of zero has depth tokens with value 0.

    Examples
    --------
    >>> import scfm
    >>> from scfm.encoding import ContinuousEncoding, EncodingConfig, GeneMap
    >>> names = ["ACTB", "CD74"]
    >>> vocabulary = scfm.Vocabulary.from_genes(names, special=("target_depth", "source_depth"))
    >>> encoding = ContinuousEncoding(EncodingConfig(kind="continuous", target_depth=1000), vocabulary)
    >>> cell = encoding.encode([[90, 10]], GeneMap.from_names(names, vocabulary))
    >>> [round(value, 2) for value in cell.values_T.tolist()]  # log1p(9000), log1p(1000), log10(1000), log10(100)
    [9.11, 6.91, 3.0, 2.0]
    """

    kind = "continuous"
    special_roles = DEPTH_ROLES
    # scFoundation
    defaults = MappingProxyType(
        {
            "add_cls": False,
            "add_eos": False,
            "target_sum": 1e4,
            "depth_over": "vocabulary",
            "log1p": True,
            "include_zeros": False,
        }
    )

    def __init__(self, config: EncodingConfig, vocabulary: Vocabulary, *, medians: ArrayLike | None = None) -> None:
        super().__init__(config, vocabulary, medians=medians)
        if missing := [role for role in DEPTH_ROLES if vocabulary.special_id(role) is None]:
            raise ValueError(
                f"The continuous encoding needs special tokens of roles {' and '.join(DEPTH_ROLES)}; the vocabulary lacks "
                f"{missing}. Build it with `Vocabulary.from_genes(names, special=[..., *{DEPTH_ROLES}])`."
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
        divisor_B = np.where(total_B > 0, total_B, 1.0)
        value_T = np.log1p(normalized(cells.count_T, cells.cell_T, divisor_B, config.target_sum))
        front, back = cls_and_eos(self, cells.n_cells)
        target_B = total_B if config.target_depth is None else np.full_like(total_B, config.target_depth)
        for role, depth in zip(DEPTH_ROLES, (target_B, total_B)):
            token = self.vocabulary.special_id(role)
            assert token is not None
            back[token] = np.log10(np.where(depth > 0, depth, 1.0)).astype(np.float32)
        return add_special_tokens(cells.cu_seqlens, cells.token_T, value_T.astype(np.float32), front=front, back=back)
