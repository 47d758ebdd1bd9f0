"""The validation cells of a pretraining run."""

# Axes: B cells.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from scfm._remote import AnyPath, input_paths
from scfm.data import CellBatch
from scfm.data.files import count_rows
from scfm.encoding import Encoding
from scfm.train.statistics import Data
from scfm.train.stream import CellStream

MAX_VALIDATION_CELLS = 1000


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The validation cells: rows of the training files or of other files."""

    paths: tuple[AnyPath, ...]  # other files
    of_training: NDArray[np.bool_]
    fraction: float | None
    rows: NDArray[np.bool_]  # of the files that they are taken from

    @classmethod
    def choose(
        cls, validation: float | str | Path | Sequence[str | Path] | None, data: Data, n_obs: int, seed: int
    ) -> HeldOut:
        none = np.zeros(n_obs, dtype=bool)
        rng = np.random.default_rng(seed)
        if validation is None:
            return cls((), none, None, none)
        if isinstance(validation, int | float):
            if not 0 < validation < 1:
                raise ValueError(f"`validation` is {validation}; a fraction of the cells must be between 0 and 1.")
            n_cells = min(MAX_VALIDATION_CELLS, max(1, round(validation * n_obs)), n_obs - 1)
            chosen = _drawn(n_obs, n_cells, rng)
            return cls((), chosen, float(validation), chosen)
        paths = input_paths(validation)
        if twice := sorted({path.name for path in paths if path.resolve() in {each.resolve() for each in data.paths}}):
            raise ValueError(f"{', '.join(twice)} is in `paths` and in `validation`. Remove it from one of them.")
        n_cells = sum(map(count_rows, paths))
        return cls(paths, none, None, _drawn(n_cells, min(MAX_VALIDATION_CELLS, n_cells), rng))

    def to_dict(self) -> float | list[str] | None:
        return [path.name for path in self.paths] if self.paths else self.fraction

    def cells(self, data: Data, encoding: Encoding) -> CellBatch | None:
        """Return the encoded cells; None if there are none."""
        if not self.rows.any():
            return None
        return encode_rows(self.paths or data.paths, data, encoding, self.rows)


def _drawn(n_cells: int, n_drawn: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    drawn = np.zeros(n_cells, dtype=bool)
    drawn[rng.permutation(n_cells)[:n_drawn]] = True
    return drawn


def encode_rows(paths: Sequence[AnyPath], data: Data, encoding: Encoding, rows: NDArray[np.bool_]) -> CellBatch:
    """Encode some rows of files; cells without a gene of the vocabulary are omitted."""
    stream = CellStream(
        paths,
        encoding,
        batch_cells=1024,
        lengths_B=rows,
        shuffle=False,
        layer=data.layer,
        gene_key=data.gene_key,
        depth_key=data.depth_key,
    )
    cells = CellBatch.concat(list(stream))
    return cells.select(torch.nonzero(cells.lengths_B > encoding.config.n_special_tokens).squeeze(1))
