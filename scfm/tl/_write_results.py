"""Write results of the cells of files, in the format of a suffix, without holding all of them in memory."""

# Axes: N cells of all files, D columns of a matrix.

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm._files import atomic_write, write_adata
from scfm._remote import AnyPath
from scfm.data.files import FileTable, obs_of
from scfm.tl._file_pass import Rows
from scfm.tl._record import records_of

SUFFIXES = (".h5ad", ".zarr", ".parquet", ".npy", ".csv")
TABLE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".npy")  # of files that can hold labels


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of all cells.

    Attributes
    ----------
    matrix
        The rows of the pass, of which `columns` are written.
    key, columns
        Key of `obsm`, and columns of `matrix`.
    names
        Names of these columns in a table.
    obs
        Columns of `obs`, N values each.
    records
        Entries of `uns["scfm"]`.
    dtype
        Type in which the matrix is written to `obsm`.
    others
        Other matrices of the same rows; only key, columns, names and dtype are used.
    """

    matrix: Rows
    key: str
    columns: slice
    names: list[str]
    records: dict[str, Any] = field(default_factory=dict)
    dtype: Any = np.float32
    others: tuple[Results, ...] = ()
    obs: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.matrix), len(self.names)

    def part(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        """Return the columns of these results, of some rows of the pass."""
        return rows[:, self.columns].astype(self.dtype, copy=False)

    def chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        for start, rows in self.matrix.chunks():
            yield start, self.part(rows)

    def whole(self) -> NDArray[Any]:
        return np.concatenate([np.zeros((0, self.shape[1]), self.dtype), *(rows for _, rows in self.chunks())])


def write_results(out: Path, files: tuple[AnyPath, ...], results: Results) -> None:
    """Write the results of the cells of `files` to `out`."""
    with atomic_write(out) as temporary_path:
        if out.suffix == ".npy":
            shutil.copyfile(results.matrix.path, temporary_path)
        elif out.suffix == ".csv":
            for number, table in enumerate(_tables(files, results)):
                table.to_csv(temporary_path, mode="a" if number else "w", header=not number)
        elif out.suffix == ".parquet":
            _write_parquet(temporary_path, _tables(files, results))
        elif len(files) == 1 and isinstance(files[0], Path) and files[0].suffix == out.suffix:
            _write_into_copy(temporary_path, files[0], results)
        else:
            _write_anndata(temporary_path, files, results)


def read_obs(path: AnyPath) -> pd.DataFrame:
    """Read `obs` of a file and nothing else."""
    return obs_of(path).to_memory()


def _tables(files: tuple[AnyPath, ...], results: Results) -> Iterator[pd.DataFrame]:
    """Yield tables with one row per cell, in order; for several files, with a column `file`."""
    names = [obs_of(path).index for path in files]
    ends = np.cumsum([len(each) for each in names])
    index = names[0].append(names[1:]) if len(names) > 1 else names[0]
    for start, rows in results.matrix.chunks() if len(results.matrix) else [(0, results.matrix[:])]:
        span = slice(start, start + len(rows))
        parts = [pd.DataFrame(each.part(rows), columns=each.names) for each in (results, *results.others)]
        table = pd.concat(parts, axis=1).set_axis(index[span]) if results.others else parts[0].set_axis(index[span])
        for place, (name, values) in enumerate(results.obs.items()):
            table.insert(place, name, values[span])
        if len(files) > 1:
            number_B = np.searchsorted(ends, np.arange(span.start, span.stop), side="right")
            table.insert(0, "file", [files[number].name for number in number_B])
        yield table


def _write_parquet(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    import pyarrow
    from pyarrow import parquet

    first = pyarrow.Table.from_pandas(next(tables))
    with parquet.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(pyarrow.Table.from_pandas(table, schema=first.schema))


def _write_into_copy(path: Path, source: Path, results: Results) -> None:
    """Copy the file and add the results to the copy, without reading the counts."""
    if path.suffix == ".zarr":
        import zarr

        shutil.copytree(source, path)
        _add(zarr.open_group(path, mode="r+", use_consolidated=False), results)
        zarr.consolidate_metadata(path)
    else:
        shutil.copyfile(source, path)
        with h5py.File(path, "r+") as file:
            _add(file, results)


def _add(group: Any, results: Results) -> None:
    _add_columns(group, results.obs)
    if "obsm" not in group:  # files of other programs may lack it
        anndata.io.write_elem(group, "obsm", {})
    for each in (results, *results.others):
        write_matrix(group, f"obsm/{each.key}", each)
    uns = {"scfm": anndata.io.read_elem(group["uns/scfm"])} if "uns/scfm" in group else {}
    anndata.io.write_elem(group, "uns/scfm", {**records_of(uns), **results.records})


def _add_columns(group: Any, columns: dict[str, Any]) -> None:
    """Add columns to `obs`, which is not read if it has anndata's present form."""
    if not columns:
        return
    if group["obs"].attrs.get("encoding-version") != "0.2.0":
        anndata.io.write_elem(group, "obs", FileTable(group["obs"]).to_memory().assign(**columns))
        return
    order = [str(name) for name in group["obs"].attrs["column-order"]]
    for name, values in columns.items():
        anndata.io.write_elem(group["obs"], name, values)
    group["obs"].attrs["column-order"] = [*order, *(name for name in columns if name not in order)]


def write_matrix(group: Any, key: str, results: Results) -> None:
    """Write a dense matrix in anndata's form, block by block."""
    if key in group:
        del group[key]
    if not len(results.matrix):
        anndata.io.write_elem(group, key, results.whole())
        return
    make = group.create_array if hasattr(group, "create_array") else group.create_dataset
    array = make(key, shape=results.shape, dtype=results.dtype)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for start, block in results.chunks():
        array[start : start + len(block)] = block


def _write_anndata(path: Path, files: tuple[AnyPath, ...], results: Results) -> None:
    """Write an AnnData: the complete content of one file in the other format, or only `obs` of several or remote files."""
    if len(files) == 1 and isinstance(source := files[0], Path):
        adata = anndata.read_zarr(source) if source.suffix == ".zarr" else anndata.read_h5ad(source)
    else:
        adata = anndata.AnnData(obs=pd.concat([read_obs(path).assign(file=path.name) for path in files]))
    for name, values in results.obs.items():
        adata.obs[name] = values
    for each in (results, *results.others):
        adata.obsm[each.key] = each.whole()
    adata.uns["scfm"] = {**records_of(adata.uns), **results.records}
    write_adata(adata, path)
