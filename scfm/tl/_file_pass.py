"""A pass over the cells of many files that computes one row of numbers per cell, and resumes after an interruption."""

# Axes: B cells of a block, N cells of all files, X numbers per cell.

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

from scfm._files import atomic_write, out_of_space_as, output_lock
from scfm._remote import AnyPath
from scfm.data import CountSource
from scfm.data.ahead import one_ahead
from scfm.data.files import count_rows
from scfm.data.gene_names import shared_by_names
from scfm.data.ranks import gather, range_of_rank, torchrun_rank
from scfm.encoding import GeneMap
from scfm.models.model import Model
from scfm.pp._encode import EncodedBlock, empty_cells, gene_map, open_counts, refuse_empty

logger = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK_CELLS = 1024  # the progress is saved after this many cells, which take seconds on a CPU
_HEADER = 128  # bytes of the header of a .npy file


@dataclass(frozen=True)
class FilePass:
    """Inputs, model and settings of a pass.

    Attributes
    ----------
    files
        The input files.
    out
        The output; progress is in the folder `<out>.part`.
    model
        The model.
    where
        `layer`, `gene_key` and `depth_key`.
    settings
        Everything else that changes the numbers.
    width
        Numbers per cell.
    compute
        Returns the numbers of a block of cells, shape (B, X), float32, and advances the progress bar.
    title
        Title of the progress bar.
    expression
        Whether `compute` needs the log-expression of the cells.
    """

    files: tuple[AnyPath, ...]
    out: Path
    model: Model
    where: dict[str, Any]
    settings: dict[str, Any]
    width: int
    compute: Callable[[EncodedBlock, tqdm], NDArray[np.float32]]
    title: str
    expression: bool = False

    @property
    def folder(self) -> Path:
        return self.out.with_name(self.out.name + ".part")

    @cached_property
    def rows(self) -> list[int]:
        """Number of cells of each file."""
        return [count_rows(path) for path in self.files]

    def run(self, write: Callable[[Rows], T], *, progress: bool) -> T | None:
        """Compute the rows of all cells, and return what `write` makes of them; None in all processes but the first.

        Under torchrun, each process computes a part of the cells.
        """
        written = None
        rank, world_size = torchrun_rank()
        job = _Job(
            self.folder,
            {
                "model_id": self.model.id,
                "files": [str(path.resolve()) for path in self.files],
                "rows": self.rows,
                **self.where,
                **self.settings,
            },
            sum(self.rows),
            self.width,
        )
        with output_lock(self.out if rank == 0 else job.part_folder(rank, world_size)):
            share, part = range_of_rank(job.n_cells, rank, world_size), _Part(job, rank, world_size)
            try:
                blocks = _Blocks(self, share)
                with tqdm(total=len(share), desc=self.title, unit="cell", disable=not progress or rank > 0) as bar:
                    blocks.skip(part, bar)
                    with one_ahead(blocks) as encoded:
                        for block, digest in encoded:
                            part.append(self.compute(block, bar), digest)
            except BaseException as error:
                if part.done:
                    error.add_note(
                        f"{part.done:,} of {len(share):,} cells are in {job.folder}; the same call continues from there."
                    )
                raise
            finally:
                part.close()
            gather()  # wait until the parts of all processes are complete
            if rank == 0:
                written = write(job.merge(part, world_size))
                shutil.rmtree(job.folder, ignore_errors=True)
            gather()  # wait until the output is complete
        return written


class Rows:
    """A float32 matrix in a .npy file, of which slices are read. A memory map would count as memory of the process."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path, self.shape = path, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        start, stop, _ = rows.indices(self.shape[0])
        n_rows = max(stop - start, 0)
        offset = _HEADER + start * self.shape[1] * 4
        values = np.fromfile(self.path, np.float32, count=n_rows * self.shape[1], offset=offset)
        return values.reshape(n_rows, self.shape[1])

    def chunks(self, size: int = 65_536) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield blocks of rows with the number of their first row."""
        for start in range(0, len(self), size):
            yield start, self[start : start + size]


@dataclass(frozen=True)
class _Job:
    """What identifies a pass, and the folder with the progress of all processes."""

    folder: Path
    settings: dict[str, Any]
    n_cells: int
    width: int

    def part_folder(self, rank: int, world_size: int) -> Path:
        return self.folder / f"{rank}-of-{world_size}"

    def merge(self, first: _Part, world_size: int) -> Rows:
        """Return the rows of all cells from the parts of all processes."""
        if world_size == 1:
            return first.rows()
        path, shape = self.folder / "rows.npy", (self.n_cells, self.width)
        with out_of_space_as(path, self.n_cells * self.width * 4), path.open("wb") as file:
            _write_header(file, shape)
            for rank in range(world_size):
                n_rows = len(range_of_rank(self.n_cells, rank, world_size))
                part = Rows(self.part_folder(rank, world_size) / "rows.npy", (n_rows, self.width))
                for _, block in part.chunks():
                    block.tofile(file)
        return Rows(path, shape)


