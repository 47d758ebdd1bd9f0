"""Count matrices left on disk: `.h5ad` and `.zarr`, of which only what is asked for is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from scfm.data.matrix import CountMatrix, no_matrix
from scfm.data.raw_hdf5 import RawDataset
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
    OSError
        If the file is missing, cut short, or no AnnData.

    Examples
    --------
    >>> import scfm
    >>> scfm.datasets.pbmc().write_h5ad("pbmc.h5ad")
    >>> counts = scfm.data.open_counts("pbmc.h5ad")
    >>> counts.shape, counts.rows(10, 12).shape
    ((700, 765), (2, 765))
    """
    import anndata

    path = Path(path)
    group = open_group(path)
    where, var_where = ("X", "var") if layer is None else (f"layers/{layer}", "var")
    if layer == "raw" and where not in group:
        where, var_where = "raw/X", "raw/var"
    if where not in group:
        raise CountsError(no_matrix(str(path), where, list(group.get("layers", {})), has_raw="raw/X" in group))
    if depth_key is None and "uns/scfm/depth_key" in group:
        depth_key = str(anndata.io.read_elem(group["uns/scfm/depth_key"]))
    if depth_key is not None and f"obs/{depth_key}" not in group:
        raise CountsError(f"`depth_key` is {depth_key!r}, which is not a column of `obs` in {str(path)!r}.")
    return CountMatrix(
        _matrix(group[where]),
        var=anndata.io.read_elem(group[var_where]),
        depth=None if depth_key is None else np.asarray(anndata.io.read_elem(group[f"obs/{depth_key}"])),
        name=f"{path.name}:{where}",
        elsewhere=_other_matrices(group, where),
    )


def _other_matrices(group: Any, where: str) -> dict[str, Any]:
    """Every other matrix of the file, under the argument that names it: where counts may be found instead."""
    places = {"X": "layer=None (X)", **{f"layers/{name}": f'layer="{name}"' for name in group.get("layers", {})}}
    places["raw/X"] = 'layer="raw"'
    return {words: _Unopened(group[place]) for place, words in places.items() if place in group and place != where}


def count_rows(path: str | Path) -> int:
    """Number of cells in a file, without opening more of it than the names' shape."""
    obs = open_group(Path(path))["obs"]
    return int(obs[obs.attrs.get("_index", "_index")].shape[0])


class FileCsr:
    """A CSR matrix on disk: row pointers in memory, a block of rows read in two contiguous pieces.

    anndata's own dataset does the same through several layers; for small blocks they cost more than the reading.
    """

    format = "csr"

    def __init__(self, group: Any) -> None:
        self.indptr = group["indptr"][:].astype(np.int64, copy=False)
        self._indices, self._data = _readable(group["indices"]), _readable(group["data"])
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


def _readable(dataset: Any) -> Any:
    """An HDF5 dataset read straight from its file where its bytes are its numbers; else as it is."""
    if not hasattr(dataset, "id"):
        return dataset
    return RawDataset.of(dataset) or dataset


class _Unopened:
    """A matrix on disk of which nothing is read before it is asked for."""

    def __init__(self, element: Any) -> None:
        self._element = element

    @property
    def shape(self) -> tuple[int, int]:
        return _matrix(self._element).shape

    def __getitem__(self, rows: slice) -> Any:
        return _matrix(self._element)[rows]


def open_group(path: Path) -> Any:
    """Open a `.h5ad` file (h5py) or a `.zarr` folder (zarr) for reading.

    Raises
    ------
    OSError
        If it is missing, cut short, or holds no AnnData.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    group = _open_zarr(path) if path.suffix == ".zarr" else _open_hdf5(path)
    if missing := [part for part in ("obs", "var") if part not in group]:
        raise OSError(f"{path} holds no AnnData: it has no {' and no '.join(missing)}. Write it with `write_h5ad`.")
    return group


def _open_zarr(path: Path) -> Any:
    import zarr

    try:
        return zarr.open_group(path, mode="r")
    except FileNotFoundError as error:  # what zarr raises for a folder of another kind
        raise OSError(f"{path} is not a .zarr folder. Write it with `adata.write_zarr`.") from error


def _open_hdf5(path: Path) -> Any:
    import h5py

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not an .h5ad file; a .zarr folder is named so.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if isinstance(error, PermissionError):
            raise PermissionError(f"{path} cannot be read: permission denied.") from error
        if "truncated" in str(error):
            raise OSError(f"{path} is cut short: its end is missing. Copy or download it again.") from error
        if not path.stat().st_size:
            raise OSError(f"{path} is empty (0 bytes). Copy or download it again.") from error
        raise OSError(f"{path} cannot be read as an .h5ad file ({error}). Is it one, and whole?") from error


def _matrix(element: Any) -> Any:
    kind = element.attrs.get("encoding-type", "array")
    if kind == "csr_matrix":
        return FileCsr(element)
    if kind == "csc_matrix":
        import anndata

        return anndata.io.sparse_dataset(element)
    return element
