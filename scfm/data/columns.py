"""Read columns of `obs` and `var`: labels, groups, truth values, total counts, gene names.

NaN, None, NA and empty strings are missing values in all of them.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.errors import CountsError, LabelsError, ScfmError, VocabularyMismatchError

# Texts and numbers that mean True.
_TRUE = ("true", "t", "yes", "y", "1", "1.0", "test")


@dataclass(frozen=True)
class Labels:
    """Class names, and the class of each cell.

    Attributes
    ----------
    names
        Names of the classes that occur, sorted.
    codes
        Class of each cell, shape (n_obs,), int64, -1 for a cell without a label.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int64]

    @property
    def labeled(self) -> NDArray[np.int64]:
        """Rows with a label, ascending."""
        return np.flatnonzero(self.codes >= 0)


def n_rows(table: Any) -> int:
    """Return the number of rows of a data frame or a table of files. The length of a lazy table is its number of columns."""
    return int(table.shape[0]) if hasattr(table, "shape") else len(table)


def labels(obs: Any, key: str, *, argument: str = "labels_key") -> Labels:
    """Read the classes of cells.

    Raises
    ------
    LabelsError
        If the column is missing, holds fewer than two classes, or looks like a measurement.
    """
    column = find(obs, key, argument=argument)
    if pd.api.types.is_numeric_dtype(column.dtype) and column.nunique() > min(100, column.count() / 2):
        raise LabelsError(
            f"`adata.obs[{key!r}]` holds {column.nunique()} different numbers in {column.count()} cells, so it looks like a "
            "measurement and not a label. Pass a column of cell types; convert numbers that name cell types to text."
        )
    found = _classes(column)
    if len(found.names) < 2:
        raise LabelsError(
            f"`adata.obs[{key!r}]` holds {len(found.names)} class{'es' * (len(found.names) != 1)} "
            f"({', '.join(found.names) or 'all cells are unlabeled'}); at least two are needed. Pass another `{argument}`."
        )
    return found


def groups(obs: Any, key: str, *, argument: str = "batch_key") -> Labels:
    """Read the groups of cells (donors, batches, clusters, conditions); a cell without a group has code -1.

    Raises
    ------
    LabelsError
        If the column does not exist or has no value for any cell.
    """
    found = _classes(find(obs, key, argument=argument))
    if not found.names:
        raise LabelsError(f"`adata.obs[{key!r}]` (`{argument}`) has no value for any cell. Pass another column.")
    return found


def groups_of_tables(tables: Iterable[tuple[str, Any]], key: str, *, argument: str) -> Labels:
    """Read the groups of the cells of several tables, one after another; a cell without a group has code -1.

    Parameters
    ----------
    tables
        Name for error messages, and table, of each file.
    key, argument
        Name of the column, and of the caller's parameter.

    Raises
    ------
    LabelsError
        If a table lacks the column, or it has no value for any cell.
    """
    number_of: dict[str, int] = {}  # of each group, in the order in which they are found
    parts = [np.zeros(0, dtype=np.int32)]
    for where, table in tables:
        found = _classes(find(table, key, argument=argument, where=where))
        numbers = [number_of.setdefault(name, len(number_of)) for name in found.names]
        parts.append(np.array([*numbers, -1], dtype=np.int32)[found.codes])
    if not number_of:
        raise LabelsError(f"The column {key!r} of `obs` (`{argument}`) has no value for any cell. Pass another column.")
    names = tuple(sorted(number_of))
    code_of = np.argsort(np.argsort(np.array(list(number_of), dtype=object)))
    return Labels(names, np.append(code_of, -1)[np.concatenate(parts)])


def weights(obs: Any, key: str, *, where: str, argument: str = "sampling") -> NDArray[np.float32]:
    """Read weights of cells, shape (n_obs,), float32.

    Raises
    ------
    LabelsError
        If the column does not exist or does not hold numbers, or if a weight is missing, negative or infinite.
    """
    column = find(obs, key, argument=argument, where=where)
    if not pd.api.types.is_numeric_dtype(column.dtype):
        raise LabelsError(
            f"The column {key!r} of {where} (`{argument}`) has dtype {column.dtype}; weights are numbers."
        )
    weight_B = column.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~(np.isfinite(weight_B) & (weight_B >= 0) & (weight_B <= np.finfo(np.float32).max))
    if wrong.any():
        raise LabelsError(
            f"{int(wrong.sum())} of {len(weight_B)} weights in the column {key!r} of {where} (`{argument}`) are missing, "
            f"negative or infinite (cell {int(wrong.argmax())}: {weight_B[wrong.argmax()]}). Correct them; a weight of 0 "
            "leaves a cell out."
        )
    return weight_B.astype(np.float32)


