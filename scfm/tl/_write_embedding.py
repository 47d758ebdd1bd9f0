"""Write the embedding of the cells of files, in the format of a suffix."""

# Axes: N cells of all files, D model width.

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm._files import atomic_write, write_adata
from scfm.data.files import FileTable, open_group
from scfm.tl._record import records_of

SUFFIXES = (".h5ad", ".zarr", ".parquet", ".npy", ".csv")


def write_embedding(
    out: Path, files: list[Path], embedding_ND: NDArray[np.float32], *, key: str, record: dict[str, Any]
) -> None:
    """Write the embedding of the cells of `files` to `out`."""
    with atomic_write(out) as temporary_path:
        if out.suffix == ".npy":
            np.save(temporary_path, embedding_ND)
        elif out.suffix in (".csv", ".parquet"):
            _write_table(temporary_path, files, embedding_ND)
        elif len(files) == 1 and files[0].suffix == out.suffix:
            _write_into_copy(temporary_path, files[0], embedding_ND, key=key, record=record)
        else:
            _write_anndata(temporary_path, files, embedding_ND, key=key, record=record)


def read_obs(path: Path) -> pd.DataFrame:
    """Read `obs` of a file and nothing else."""
    return FileTable(open_group(path)["obs"]).to_memory()


def _obs_of_all(files: list[Path]) -> pd.DataFrame:
    """Return `obs` of all files; for several files, with a column `file`."""
    if len(files) == 1:
        return read_obs(files[0])
    return pd.concat([read_obs(path).assign(file=path.name) for path in files])


def _write_table(path: Path, files: list[Path], embedding_ND: NDArray[np.float32]) -> None:
    obs = _obs_of_all(files)
    columns = [f"scfm_{dimension}" for dimension in range(embedding_ND.shape[1])]
    table = pd.DataFrame(embedding_ND, index=obs.index, columns=columns)
    if "file" in obs and len(files) > 1:
        table.insert(0, "file", obs["file"])
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)


def _write_into_copy(
    path: Path, source: Path, embedding_ND: NDArray[np.float32], *, key: str, record: dict[str, Any]
) -> None:
    """Copy the file and add the embedding to the copy, without reading the counts."""
    if path.suffix == ".zarr":
        import zarr

        shutil.copytree(source, path)
        _add(zarr.open_group(path, mode="r+"), embedding_ND, key=key, record=record)
        zarr.consolidate_metadata(path)
    else:
        shutil.copyfile(source, path)
        with h5py.File(path, "r+") as file:
            _add(file, embedding_ND, key=key, record=record)


def _add(group: Any, embedding_ND: NDArray[np.float32], *, key: str, record: dict[str, Any]) -> None:
    anndata.io.write_elem(group, f"obsm/{key}", np.asarray(embedding_ND))
    uns = {"scfm": anndata.io.read_elem(group["uns/scfm"])} if "uns/scfm" in group else {}
    anndata.io.write_elem(group, "uns/scfm", {**records_of(uns), key: record})


def _write_anndata(
    path: Path, files: list[Path], embedding_ND: NDArray[np.float32], *, key: str, record: dict[str, Any]
) -> None:
    """Write an AnnData: the complete content of one file in the other format, or only `obs` of several files."""
    if len(files) == 1:
        source = files[0]
        adata = anndata.read_zarr(source) if source.suffix == ".zarr" else anndata.read_h5ad(source)
    else:
        adata = anndata.AnnData(obs=_obs_of_all(files))
    adata.obsm[key] = np.asarray(embedding_ND)
    adata.uns["scfm"] = {**records_of(adata.uns), key: record}
    write_adata(adata, path)
