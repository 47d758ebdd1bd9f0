"""Files behind URLs, through fsspec, experiments of TileDB-SOMA, and lists of input files."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote


class RemotePath:
    """A file or a .zarr folder behind a URL, with the part of `pathlib.Path` that reading inputs needs.

    Parameters
    ----------
    url
        Any URL that fsspec knows, such as "https://host/cells.h5ad", "s3://bucket/cells.zarr" or "memory://cells.h5ad".

    Raises
    ------
    OSError
        If the package that reads this kind of URL is not installed, or fsspec does not know it.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        self.name = url.rstrip("/").rpartition("/")[2]
        self.suffix = Path(self.name).suffix
        try:
            self._files, self._path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise OSError(f"{url} cannot be read: {error} (`pip install` the package).") from error
        except ValueError as error:
            raise OSError(
                f"{url} is of a kind that fsspec does not know ({error}). Pass a path, or another URL."
            ) from error

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def exists(self) -> bool:
        return bool(self._files.exists(self._path))

    def resolve(self) -> RemotePath:
        return self

    def is_file(self) -> bool:
        return self.suffix != ".zarr"

    def is_dir(self) -> bool:
        return not self.is_file()

    def stat(self) -> os.stat_result:
        """Return a result that holds the size, as far as the server tells it, and nothing else."""
        size = int(self._files.info(self._path).get("size") or 0)
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def open(self) -> Any:
        """Open the file for reading at any position; parts that were read are kept in memory for a while."""
        return self._files.open(self._path, "rb")


class SomaPath(RemotePath):
    """Cells of a TileDB-SOMA experiment, such as those of the CELLxGENE Census; needs the package tiledbsoma.

    Parameters
    ----------
    url
        "soma://", the URI of an experiment (a folder, or s3:// and others that TileDB knows), and after a question mark,
        separated by "&": "measurement=NAME" (default RNA), "obs=FILTER" for a value filter on `obs`, such as
        ``obs=tissue_general == 'blood' and is_primary_data == True``, and settings of TileDB such as
        "vfs.s3.region=us-west-2". Characters can be written as in URLs (%26 for "&").

    Examples
    --------
    >>> from scfm.data import SomaPath
    >>> path = SomaPath("soma:///data/pbmc?obs=cell_type == 'B cell'")
    >>> path.uri, path.measurement, path.obs_filter
    ('/data/pbmc', 'RNA', "cell_type == 'B cell'")
    """

    def __init__(self, url: str) -> None:
        self.url, self.suffix = url, ".soma"
        self.uri, _, options = url.removeprefix("soma://").partition("?")
        self.name = self.uri.rstrip("/").rpartition("/")[2] + (f"?{options}" if options else "")
        given = [option.partition("=") for option in options.split("&") if option]
        settings = {name: unquote(value) for name, _, value in given}
        self.measurement = settings.pop("measurement", "RNA")
        self.obs_filter = settings.pop("obs", None)
        if unknown := [name for name in settings if "." not in name]:
            raise OSError(
                f"{url} has the option {unknown[0]!r}, which does not exist. Options: measurement, obs, and settings of TileDB."
            )
        self.settings = settings

    def experiment(self) -> Any:
        """Open the experiment.

        Raises
        ------
        OSError
            If tiledbsoma is not installed, or there is no experiment.
        """
        try:
            import tiledbsoma
        except ImportError as error:
            raise OSError(f"{self.url} cannot be read: install `tiledbsoma` (`pip install tiledbsoma`).") from error
        context = tiledbsoma.SOMATileDBContext(tiledb_config=self.settings) if self.settings else None
        try:
            return tiledbsoma.Experiment.open(self.uri, context=context)
        except (tiledbsoma.SOMAError, TypeError) as error:
            raise OSError(f"{self.uri} cannot be opened as a SOMA experiment ({error}).") from error

    def exists(self) -> bool:
        self.experiment().close()
        return True

    def is_file(self) -> bool:
        return False


AnyPath: TypeAlias = Path | RemotePath


def input_path(path: str | AnyPath) -> AnyPath:
    """Return a path; a string with "://" is a URL, and one that starts with "soma://" is a SOMA experiment."""
    if isinstance(path, RemotePath):
        return path
    if isinstance(path, str) and path.startswith("soma://"):
        return SomaPath(path)
    return RemotePath(str(path)) if isinstance(path, str) and "://" in path else Path(path)


def input_paths(paths: str | AnyPath | Sequence[str | AnyPath]) -> tuple[AnyPath, ...]:
    """Return the input files that are named by paths, patterns, lists and URLs, in the order in which they are named.

    Parameters
    ----------
    paths
        One or several of: the path of a `.h5ad` file or a `.zarr` folder; a URL; a pattern such as "donors/*.h5ad", for its
        matches in alphabetical order; the path of a `.txt` file with one of these per line, relative to its folder.

    Raises
    ------
    OSError
        If a pattern matches nothing, or a list cannot be read or is empty.
    """
    several = [paths] if isinstance(paths, str | Path | RemotePath) else paths
    found: list[AnyPath] = []
    for path in several:
        found += _named_by(input_path(path))
    return tuple(found)


def _named_by(path: AnyPath) -> list[AnyPath]:
    if isinstance(path, RemotePath):
        return [path]
    if path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        named = [line if "://" in line else path.parent / line for line in lines if line and not line.startswith("#")]
        if not named:
            raise OSError(f"{path} names no files. Write one path per line.")
        return [each for line in named for each in _named_by(input_path(line))]
    if glob.has_magic(str(path)) and not path.exists():
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (an absolute pattern)
        if not matches:
            raise FileNotFoundError(f"No file matches {path}.")
        return [Path(match) for match in matches]
    return [path]
