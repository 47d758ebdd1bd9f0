"""Labels of cells as codes, with unlabelled cells told apart."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.errors import LabelsError


@dataclass(frozen=True)
class Labels:
    """Class names, and the class of each cell.

    Attributes
    ----------
    names
        Class names, sorted; only those that occur.
    codes
        Class of each cell, shape (n_obs,), int64, -1 where there is none.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int64]

    @classmethod
    def from_obs(cls, obs: pd.DataFrame, key: str) -> Labels:
        """Read the column `key`; NaN, None and empty strings mean "unlabelled".

        Raises
        ------
        LabelsError
            If the column is missing, holds fewer than two classes, or looks like a measurement.
        """
        if key not in obs:
            close = difflib.get_close_matches(key, [str(column) for column in obs.columns], n=3, cutoff=0.5)
            hint = (
                f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Columns: {', '.join(map(str, obs))}."
            )
            raise LabelsError(f"`labels_key` is {key!r}, which is not in `adata.obs`. {hint}")
        column = obs[key]
        if pd.api.types.is_numeric_dtype(column.dtype) and column.nunique() > min(100, column.count() / 2):
            raise LabelsError(
                f"`adata.obs[{key!r}]` holds {column.nunique()} different numbers in {column.count()} cells, which is a "
                "measurement and not a label. Give a column of cell types; turn numbers that name types into text."
            )
        text = (
            column.astype(object).where(column.notna(), None).map(lambda value: None if value is None else str(value))
        )
        text = text.where(text != "", None)
        names = tuple(sorted(text.dropna().unique()))
        if len(names) < 2:
            raise LabelsError(
                f"`adata.obs[{key!r}]` holds {len(names)} class{'es' * (len(names) != 1)} "
                f"({', '.join(names) or 'all cells are unlabelled'}); at least two are needed to tell apart."
            )
        return cls(names, pd.Categorical(text, categories=list(names)).codes.astype(np.int64))

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Rows that have a label."""
        return np.flatnonzero(self.codes >= 0)
