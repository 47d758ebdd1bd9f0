"""The matrices of an AnnData or AnnCollection, and blocks of their rows."""

# Axes: B cells.

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.data.counts import MAX_COUNT, canonical_csr, check_pointers, native_numbers, signed_indices, survey
from scfm.errors import CountsError


def require_adata(adata: Any) -> None:
    """Raise `TypeError` unless `adata` is an AnnData, which can hold results."""
    if isinstance(getattr(adata, "mod", None), Mapping):
        modalities = ", ".join(map(str, adata.mod))
        raise TypeError(
            f"`adata` is a {type(adata).__name__} with the modalities {modalities}. Pass the modality that holds gene counts, "
            f"such as `mdata[{str(next(iter(adata.mod), 'rna'))!r}]`."
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
    """Sum the columns with the same number in `column_of`, and omit those with -1; the result has shape (B, n_columns)."""
    kept = column_of[block.indices] >= 0
    row_N = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))[kept]
    data = block.data[kept].astype(np.float64)
    return sp.csr_matrix((data, (row_N, column_of[block.indices[kept]])), shape=(block.shape[0], n_columns))


def no_matrix(data: str, element: str, layers: Sequence[str], *, has_raw: bool) -> str:
    """Return an error text: `data` does not have `element`, and other arguments that could be passed."""
    others = [*(f'layer="{name}"' for name in sorted(layers)), *(['layer="raw"'] if has_raw else [])]
    remedy = f"Pass one of {', '.join(others)}." if others else "It has no layer and no `raw` either. Load the counts."
    return f"{data} has no {element}, where counts were expected. {remedy}"


