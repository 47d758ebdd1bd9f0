"""Sampling: all classes of a column equally often."""

# Axes: B cells of all files, C classes.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scfm._remote import AnyPath
from scfm.data import columns
from scfm.data.files import obs_of
from scfm.errors import LabelsError
from scfm.train.sampling.base import Sampling, require_column


@dataclass(frozen=True, kw_only=True)
class Balanced(Sampling):
    """Cells of all classes of a column of `obs` are drawn equally often; every file must have the column.

    Classes that are so rare that their cells would be drawn more than `max_repeats` times per epoch are drawn less often.

    Attributes
    ----------
    column
        Column with classes, such as cell types or donors. Every cell needs one.
    """

    name: ClassVar[str] = "balanced"
    column: str

    @classmethod
    def from_argument(cls, argument: str) -> Balanced:
        return cls(column=require_column(cls.name, argument))

    def weights(self, paths: Sequence[AnyPath], rows: Sequence[int]) -> NDArray[np.float32]:
        tables = ((f"obs of {path.name}", obs_of(path)) for path in paths)
        found = columns.groups_of_tables(tables, self.column, argument="sampling")
        if n_missing := int((found.codes < 0).sum()):
            raise LabelsError(
                f"{n_missing} of {len(found.codes)} cells have no value in the column {self.column!r} of `obs` (`sampling`). "
                "Fill them, for example with the class 'unknown', or use another column."
            )
        size_C = np.bincount(found.codes, minlength=len(found.names))
        weight_C = (1 / np.maximum(size_C, 1)).astype(np.float32)
        return weight_C[found.codes]

    def to_text(self) -> str:
        return f"{self.name}:{self.column}"
