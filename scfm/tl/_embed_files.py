"""`scfm.tl.embed_files`: embed files that are larger than memory, and resume after an interruption."""

# Axes: B cells of a block, N cells of all files, D model width.

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

from scfm._docs import document
from scfm._files import as_paths, atomic_write, out_of_space_as, output_lock, require_writable
from scfm.data import CellBatch, CountSource
from scfm.data.files import count_rows
from scfm.data.ranks import gather, range_of_rank, torchrun_rank
from scfm.encoding import GeneMap
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.pp._encode import empty_cells, gene_map, open_counts, refuse_empty
from scfm.tl._record import record_of
from scfm.tl._write_embedding import SUFFIXES, write_embedding

logger = logging.getLogger(__name__)

BLOCK_CELLS = 1024  # the progress is saved after this many cells, which take seconds on a CPU


@document
def embed_files(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    model: Model | str | Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    hidden_layer: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    precision: Precision = "fp32",
    key_added: str = "X_scfm",
    progress: bool = True,
) -> int:
    """Embed every cell of one or many files, with one block of cells in memory at a time.

    The embeddings are the same as those of `scfm.tl.embed`. Progress is saved in the folder `<out>.part`. After an
    interruption, the same call resumes from there, unless the input has changed. Under torchrun, each process embeds a part
    of the cells, and the first one writes `out`, which must be on a file system that all processes share.

    At the end, some outputs need more memory: for `.csv` and `.parquet` a table of all embeddings, and for a single `.h5ad`
    that is written as `.zarr`, or the reverse, the complete input.

    Parameters
    ----------
    paths
        Paths of `.h5ad` files and `.zarr` folders with raw counts, or one path.
    out
        File to write, whose suffix determines the format:

        - `.h5ad` or `.zarr`: for one input, a copy of it with the embedding; for several, their `obs` with a column `file`,
          and the embedding, without counts
        - `.parquet` or `.csv`: one row per cell
        - `.npy`: the array
    {model}
    {layer}
    {gene_key}
    {depth_key}
    {hidden_layer}
    {pooling}
    {normalize}
    {precision}
    key_added
        Key of `obsm` for the embedding.
    {progress}

    Returns
    -------
    The number of cells. The embedding in `out` has shape (n_cells, width of the embedding), float32, with cells in the order
    of the files and of their rows.

    Raises
    ------
    CountsError, VocabularyMismatchError, EmptyCellError
        If a matrix does not hold raw counts, its genes do not match the model, or a cell expresses no gene of the model.
    ValueError
        If the suffix of `out` is not one of those above, or `out` is an input or a folder that is not a .zarr.
    ModelFileError
        If `model` is a path or a name that cannot be opened.
    OSError
        If an input is missing, cut short or not an AnnData, or `out` cannot be written (`OutputError` if the disk is full or
        another process is writing `out`).

    Examples
    --------
    >>> import pathlib, tempfile, numpy as np, scfm
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> adata = scfm.datasets.pbmc()
    >>> adata.write_h5ad(folder / "pbmc.h5ad")
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.embed_files([folder / "pbmc.h5ad"], folder / "pbmc.npy", model, progress=False)
    700
    >>> np.load(folder / "pbmc.npy").shape
    (700, 128)
    """
    model = opened(model)
    files, out = list(as_paths(paths)), Path(out)
    require_writable(out, SUFFIXES, inputs=files)
    where: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    how: dict[str, Any] = {
        "hidden_layer": hidden_layer,
        "pooling": pooling,
        "normalize": normalize,
        "precision": precision,
    }
    rows = [count_rows(path) for path in files]
    config = model.network.config
    job = _Job(
        folder=out.with_name(out.name + ".part"),
        settings={"model_id": model.id, "files": [str(path.resolve()) for path in files], "rows": rows, **where, **how},
        n_cells=sum(rows),
        width=config.replace(pooling={"how": pooling or config.pooling.how}).d_embedding,
    )
    rank, world_size = torchrun_rank()
    with output_lock(out if rank == 0 else job.part_folder(rank, world_size)):
        share, part = range_of_rank(job.n_cells, rank, world_size), _Part(job, rank, world_size)
        try:
            blocks = _Blocks(files, rows, share, model, where)
            with tqdm(total=len(share), desc="embedding", unit="cell", disable=not progress or rank > 0) as bar:
                blocks.skip(part, bar)
                for cells in blocks:
                    part.append(model.embed(cells, **how), blocks.digest)
                    bar.update(cells.n_cells)
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
            record = record_of(model, **where, **how)
            write_embedding(out, files, job.merge(part, world_size), key=key_added, record=record)
            shutil.rmtree(job.folder, ignore_errors=True)
        gather()  # wait until the output is complete
    return job.n_cells


@dataclass(frozen=True)
class _Job:
    """Inputs, model and settings, and the folder with the progress of all processes."""

    folder: Path
    settings: dict[str, Any]
    n_cells: int
    width: int

    def part_folder(self, rank: int, world_size: int) -> Path:
        return self.folder / f"{rank}-of-{world_size}"

    def merge(self, first: _Part, world_size: int) -> NDArray[np.float32]:
        """Return the embedding of all cells, (N, D), from the parts of all processes, mapped from disk."""
        if world_size == 1:
            return first.rows()
        path = self.folder / "embedding.npy"
        with out_of_space_as(path, self.n_cells * self.width * 4), path.open("wb") as file:
            _write_header(file, (self.n_cells, self.width))
            for rank in range(world_size):
                part_path = self.part_folder(rank, world_size) / "embedding.npy"
                if len(range_of_rank(self.n_cells, rank, world_size)):
                    np.load(part_path, mmap_mode="r").tofile(file)
        return _read(path, (self.n_cells, self.width))


