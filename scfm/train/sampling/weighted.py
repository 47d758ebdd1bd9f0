"""Sampling: by a column of weights."""

# Axes: B cells of all files.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scfm._remote import AnyPath
from scfm.data import columns
from scfm.data.files import obs_of
from scfm.train.sampling.base import Sampling, require_column


@dataclass(frozen=True, kw_only=True)
class Weighted(Sampling):
    """A cell is drawn in proportion to its weight, a number in a column of `obs` of every file.

    Attributes
    ----------
    column
        Column with weights, which are finite and not negative. Cells of weight 0 are never drawn.
    """

    name: ClassVar[str] = "weighted"
    column: str

    @classmethod
    def from_argument(cls, argument: str) -> Weighted:
        return cls(column=require_column(cls.name, argument))

    def weights(self, paths: Sequence[AnyPath], rows: Sequence[int]) -> NDArray[np.float32]:
        parts = [columns.weights(obs_of(path), self.column, where=f"obs of {path.name}") for path in paths]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def to_text(self) -> str:
        return f"{self.name}:{self.column}"
