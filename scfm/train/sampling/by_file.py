"""Sampling: all files equally often, or by weights."""

# Axes: B cells of all files.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scfm._remote import AnyPath
from scfm.errors import LabelsError
from scfm.train.sampling.base import Sampling, refuse_argument


@dataclass(frozen=True, kw_only=True)
class ByFile(Sampling):
    """Cells of all files are drawn equally often, or in proportion to the weights of the files.

    Attributes
    ----------
    file_weights
        Weight of each file by its name, such as ``{"a.h5ad": 2, "b.h5ad": 1}``; None for equal weights.
    """

    name: ClassVar[str] = "by-file"
    file_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for file, weight in (self.file_weights or {}).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise LabelsError(
                    f"The weight of {file} is {weight}; weights of files must be finite and not negative."
                )

    @classmethod
    def from_argument(cls, argument: str) -> ByFile:
        refuse_argument(cls.name, argument)
        return cls()

    def weights(self, paths: Sequence[AnyPath], rows: Sequence[int]) -> NDArray[np.float32]:
        names = [path.name for path in paths]
        given = self.file_weights if self.file_weights is not None else dict.fromkeys(names, 1.0)
        if set(given) != set(names) or (self.file_weights is not None and len(set(names)) < len(names)):
            missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
            raise LabelsError(
                "`file_weights` must name every file once"
                + (f"; it lacks {', '.join(missing[:5])}" if missing else "")
                + (f"; {', '.join(unknown[:5])} is not a file of the run" if unknown else "")
                + ("" if missing or unknown else "; several files have the same name")
                + "."
            )
        per_cell = [given[name] / max(n_rows, 1) for name, n_rows in zip(names, rows)]
        return np.repeat(np.array(per_cell, dtype=np.float32), rows)
