"""`CountSource`: the only way in which counts enter, in whatever form AnnData holds them."""

# Axes: B cells, G genes.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scfm.data import columns
from scfm.data.counts import (
    canonical_csr,
    check_counts,
    check_pointers,
    log_normalize,
    looks_like_counts,
    native_numbers,
    row_totals,
    signed_indices,
)
from scfm.data.files import AnnDataFile
from scfm.data.gene_names import choose_names
from scfm.errors import CountsError
from scfm.vocab import Vocabulary, strip_version

# A block of rows is read, checked and encoded at once: large enough to amortise calls, small enough for the cache of
# a laptop's memory budget (about 100 MB at 3,000 genes a cell).
BLOCK_ROWS = 8192
FEATURE_TYPES, GENES = "feature_types", "gene expression"


class CountSource:
    """Raw counts of n_obs cells by n_vars genes, with the names, depths and feature types that belong to them.

    Counts are read in blocks of CSR rows, never densified and never copied as a whole. Dense arrays, CSR, backed and
    lazy matrices and views are read a block at a time. CSC (in memory or backed) is turned into CSR once, which costs
    one copy. Features that `var["feature_types"]` says are not genes (antibodies, guides, peaks) are left out of the
    matrix and of the depths.

    Parameters
    ----------
    matrix
        Anything two-dimensional that gives blocks of rows by slicing.
    var
        One row per feature; its index and columns name the genes.
    gene_key
        Column of `var` with the gene names; None for the index.
    depth
        Total counts of each cell where the matrix does not hold all genes, shape (n_obs,); None to sum the rows.
    obs_names
        Names of the cells, or a function that reads them.
    name
        What to call the matrix in errors.
    elsewhere
        Other matrices of the same AnnData by name, searched for counts when an error has to say where they are.

    Attributes
    ----------
    n_obs, n_vars
        Number of cells and of genes.
    var
        One row per gene.
    columns
        Column of the matrix that each gene is in, shape (n_vars,).
    left_out
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
        obs_names: Any = None,
        name: str = "the matrix",
        elsewhere: Mapping[str, Any] | None = None,
    ) -> None:
        if len(getattr(matrix, "shape", ())) != 2:
            raise CountsError(f"{name} is {type(matrix).__name__}, not a matrix of cells by genes.")
        self.name, self.gene_key = name, gene_key
        self._matrix = _row_readable(matrix, name)
        self.n_obs, n_columns = map(int, self._matrix.shape)
        var = pd.DataFrame(index=pd.RangeIndex(n_columns).astype(str)) if var is None else var
        if len(var) != n_columns:
            raise CountsError(
                f"{name} has {n_columns} columns, but its `var` has {len(var)} rows: the data are damaged."
            )
        is_gene, self.left_out = _find_genes(var)
        self.columns = np.flatnonzero(is_gene)
        self.var = var if is_gene.all() else var[is_gene]
        self.n_vars = len(self.columns)
        self._obs_names = obs_names
        self._elsewhere = dict(elsewhere or {})
        self._depth = None if depth is None else _valid_depth(depth, self.n_obs, name)

    @classmethod
    def of(
        cls, data: Any, *, layer: str | None = None, gene_key: str | None = None, depth_key: str | None = None
    ) -> CountSource:
        """Open the counts of an AnnData, a file, or a `CountSource` (which is returned as it is).

        Parameters
        ----------
        data
            AnnData in memory, backed, lazy, or a view; an AnnCollection; the path of a `.h5ad` file or `.zarr` folder,
            of which cells are read when they are asked for.
        layer
            Name in `adata.layers`; "raw" for `adata.raw` (with its own genes); None for `adata.X`.
        gene_key
            Column of `var` with the gene names; None to choose by the vocabulary that they are looked up in.
        depth_key
            Column of `adata.obs` with the total counts of each cell over all genes measured, for a matrix that holds
            only some of them. If None, `adata.uns["scfm"]["depth_key"]` names it; without either, rows are summed.

        Raises
        ------
        CountsError
            If `layer` or `depth_key` is missing, the depths are not positive numbers, or the matrix does not match
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
                raise TypeError("A CountSource is open already: pass `layer`, `gene_key` and `depth_key` to `of`.")
            return data
        if isinstance(data, str | Path):
            data = AnnDataFile(Path(data))
        else:
            data = _with_matrix(data)
        matrix, var, name = _find_matrix(data, layer)
        var = var if isinstance(var, pd.DataFrame) else var.to_memory()
        if tuple(matrix.shape) != (data.n_obs, len(var)):
            raise CountsError(
                f"{name} has {matrix.shape[0]} rows and {matrix.shape[1]} columns, but there are {data.n_obs} cells and "
                f"{len(var)} genes: the data are damaged. Write them again from their source."
            )
        depth_key = depth_key or _named_depth_key(data.uns)
        return cls(
            matrix,
            var=var,
            gene_key=gene_key,
            depth=None if depth_key is None else columns.totals(data.obs, depth_key),
            obs_names=lambda: data.obs_names,
            name=name,
            elsewhere=_other_matrices(data, layer),
        )

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
        """Total counts of each cell where the data name them, shape (n_obs,); None where rows are summed."""
        return self._depth

    def names(self, vocabulary: Vocabulary | None = None) -> tuple[list[str | None], str]:
        """Names of the genes, shape (n_vars,), None where one is missing, and where they come from.

        Parameters
        ----------
        vocabulary
            If `var_names` are of another kind than its genes (Ensembl ids for symbols, or the reverse) and `gene_key` is
            None, a column of `var` that is known to hold that kind is used; None to take `var_names`.
        """
        return choose_names(self.var, gene_key=self.gene_key, vocabulary=vocabulary)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Read rows start..stop in canonical CSR form, unchecked; shares memory with the source where it can."""
        block = _csr_rows(self._matrix, start, stop) if sp.issparse(self._matrix) else self._matrix[start:stop]
        block = canonical_csr(block.compute() if hasattr(block, "compute") else block, name=self.name)
        return _take_columns(block, self.columns) if self.left_out else block

    def blocks(
        self, rows: int = BLOCK_ROWS, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, sp.csr_matrix, NDArray[np.float64]]]:
        """Read in blocks: first row, its checked CSR counts without zeros, and the depths of its cells (float64).

        Raises
        ------
        CountsError
            At the first block that does not hold raw counts; says where counts may be found.
        """
        stop = self.n_obs if stop is None else stop
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            block = self.check(self.rows(first, last))
            yield first, block, row_totals(block) if self._depth is None else self._depth_of(block, first, last)

    def depth(self) -> NDArray[np.float64]:
        """Total counts of every cell over all genes measured, shape (n_obs,), float64."""
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
        """log1p of counts per 10,000 by gene, shape (n_obs, G), CSR float32, and the names of the genes.

        Columns of one gene are summed first. Genes without a name are left out, though they count for the depth.
        """
        names = [None if name is None else strip_version(name) for name in self.names()[0]]
        genes = list(dict.fromkeys(name for name in names if name is not None))
        place = {gene: column for column, gene in enumerate(genes)}
        column_of = np.array([-1 if name is None else place[name] for name in names], dtype=np.int64)
        is_plain = len(genes) == self.n_vars
        parts = [
            log_normalize(block if is_plain else sum_columns(block, column_of, len(genes)), depth_B)
            for _, block, depth_B in self.blocks()
        ]
        empty = sp.csr_matrix((0, len(genes)), dtype=np.float32)
        return sp.vstack(parts, format="csr") if parts else empty, genes

    def places_with_counts(self) -> list[str]:
        """Where else in the AnnData raw counts seem to be, judged by the first rows."""
        return [place for place, matrix in self._elsewhere.items() if looks_like_counts(matrix)]

    def _depth_of(self, block: sp.csr_matrix, first: int, last: int) -> NDArray[np.float64]:
        """The depths that the data name, which a cell with counts must have."""
        assert self._depth is not None
        depth_B = self._depth[first:last]
        without = (depth_B == 0) & (np.diff(block.indptr) > 0)
        if without.any():
            raise CountsError(
                f"Cell {first + int(without.argmax())} of {self.name} has counts, but its depth is 0. Name another column "
                "by `depth_key`, or None to sum the rows."
            )
        return depth_B

    def _advice(self) -> str:
        places = self.places_with_counts()
        if places:
            return f"Raw counts seem to be in {' and '.join(places)}: pass that."
        searched = ", ".join(self._elsewhere) or "there are no layers and no `raw`"
        return (
            f"No raw counts were found elsewhere ({searched}). Load the unnormalized matrix, keep it as "
            '`adata.layers["counts"]`, and pass `layer="counts"`.'
        )


def require_adata(adata: Any) -> None:
    """Raise `TypeError` unless `adata` is an AnnData, which can hold results."""
    if isinstance(getattr(adata, "mod", None), Mapping):
        modalities = ", ".join(map(str, adata.mod))
        raise TypeError(
            f"`adata` is a {type(adata).__name__} with the modalities {modalities}. Pass the one that holds genes, such as "
            f"`mdata[{str(next(iter(adata.mod), 'rna'))!r}]`."
        )
    if hasattr(adata, "adatas"):
        raise TypeError(
            f"`adata` is an {type(adata).__name__}, which cannot hold results. Pass `collection[:].to_adata()`, or its "
            "files to `scfm.tl.embed_files`."
        )
    if not hasattr(adata, "obs_names"):
        raise TypeError(
            f"`adata` is a {type(adata).__name__}, not an AnnData. Read a file with `anndata.read_h5ad(path)`, or wrap a "
            "matrix of cells by genes in `anndata.AnnData(matrix)` and set `var_names`."
        )


def sum_columns(block: sp.csr_matrix, column_of: NDArray[np.integer], n_columns: int) -> sp.csr_matrix:
    """Sum the columns that have the same number in `column_of` and leave out those that have -1; shape (B, n_columns)."""
    kept = column_of[block.indices] >= 0
    row_N = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))[kept]
    data = block.data[kept].astype(np.float64)
    return sp.csr_matrix((data, (row_N, column_of[block.indices[kept]])), shape=(block.shape[0], n_columns))


def no_matrix(data: str, place: str, layers: Sequence[str], *, has_raw: bool) -> str:
    """Say that `data` has nothing at `place`, and what to do with what there is."""
    others = [*(f'layer="{name}"' for name in sorted(layers)), *(['layer="raw"'] if has_raw else [])]
    remedy = (
        f"Pass one of {', '.join(others)}." if others else "There is no layer and no `raw` either: load the counts."
    )
    return f"{data} has no {place}, where counts were expected. {remedy}"


class _CollectionMatrix:
    """A matrix of an AnnCollection, read by rows."""

    def __init__(self, collection: Any, layer: str | None) -> None:
        self._collection, self._layer, self.shape = collection, layer, collection.shape

    def __getitem__(self, rows: slice) -> Any:
        view = self._collection[rows]
        return view.X if self._layer is None else view.layers[self._layer]


class _Collection:
    """What is read of an AnnCollection, under the names that an AnnData has for it."""

    raw: Any = None
    uns: Mapping[str, Any] = {}

    def __init__(self, collection: Any) -> None:
        self.n_obs, self.obs, self.obs_names = collection.n_obs, collection.obs, collection.obs_names
        self.var = pd.DataFrame(index=collection.var_names)
        layers = getattr(collection[:0], "layers", None)
        self.X = _CollectionMatrix(collection, None)
        self.layers = {name: _CollectionMatrix(collection, name) for name in (layers.keys() if layers else ())}


def _with_matrix(data: Any) -> Any:
    if hasattr(data, "adatas"):
        return _Collection(data)
    require_adata(data)
    return data


def _find_matrix(adata: Any, layer: str | None) -> tuple[Any, Any, str]:
    label = getattr(adata, "label", "adata")
    has_raw = _has_raw(adata)
    if layer is None:
        if adata.X is None:
            raise CountsError(no_matrix(label, "X", list(adata.layers), has_raw=has_raw))
        return adata.X, adata.var, f"{label}.X"
    if not isinstance(layer, str):
        raise TypeError(f"`layer` is {layer!r}; it must be the name of a layer, or None for X.")
    if layer in adata.layers:
        return adata.layers[layer], adata.var, f'{label}.layers["{layer}"]'
    if layer == "raw" and has_raw:
        return adata.raw.X, adata.raw.var, f"{label}.raw.X"
    raise CountsError(
        f"`layer` is {layer!r}, which is not there. Layers: {sorted(adata.layers) or 'none'}; "
        f"`{label}.raw`: {'present, layer=' + repr('raw') if has_raw else 'none'}."
    )


def _has_raw(adata: Any) -> bool:
    """Whether there is a `raw`: of a backed file without one, anndata gives a `raw` without genes."""
    return adata.raw is not None and len(adata.raw.var) > 0


def _other_matrices(adata: Any, layer: str | None) -> dict[str, Any]:
    """Every matrix but the one at `layer`, under the argument that names it."""
    label = getattr(adata, "label", "adata")
    others = {f'layer="{key}"': adata.layers[key] for key in adata.layers if key != layer}
    if _has_raw(adata) and (layer != "raw" or "raw" in adata.layers):
        others[f'layer="raw" ({label}.raw)'] = adata.raw.X
    if layer is not None and adata.X is not None:
        others[f"layer=None ({label}.X)"] = adata.X
    return others


def _named_depth_key(uns: Mapping[str, Any]) -> str | None:
    """The column that `uns["scfm"]` names for depths; whatever else is there is not ours."""
    records = uns.get("scfm")
    depth_key = records.get("depth_key") if isinstance(records, Mapping) else None
    return depth_key if isinstance(depth_key, str) else None


def _find_genes(var: pd.DataFrame) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Which features are genes, and how many of each other type there are: all are genes unless some are said to be."""
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