def _write_header(file: Any, shape: tuple[int, int]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a float32 array mapped from a file; an array without rows cannot be mapped and is in memory."""
    return np.load(path, mmap_mode="r") if shape[0] else np.zeros(shape, np.float32)


class _Part:
    """The folder of one process, with the embedding so far, the number of its cells, and the digest of their counts."""

    def __init__(self, job: _Job, rank: int, world_size: int) -> None:
        self.folder, self._job = job.part_folder(rank, world_size), job
        self._path = self.folder / "embedding.npy"
        self._shape = len(range_of_rank(job.n_cells, rank, world_size)), job.width
        self.done, self.digest = self._read_state()
        if self.done:
            self._file = self._path.open("r+b")
        else:
            self.restart()

    def _read_state(self) -> tuple[int, str]:
        """Return the number of cells that an earlier run of the same job embedded (0 if none), and the digest of their counts."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
            same = state["job"] == self._job.settings and self._path.stat().st_size == self._offset(self._shape[0])
            return (int(state["done"]), str(state["digest"])) if same else (0, "")
        except (OSError, KeyError, TypeError, ValueError):
            return 0, ""

    def restart(self) -> None:
        """Start with a file of the final size, so that a full disk is noticed before the work and not after it."""
        self.done, self.digest = 0, ""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        n_bytes = self._offset(self._shape[0])
        with out_of_space_as(self._path, n_bytes):
            self._file = self._path.open("w+b")
            _write_header(self._file, self._shape)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, n_bytes)

    def _offset(self, row: int) -> int:
        """Return the byte at which a row starts; the header has 128 bytes."""
        return 128 + row * self._shape[1] * 4

    def append(self, embedding_BD: NDArray[np.float32], digest: str) -> None:
        with out_of_space_as(self._path, self._offset(self._shape[0])):
            self._file.seek(self._offset(self.done))
            self._file.write(np.ascontiguousarray(embedding_BD, dtype=np.float32).data)
            self._file.flush()
            self.done, self.digest = self.done + len(embedding_BD), digest
            with atomic_write(self.folder / "state.json") as temporary_path:
                state = {"job": self._job.settings, "done": self.done, "digest": digest}
                temporary_path.write_text(json.dumps(state))

    def rows(self) -> NDArray[np.float32]:
        return _read(self._path, self._shape)

    def close(self) -> None:
        """Close the file, and remove it if the job failed before its first block."""
        self._file.close()
        if self.done == 0 and self._shape[0]:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # the folder may contain files of other processes
                self.folder.parent.rmdir()


class _Blocks:
    """The encoded cells of one process, one block after another, and a digest of the counts that were read."""

    def __init__(self, files: list[Path], rows: list[int], share: range, model: Model, where: dict[str, Any]) -> None:
        self._encoding, self.digest = model.encoding, ""
        sources = [(open_counts(path, model.encoding, **where), span) for path, span in _spans(files, rows, share)]
        # The genes of all files are checked before the work starts.
        self._sources = [(source, gene_map(source, model.encoding), span) for source, span in sources]
        self._blocks = self._read()

    def __iter__(self) -> Iterator[CellBatch]:
        for counts, genes, first, block, depth_B in self._blocks:
            refuse_empty(empty_cells(block, genes, self._encoding), counts, first)
            yield self._encoding.encode(block, genes, depth_B=depth_B)

    def skip(self, part: _Part, bar: Any) -> None:
        """Skip the cells that an earlier run embedded; if their counts have changed, start from the first cell."""
        n_skipped = 0
        while n_skipped < part.done:
            *_, depth_B = next(self._blocks)
            n_skipped += len(depth_B)
        if n_skipped == part.done and self.digest == part.digest:
            bar.update(n_skipped)
            return
        logger.warning("The counts have changed since %d cells were embedded: all cells are embedded again.", part.done)
        part.restart()
        self.digest, self._blocks = "", self._read()

    def _read(self) -> Iterator[tuple[CountSource, GeneMap, int, sparse.csr_matrix, NDArray[np.float64]]]:
        for counts, genes, span in self._sources:
            for first, block, depth_B in counts.blocks(BLOCK_CELLS, start=span.start, stop=span.stop):
                digest = hashlib.blake2b(self.digest.encode(), digest_size=16)
                for array in (genes.token_ids, block.indptr, block.indices, block.data, depth_B):
                    digest.update(np.ascontiguousarray(array).data)
                self.digest = digest.hexdigest()
                yield counts, genes, first, block, depth_B


def _spans(files: list[Path], rows: list[int], cells: range) -> Iterator[tuple[Path, range]]:
    """Yield the files that contain some of the `cells`, which are numbered over all files, and their rows in each file."""
    first = 0
    for path, n_rows in zip(files, rows):
        start, stop = max(cells.start, first), min(cells.stop, first + n_rows)
        if start < stop:
            yield path, range(start - first, stop - first)
        first += n_rows
