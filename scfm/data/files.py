"""Count matrices left on disk: `.h5ad` and `.zarr`, of which only what is asked for is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from scfm.data.matrix import CountMatrix
from scfm.errors import CountsError


def open_counts(path: str | Path, *, layer: str | None = None, depth_key: str | None = None) -> CountMatrix:
    """Open the counts of a file; cells are read when asked for, `obsm` and the rest of the file never.

    Parameters
    ----------
    path
        `.h5ad` file or `.zarr` folder.
    layer
        Layer with the counts, "raw" for `raw`; None for X.
    depth_key
        Column of `obs` with total counts. None takes the column that the file names, if any, or sums the rows.

    Raises
    ------
    CountsError
        If the file has no such matrix or column.
    """
    import anndata

    path = Path(path)
    group = _open_group(path)
    where, var_where = ("X", "var") if layer is None else (f"layers/{layer}", "var")
    if layer == "raw" and where not in group:
        where, var_where = "raw/X", "raw/var"
    if where not in group:
        raise CountsError(
            f"{str(path)!r} has no {where!r}; it has {sorted(group)}, layers {sorted(group.get('layers', {}))}."
        )
    if depth_key is None and "uns/scfm/depth_key" in group:
        depth_key = str(anndata.io.read_elem(group["uns/scfm/depth_key"]))
    if depth_key is not None and f"obs/{depth_key}" not in group:
        raise CountsError(f"`depth_key` is {depth_key!r}, which is not a column of `obs` in {str(path)!r}.")
    return CountMatrix(
        _matrix(group[where]),
        var=anndata.io.read_elem(group[var_where]),
        depth=None if depth_key is None else np.asarray(anndata.io.read_elem(group[f"obs/{depth_key}"])),
        name=f"{path.name}:{where}",
    )


def count_rows(path: str | Path) -> int:
    """Number of cells in a file, without opening more of it than the names' shape."""
    obs = _open_group(Path(path))["obs"]
    return int(obs[obs.attrs.get("_index", "_index")].shape[0])


class FileCsr:
    """A CSR matrix on disk: row pointers in memory, a block of rows read in two contiguous pieces.

    anndata's own dataset does the same through several layers; for small blocks they cost more than the reading.
    """

    format = "csr"

    def __init__(self, group: Any) -> None:
        self.indptr = group["indptr"][:].astype(np.int64, copy=False)
        self._indices, self._data = group["indices"], group["data"]
        self.shape = tuple(int(size) for size in group.attrs["shape"])
        self.dtype = self._data.dtype
        if len(self.indptr) != self.shape[0] + 1 or self.indptr[-1] != self._data.shape[0]:
            raise CountsError("The row pointers of the matrix on disk do not fit its entries; the file is damaged.")

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        block = sp.csr_matrix((stop - start, self.shape[1]), dtype=self.dtype.newbyteorder("="))
        block.data = np.asarray(self._data[first:last])
        block.indices = np.asarray(self._indices[first:last])
        block.indptr = self.indptr[start : stop + 1] - first
        return block


def _open_group(path: Path) -> Any:
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_group(path, mode="r")
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist.")
    return h5py.File(path, "r")


def _matrix(element: Any) -> Any:
    kind = element.attrs.get("encoding-type", "array")
    if kind == "csr_matrix":
        return FileCsr(element)
    if kind == "csc_matrix":
        import anndata

        return anndata.io.sparse_dataset(element)
    return element