def _row_readable(matrix: Any, name: str) -> Any:
    """Return `matrix` in a form whose blocks of rows are cheap to read."""
    if isinstance(matrix, pd.DataFrame):
        return matrix.to_numpy()
    matrix = getattr(matrix, "opened", matrix)
    if getattr(matrix, "format", None) == "csc" and not sp.issparse(matrix):
        matrix = matrix.to_memory()  # backed CSC: a block of rows would read the whole file each time
    if sp.issparse(matrix):
        return _checked_sparse(matrix, name)
    return np.asarray(matrix) if isinstance(matrix, np.matrix) else matrix


def _checked_sparse(matrix: Any, name: str) -> sp.csr_matrix:
    """A sparse matrix as CSR whose pointers can be followed; entries are not looked at."""
    if matrix.format not in ("csr", "csc"):
        return matrix.tocsr()
    check_pointers(matrix.indptr, len(matrix.data), len(matrix.indices), matrix.shape[matrix.format == "csc"])
    if matrix.format == "csr":
        return matrix
    checked = sp.csc_matrix(matrix.shape, dtype=np.int8)
    checked.data, checked.indices = native_numbers(matrix.data, name=name), signed_indices(matrix.indices)
    checked.indptr = matrix.indptr.astype(np.int64)
    if len(checked.indices) and not 0 <= checked.indices.min() <= checked.indices.max() < matrix.shape[0]:
        raise CountsError(
            f"{name} has a row index out of range: the matrix is damaged. Build it again from its source."
        )
    return checked.tocsr()


