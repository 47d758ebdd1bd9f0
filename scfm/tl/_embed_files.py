"""`scfm.tl.embed_files`: embed files that are larger than memory, and resume after an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm._docs import document
from scfm._files import require_writable
from scfm._remote import input_paths
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.pp._encode import EncodedBlock
from scfm.tl._file_pass import FilePass, Rows
from scfm.tl._record import record_of
from scfm.tl._write_results import SUFFIXES, Results, write_results


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

    At the end, some outputs need more memory: for several inputs their `obs`, and for a single `.h5ad` that is written as
    `.zarr`, or the reverse, the complete input.

    Parameters
    ----------
    {paths}
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
    files, out = input_paths(paths), Path(out)
    require_writable(out, SUFFIXES, inputs=files)
    where: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    how: dict[str, Any] = {
        "hidden_layer": hidden_layer,
        "pooling": pooling,
        "normalize": normalize,
        "precision": precision,
    }
    config = model.network.config
    width = config.replace(pooling={"how": pooling or config.pooling.how}).d_embedding

    def write(rows: Rows) -> None:
        names = [f"scfm_{dimension}" for dimension in range(width)]
        records = {key_added: record_of(model, **where, **how)}
        write_results(
            out, files, Results(matrix=rows, key=key_added, columns=slice(None), names=names, records=records)
        )

    def compute(block: EncodedBlock, bar: tqdm) -> NDArray[np.float32]:
        return model.embed(block.cells, progress=bar, **how)

    job = FilePass(files, out, model, where, how, width, compute, title="embedding")
    job.run(write, progress=progress)
    return sum(job.rows)
