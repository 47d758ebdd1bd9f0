"""`AnnDataFiles`: many files as one data set, with the union of their genes."""

# Axes: B cells of a block, G genes of a file.

from __future__ import annotations

import bisect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm._remote import AnyPath, RemotePath, input_paths
from scfm.data.common_names import CommonNames
from scfm.data.counts import check_counts
from scfm.data.files import obs_of, open_file
from scfm.data.gene_names import names_key
from scfm.data.matrices import find_matrix, other_matrices, read_rows, readable_by_rows, shared_uns, with_matrix
from scfm.errors import LabelsError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# An open .h5ad file can need three file descriptors, and 256 is a common limit for all of a process.
MAX_OPEN_FILES = 32


def open_data(data: Any) -> Any:
    """Return data with the attributes of an AnnData: files for paths, patterns, lists and URLs; an AnnData as it is.

    Raises
    ------
    TypeError
        If `data` is of another type.
    OSError
        If a file is missing, cut short, or does not hold an AnnData.
    """
    if isinstance(data, str | Path | RemotePath) or _is_list_of_paths(data):
        paths = input_paths(data)
        return open_file(paths[0]) if len(paths) == 1 else AnnDataFiles(paths)
    return with_matrix(data)


def _is_list_of_paths(data: Any) -> bool:
    is_list = isinstance(data, list | tuple) and len(data) > 0
    return is_list and all(isinstance(each, str | Path | RemotePath) for each in data)


