"""Read parts of `.h5ad` files and `.zarr` folders without loading the rest."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm._remote import AnyPath, SomaPath, input_path
from scfm.data.counts import check_pointers
from scfm.data.raw_hdf5 import RawDataset
from scfm.data.soma import SomaData, SomaTable


class AnnDataFile:
    """A file with the attributes of an AnnData that `CountSource` needs; each is read when it is first used.

    Parameters
    ----------
    path
        `.h5ad` file or `.zarr` folder, or a URL of one.

    Raises
    ------
    OSError
        If the file is missing, cut short, or does not hold an AnnData.
    """

    def __init__(self, path: AnyPath) -> None:
        self.label = path.name
        self._group = open_group(path)
        self.obs, self.var = FileTable(self._group["obs"]), FileTable(self._group["var"])
        self.n_obs = len(self.obs)
        self.layers = {name: FileMatrix(element) for name, element in dict(self._group.get("layers", {})).items()}
        self.X = FileMatrix(self._group["X"]) if "X" in self._group else None
        # anndata 0.6 wrote raw as two elements.
        where = next((where for where in ("raw/{}", "raw.{}") if where.format("X") in self._group), None)
        self.raw = None if where is None else _Raw(self._group[where.format("X")], self._group[where.format("var")])

    @property
    def n_vars(self) -> int:
        return len(self.var)

    @property
    def obs_names(self) -> pd.Index:
        return self.obs.index

    @property
    def uns(self) -> dict[str, Any]:
        """The part of `uns` that scfm reads."""
        import anndata

        return {"scfm": anndata.io.read_elem(self._group["uns/scfm"])} if "uns/scfm" in self._group else {}


class _Raw:
    def __init__(self, matrix: Any, var: Any) -> None:
        self.X, self.var = FileMatrix(matrix), FileTable(var)


class FileTable:
    """`obs` or `var` of a file; columns are read one by one."""

    def __init__(self, element: Any) -> None:
        self._element = element
        # Before anndata 0.8 tables stored categories separately; before 0.7 a table was one array of records.
        self._is_current = element.attrs.get("encoding-version") == "0.2.0"

    def __len__(self) -> int:
        if not hasattr(self._element, "keys"):
            return int(self._element.shape[0])
        index = self._element[self._element.attrs.get("_index", "_index")]
        # Nullable and categorical arrays are groups.
        return int((index if hasattr(index, "shape") else index["values" if "values" in index else "codes"]).shape[0])

    @property
    def columns(self) -> list[str]:
        return list(self._element.attrs["column-order"]) if self._is_current else list(self.to_memory().columns)

    @cached_property
    def index(self) -> pd.Index:
        return pd.Index(self._read(self._element.attrs["_index"])) if self._is_current else self.to_memory().index

    def read_column(self, name: str) -> pd.Series:
        return pd.Series(self._read(name)) if self._is_current else self.to_memory()[name]

    def to_memory(self) -> pd.DataFrame:
        return self._table

    @cached_property
    def _table(self) -> pd.DataFrame:
        import anndata

        table = anndata.io.read_elem(self._element)
        if isinstance(table, pd.DataFrame):
            return table
        records = pd.DataFrame({name: table[name] for name in table.dtype.names})
        texts = [name for name in records if records[name].map(lambda value: isinstance(value, bytes)).all()]
        records[texts] = records[texts].map(bytes.decode)
        return records.set_index(records.columns[0])

    def _read(self, name: str) -> Any:
        import anndata

        return anndata.io.read_elem(self._element[name])


class FileMatrix:
    """A matrix on disk, opened when it is first used."""

    def __init__(self, element: Any) -> None:
        self._element = element

    @cached_property
    def opened(self) -> Any:
        kind = _kind(self._element)
        if kind == "csr":
            return FileCsr(self._element)
        if kind == "csc":
            import anndata

            return anndata.io.sparse_dataset(self._element)
        return self._element

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.opened.shape)

    def __getitem__(self, rows: slice) -> Any:
        return self.opened[rows]


class FileCsr:
    """A CSR matrix on disk. Row pointers are in memory, and a block of rows is two contiguous reads.

    anndata's dataset class does the same with more overhead: for blocks of 256 rows it read a tenth of the rows per second
    of an uncompressed .h5ad file, and two thirds of a compressed one.
    """

    format = "csr"

    def __init__(self, group: Any) -> None:
        self.indptr = group["indptr"][:].astype(np.int64, copy=False)
        self._indices, self._data = _readable(group["indices"]), _readable(group["data"])
        shape = group.attrs["shape"] if "shape" in group.attrs else group.attrs["h5sparse_shape"]
        self.shape = tuple(int(size) for size in shape)
        self.dtype = self._data.dtype
        check_pointers(self.indptr, self._data.shape[0], self._indices.shape[0], self.shape[0])

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        block = sp.csr_matrix((stop - start, self.shape[1]), dtype=np.int8)
        block.data = np.asarray(self._data[first:last])
        block.indices = np.asarray(self._indices[first:last])
        block.indptr = self.indptr[start : stop + 1] - first
        return block


# A program that converts the output of Cell Ranger; the names of genes are not unique in the .h5 file.
_CONVERSION = (
    '`import scanpy as sc; adata = sc.{}({!r}); adata.var_names_make_unique(); adata.write_h5ad("cells.h5ad")`.'
)


def open_file(path: str | AnyPath) -> AnnDataFile | SomaData:
    """Open a file or a SOMA experiment, with the attributes of an AnnData that `CountSource` needs."""
    path = input_path(path)
    return SomaData(path) if isinstance(path, SomaPath) else AnnDataFile(path)


def obs_of(path: str | AnyPath) -> FileTable | SomaTable:
    """Return `obs` of a file, whose columns are read when they are needed; counts are not read."""
    path = input_path(path)
    return SomaData(path).obs if isinstance(path, SomaPath) else FileTable(open_group(path)["obs"])


def count_rows(path: str | AnyPath) -> int:
    """Return the number of cells in a file without reading it."""
    return len(obs_of(path))


def open_group(path: AnyPath) -> Any:
    """Open a `.h5ad` file (h5py) or a `.zarr` folder (zarr) for reading.

    Raises
    ------
    OSError
        If it is missing, cut short, locked, or does not hold an AnnData.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    group = _open_zarr(path) if path.suffix == ".zarr" else _open_hdf5(path)
    if "mod" in group:
        modalities = ", ".join(group["mod"])
        raise OSError(
            f"{path} holds a MuData with the modalities {modalities}. Write the one with gene counts to a separate file: "
            f"`mudata.read({str(path)!r})[{next(iter(group['mod']))!r}].write_h5ad(...)`."
        )
    if "obs" not in group and {"barcodes", "features"} <= set(group.get("matrix", ())):
        raise OSError(
            f"{path} is the output of Cell Ranger. Convert it: {_CONVERSION.format('read_10x_h5', str(path))}"
        )
    if missing := [part for part in ("obs", "var") if part not in group]:
        raise OSError(
            f"{path} does not hold an AnnData: it has no {' and no '.join(missing)}. Write it with `write_h5ad`."
        )
    return group


