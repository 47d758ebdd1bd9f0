"""One pass over the files of a run: what it counts, and some cells that it keeps."""

# Axes: B cells, G genes of a file, V tokens of the vocabulary.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm.data import CountSource
from scfm.data.common_names import CommonNames
from scfm.data.counts import log_normalize
from scfm.data.gene_names import shared_by_names
from scfm.data.matrices import sum_columns
from scfm.encoding import EncodingConfig, GeneMap, Vocabulary
from scfm.encoding.medians import GeneMedians
from scfm.encoding.registry import ENCODINGS
from scfm.errors import CountsError, VocabularyMismatchError
from scfm.train.loadings import residual_loadings, streamed_loadings

MAX_SAMPLED_CELLS = 20_000  # cells for the loadings, which are in memory during the pass; as many as in `scfm.fit`
BLOCK_CELLS = 2048


class Survey:
    """Totals and medians of genes, number of expressed genes of each cell, and some cells, of files that are added in turn.

    Memory holds a block of cells, at most 20,000 sampled cells, the histograms of `GeneMedians`, and 4 bytes per cell.

    Parameters
    ----------
    config
        Settings of the encoding.
    vocabulary
        The vocabulary of the run, or all names of all files.
    names
        How files name genes, if the vocabulary is learned.
    n_training
        Number of cells of all files that are not held out.
    learns_medians
        Whether to compute medians.
    samples
        Whether to keep some cells for loadings.
    n_seen
        Number of cells that are not held out in earlier files, which another process reads.
    """

    def __init__(
        self,
        config: EncodingConfig,
        vocabulary: Vocabulary,
        *,
        names: CommonNames | None,
        n_training: int,
        learns_medians: bool,
        samples: bool,
        n_seen: int = 0,
    ) -> None:
        self.config, self.vocabulary, self.names = config, vocabulary, names
        self.medians = GeneMedians(len(vocabulary), config) if learns_medians else None
        self.totals_V = np.zeros(len(vocabulary))
        self.all_counts = 0.0
        self.expressed: dict[int, None] = {}  # tokens with counts, in the order of the files
        self._n_expressed: list[
            NDArray[np.int32]
        ] = []  # genes of a cell that have a name; -1 for cells that are held out
        self._sample: list[tuple[sparse.csr_matrix, NDArray[np.int32], NDArray[np.float64]]] = []
        self._rate = min(1.0, MAX_SAMPLED_CELLS / max(1, n_training)) if samples else 0.0
        self._n_seen = n_seen
        self._maps: dict[str, GeneMap] = {}

    def add(self, counts: CountSource, held_out_B: NDArray[np.bool_]) -> None:
        """Read all cells of a file; `held_out_B` names those that teach nothing, shape (B,)."""
        genes = self._genes_of(counts)
        is_named_G, totals_G = genes.token_ids >= 0, np.zeros(counts.n_vars)
        n_expressed_B = np.zeros(counts.n_obs, dtype=np.int32)
        for first, block, depth_B in counts.blocks(BLOCK_CELLS):
            kept_B = ~held_out_B[first : first + block.shape[0]]
            n_named_B = np.diff(np.concatenate([[0], np.cumsum(is_named_G[block.indices])])[block.indptr])
            n_expressed_B[first : first + len(kept_B)] = np.where(kept_B, n_named_B, -1)
            if not kept_B.all():
                block, depth_B = block[np.flatnonzero(kept_B)], depth_B[kept_B]
            totals_G += np.bincount(block.indices, weights=block.data, minlength=counts.n_vars)
            if self.medians is not None:
                self.medians.add(block, genes, depth_B)
            self._keep_some(block, genes.token_ids, depth_B)
        self._n_expressed.append(n_expressed_B)
        self._count_genes(genes.token_ids, totals_G)

    def merge(self, later: Survey) -> None:
        """Add the files of another survey, which come after those of this one."""
        if self.medians is not None and later.medians is not None:
            self.medians.merge(later.medians)
        self.totals_V += later.totals_V
        self.all_counts += later.all_counts
        self.expressed.update(later.expressed)
        self._n_expressed += later._n_expressed
        self._sample += later._sample

    def _genes_of(self, counts: CountSource) -> GeneMap:
        """Map the genes of a file; files with the same names share one map."""
        return shared_by_names(self._maps, counts.var, lambda: self._map(counts))

    def _map(self, counts: CountSource) -> GeneMap:
        if self.names is None:
            return GeneMap.of(counts, self.vocabulary, duplicates=self.config.duplicates)
        return GeneMap.from_names(self.names.of(counts.var), self.vocabulary, duplicates="sum", min_coverage=0)

    def _keep_some(self, block: sparse.csr_matrix, token_G: NDArray[np.int32], depth_B: NDArray[np.float64]) -> None:
        number_B = self._n_seen + np.arange(len(depth_B))
        chosen = np.flatnonzero(np.floor((number_B + 1) * self._rate) > np.floor(number_B * self._rate))
        if len(chosen):
            self._sample.append((block[chosen], token_G, depth_B[chosen]))
        self._n_seen += len(depth_B)

    def _count_genes(self, token_G: NDArray[np.int32], totals_G: NDArray[np.float64]) -> None:
        known_G = token_G >= 0
        self.totals_V += np.bincount(token_G[known_G], totals_G[known_G], len(self.vocabulary))
        self.all_counts += float(totals_G.sum())
        seen = token_G[known_G & (totals_G > 0)].tolist()
        if self.names is not None and self.config.duplicates == "error" and len(set(seen)) < len(seen):
            twice = next(token for place, token in enumerate(seen) if token in seen[:place])
            raise VocabularyMismatchError(
                f"{len(seen) - len(set(seen))} gene names of a file occur twice (such as {self.vocabulary.tokens[twice]!r}). "
                "Keep one column of each (`adata[:, ~adata.var_names.duplicated()]`), or pass an encoding that sums them "
                '(`encoding=scfm.EncodingConfig(kind=..., duplicates="sum")`).'
            )
        self.expressed.update(dict.fromkeys(seen))

    def lengths_B(self, vocabulary: Vocabulary) -> NDArray[np.int32]:
        """Return the maximum number of tokens of each cell; 0 for cells that are held out or express no named gene."""
        return lengths_of_cells(np.concatenate(self._n_expressed), self.config, vocabulary)

    def sampled(self, token_V: NDArray[np.int64]) -> Iterator[tuple[sparse.csr_matrix, NDArray[np.float64]]]:
        """Yield counts of the sampled cells, with one column for each of some tokens of the survey, and their depths."""
        column_V = np.full(len(self.vocabulary) + 1, -1)  # the last one is read at -1, for genes without a token
        column_V[token_V] = np.arange(len(token_V))
        for block, token_G, depth_B in self._sample:
            yield sum_columns(block, column_V[token_G], len(token_V)), depth_B

    def loadings_VR(
        self, token_V: NDArray[np.int64], n_components: int, *, residuals: bool, seed: int
    ) -> NDArray[np.float64]:
        """Return loadings of some tokens: of Pearson residuals, or singular vectors of log1p of counts per 10,000."""
        if not n_components:
            return np.zeros((len(token_V), 0))
        if residuals:
            counts = lambda: (block for block, _ in self.sampled(token_V))  # noqa: E731
            return residual_loadings(counts, len(token_V), n_components, seed=seed)
        logs = lambda: (log_normalize(*block) for block in self.sampled(token_V))  # noqa: E731
        return streamed_loadings(logs, len(token_V), n_components, seed=seed)[0]

    def learned_vocabulary(self) -> tuple[Vocabulary, NDArray[np.int64]]:
        """Return the vocabulary of the expressed genes, and the token of the survey of each of its tokens, shape (V,)."""
        assert self.names is not None
        if not self.expressed:
            raise CountsError("All counts of the files are zero. Check the files with `scfm.pp.check`.")
        tokens, id_type = self.vocabulary.tokens, self.names.id_type
        genes = dict.fromkeys(tokens[token] for token in self.expressed)
        found = vocabulary_of(genes, self.config, self.names)
        aliases = {alias: name for alias, name in self.names.aliases.items() if name in genes and alias not in genes}
        vocabulary = Vocabulary(found.tokens, special=found.special, id_type=id_type, aliases=aliases)
        return vocabulary, np.array([*range(len(found) - len(genes)), *self.expressed], dtype=np.int64)


def lengths_of_cells(n_genes_B: NDArray[np.int32], config: EncodingConfig, vocabulary: Vocabulary) -> NDArray[np.int32]:
    """Turn numbers of expressed genes, in their array, into numbers of tokens; 0 for cells without genes."""
    is_empty_B = n_genes_B <= 0
    if config.include_zeros:
        n_genes_B[:] = vocabulary.n_genes
    if config.max_genes is not None:
        np.minimum(n_genes_B, config.max_genes, out=n_genes_B)
    n_genes_B += config.n_special_tokens
    n_genes_B[is_empty_B] = 0
    return n_genes_B


def vocabulary_of(genes: dict[str, None], config: EncodingConfig, names: CommonNames) -> Vocabulary:
    """Return a vocabulary of genes, with the special tokens that an encoding needs."""
    return Vocabulary.from_genes(genes, special=["pad", "mask", *config.special_roles], id_type=names.id_type)


def learns_medians(config: EncodingConfig) -> bool:
    return ENCODINGS[config.kind].learns_medians