def truth(obs: Any, key: str, *, argument: str = "test_key") -> NDArray[np.bool_]:
    """Read truth values, shape (n_obs,), bool.

    Raises
    ------
    LabelsError
        If the column does not exist, holds other values than True and False, or has no value for some cells.
    """
    column = find(obs, key, argument=argument)
    present = column[column.notna()]
    is_boolean = [isinstance(value, bool | np.bool_) for value in present.unique()]
    if not all(is_boolean):
        values = [value.item() if isinstance(value, np.generic) else value for value in present.unique()]
        wrong = values[is_boolean.index(False)]
        true = next((value for value in values if str(value).strip().lower() in _TRUE), wrong)
        raise LabelsError(
            f"`adata.obs[{key!r}]` (`{argument}`) holds {wrong!r}; it must hold True and False. Make such a column, for "
            f'example by `adata.obs["is_test"] = adata.obs[{key!r}] == {true!r}`, and pass `{argument}="is_test"`.'
        )
    if n_missing := len(column) - len(present):
        raise LabelsError(
            f"{n_missing} of {len(column)} cells have no value in `adata.obs[{key!r}]` (`{argument}`). Fill them with "
            f"`adata.obs[{key!r}] = adata.obs[{key!r}].astype('boolean').fillna(False)`, or remove these cells."
        )
    return column.to_numpy(dtype=bool)


def totals(obs: Any, key: str, *, argument: str = "depth_key") -> NDArray[np.float64]:
    """Read total counts of cells, shape (n_obs,), float64.

    Raises
    ------
    CountsError
        If the column does not exist or does not hold numbers, or if a value is missing, negative or infinite.
    """
    column = find(obs, key, argument=argument, error=CountsError)
    values = column.astype(object).where(column.notna(), np.nan)
    is_number = values.map(lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_))
    if not is_number.all():
        wrong = values[~is_number].iloc[0]
        raise CountsError(
            f"`adata.obs[{key!r}]` (`{argument}`) holds {wrong!r}; it must hold each cell's total counts. Pass another "
            "column, or None to sum the rows."
        )
    return values.to_numpy(dtype=np.float64)


def gene_names(var: Any, key: str) -> list[str | None]:
    """Read the names of genes; a missing name is None.

    Raises
    ------
    VocabularyMismatchError
        If the column is missing.
    """
    return as_names(find(var, key, argument="gene_key", where="adata.var", error=VocabularyMismatchError))


def as_names(values: pd.Series | pd.Index) -> list[str | None]:
    """Return values as strings; a missing value is None."""
    given = pd.notna(values)
    return [str(value) if has and value != "" else None for value, has in zip(values.tolist(), given.tolist())]


def find(
    frame: Any, key: str, *, argument: str, where: str = "adata.obs", error: type[ScfmError] = LabelsError
) -> pd.Series:
    """Return one column of a table.

    Parameters
    ----------
    frame
        A data frame, or a lazy table of `anndata.experimental.read_lazy` or of a file.
    key
        Name of the column. A column whose name is a number is found by the digits of that number, as in a file.
    argument, where
        Names of the caller's parameter and of the table in error messages.
    error
        Class of the error for a missing column.
    """
    names = list(frame.columns)
    places = [place for place, name in enumerate(names) if name == key] or [
        place for place, name in enumerate(names) if str(name) == key
    ]
    if len(places) == 1:
        name = names[places[0]]
        if isinstance(frame, pd.DataFrame):
            return frame.iloc[:, places[0]]
        if hasattr(frame, "read_column"):  # a table of a file
            return frame.read_column(name)
        return frame[[name]].to_memory()[name]  # what anndata's read_lazy has
    if places:
        raise error(f"`{where}` has {len(places)} columns named {key!r} (`{argument}`). Rename all but one of them.")
    texts = [str(name) for name in names]
    similar = difflib.get_close_matches(str(key), texts, n=3, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(map(repr, similar))}?"
        if similar
        else f"Columns: {', '.join(texts[:20])}{', ...' * (len(texts) > 20)}."
        if texts
        else "It has no columns."
    )
    raise error(f"`{argument}` is {key!r}, which is not a column of `{where}`. {hint}")


def _classes(column: pd.Series) -> Labels:
    if isinstance(column.dtype, pd.CategoricalDtype):  # a text per category, not per cell
        texts, code_B = as_names(column.cat.categories), column.cat.codes.to_numpy()
        names = tuple(sorted({text for code in np.unique(code_B) if code >= 0 and (text := texts[code]) is not None}))
        number_of: dict[str | None, int] = {name: number for number, name in enumerate(names)}
        return Labels(names, np.array([*(number_of.get(text, -1) for text in texts), -1])[code_B])
    text = pd.Series(as_names(column), dtype=object)
    names = tuple(sorted(text.dropna().unique()))
    return Labels(names, pd.Categorical(text, categories=list(names)).codes.astype(np.int64))