def _write_header(file: Any, shape: tuple[int, int]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()


class _Part:
    """The folder of one process, with the rows so far, their number, and the digest of the counts of their cells."""

    def __init__(self, job: _Job, rank: int, world_size: int) -> None:
        self.folder, self._job = job.part_folder(rank, world_size), job
        self._path = self.folder / "rows.npy"
        self._shape = len(range_of_rank(job.n_cells, rank, world_size)), job.width
        self.done, self.digest = self._read_state()
        self._file: Any = None
        if self.done:
            self._file = self._path.open("r+b")
        else:
            self.restart()

    def _read_state(self) -> tuple[int, str]:
        """Return the number of cells that an earlier run of the same job finished (0 if none), and the digest of their counts."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
            same = state["job"] == self._job.settings and self._path.stat().st_size == self._offset(self._shape[0])
            return (int(state["done"]), str(state["digest"])) if same else (0, "")
        except (OSError, KeyError, TypeError, ValueError):
            return 0, ""

    def restart(self) -> None:
        """Start with a file of the final size, so that a full disk is noticed before the work and not after it."""
        self.done, self.digest = 0, ""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        n_bytes = self._offset(self._shape[0])
        with out_of_space_as(self._path, n_bytes):
            self._file = self._path.open("w+b")
            _write_header(self._file, self._shape)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, n_bytes)

    def _offset(self, row: int) -> int:
        return _HEADER + row * self._shape[1] * 4

    def append(self, rows_BX: NDArray[np.float32], digest: str) -> None:
        with out_of_space_as(self._path, self._offset(self._shape[0])):
            self._file.seek(self._offset(self.done))
            self._file.write(np.ascontiguousarray(rows_BX, dtype=np.float32).data)
            self._file.flush()
            self.done, self.digest = self.done + len(rows_BX), digest
            with atomic_write(self.folder / "state.json") as temporary_path:
                state = {"job": self._job.settings, "done": self.done, "digest": digest}
                temporary_path.write_text(json.dumps(state))

    def rows(self) -> Rows:
        return Rows(self._path, self._shape)

    def close(self) -> None:
        """Close the file, and remove it if the job failed before its first block."""
        self._file.close()
        if self.done == 0 and self._shape[0]:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # the folder may contain files of other processes
                self.folder.parent.rmdir()


class _Blocks:
    """The encoded cells of one process, one block after another, and a digest of the counts that were read."""

    def __init__(self, job: FilePass, share: range) -> None:
        self._job, self._encoding, self.digest = job, job.model.encoding, ""
        self._spans = list(_spans(job.files, job.rows, share))
        self._maps: dict[str, GeneMap] = {}  # files with the same names share one map
        for path, _ in self._spans:  # the genes of all files are checked before the work starts
            self._open(path)
        self._blocks = self._read()

    def __iter__(self) -> Iterator[tuple[EncodedBlock, str]]:
        """Yield each encoded block, and the digest of the counts up to its end."""
        for counts, genes, first, block, depth_B in self._blocks:
            refuse_empty(empty_cells(block, genes, self._encoding), counts, first)
            encoded = EncodedBlock(self._encoding, genes, first, block, depth_B)
            yield encoded.made(expression=self._job.expression), self.digest

    def skip(self, part: _Part, bar: Any) -> None:
        """Skip the cells that an earlier run finished; if their counts have changed, start from the first cell."""
        n_skipped = 0
        while n_skipped < part.done:
            *_, depth_B = next(self._blocks)
            n_skipped += len(depth_B)
        if n_skipped == part.done and self.digest == part.digest:
            bar.update(n_skipped)
            return
        logger.warning("The counts have changed since %d cells were finished: all cells are computed again.", part.done)
        part.restart()
        self.digest, self._blocks = "", self._read()

    def _open(self, path: AnyPath) -> tuple[CountSource, GeneMap]:
        counts = open_counts(path, self._encoding, **self._job.where)
        return counts, shared_by_names(self._maps, counts.var, lambda: gene_map(counts, self._encoding))

    def _read(self) -> Iterator[tuple[CountSource, GeneMap, int, sparse.csr_matrix, NDArray[np.float64]]]:
        for path, span in self._spans:
            counts, genes = self._open(path)
            for first, block, depth_B in counts.blocks(BLOCK_CELLS, start=span.start, stop=span.stop):
                digest = hashlib.blake2b(self.digest.encode(), digest_size=16)
                for array in (genes.token_ids, block.indptr, block.indices, block.data, depth_B):
                    digest.update(np.ascontiguousarray(array).data)
                self.digest = digest.hexdigest()
                yield counts, genes, first, block, depth_B


def _spans(files: tuple[AnyPath, ...], rows: list[int], cells: range) -> Iterator[tuple[AnyPath, range]]:
    """Yield the files that contain some of the `cells`, which are numbered over all files, and their rows in each file."""
    first = 0
    for path, n_rows in zip(files, rows):
        start, stop = max(cells.start, first), min(cells.stop, first + n_rows)
        if start < stop:
            yield path, range(start - first, stop - first)
        first += n_rows
