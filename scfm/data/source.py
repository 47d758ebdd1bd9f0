"""`CountSource`: raw counts with their gene names and depths, from AnnData in any form; all functions read counts from it."""

# Axes: B cells, G genes.

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scfm.data import columns
from scfm.data.counts import check_counts, log_normalize, row_totals
from scfm.data.gene_names import choose_names
from scfm.data.many_files import AnnDataFiles, open_data
from scfm.data.matrices import (
    SelectedRows,
    find_matrix,
    looks_like_counts,
    other_matrices,
    read_rows,
    readable_by_rows,
    sum_columns,
    take_columns,
)
from scfm.errors import CountsError
from scfm.vocab import Vocabulary, strip_version

logger = logging.getLogger(__name__)

# Rows that are read, checked and encoded at once: enough to make the overhead of calls negligible, and about 100 MB at
# 3,000 expressed genes per cell.
BLOCK_ROWS = 8192
FEATURE_TYPES, GENES = "feature_types", "gene expression"


class CountSource:
    """Raw counts of n_obs cells by n_vars genes, with the names, depths and feature types that belong to them.

    Counts are read in blocks of CSR rows; the whole matrix is never made dense or copied. The exception is CSC (in memory
    or backed), which is converted to CSR once. Features that are not genes according to `var["feature_types"]`
    (antibodies, guides, peaks) are omitted from the matrix and from the depths.

    Parameters
    ----------
    matrix
        Two-dimensional object of shape (n_obs, n_features) that can be sliced by rows.
    var
        One row per feature; its index or a column holds the names of the genes.
    gene_key
        Column of `var` with the gene names; None for the index.
    depth
        Total counts of each cell if the matrix does not hold all genes, shape (n_obs,). None to sum the rows.
    depth_key
        Column that `depth` was read from, if any.
    obs_names
        Names of the cells, or a function that reads them.
    name
        Name of the matrix in error messages.
    elsewhere
        Other matrices of the same AnnData by name. If this one does not hold counts, the error says which of them does.

    Attributes
    ----------
    n_obs, n_vars
        Number of cells and of genes.
    var
        One row per gene.
    columns
        Column of the matrix of each gene, shape (n_vars,).
    omitted
        Number of features that are not genes, by feature type.

    Examples
    --------
    >>> import scfm
    >>> counts = scfm.data.CountSource.of(scfm.datasets.pbmc())
    >>> [(first, block.shape[0]) for first, block, depth_B in counts.blocks(400)]
    [(0, 400), (400, 300)]
    """

    def __init__(
        self,
        matrix: Any,
        *,
        var: pd.DataFrame | None = None,
        gene_key: str | None = None,
        depth: ArrayLike | None = None,
        depth_key: str | None = None,
        obs_names: Any = None,
        name: str = "the matrix",
        elsewhere: Mapping[str, Any] | None = None,
    ) -> None:
        if len(getattr(matrix, "shape", ())) != 2:
            raise CountsError(f"{name} is {type(matrix).__name__}, not a matrix of cells by genes.")
        self.name, self.gene_key, self.depth_key = name, gene_key, depth_key
        self._matrix = readable_by_rows(matrix, name)
        self.n_obs, n_columns = map(int, self._matrix.shape)
        var = pd.DataFrame(index=pd.RangeIndex(n_columns).astype(str)) if var is None else var
        if len(var) != n_columns:
            raise CountsError(
                f"{name} has {n_columns} columns, but its `var` has {len(var)} rows: the data are damaged. Write them again "
                "from their source."
            )
        is_gene, self.omitted = _find_genes(var)
        self.columns = np.flatnonzero(is_gene)
        self.var = var if is_gene.all() else var[is_gene]
        self.n_vars = len(self.columns)
        self._obs_names = obs_names
        self._elsewhere = dict(elsewhere or {})
        self._depth = None if depth is None else _valid_depth(depth, self.n_obs, name)

    @classmethod
    def of(
        cls,
        data: Any,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        depth_key: str | None = None,
        usual_depth_key: str | None = None,
    ) -> CountSource:
        """Return the counts of an AnnData or a file. A `CountSource` is returned unchanged.

        Parameters
        ----------
        data
            An AnnData (in memory, backed, lazy, or a view), an AnnCollection, or one or several paths, patterns and URLs of
            `.h5ad` files and `.zarr` folders, whose cells are read when they are needed. The genes of several files are all
            genes of all of them.
        layer
            Name in `adata.layers`; "raw" for `adata.raw` (with its own genes); None for `adata.X`.
        gene_key
            Column of `var` with the gene names. None to choose a column that matches the vocabulary; see `GeneMap.of`.
        depth_key
            Column of `adata.obs` with the total counts of each cell over all measured genes, for a matrix that holds
            only some of them. None for the column named in `adata.uns["scfm"]["depth_key"]`, or, without one, for the
            sum of each row.
        usual_depth_key
            Column from which a model read the depths of its training cells. It is used if no other column is named; if it is
            missing, a warning is logged.

        Raises
        ------
        CountsError
            If `layer` or `depth_key` does not exist, a depth is negative or not a number, or the matrix does not match
            `obs` and `var`.
        TypeError
            If `data` is of another type.
        OSError
            If a file is missing, cut short, or does not hold an AnnData.

        Examples
        --------
        >>> import scfm
        >>> scfm.datasets.pbmc().write_h5ad("pbmc.h5ad")
        >>> counts = scfm.data.CountSource.of("pbmc.h5ad")
        >>> counts.shape, counts.rows(10, 12).shape
        ((700, 765), (2, 765))
        """
        if isinstance(data, CountSource):
            if layer is not None or depth_key is not None or gene_key not in (None, data.gene_key):
                raise TypeError(
                    "`data` is a CountSource, whose matrix, gene names and depths are already chosen. Pass `layer`, "
                    "`gene_key` and `depth_key` when it is made, with `CountSource.of(adata, ...)`."
                )
            return data
        data = open_data(data)
        if isinstance(data, AnnDataFiles):
            matrix, var = data.matrix(layer, gene_key)
            name, elsewhere = data.label, data.other_matrices(layer)
        else:
            matrix, var, name = find_matrix(data, layer)
            elsewhere = other_matrices(data, layer)
        var = var if isinstance(var, pd.DataFrame) else var.to_memory()
        if tuple(matrix.shape) != (data.n_obs, len(var)):
            raise CountsError(
                f"{name} has {matrix.shape[0]} rows and {matrix.shape[1]} columns, but there are {data.n_obs} cells and "
                f"{len(var)} genes: the data are damaged. Write them again from their source."
            )
        depth_key = depth_key or _named_depth_key(data.uns) or _found(usual_depth_key, data.obs)
        return cls(
            matrix,
            var=var,
            gene_key=gene_key,
            depth=None if depth_key is None else columns.totals(data.obs, depth_key),
            depth_key=depth_key,
            obs_names=lambda: data.obs_names,
            name=name,
            elsewhere=elsewhere,
        )

    def select(self, rows: ArrayLike) -> CountSource:
        """Return the counts of some cells, which are read from the same matrix when they are needed.

        Parameters
        ----------
        rows
            Row numbers, in any order, or a boolean mask, shape (n_obs,).

        Examples
        --------
        >>> import scfm
        >>> counts = scfm.data.CountSource.of(scfm.datasets.pbmc())
        >>> counts.select([5, 3]).obs_names.tolist() == counts.obs_names[[5, 3]].tolist()
        True
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        selected = copy.copy(self)
        selected._matrix, selected.n_obs = SelectedRows(self._matrix, rows, self.name), len(rows)
        selected._depth = None if self._depth is None else self._depth[rows]
        selected._obs_names = lambda: self.obs_names[rows]
        return selected

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_obs, self.n_vars

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        names = self._obs_names() if callable(self._obs_names) else self._obs_names
        return pd.RangeIndex(self.n_obs).astype(str) if names is None else pd.Index(names)

    @property
    def named_depth(self) -> NDArray[np.float64] | None:
        """Total counts of each cell if the data give them, shape (n_obs,); None if rows are summed."""
        return self._depth

    def names(self, vocabulary: Vocabulary | None = None) -> tuple[list[str | None], str]:
        """Return the names of the genes, shape (n_vars,), with None for a missing name, and where they were found.

        Parameters
        ----------
        vocabulary
            If `gene_key` is None and `var_names` are of another kind than its genes (Ensembl ids instead of symbols, or the
            reverse), a column of `var` that commonly holds the right kind is used. None for `var_names`.
        """
        return choose_names(self.var, gene_key=self.gene_key, vocabulary=vocabulary)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Read rows start..stop in canonical CSR form, without a check; memory is shared with the source if possible."""
        block = read_rows(self._matrix, start, stop, self.name)
        return take_columns(block, self.columns) if self.omitted else block

    def blocks(
        self, rows: int = BLOCK_ROWS, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, sp.csr_matrix, NDArray[np.float64]]]:
        """Yield blocks of cells: the first row, checked counts (CSR, without explicit zeros), and depths (float64).

        Raises
        ------
        CountsError
            At the first block that does not hold raw counts; the message says where counts may be found.
        """
        stop = self.n_obs if stop is None else stop
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            block = self.check(self.rows(first, last))
            yield first, block, row_totals(block) if self._depth is None else self._depth_of(block, first, last)

    def row_lengths(self) -> NDArray[np.int32] | None:
        """Return the number of stored values of each cell, shape (n_obs,), from row pointers; None if there are none.

        It is an upper bound of the number of expressed genes, and needs no counts.
        """
        pointers = getattr(self._matrix, "indptr", None) if getattr(self._matrix, "format", None) == "csr" else None
        return None if pointers is None else np.diff(pointers).astype(np.int32)

    def depth(self) -> NDArray[np.float64]:
        """Return the total counts of every cell over all measured genes, shape (n_obs,), float64."""
        if self._depth is not None:
            return self._depth
        return np.concatenate([depth for _, _, depth in self.blocks()]) if self.n_obs else np.zeros(0)

    def check(self, block: sp.csr_matrix) -> sp.csr_matrix:
        """Return `block` without explicit zeros; raise `CountsError` unless it holds raw counts."""
        low = check_counts(block, name=self.name, advice=self._advice)
        if low > 0 or np.count_nonzero(block.data) == len(block.data):
            return block
        block = block.copy()
        block.eliminate_zeros()
        return block

    def log_normalized(self) -> tuple[sp.csr_matrix, list[str]]:
        """Return log1p of counts per 10,000 by gene, shape (n_obs, G), CSR float32, and the names of the genes.

        Columns of the same gene are summed first. Genes without a name are omitted, but count towards the depth.
        """
        names = [None if name is None else strip_version(name) for name in self.names()[0]]
        genes = list(dict.fromkeys(name for name in names if name is not None))
        column_of_gene = {gene: column for column, gene in enumerate(genes)}
        column_of = np.array([-1 if name is None else column_of_gene[name] for name in names], dtype=np.int64)
        is_plain = len(genes) == self.n_vars
        parts = [
            log_normalize(block if is_plain else sum_columns(block, column_of, len(genes)), depth_B)
            for _, block, depth_B in self.blocks()
        ]
        empty = sp.csr_matrix((0, len(genes)), dtype=np.float32)
        return sp.vstack(parts, format="csr") if parts else empty, genes

    def matrices_with_counts(self) -> list[str]:
        """Return the other matrices of the AnnData whose first rows look like raw counts."""
        return [name for name, matrix in self._elsewhere.items() if looks_like_counts(matrix, name)]

    def _depth_of(self, block: sp.csr_matrix, first: int, last: int) -> NDArray[np.float64]:
        """Return the given depths of a block of cells; a cell with counts must have a positive depth."""
        assert self._depth is not None
        depth_B = self._depth[first:last]
        without = (depth_B == 0) & (np.diff(block.indptr) > 0)
        if without.any():
            raise CountsError(
                f"Cell {first + int(without.argmax())} of {self.name} has counts, but its depth is 0. Pass another "
                "`depth_key`, or None to sum the rows."
            )
        return depth_B

    def _advice(self) -> str:
        found = self.matrices_with_counts()
        if found:
            return f"Other matrices of these data seem to hold raw counts: pass {' or '.join(found)}."
        searched = ", ".join(self._elsewhere) or "there are no layers and no `raw`"
        return (
            f"No raw counts were found elsewhere ({searched}). Load the unnormalized matrix, keep it as "
            '`adata.layers["counts"]`, and pass `layer="counts"`.'
        )


