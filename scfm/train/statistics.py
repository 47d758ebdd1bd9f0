"""Statistics of the files of a run, computed in one pass before training: vocabulary, medians, loadings, lengths of cells."""

# Axes: B cells, V tokens of the vocabulary, R components.

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm._files import atomic_write
from scfm._remote import AnyPath
from scfm.data import CountSource
from scfm.data.common_names import CommonNames
from scfm.data.files import count_rows
from scfm.data.gene_names import shared_by_names
from scfm.encoding import Encoding, EncodingConfig, GeneMap, Vocabulary
from scfm.encoding.registry import ENCODINGS
from scfm.train.survey import Survey, learns_medians, lengths_of_cells, vocabulary_of

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

    paths: tuple[AnyPath, ...]
    layer: str | None = None
    gene_key: str | None = None
    depth_key: str | None = None

    def open(self, path: AnyPath) -> CountSource:
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
        Total counts of each gene over all cells that are not held out, by token id, shape (V,); 0 if counts were not read.
    loadings_VR
        Right singular vectors of log-normalized expression, or loadings of Pearson residuals; R is 0 if they are not needed.
    fraction_known
        Fraction of all counts that is in genes of the vocabulary; NaN if counts were not read.
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Learning:
    """What is learned from the files of a run, and what is given.

    Attributes
    ----------
    data, config
        The files, and the settings of the encoding.
    held_out_B
        Cells that teach nothing, shape (B,), bool.
    vocabulary, medians
        None to learn them.
    n_components, residuals, seed
        Of the loadings; see `Survey.loadings_VR`.
    """

    data: Data
    config: EncodingConfig
    held_out_B: NDArray[np.bool_]
    vocabulary: Vocabulary | None = None
    medians: ArrayLike | None = None
    n_components: int = 0
    residuals: bool = False
    seed: int = 0

    @property
    def learns_medians(self) -> bool:
        return self.medians is None and learns_medians(self.config)

    def statistics(self) -> Statistics:
        """Return the statistics, in one process."""
        return self.finish([self.survey()])

    def survey(self, rank: int = 0, world_size: int = 1) -> Survey | NDArray[np.int32]:
        """Read the files of a rank once, in blocks of cells, and return what `finish` needs.

        If only the lengths of cells are missing, and all matrices have row pointers, no counts are read but those of the first
        cells, to check the genes. The result is then an upper bound of the length of every cell of all files.

        Raises
        ------
        CountsError
            If a file holds no raw counts.
        VocabularyMismatchError
            If the genes of a file do not match those of the other files, or the vocabulary.
        """
        if self.vocabulary is not None and not self.learns_medians and not self.n_components:
            bounds_B = self._length_bounds(self.vocabulary)
            if bounds_B is not None:
                return bounds_B
        data, names, known = self.data, None, self.vocabulary
        if known is None:
            variables = ((path.name, data.open(path).var) for path in data.paths)
            names = CommonNames.of_files(variables, gene_key=data.gene_key)
            known = vocabulary_of(names.all_names, self.config, names)
        rows = [count_rows(path) for path in data.paths]
        first_rows = [0, *np.cumsum(rows).tolist()]
        numbers = [
            number
            for number, first in enumerate(first_rows[:-1])
            if first * world_size // max(1, first_rows[-1]) == rank
        ]
        start = first_rows[numbers[0]] if numbers else 0
        survey = Survey(
            self.config,
            known,
            names=names,
            n_training=int((~self.held_out_B).sum()),
            learns_medians=self.learns_medians,
            samples=self.n_components > 0,
            n_seen=int((~self.held_out_B[:start]).sum()),
        )
        for number in numbers:
            counts = data.open(data.paths[number])
            survey.add(counts, self.held_out_B[first_rows[number] : first_rows[number + 1]])
        return survey

    def finish(self, parts: Sequence[Survey | NDArray[np.int32]]) -> Statistics:
        """Return the statistics of the surveys of all ranks."""
        survey, *others = parts
        if not isinstance(survey, Survey):
            assert self.vocabulary is not None
            n_tokens = len(self.vocabulary)
            medians = None if self.medians is None else np.asarray(self.medians, dtype=np.float64)
            nothing = np.zeros((n_tokens, 0), np.float32)
            return Statistics(self.vocabulary, medians, survey, np.zeros(n_tokens), nothing, float("nan"))
        for other in others:
            assert isinstance(other, Survey)
            survey.merge(other)
        vocabulary, token_V = self.vocabulary, np.arange(len(survey.vocabulary))
        medians = None if self.medians is None else np.asarray(self.medians, dtype=np.float64)
        if vocabulary is None:
            vocabulary, token_V = survey.learned_vocabulary()
        if survey.medians is not None:
            medians = survey.medians.result()[token_V]
        loadings_VR = survey.loadings_VR(token_V, self.n_components, residuals=self.residuals, seed=self.seed)
        return Statistics(
            vocabulary,
            medians,
            survey.lengths_B(vocabulary),
            survey.totals_V[token_V],
            loadings_VR.astype(np.float32),
            float(survey.totals_V.sum()) / max(1.0, survey.all_counts),
        )

    def _length_bounds(self, vocabulary: Vocabulary) -> NDArray[np.int32] | None:
        """Return upper bounds of the lengths from the row pointers of all files; None if a file has none."""
        maps: dict[str, GeneMap] = {}
        parts = [np.zeros(0, np.int32)]
        for path in self.data.paths:
            counts = self.data.open(path)
            n_values_B = counts.row_lengths()
            if n_values_B is None:
                return None
            make = partial(GeneMap.of, counts, vocabulary, duplicates=self.config.duplicates)
            shared_by_names(maps, counts.var, make)  # raises if the genes do not match
            parts.append(n_values_B)
        n_values_B = np.concatenate(parts)
        n_values_B[self.held_out_B] = 0
        return lengths_of_cells(n_values_B, self.config, vocabulary)


def _fingerprint(path: AnyPath, counts: CountSource) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(counts.var.index.astype(str)).encode())
    starts = np.linspace(0, max(0, counts.n_obs - DIGEST_ROWS), N_DIGEST_BLOCKS).astype(int)
    for start in np.unique(starts).tolist():
        block = counts.rows(start, min(counts.n_obs, start + DIGEST_ROWS))
        for array in (block.indptr.astype(np.int64), block.indices.astype(np.int64), block.data.astype(np.float64)):
            digest.update(np.ascontiguousarray(array).data)
    n_bytes = path.stat().st_size if path.is_file() else None
    return {"file": path.name, "n_obs": counts.n_obs, "bytes": n_bytes, "counts": digest.hexdigest()}