class RecentlyOpened(Generic[T]):
    """Keeps the files that were used last open, at most `MAX_OPEN_FILES`; several threads may use it.

    A copy in another process has no open files.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, number: int, open_one: Callable[[int], T]) -> T:
        """Return file `number`, which `open_one` opens if it is not open."""
        with self._lock:
            if number not in self._files:
                if len(self._files) >= MAX_OPEN_FILES:
                    self._files.popitem(last=False)
                self._files[number] = open_one(number)
            self._files.move_to_end(number)
            return self._files[number]

    def clear(self) -> None:
        """Close all files that no thread reads."""
        with self._lock:
            self._files.clear()

    def __reduce__(self) -> tuple[type[RecentlyOpened[T]], tuple[()]]:
        return type(self), ()


class AnnDataFiles:
    """Cells of many files, one after another, with the attributes of an AnnData that `CountSource` and `scfm.fit` need.

    The genes are all genes of all files, in the order of the files; a file has no counts of genes that it lacks. Genes are
    matched by name, and if some files use symbols and others Ensembl ids, by the kind of name that most files have; see
    `CommonNames`. Genes without a name are kept apart, as they count towards the depth of a cell. At most 32 files are open.

    Parameters
    ----------
    paths
        At least two files.
    """

    raw: Any = None

    def __init__(self, paths: Sequence[AnyPath]) -> None:
        self.paths = tuple(paths)
        self.label = f"{len(paths)} files ({paths[0].name}, ...)"
        self.obs = FilesTable(self.paths)
        self.n_obs = len(self.obs)
        self._matrices: dict[tuple[str | None, str | None], tuple[JoinedMatrix, pd.DataFrame]] = {}

    @property
    def obs_names(self) -> pd.Index:
        return self.obs.index

    @property
    def n_vars(self) -> int:
        return self.matrix(None, None)[0].shape[1]

    @cached_property
    def uns(self) -> dict[str, Any]:
        """The part of `uns` that scfm reads, which must be the same in all files."""
        return shared_uns((path.name, open_file(path).uns) for path in self.paths)

    def matrix(self, layer: str | None, gene_key: str | None) -> tuple[JoinedMatrix, pd.DataFrame]:
        """Return the matrix at `layer` of all files, and the table of its genes.

        Raises
        ------
        VocabularyMismatchError
            If the genes are of different species, or too few names of a file can be translated.
        """
        if (layer, gene_key) not in self._matrices:
            self._matrices[layer, gene_key] = _joined(self.paths, self.obs.rows, layer, gene_key)
        return self._matrices[layer, gene_key]

    def other_matrices(self, layer: str | None) -> dict[str, Any]:
        """Return the other matrices of the first file."""
        return other_matrices(open_file(self.paths[0]), layer)


class FilesTable:
    """`obs` of many files, whose columns are read one by one.

    Attributes
    ----------
    rows
        Number of cells of each file.
    """

    def __init__(self, paths: Sequence[AnyPath]) -> None:
        self._paths = paths
        tables = [obs_of(path) for path in paths]
        self.rows = [len(table) for table in tables]
        self._columns = [list(table.columns) for table in tables]
        self.columns = list(dict.fromkeys(name for names in self._columns for name in names))

    def __len__(self) -> int:
        return sum(self.rows)

    @cached_property
    def index(self) -> pd.Index:
        first, *others = [obs_of(path).index for path in self._paths]
        return first.append(others)

    def read_column(self, name: str) -> pd.Series:
        """Return the column of all files; raise `LabelsError` if one lacks it."""
        if lacking := [path.name for path, names in zip(self._paths, self._columns) if name not in names]:
            raise LabelsError(
                f"{len(lacking)} of {len(self._paths)} files have no column {name!r} in `obs`: {', '.join(lacking[:5])}. Add "
                "it, with missing values if there are none, or omit these files."
            )
        parts = [obs_of(path).read_column(name) for path in self._paths]
        if all(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
            texts = [part.cat.rename_categories([str(each) for each in part.cat.categories]) for part in parts]
            return pd.Series(pd.api.types.union_categoricals(texts, ignore_order=True))
        return pd.concat([part.reset_index(drop=True) for part in parts], ignore_index=True)


class JoinedMatrix:
    """The rows of matrices of many files, one after another, with one column per gene of any file.

    Parameters
    ----------
    paths, rows, layer
        The files, their numbers of cells, and the matrix of each.
    column_of
        For each file, the new column of each of its columns, shape (G,).
    n_columns
        Number of columns.
    """

    def __init__(
        self,
        paths: Sequence[AnyPath],
        rows: Sequence[int],
        layer: str | None,
        column_of: Sequence[NDArray[np.int64]],
        n_columns: int,
    ) -> None:
        self._paths, self._layer, self._column_of = paths, layer, column_of
        self._firsts = [0, *np.cumsum(rows).tolist()]
        self.shape = self._firsts[-1], n_columns
        self._opened: RecentlyOpened[tuple[Any, str]] = RecentlyOpened()

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop, _ = rows.indices(self.shape[0])
        parts = list(self._parts(start, stop))
        if not parts:
            return sp.csr_matrix((0, self.shape[1]), dtype=np.float32)
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _parts(self, start: int, stop: int) -> Iterator[sp.csr_matrix]:
        number = max(0, bisect.bisect_right(self._firsts, start) - 1)
        while start < stop:
            first, end = self._firsts[number], min(stop, self._firsts[number + 1])
            if start < end:
                yield self._read(number, start - first, end - first)
            start, number = max(start, end), number + 1

    def _read(self, number: int, start: int, stop: int) -> sp.csr_matrix:
        matrix, name = self._opened.get(number, self._open)
        block = read_rows(matrix, start, stop, name)
        advice = f"Look at this file with `scfm.pp.check({str(self._paths[number])!r})`."
        check_counts(block, name=name, advice=lambda: advice)  # here, because the message names the file
        joined = sp.csr_matrix((block.shape[0], self.shape[1]), dtype=np.int8)
        joined.data, joined.indptr = block.data, block.indptr
        joined.indices = self._column_of[number][block.indices]
        return joined

    def _open(self, number: int) -> tuple[Any, str]:
        matrix, _, name = find_matrix(open_file(self._paths[number]), self._layer)
        return readable_by_rows(matrix, name), name


def _joined(
    paths: Sequence[AnyPath], rows: Sequence[int], layer: str | None, gene_key: str | None
) -> tuple[JoinedMatrix, pd.DataFrame]:
    """Match the genes of files by name; the first, second, ... column of one name are matched with those of other files."""
    variables = (_var_of(path, layer) for path in paths)
    names = CommonNames.of_files(zip([path.name for path in paths], variables), gene_key=gene_key)
    column_of_gene: dict[tuple[str | None, str, int], int] = {}
    column_of: list[NDArray[np.int64]] = []
    maps: dict[str, NDArray[np.int64]] = {}
    for path in paths:
        var = _var_of(path, layer)
        key = names_key(var)
        if key not in maps:
            maps[key] = _columns_of(names.of(var), _types_of(var), column_of_gene)
        column_of.append(maps[key])
    found = pd.DataFrame(list(column_of_gene), columns=["name", "type", "occurrence"])
    var = pd.DataFrame({"feature_types": found["type"].to_numpy()}, index=pd.Index(found["name"], dtype=object))
    if not found["type"].any():
        var = var[[]]
    for kind, column in (("symbol", "feature_name"), ("ensembl", "feature_id")):
        others = {name: alias for alias, name in names.aliases.items()}
        if kind != names.id_type and others:
            var[column] = [others.get(name) for name in found["name"]]
    if gene_key is not None:
        var[gene_key] = found["name"].to_numpy()
    n_common = len(set.intersection(*(set(each.tolist()) for each in maps.values())))
    if n_common < len(found):
        logger.info(
            "The files have %d genes together, and %d in common; a cell has no counts of genes that its file lacks.",
            len(found),
            n_common,
        )
    return JoinedMatrix(paths, rows, layer, column_of, len(found)), var


def _var_of(path: AnyPath, layer: str | None) -> pd.DataFrame:
    var = find_matrix(open_file(path), layer)[1]
    return var if isinstance(var, pd.DataFrame) else var.to_memory()


def _types_of(var: pd.DataFrame) -> list[str]:
    """Return the feature type of each column, empty if it is not given."""
    if "feature_types" not in var:
        return [""] * len(var)
    return ["" if pd.isna(value) else str(value) for value in var["feature_types"]]


def _columns_of(
    names: list[str | None], types: list[str], column_of_gene: dict[tuple[str | None, str, int], int]
) -> NDArray[np.int64]:
    """Return the column of each gene of a file among the genes of all files, and add new genes."""
    seen: dict[tuple[str | None, str], int] = {}
    columns = []
    for name, kind in zip(names, types):
        occurrence = seen[name, kind] = seen.get((name, kind), -1) + 1
        columns.append(column_of_gene.setdefault((name, kind, occurrence), len(column_of_gene)))
    return np.array(columns, dtype=np.int64)
