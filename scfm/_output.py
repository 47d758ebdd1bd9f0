"""Files that are written whole or not at all, and refused before any work where they could not be."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs")


def require_writable(out: Path, suffixes: Sequence[str], *, inputs: Sequence[Path] = ()) -> None:
    """Refuse what could not, or should not, be written when the work is done.

    Raises
    ------
    ValueError
        If `out` has none of `suffixes`, is one of `inputs`, or is a folder that is no .zarr; or if its suffix needs a
        package that is missing.
    OSError
        If the folder that `out` is to stand in cannot be written to.
    """
    if out.suffix not in suffixes:
        raise ValueError(
            f"{out} {f'ends in {out.suffix!r}' if out.suffix else 'has no suffix'}; name an output that ends in one of {', '.join(suffixes)}."
        )
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"{out} is an input. Name another output; inputs are never changed.")
    if out.is_dir() and not (out.suffix == ".zarr" and any((out / mark).exists() for mark in ZARR_MARKS)):
        raise ValueError(f"{out} is a folder that scfm has not written, so it is not replaced. Name another output.")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ValueError('Writing .parquet needs pyarrow: pip install "single-cell-fm[parquet]".') from error
    require_folder(out.parent)


def require_folder(folder: Path) -> None:
    """Raise `OSError` unless `folder` can be written to, or made."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, so nothing can be written below it. Name another output.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {folder} cannot be written to. Name an output elsewhere.")


def write_adata(adata: Any, path: Path) -> None:
    """Write an AnnData as `.zarr` or `.h5ad`, without anndata's words on its next default format: no matter of a user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)


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