def shared_uns(parts: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the part of `uns` that scfm reads, of several data sets; raise `CountsError` if they contradict each other."""
    keys = {}
    for name, uns in parts:
        records = uns.get("scfm")
        keys[name] = records.get("depth_key") if isinstance(records, Mapping) else None
    if len(set(keys.values())) > 1:
        shown = ", ".join(f"{name}: {key}" for name, key in list(keys.items())[:5])
        raise CountsError(
            f"The data sets name different columns for the depths of their cells ({shown}). Pass `depth_key`, for a column that "
            "all of them have."
        )
    key = next(iter(keys.values()), None)
    return {} if key is None else {"scfm": {"depth_key": key}}


class _CollectionMatrix:
    """A matrix of an AnnCollection, read by rows."""

    def __init__(self, collection: Any, layer: str | None) -> None:
        self._collection, self._layer, self.shape = collection, layer, collection.shape

    def __getitem__(self, rows: slice) -> Any:
        view = self._collection[rows]
        return view.X if self._layer is None else view.layers[self._layer]


class _Collection:
    """The attributes of an AnnCollection that `CountSource` reads, under the names that an AnnData uses."""

    raw: Any = None

    def __init__(self, collection: Any) -> None:
        self.n_obs, self.n_vars = collection.shape
        self.obs, self.obs_names = collection.obs, collection.obs_names
        self.var = pd.DataFrame(index=collection.var_names)
        self.uns = shared_uns((f"part {number}", part.uns) for number, part in enumerate(collection.adatas))
        layers = getattr(collection[:0], "layers", None)
        self.X = _CollectionMatrix(collection, None)
        self.layers = {name: _CollectionMatrix(collection, name) for name in (layers.keys() if layers else ())}


def with_matrix(data: Any) -> Any:
    """Return `data` itself, or an AnnCollection with the attributes of an AnnData; raise `TypeError` for other types."""
    if hasattr(data, "adatas"):
        return _Collection(data)
    require_adata(data)
    return data


def find_matrix(adata: Any, layer: str | None) -> tuple[Any, Any, str]:
    """Return the matrix at `layer`, the `var` that belongs to it, and its name in error messages."""
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
        f"`layer` is {layer!r}, which does not exist. Layers: {sorted(adata.layers) or 'none'}; "
        f"`{label}.raw`: {'present, layer=' + repr('raw') if has_raw else 'none'}."
    )


def _has_raw(adata: Any) -> bool:
    """Whether `raw` exists; for a backed file without one, anndata returns a `raw` without genes."""
    return adata.raw is not None and len(adata.raw.var) > 0


def other_matrices(adata: Any, layer: str | None) -> dict[str, Any]:
    """Return all matrices except the one at `layer`, by the argument that selects them."""
    label = getattr(adata, "label", "adata")
    others = {f'layer="{key}"': adata.layers[key] for key in adata.layers if key != layer}
    if _has_raw(adata) and (layer != "raw" or "raw" in adata.layers):
        others[f'layer="raw" ({label}.raw)'] = adata.raw.X
    if layer is not None and adata.X is not None:
        others[f"layer=None ({label}.X)"] = adata.X
    return others


def readable_by_rows(matrix: Any, name: str) -> Any:
    """Return `matrix` in a form that is fast to read by blocks of rows."""
    matrix = getattr(matrix, "opened", matrix)
    if getattr(matrix, "format", None) == "csc" and not sp.issparse(matrix):
        matrix = matrix.to_memory()  # each block of rows of backed CSC would read the whole file
    matrix = _sliceable(matrix, name)
    return matrix.tocsr() if sp.issparse(matrix) else matrix


def read_rows(matrix: Any, start: int, stop: int, name: str) -> sp.csr_matrix:
    """Read rows of a matrix in canonical CSR form, without a check of the counts; memory is shared if possible."""
    is_csr = sp.issparse(matrix) and matrix.format == "csr"
    block = slice_rows(matrix, start, stop) if is_csr else matrix[start:stop]
    return canonical_csr(block.compute() if hasattr(block, "compute") else block, name=name)


def looks_like_counts(matrix: Any, name: str, *, rows: int = 200) -> bool:
    """Whether the first rows of a matrix of any type are raw counts, and not all zero."""
    try:
        block = read_rows(_sliceable(matrix, name), 0, min(rows, matrix.shape[0]), name)
    except CountsError:
        return False
    low, high, fractions = survey(block.data)
    return bool(block.data.size and low >= 0 and 0 < high <= MAX_COUNT and fractions == 0)


def _sliceable(matrix: Any, name: str) -> Any:
    """Return a matrix whose rows can be sliced: of a sparse one, row pointers (CSR) or all indices (CSC) are checked."""
    if isinstance(matrix, pd.DataFrame | np.matrix):
        return np.asarray(matrix)
    if not sp.issparse(matrix):
        return matrix
    if matrix.format not in ("csr", "csc"):
        return matrix.tocsr()
    check_pointers(matrix.indptr, len(matrix.data), len(matrix.indices), matrix.shape[matrix.format == "csc"])
    return matrix if matrix.format == "csr" else _native_csc(matrix, name)


def _native_csc(matrix: Any, name: str) -> sp.csc_matrix:
    """Return a CSC matrix with numbers and indices of kinds that scipy computes with, after a check of its indices."""
    checked = sp.csc_matrix(matrix.shape, dtype=np.int8)
    checked.data, checked.indices = native_numbers(matrix.data, name=name), signed_indices(matrix.indices)
    checked.indptr = matrix.indptr.astype(np.int64)
    if len(checked.indices) and not 0 <= checked.indices.min() <= checked.indices.max() < matrix.shape[0]:
        raise CountsError(
            f"{name} has a row index out of range: the matrix is damaged. Build it again from its source."
        )
    return checked


def slice_rows(matrix: sp.csr_matrix, start: int, stop: int) -> sp.csr_matrix:
    """Slice rows without copying data or indices, both of which scipy's slicing copies."""
    pointers = matrix.indptr[start : stop + 1].astype(np.int64)
    first, last = pointers[0], pointers[-1]
    block = sp.csr_matrix((stop - start, matrix.shape[1]), dtype=np.int8)
    block.data, block.indices, block.indptr = matrix.data[first:last], matrix.indices[first:last], pointers - first
    return block


def take_rows(matrix: sp.csr_matrix, rows: NDArray[np.integer]) -> sp.csr_matrix:
    """Return rows of a CSR matrix whose row pointers were checked; its entries may be of any dtype."""
    starts, stops = matrix.indptr[rows].astype(np.int64), matrix.indptr[rows + 1].astype(np.int64)
    entries = [slice(starts[first], stops[last - 1]) for first, last in _runs(rows)]
    taken = sp.csr_matrix((len(rows), matrix.shape[1]), dtype=np.int8)
    taken.data = np.concatenate([matrix.data[:0], *(matrix.data[each] for each in entries)])
    taken.indices = np.concatenate([matrix.indices[:0], *(matrix.indices[each] for each in entries)])
    taken.indptr = np.concatenate([[0], np.cumsum(stops - starts)])
    return taken


def _runs(rows: NDArray[np.integer]) -> list[tuple[int, int]]:
    """Return the first and last (exclusive) position of every run of consecutive numbers."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(rows)]))


class SelectedRows:
    """Some rows of a matrix that `readable_by_rows` returned, in any order; they are read when they are sliced."""

    def __init__(self, matrix: Any, rows: NDArray[np.integer], name: str) -> None:
        self._matrix, self._rows, self._name = matrix, rows, name
        self.shape = (len(rows), matrix.shape[1])

    def __getitem__(self, block: slice) -> Any:
        rows = self._rows[block]
        if sp.issparse(self._matrix):
            return take_rows(self._matrix, rows)
        if isinstance(self._matrix, np.ndarray) or hasattr(self._matrix, "compute"):
            return self._matrix[rows]
        parts = [read_rows(self._matrix, int(rows[a]), int(rows[b - 1]) + 1, self._name) for a, b in _runs(rows)]
        return sp.vstack(parts, format="csr") if parts else read_rows(self._matrix, 0, 0, self._name)


def take_columns(block: sp.csr_matrix, kept: NDArray[np.integer]) -> sp.csr_matrix:
    """Return the columns `kept` (ascending) of a canonical CSR matrix; the result is canonical too."""
    new_column = np.full(block.shape[1], -1, dtype=block.indices.dtype)
    new_column[kept] = np.arange(len(kept))
    indices = new_column[block.indices]
    is_kept = indices >= 0
    taken = sp.csr_matrix((block.shape[0], len(kept)), dtype=np.int8)
    taken.data, taken.indices = block.data[is_kept], indices[is_kept]
    taken.indptr = np.concatenate([[0], np.cumsum(is_kept)])[block.indptr].astype(block.indptr.dtype)
    return taken