def _csr_rows(matrix: sp.csr_matrix, start: int, stop: int) -> sp.csr_matrix:
    """Slice rows without copying data or indices (scipy's own slicing copies both)."""
    pointers = matrix.indptr[start : stop + 1].astype(np.int64)
    first, last = pointers[0], pointers[-1]
    block = sp.csr_matrix((stop - start, matrix.shape[1]), dtype=np.int8)
    block.data, block.indices, block.indptr = matrix.data[first:last], matrix.indices[first:last], pointers - first
    return block


def _take_columns(block: sp.csr_matrix, kept: NDArray[np.integer]) -> sp.csr_matrix:
    """Columns `kept` (ascending) of a canonical CSR matrix, which stays canonical."""
    new_column = np.full(block.shape[1], -1, dtype=block.indices.dtype)
    new_column[kept] = np.arange(len(kept))
    indices = new_column[block.indices]
    is_kept = indices >= 0
    taken = sp.csr_matrix((block.shape[0], len(kept)), dtype=np.int8)
    taken.data, taken.indices = block.data[is_kept], indices[is_kept]
    taken.indptr = np.concatenate([[0], np.cumsum(is_kept)])[block.indptr].astype(block.indptr.dtype)
    return taken


def _valid_depth(depth: ArrayLike, n_obs: int, name: str) -> NDArray[np.float64]:
    depth_B = np.ascontiguousarray(depth, dtype=np.float64)
    if depth_B.shape != (n_obs,):
        raise CountsError(f"The depths have shape {depth_B.shape}; {name} has {n_obs} cells.")
    wrong = ~(np.isfinite(depth_B) & (depth_B >= 0))
    if wrong.any():
        raise CountsError(
            f"{int(wrong.sum())} of {n_obs} depths are negative or not numbers (cell {int(wrong.argmax())}: "
            f"{depth_B[wrong.argmax()]}). Total counts must be finite and not negative."
        )
    return depth_B