def _named_depth_key(uns: Mapping[str, Any]) -> str | None:
    """Return the column for depths that is named in `uns["scfm"]`, which may hold unrelated content of other programs."""
    records = uns.get("scfm")
    depth_key = records.get("depth_key") if isinstance(records, Mapping) else None
    return depth_key if isinstance(depth_key, str) else None


def _found(depth_key: str | None, obs: Any) -> str | None:
    """The column that a model read depths from, if these cells have it too; else None, and a warning in the log."""
    if depth_key is None or depth_key in list(obs.columns):
        return depth_key
    logger.warning(
        "The model was fitted with the depth of each cell from `adata.obs[%r]`, which these cells lack: their counts are "
        "summed. That is right if they hold all measured genes; if not, pass `depth_key=`.",
        depth_key,
    )
    return None


def _find_genes(var: pd.DataFrame) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Return which features are genes, and the number of the others by type; without any labeled gene, all are genes."""
    if FEATURE_TYPES not in var:
        return np.ones(len(var), dtype=bool), {}
    types = columns.as_names(
        columns.find(var, FEATURE_TYPES, argument="feature_types", where="adata.var", error=CountsError)
    )
    is_gene = np.array([name is None or name.lower() == GENES for name in types], dtype=bool)
    if all(name is None or name.lower() != GENES for name in types):
        return np.ones(len(var), dtype=bool), {}
    others = pd.Series([name for name, gene in zip(types, is_gene) if not gene], dtype=object)
    return is_gene, {str(name): int(count) for name, count in others.value_counts().items()}


def _valid_depth(depth: ArrayLike, n_obs: int, name: str) -> NDArray[np.float64]:
    depth_B = np.ascontiguousarray(depth, dtype=np.float64)
    if depth_B.shape != (n_obs,):
        raise CountsError(f"The depths have shape {depth_B.shape}; {name} has {n_obs} cells.")
    wrong = ~((depth_B <= np.finfo(np.float32).max) & (depth_B >= 0))  # what is not a number is wrong too
    if wrong.any():
        raise CountsError(
            f"{int(wrong.sum())} of {n_obs} depths are negative, not numbers or beyond float32 (cell "
            f"{int(wrong.argmax())}: {depth_B[wrong.argmax()]}). Total counts must be finite and not negative."
        )
    return depth_B
