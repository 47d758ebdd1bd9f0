"""Output files and folders: they are written completely or not at all, and checked before any work starts."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scfm._remote import AnyPath
from scfm.errors import OutputError

ZARR_FILES = ("zarr.json", ".zgroup", ".zattrs")

_FULL = 1 << 26  # bytes that may be free on a full disk
_LIMITED = "Disk quota exceeded|File too large"
_HOST = re.sub(r"\W", "-", socket.gethostname())[:40]
_counter = itertools.count()
_in_use: set[Path] = set()


@contextmanager
def atomic_write(path: str | Path, *, n_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` for a file or a folder, and rename it to `path` at the end.

    At every moment `path` is either unchanged or complete, even if the process is killed. Temporary files for the same
    `path` that killed processes on this machine left behind are removed.

    Parameters
    ----------
    path
        The file or folder to write; an existing one is replaced.
    n_bytes
        Disk space that the output needs, if known; it is compared with the free space before anything is written.

    Raises
    ------
    OutputError
        If the disk is full, or a quota or a limit of the size of files is reached.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    if n_bytes is not None:
        require_space(path, n_bytes)
    temporary_path = _temporary_path(path)
    _in_use.add(temporary_path)
    try:
        yield temporary_path
        _move(temporary_path, path)
    except Exception as error:
        if is_out_of_space(error):
            raise _out_of_space(path, _size(temporary_path), error, at_least=True) from error
        raise
    finally:
        _remove(temporary_path)
        _in_use.discard(temporary_path)


@contextmanager
def output_lock(path: str | Path) -> Iterator[None]:
    """Hold the exclusive right to write `path`; another process that requests it meanwhile gets an error.

    Raises
    ------
    OutputError
        If another process holds it.
    """
    import fcntl

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise OutputError(
                f"{path} is being written by {holder}. Wait until it has finished, or choose another output."
            ) from None
        except OSError:  # the file system has no locks
            pass
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock_path.stat().st_ino:
                break
        os.close(descriptor)  # the previous holder removed the file
    try:
        with suppress(OSError):  # on a full disk the holder has no name
            os.pwrite(descriptor, f"process {os.getpid()} on {_HOST}".encode(), 0)
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(descriptor)


def require_writable(out: Path, suffixes: Sequence[str], *, inputs: Sequence[AnyPath] = ()) -> None:
    """Raise unless `out` can be written at the end of the work.

    Raises
    ------
    ValueError
        If `out` has none of `suffixes`, is one of `inputs`, is a folder other than a .zarr, or has a suffix that needs a
        package that is not installed.
    OSError
        If the folder of `out` cannot be written to.
    """
    if out.suffix not in suffixes:
        raise ValueError(
            f"{out} {f'ends in {out.suffix!r}' if out.suffix else 'has no suffix'}; choose an output that ends in one of "
            f"{', '.join(suffixes)}."
        )
    require_folder(out.parent)
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"{out} is an input, and inputs are never changed. Choose another output.")
    if out.is_dir() and not (out.suffix == ".zarr" and any((out / name).exists() for name in ZARR_FILES)):
        raise ValueError(f"{out} is a folder that scfm has not written, so it is not replaced. Choose another output.")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ValueError("Writing .parquet needs pyarrow: `pip install pyarrow`.") from error


def require_folder(folder: Path) -> None:
    """Raise `OSError` unless `folder` is writable or can be created."""
    folder = _existing(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, so nothing can be written below it. Choose another output.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {folder} is not writable. Choose another output.")


def require_space(path: Path, n_bytes: int) -> None:
    """Raise `OutputError` unless `n_bytes` are free on the disk of `path`."""
    if _free(path) < n_bytes:
        raise _out_of_space(path, n_bytes)


@contextmanager
def out_of_space_as(path: Path, n_bytes: int) -> Iterator[None]:
    """Raise `OutputError` for `path`, which needs `n_bytes`, if the code inside reports that they cannot be written."""
    try:
        yield
    except Exception as error:
        if is_out_of_space(error):
            raise _out_of_space(path, n_bytes, error) from error
        raise


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error of any library says that a disk is full, or a quota or a limit of the size of files is reached."""
    if isinstance(error, OutputError):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # HDF5 and safetensors repeat the message of the system; NumPy and torch report the number of bytes written.
    return re.search(
        rf"No space left on device|{_LIMITED}|\d+ requested and \d+ written|"
        r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+",
        str(error),
    ) is not None  # fmt: skip


