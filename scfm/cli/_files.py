"""Reading and writing of a command's files: whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import pandas as pd


def read(path: Path) -> anndata.AnnData:
    """Read a `.h5ad` file or a `.zarr` folder."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and rename it at the end; if that is not reached, nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        if path.is_dir():
            shutil.rmtree(path)
        beside.replace(path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)


def write(adata: anndata.AnnData, path: Path) -> None:
    """Write as `.h5ad` or `.zarr`."""
    require_suffix(path, (".h5ad", ".zarr"))
    with whole(path) as beside:
        adata.write_zarr(beside) if path.suffix == ".zarr" else adata.write_h5ad(beside)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write as `.csv` or `.parquet`."""
    require_suffix(path, (".csv", ".parquet"))
    with whole(path) as beside:
        table.to_parquet(beside) if path.suffix == ".parquet" else table.to_csv(beside)


def require_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'!r}; name an output that ends in {' or '.join(suffixes)}."
        )


def tell(facts: dict[str, Any], *, as_json: bool, text: str) -> None:
    """Print a command's result on stdout: one JSON object, or words."""
    json.dump(facts, sys.stdout, default=str) if as_json else sys.stdout.write(text)
    sys.stdout.write("\n")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON-able rows; NaN becomes null."""
    rows: list[dict[str, Any]] = json.loads(table.reset_index().to_json(orient="records", double_precision=15))
    return rows


def inputs_and_output(paths: Sequence[Path]) -> Sequence[Path]:
    """Paths of a command that takes one or many inputs and then an output, as `cp` does."""
    if len(paths) < 2:
        raise ValueError(
            f"Name one or many inputs and then the output; there is only {paths[0] if paths else 'nothing'}."
        )
    return paths
