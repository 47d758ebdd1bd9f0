"""The matrices of an AnnData or AnnCollection, and blocks of their rows."""

# Axes: B cells.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.data.counts import check_pointers, native_numbers, signed_indices
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
    uns: Mapping[str, Any] = {}

    def __init__(self, collection: Any) -> None:
        self.n_obs, self.obs, self.obs_names = collection.n_obs, collection.obs, collection.obs_names
        self.var = pd.DataFrame(index=collection.var_names)
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
    if isinstance(matrix, pd.DataFrame):
        return matrix.to_numpy()
    matrix = getattr(matrix, "opened", matrix)
    if getattr(matrix, "format", None) == "csc" and not sp.issparse(matrix):
        matrix = matrix.to_memory()  # each block of rows of backed CSC would read the whole file
    if sp.issparse(matrix):
        return _checked_sparse(matrix, name)
    return np.asarray(matrix) if isinstance(matrix, np.matrix) else matrix


def _checked_sparse(matrix: Any, name: str) -> sp.csr_matrix:
    """Return a sparse matrix as CSR after a check of its row pointers; its entries are not checked."""
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


def slice_rows(matrix: sp.csr_matrix, start: int, stop: int) -> sp.csr_matrix:
    """Slice rows without copying data or indices, both of which scipy's slicing copies."""
    pointers = matrix.indptr[start : stop + 1].astype(np.int64)
    first, last = pointers[0], pointers[-1]
    block = sp.csr_matrix((stop - start, matrix.shape[1]), dtype=np.int8)
    block.data, block.indices, block.indptr = matrix.data[first:last], matrix.indices[first:last], pointers - first
    return block


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