def _open_zarr(path: AnyPath) -> Any:
    import zarr

    try:
        return zarr.open_group(path if isinstance(path, Path) else path.url, mode="r")
    except FileNotFoundError as error:  # zarr raises it for any other folder
        raise OSError(f"{path} is not a .zarr folder. Write it with `adata.write_zarr`.") from error


def _open_hdf5(path: AnyPath) -> Any:
    import h5py

    if isinstance(path, Path) and path.is_dir() and any(path.glob("matrix.mtx*")):
        raise IsADirectoryError(
            f"{path} is the output of Cell Ranger. Convert it: {_CONVERSION.format('read_10x_mtx', str(path))}"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not an .h5ad file. The name of a .zarr folder must end in .zarr.")
    try:
        return h5py.File(path if isinstance(path, Path) else path.open(), "r")
    except OSError as error:
        if isinstance(error, PermissionError):
            raise PermissionError(f"{path} cannot be read: permission denied.") from error
        if isinstance(error, BlockingIOError) or "unable to lock file" in str(error):
            raise BlockingIOError(
                f"{path} is locked: another program has it open for writing. Close it there, or wait until it has finished."
            ) from error
        if "truncated" in str(error):
            raise OSError(f"{path} is cut short: its end is missing. Copy or download it again.") from error
        if not path.stat().st_size:
            raise OSError(f"{path} is empty (0 bytes). Copy or download it again.") from error
        raise OSError(f"{path} cannot be read as an .h5ad file ({error}). Check that it is complete.") from error


def _kind(element: Any) -> str:
    """Return how a matrix is stored: "csr", "csc" or "array"."""
    text = element.attrs.get("h5sparse_format", element.attrs.get("encoding-type", "array"))
    text = text.decode() if isinstance(text, bytes) else str(text)
    return text.removesuffix("_matrix")


def _readable(dataset: Any) -> Any:
    """Return a `RawDataset` of an HDF5 dataset if its bytes can be read directly, otherwise the dataset."""
    if not hasattr(dataset, "id"):
        return dataset
    return RawDataset.of(dataset) or dataset