def write_adata(adata: Any, path: Path) -> None:
    """Write an AnnData as `.zarr` or `.h5ad`, without anndata's warnings about its future default format."""
    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with anndata.settings.override(allow_write_nullable_strings=True):  # what was read with them keeps them
            adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)


def _free(path: Path) -> int:
    """Return the free bytes on the disk where `path` is, or will be."""
    return shutil.disk_usage(_existing(path.parent)).free


def _existing(folder: Path) -> Path:
    """Return `folder` if it exists, otherwise the nearest parent folder that exists."""
    while True:
        with suppress(PermissionError):  # of a folder whose content cannot be listed
            if folder.exists():
                return folder
        folder = folder.parent


def _out_of_space(
    path: Path, n_bytes: int, error: BaseException | None = None, *, at_least: bool = False
) -> OutputError:
    """Return the error for a `path` that needs `n_bytes`, or more than these, which were written."""
    free = _free(path)
    unchanged = f"{path} is unchanged." if path.exists() else "Nothing was written."
    if _is_limited(error, free):
        return OutputError(
            f"{path} could not be written completely, although {_readable(free)} are free: a quota or a limit of the size of "
            f"files (`ulimit -f`) is reached. Raise it, or choose an output on another disk. {unchanged}"
        )
    needed = f"more than {_readable(n_bytes + free)}" if at_least else _readable(n_bytes)
    return OutputError(
        f"The disk is full: {path} needs {needed}, and {_readable(free)} are free. Free some space, or choose an output on "
        f"another disk. {unchanged}"
    )


def _is_limited(error: BaseException | None, free: int) -> bool:
    """Whether a limit stopped the writing and not a full disk; libraries that do not say are asked for the free space."""
    number = getattr(error, "errno", None)
    if error is None or number == errno.ENOSPC or "No space left" in str(error):
        return False
    return number in (errno.EDQUOT, errno.EFBIG) or re.search(_LIMITED, str(error)) is not None or free > _FULL


def _readable(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


# A temporary path names the machine and the process that writes it, so that files of killed processes are recognized.


def _temporary_path(path: Path, ending: str = "") -> Path:
    # File names are limited to 255 bytes. The suffix is kept because writers use it to choose the format.
    return path.with_name(f".{path.stem[:40]}.{_HOST}-{os.getpid()}-{next(_counter)}{ending}{path.suffix}")


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files for `path` whose process has ended; restore `path` if such a process had only moved it."""
    pattern = re.compile(
        rf"\.{re.escape(path.stem[:40])}\.{re.escape(_HOST)}-(\d+)-\d+(?P<old>-old)?{re.escape(path.suffix)}"
    )
    for other in list(path.parent.glob(f".*{_HOST}-*")):
        found = pattern.fullmatch(other.name)
        if found is None or other in _in_use or (int(found[1]) != os.getpid() and _is_running(int(found[1]))):
            continue
        with suppress(OSError):
            if found["old"] and not path.exists():
                other.rename(path)
            else:
                _remove(other)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _move(temporary_path: Path, path: Path) -> None:
    """Rename `temporary_path` to `path`; existing content is replaced in one step."""
    if not path.is_dir() and not (temporary_path.is_dir() and path.exists()):
        temporary_path.replace(path)
    elif _exchange(temporary_path, path):
        _remove(temporary_path)
    else:
        old = _temporary_path(path, "-old")
        path.rename(old)
        temporary_path.rename(path)
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return False if the system does not support it."""
    libc = ctypes.CDLL(None)
    names = os.fsencode(first), os.fsencode(second)
    if hasattr(libc, "renameat2"):  # Linux: AT_FDCWD is -100, RENAME_EXCHANGE is 2
        return libc.renameat2(-100, names[0], -100, names[1], ctypes.c_uint(2)) == 0
    if hasattr(libc, "renamex_np"):  # macOS: RENAME_SWAP is 2
        return libc.renamex_np(*names, ctypes.c_uint(2)) == 0
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    with suppress(OSError):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)
    return 0
