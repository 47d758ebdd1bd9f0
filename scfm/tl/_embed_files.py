"""`scfm.tl.embed_files`: embeddings of files larger than memory, resumable after an interruption."""

# Axes: B cells of a block, N cells of all files, D model width.

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm._docs import document
from scfm._files import atomic_write, require_writable
from scfm.data import CountSource
from scfm.data.files import count_rows
from scfm.data.ranks import gather, share_of, torchrun_rank
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.pp._encode import empty_cells, gene_map, refuse_empty
from scfm.tl._record import record_of
from scfm.tl._write_embedding import SUFFIXES, write_embedding

BLOCK_CELLS = 1024  # cells between two notes of the progress; seconds of work on a CPU


@document
def embed_files(
    paths: Sequence[str | Path],
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

    Progress is kept in the folder `<out>.part`. After an interruption, the same call continues from there. The embeddings are
    those of `scfm.tl.embed`. Under torchrun each process embeds a part of the cells, and the first one writes `out`; all
    processes must be able to read and write the same folder.

    Parameters
    ----------
    paths
        `.h5ad` files and `.zarr` folders with raw counts.
    out
        File to write; its suffix names the format. `.h5ad` or `.zarr`: a copy of the input with the embedding, or, for several
        inputs, their `obs` with a column `file` and the embedding, without counts. `.parquet` or `.csv`: one row per cell.
        `.npy`: the array.
    {model}
    {layer}
    {gene_key}
    {hidden_layer}
    {pooling}
    {normalize}
    {precision}
    key_added
        Name of the embedding: its key in `obsm`.
    {depth_key}
    {progress}

    Returns
    -------
    Number of cells. Writes `out` atomically: an array of shape (N, D), float32, with cells in the order of the files.

    Raises
    ------
    CountsError, VocabularyMismatchError, EmptyCellError
        If a matrix holds no raw counts, its genes are not those of the model, or a cell has none of them.
    ValueError
        If `out` has another suffix, is one of the inputs, or is a folder that is not a .zarr.
    OSError
        If an input is missing, cut short or of another kind, or `out` cannot be written.

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
    if isinstance(paths, (str, Path)):
        raise TypeError(f"`paths` is one path ({paths}); pass a list of paths: [{str(paths)!r}].")
    files, out = [Path(path) for path in paths], Path(out)
    require_writable(out, SUFFIXES, inputs=files)
    where: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    how: dict[str, Any] = {
        "hidden_layer": hidden_layer,
        "pooling": pooling,
        "normalize": normalize,
        "precision": precision,
    }
    rows = [count_rows(path) for path in files]
    job = _Job(
        folder=out.with_name(out.name + ".part"),
        settings={"model_id": model.id, "files": [_identity(path) for path in files], **where, **how},
        n_cells=sum(rows),
        width=model.network.config.width_of(pooling or model.network.config.pooling.how),
    )
    rank, world_size = torchrun_rank()
    share, part = share_of(job.n_cells, rank, world_size), _Part(job, rank, world_size)
    spans = list(_spans(files, rows, share[part.done :]))
    try:
        for path, _ in spans:  # that the last file does not fit is told now, not after hours
            gene_map(CountSource.of(path, **where), model.encoding)
        with tqdm(
            total=len(share), initial=part.done, desc="embedding", unit="cell", disable=not progress or rank > 0
        ) as bar:
            for path, span in spans:
                for embedding_BD in _blocks(path, model, span, where, how):
                    part.append(embedding_BD)
                    bar.update(len(embedding_BD))
    except BaseException as error:
        if part.done:
            error.add_note(f"{part.done:,} of {len(share):,} cells are in {job.folder}; the same call goes on there.")
        raise
    finally:
        part.remove_if_empty()
    gather()  # every share is done
    if rank == 0:
        write_embedding(out, files, job.merge(part, world_size), key=key_added, record=record_of(model, **where, **how))
        shutil.rmtree(job.folder, ignore_errors=True)
    gather()  # the output is there
    return job.n_cells


@dataclass(frozen=True)
class _Job:
    """What is embedded how, and the folder that keeps the progress of all ranks."""

    folder: Path
    settings: dict[str, Any]
    n_cells: int
    width: int

    def part_folder(self, rank: int, world_size: int) -> Path:
        return self.folder / f"{rank}-of-{world_size}"

    def merge(self, first: _Part, world_size: int) -> NDArray[np.float32]:
        """The embedding of all cells, (N, D), from the shares of all ranks; a map of a file, so that memory stays small."""
        if world_size == 1:
            return first.embedding_ND
        every_ND = _map(self.folder / "embedding.npy", "w+", (self.n_cells, self.width))
        for rank in range(world_size):
            share = share_of(self.n_cells, rank, world_size)
            if len(share):
                every_ND[share.start : share.stop] = np.load(
                    self.part_folder(rank, world_size) / "embedding.npy", mmap_mode="r"
                )
        return every_ND


def _map(path: Path, mode: Any, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A float32 array in a file; one without rows cannot be mapped, and is plain."""
    if not shape[0]:
        return np.zeros(shape, np.float32)
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=shape)


class _Part:
    """The folder of a rank's share under way: the embedding so far, and how far it goes."""

    def __init__(self, job: _Job, rank: int, world_size: int) -> None:
        self.folder, self._job = job.part_folder(rank, world_size), job
        self.done = self._read_done()
        if self.done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        shape = (len(share_of(job.n_cells, rank, world_size)), job.width)
        self.embedding_ND = _map(self.folder / "embedding.npy", "r+" if self.done else "w+", shape)

    def _read_done(self) -> int:
        """Cells that an earlier run of the very same job embedded; 0 where there was none."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
        except (OSError, json.JSONDecodeError):
            return 0
        same = state.get("job") == self._job.settings and (self.folder / "embedding.npy").exists()
        return int(state["done"]) if same else 0

    def append(self, embedding_BD: NDArray[np.float32]) -> None:
        self.embedding_ND[self.done : self.done + len(embedding_BD)] = embedding_BD
        self.embedding_ND.flush()  # type: ignore[attr-defined]  # a memory map
        self.done += len(embedding_BD)
        with atomic_write(self.folder / "state.json") as temporary_path:
            temporary_path.write_text(json.dumps({"job": self._job.settings, "done": self.done}))

    def remove_if_empty(self) -> None:
        """Leave nothing behind of a job that failed before its first block."""
        if self.done == 0 and len(self.embedding_ND):
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other ranks may have theirs in it
                self.folder.parent.rmdir()


def _identity(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the one that was begun with."""
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _spans(files: list[Path], rows: list[int], cells: range) -> Iterator[tuple[Path, range]]:
    """Files that hold some of the `cells`, counted through all files, and their rows in it."""
    first = 0
    for path, n_rows in zip(files, rows):
        start, stop = max(cells.start, first), min(cells.stop, first + n_rows)
        if start < stop:
            yield path, range(start - first, stop - first)
        first += n_rows


def _blocks(
    path: Path, model: Model, span: range, where: dict[str, Any], how: dict[str, Any]
) -> Iterator[NDArray[np.float32]]:
    """Embed some rows of a file, a block at a time."""
    counts = CountSource.of(path, **where)
    genes = gene_map(counts, model.encoding)
    for first, block, depth_B in counts.blocks(BLOCK_CELLS, start=span.start, stop=span.stop):
        refuse_empty(empty_cells(block, genes, model.encoding), counts, first)
        yield model.embed(model.encoding.encode(block, genes, depth_B=depth_B), **how)
