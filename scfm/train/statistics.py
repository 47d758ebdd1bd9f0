"""Statistics of the files of a run, computed in one pass before training: vocabulary, medians, loadings, lengths of cells."""

# Axes: B cells, G genes of a file, V tokens of the vocabulary, R components.

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from scfm._files import atomic_write
from scfm.data import CountSource
from scfm.data.counts import log_normalize
from scfm.data.matrices import sum_columns
from scfm.encoding import Encoding, EncodingConfig, GeneMap, Vocabulary
from scfm.encoding.registry import ENCODINGS
from scfm.errors import CountsError, VocabularyMismatchError
from scfm.train.gene_names import CommonNames
from scfm.train.loadings import residual_loadings, streamed_loadings

MAX_SAMPLED_CELLS = 50_000  # cells for medians, which are in memory during the pass
MAX_CELLS_OF_LOADINGS = 20_000  # of these, the cells for the decomposition, as in `scfm.fit`
BLOCK_CELLS = 2048
N_DIGEST_BLOCKS, DIGEST_ROWS = 16, 8  # the digest of a file covers this many blocks of rows, and rows per block


@dataclass(frozen=True, kw_only=True)
class Data:
    """The files of a run, and the layer and columns with counts, names and depths.

    Attributes
    ----------
    paths
        `.h5ad` files and `.zarr` folders.
    layer, gene_key, depth_key
        The same for all files; see `scfm.pp.encode`.
    """

    paths: tuple[Path, ...]
    layer: str | None = None
    gene_key: str | None = None
    depth_key: str | None = None

    def open(self, path: Path) -> CountSource:
        return CountSource.of(path, layer=self.layer, gene_key=self.gene_key, depth_key=self.depth_key)

    def fingerprint(self) -> dict[str, Any]:
        """Return name, number of cells and digest of some rows of each file, and a hash of all of these.

        The digest covers counts, so it changes if a file is replaced by one of the same name and size.
        """
        entries = [_fingerprint(path, self.open(path)) for path in self.paths]
        digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
        return {"sha256": digest, "files": entries, "n_obs": sum(entry["n_obs"] for entry in entries)}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of the files of a run.

    Attributes
    ----------
    vocabulary
        The genes that the cells express, or the given vocabulary.
    medians
        For rank encodings, medians by token id, shape (V,); None for other encodings.
    lengths_B
        Maximum number of tokens of each cell of all files, shape (B,), int32; 0 for cells that are held out or express no
        gene of the vocabulary.
    totals_V
        Total counts of each gene over all cells that are not held out, by token id, shape (V,).
    loadings_VR
        Right singular vectors of log-normalized expression, or loadings of Pearson residuals; R is 0 if they are not needed.
    fraction_known
        Fraction of all counts that is in genes of the vocabulary.
    """

    vocabulary: Vocabulary
    medians: NDArray[np.float64] | None
    lengths_B: NDArray[np.int32]
    totals_V: NDArray[np.float64]
    loadings_VR: NDArray[np.float32]
    fraction_known: float

    def encoding(self, config: EncodingConfig) -> Encoding:
        return ENCODINGS[config.kind](config, self.vocabulary, medians=self.medians)

    def save(self, folder: Path, key: str) -> None:
        medians = np.zeros(0) if self.medians is None else self.medians
        with atomic_write(folder) as temporary_path:
            temporary_path.mkdir()
            np.savez(
                temporary_path / "arrays.npz",
                lengths_B=self.lengths_B,
                totals_V=self.totals_V,
                loadings_VR=self.loadings_VR,
                medians=medians,
            )
            self.vocabulary.to_json(temporary_path / "vocabulary.json")
            (temporary_path / "key.json").write_text(json.dumps({"key": key, "fraction_known": self.fraction_known}))

    @classmethod
    def load(cls, folder: Path, key: str) -> Statistics | None:
        """Read statistics that `save` wrote with the same key; None if there are none."""
        try:
            content = json.loads((folder / "key.json").read_text())
            if content["key"] != key:
                return None
            with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
                stored = {name: arrays[name] for name in arrays.files}
            vocabulary = Vocabulary.from_json(folder / "vocabulary.json")
        except (OSError, ValueError, KeyError, EOFError):
            return None
        return cls(
            vocabulary,
            stored["medians"] if len(stored["medians"]) else None,
            stored["lengths_B"],
            stored["totals_V"],
            stored["loadings_VR"],
            float(content["fraction_known"]),
        )


def learn(
    data: Data,
    config: EncodingConfig,
    *,
    held_out_B: NDArray[np.bool_],
    vocabulary: Vocabulary | None = None,
    medians: ArrayLike | None = None,
    n_components: int = 0,
    residuals: bool = False,
    seed: int = 0,
) -> Statistics:
    """Read all files once, and compute the statistics that are not given.

    Vocabulary, totals and lengths are computed from all cells that are not held out; medians from at most 50,000 and
    loadings from at most 20,000 of these, spread evenly over the files.

    Raises
    ------
    CountsError
        If a file holds no raw counts.
    VocabularyMismatchError
        If the genes of a file do not match those of the other files, or the vocabulary.
    """
    names = None if vocabulary is not None else CommonNames.of_files(
        ((path.name, data.open(path).var) for path in data.paths), gene_key=data.gene_key
    )  # fmt: skip
    surveys = _survey(data, config=config, names=names, vocabulary=vocabulary, held_out_B=held_out_B)
    if vocabulary is None:
        assert names is not None
        vocabulary = _vocabulary_of(surveys, names, config)
    tokens = [survey.token_ids(vocabulary) for survey in surveys]
    if ENCODINGS[config.kind].learns_medians and medians is None:
        every = GeneMap.from_names(list(vocabulary.genes), vocabulary)
        medians = ENCODINGS[config.kind].fit(_aligned(surveys, tokens, every), every, config).medians
    return Statistics(
        vocabulary,
        None if medians is None else np.asarray(medians, dtype=np.float64),
        np.concatenate([survey.lengths(config, vocabulary) for survey in surveys]),
        np.sum([survey.totals_V(token_G, len(vocabulary)) for survey, token_G in zip(surveys, tokens)], axis=0),
        _loadings(_Sample(surveys, tokens, len(vocabulary)), n_components=n_components, residuals=residuals, seed=seed),
        sum(survey.known_counts(token_G) for survey, token_G in zip(surveys, tokens))
        / max(1.0, sum(float(survey.totals_G.sum()) for survey in surveys)),
    )


@dataclass(eq=False)
class _Survey:
    """The result of one pass over a file: totals, number of expressed genes of each cell, and some cells."""

    names: list[str | None]  # of the columns
    totals_G: NDArray[np.float64]
    n_expressed_B: NDArray[np.int64]  # genes of a cell that have a name; -1 for cells that are held out
    sample: list[tuple[sparse.csr_matrix, NDArray[np.float64]]]
    token_G: NDArray[np.int32] | None

    def token_ids(self, vocabulary: Vocabulary) -> NDArray[np.int32]:
        if self.token_G is not None:
            return self.token_G
        return vocabulary.token_ids(name if name is not None else "" for name in self.names)

    def lengths(self, config: EncodingConfig, vocabulary: Vocabulary) -> NDArray[np.int32]:
        """Return the maximum number of tokens of each cell; 0 for cells without a named gene."""
        n_genes_B = self.n_expressed_B
        if config.include_zeros:
            n_genes_B = np.where(n_genes_B > 0, vocabulary.n_genes, n_genes_B)
        limited_B = n_genes_B if config.max_genes is None else np.minimum(n_genes_B, config.max_genes)
        return np.where(n_genes_B > 0, limited_B + config.n_special_tokens, 0).astype(np.int32)

    def totals_V(self, token_G: NDArray[np.int32], n_tokens: int) -> NDArray[np.float64]:
        known = token_G >= 0
        return np.bincount(token_G[known], self.totals_G[known], n_tokens).astype(np.float64)

    def known_counts(self, token_G: NDArray[np.int32]) -> float:
        return float(self.totals_G[token_G >= 0].sum())


def _survey(
    data: Data,
    *,
    config: EncodingConfig,
    names: CommonNames | None,
    vocabulary: Vocabulary | None,
    held_out_B: NDArray[np.bool_],
) -> list[_Survey]:
    surveys, row, n_seen = [], 0, 0
    rate = min(1.0, MAX_SAMPLED_CELLS / max(1, int((~held_out_B).sum())))
    for path in data.paths:
        counts = data.open(path)
        survey = _empty_survey(counts, config, names, vocabulary)
        token_G = survey.token_G
        is_named_G = np.array([name is not None for name in survey.names]) if token_G is None else token_G >= 0
        for first, block, depth_B in counts.blocks(BLOCK_CELLS):
            kept_B = ~held_out_B[row + first : row + first + block.shape[0]]
            n_named_B = np.add.reduceat(np.append(is_named_G[block.indices], False), block.indptr[:-1], dtype=np.int64)
            n_named_B[np.diff(block.indptr) == 0] = 0
            survey.n_expressed_B[first : first + len(kept_B)] = np.where(kept_B, n_named_B, -1)
            kept = np.flatnonzero(kept_B)
            training = block if len(kept) == block.shape[0] else block[kept]
            survey.totals_G += np.bincount(training.indices, weights=training.data, minlength=counts.n_vars)
            number_B = n_seen + np.arange(len(kept))
            chosen = np.flatnonzero(np.floor((number_B + 1) * rate) > np.floor(number_B * rate))
            if len(chosen):
                survey.sample.append((training[chosen], depth_B[kept][chosen]))
            n_seen += len(kept)
        row += counts.n_obs
        surveys.append(survey)
    return surveys


def _empty_survey(
    counts: CountSource,
    config: EncodingConfig,
    names: CommonNames | None,
    vocabulary: Vocabulary | None,
) -> _Survey:
    token_G = None
    if vocabulary is not None:
        token_G = GeneMap.of(counts, vocabulary, duplicates=config.duplicates).token_ids
    own: list[str | None] = [None] * counts.n_vars if names is None else names.of(counts.var)
    return _Survey(own, np.zeros(counts.n_vars), np.zeros(counts.n_obs, dtype=np.int64), [], token_G)


def _vocabulary_of(surveys: Sequence[_Survey], names: CommonNames, config: EncodingConfig) -> Vocabulary:
    """Return the expressed genes of all files, in the order of the files."""
    genes: dict[str, None] = {}
    for survey in surveys:
        seen = [name for name, total in zip(survey.names, survey.totals_G) if total > 0 and name is not None]
        if len(set(seen)) < len(seen) and config.duplicates == "error":
            twice = next(name for place, name in enumerate(seen) if name in seen[:place])
            raise VocabularyMismatchError(
                f"{len(seen) - len(set(seen))} gene names of a file occur twice (such as {twice!r}). Keep one column of each "
                "(`adata[:, ~adata.var_names.duplicated()]`), or pass an encoding that sums them "
                '(`encoding=scfm.EncodingConfig(kind=..., duplicates="sum")`).'
            )
        genes.update(dict.fromkeys(seen))
    if not genes:
        raise CountsError("All counts of the files are zero. Check the files with `scfm.pp.check`.")
    found = Vocabulary.from_genes(genes, special=["pad", "mask", *config.special_roles], id_type=names.id_type)
    aliases = {alias: name for alias, name in names.aliases.items() if name in genes and alias not in genes}
    return Vocabulary(found.tokens, special=found.special, id_type=names.id_type, aliases=aliases)


def _aligned(
    surveys: Sequence[_Survey], tokens: Sequence[NDArray[np.int32]], every: GeneMap
) -> Iterator[tuple[sparse.csr_matrix, NDArray[np.float64]]]:
    """Return the sampled cells with one column per gene of the vocabulary."""
    column_V = np.full(len(every.vocabulary), -1, dtype=np.int32)
    column_V[every.token_ids] = np.arange(every.n_vars)
    for survey, token_G in zip(surveys, tokens):
        column_G = np.where(token_G >= 0, column_V[token_G], -1)
        for block, depth_B in survey.sample:
            yield sum_columns(block, column_G, every.n_vars), depth_B


@dataclass(frozen=True, eq=False)
class _Sample:
    """The cells for the decomposition, out of the sampled ones."""

    surveys: Sequence[_Survey]
    tokens: Sequence[NDArray[np.int32]]
    n_tokens: int

    def blocks(self) -> Iterator[tuple[sparse.csr_matrix, NDArray[np.float64]]]:
        """Counts by token id, and depths."""
        n_sampled = sum(len(depth_B) for survey in self.surveys for _, depth_B in survey.sample)
        step = -(-n_sampled // MAX_CELLS_OF_LOADINGS) or 1
        for survey, token_G in zip(self.surveys, self.tokens):
            for block, depth_B in survey.sample:
                yield sum_columns(block[::step], token_G, self.n_tokens), depth_B[::step]


def _loadings(sample: _Sample, *, n_components: int, residuals: bool, seed: int) -> NDArray[np.float32]:
    """Return loadings by token id: of Pearson residuals, or singular vectors of log1p of counts per 10,000."""
    if not n_components:
        return np.zeros((sample.n_tokens, 0), dtype=np.float32)
    if residuals:
        found_VR = residual_loadings(
            lambda: (counts for counts, _ in sample.blocks()), sample.n_tokens, n_components, seed=seed
        )
    else:
        found_VR, _ = streamed_loadings(
            lambda: (log_normalize(*block) for block in sample.blocks()), sample.n_tokens, n_components, seed=seed
        )
    return found_VR.astype(np.float32)


def _fingerprint(path: Path, counts: CountSource) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(counts.var.index.astype(str)).encode())
    starts = np.linspace(0, max(0, counts.n_obs - DIGEST_ROWS), N_DIGEST_BLOCKS).astype(int)
    for start in np.unique(starts).tolist():
        block = counts.rows(start, min(counts.n_obs, start + DIGEST_ROWS))
        for array in (block.indptr.astype(np.int64), block.indices.astype(np.int64), block.data.astype(np.float64)):
            digest.update(np.ascontiguousarray(array).data)
    n_bytes = path.stat().st_size if path.is_file() else None
    return {"file": path.name, "n_obs": counts.n_obs, "bytes": n_bytes, "counts": digest.hexdigest()}
