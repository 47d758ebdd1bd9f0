"""`scfm.tl.embed_files`: embeddings of files larger than memory, which a stopped run goes on with."""

# Axes: B cells of a block, N cells of all files, D model width.

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm._output import require_writable
from scfm.data import open_counts
from scfm.data.files import count_rows
from scfm.models.model import Model
from scfm.pp._encode import gene_map, refuse_empty
from scfm.tl._record import record_of
from scfm.tl._write_embedding import SUFFIXES, read_obs, write_embedding

BLOCK_CELLS = 1024  # cells between two notes of the progress; seconds of work on a CPU


def embed_files(
    paths: Sequence[str | Path],
    out: str | Path,
    model: Model,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    hidden_layer: int | None = None,
    pooling: str | None = None,
    key_added: str = "X_scfm",
    progress: bool = True,
) -> int:
    """Embed every cell of one or many files, a block of cells in memory at a time.

    Progress is kept beside `out` in the folder `<out>.part`; a run that was stopped, called again in the same way, goes on
    there. The numbers are those of `scfm.tl.embed`.

    Parameters
    ----------
    paths
        `.h5ad` files and `.zarr` folders with raw counts.
    out
        What to write, by its suffix: `.h5ad` or `.zarr` (one input: a copy of it with the embedding; several: their `obs` with
        a column `file`, and the embedding, without counts), `.parquet` or `.csv` (a row a cell), `.npy` (the array).
    model
        From `scfm.fit` or `scfm.load`.
    layer, gene_key, hidden_layer, pooling, key_added
        As in `scfm.tl.embed`.
    depth_key
        As in `scfm.pp.encode`.
    progress
        Whether to show a progress bar with cells per second and time left.

    Returns
    -------
    Number of cells. Writes `out`, whole or not at all: an array of shape (N, D), float32, cells in the order of the files.

    Raises
    ------
    CountsError, VocabularyMismatchError, EmptyCellError
        As in `scfm.tl.embed`.
    ValueError
        If `out` has another suffix, is one of the inputs, or is a folder that is no .zarr.
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
    files, out = [Path(path) for path in paths], Path(out)
    require_writable(out, SUFFIXES, inputs=files)
    where: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    how: dict[str, Any] = {"hidden_layer": hidden_layer, "pooling": pooling}
    rows = [count_rows(path) for path in files]
    job = {"model_id": model.id, "files": [_identity(path) for path in files], **where, **how}
    part = _Part(out.with_name(out.name + ".part"), job, (sum(rows), model.network.config.d_model))
    try:
        with tqdm(total=sum(rows), initial=part.done, desc="embedding", unit="cell", disable=not progress) as bar:
            for path, start in _unfinished(files, rows, part.done):
                for embedding_BD in _blocks(path, model, start=start, **where, **how):
                    part.append(embedding_BD)
                    bar.update(len(embedding_BD))
    finally:
        part.remove_if_empty()
    record = record_of(model, **where, **how)
    write_embedding(out, files, part.embedding_ND, key=key_added, record=record)
    part.remove()
    return sum(rows)


class _Part:
    """The folder of a job under way: the embedding so far, and how far it goes."""

    def __init__(self, folder: Path, job: dict[str, Any], shape: tuple[int, int]) -> None:
        self.folder, self._job = folder, job
        self.done = self._read_done()
        if self.done == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        mode: Any = "r+" if self.done else "w+"
        if shape[0]:
            self.embedding_ND: NDArray[np.float32] = np.lib.format.open_memmap(
                folder / "embedding.npy", mode=mode, dtype=np.float32, shape=shape
            )
        else:
            self.embedding_ND = np.zeros(shape, np.float32)

    def _read_done(self) -> int:
        """Cells that an earlier run of the very same job embedded; 0 where there was none."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
        except (OSError, json.JSONDecodeError):
            return 0
        same = state.get("job") == self._job and (self.folder / "embedding.npy").exists()
        return int(state["done"]) if same else 0

    def append(self, embedding_BD: NDArray[np.float32]) -> None:
        self.embedding_ND[self.done : self.done + len(embedding_BD)] = embedding_BD
        self.embedding_ND.flush()  # type: ignore[attr-defined]  # a memory map
        self.done += len(embedding_BD)
        beside = self.folder / "state.json.part"
        beside.write_text(json.dumps({"job": self._job, "done": self.done}))
        beside.replace(self.folder / "state.json")

    def remove_if_empty(self) -> None:
        """Leave nothing behind of a job that failed before its first block."""
        if self.done == 0 and len(self.embedding_ND):
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _identity(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the one that was begun with."""
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _unfinished(files: list[Path], rows: list[int], done: int) -> Iterator[tuple[Path, int]]:
    """Files with cells left, and the row to start at."""
    for path, n_rows in zip(files, rows):
        if done < n_rows:
            yield path, done
        done = max(0, done - n_rows)


def _blocks(
    path: Path,
    model: Model,
    *,
    start: int,
    layer: str | None,
    gene_key: str | None,
    depth_key: str | None,
    hidden_layer: int | None,
    pooling: str | None,
) -> Iterator[NDArray[np.float32]]:
    """Embed the cells of a file from row `start` on, a block at a time."""
    counts = open_counts(path, layer=layer, depth_key=depth_key)
    genes = gene_map(counts, model.encoding, gene_key=gene_key)
    names = read_obs(path).index
    for first, block, depth_B in counts.blocks(BLOCK_CELLS, start=start):
        cells = model.encoding.encode(block, genes, depth_B=depth_B)
        refuse_empty(cells, model.encoding, names[first : first + cells.n_cells])
        yield model.embed(cells, hidden_layer=hidden_layer, pooling=pooling)
