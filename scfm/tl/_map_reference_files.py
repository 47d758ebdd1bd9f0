"""`scfm.tl.map_reference_files`: label the cells of files from a labeled reference, and resume after an interruption."""

# Axes: Q query cells of a block, N neighbors, C classes, K directions.

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm._docs import document
from scfm._files import require_writable
from scfm._remote import input_paths
from scfm.annotation.mapping import hub_fraction_of
from scfm.data.files import count_rows
from scfm.data.ranks import torchrun_rank
from scfm.errors import EmptyCellError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import EncodedBlock
from scfm.tl._annotate import require_cells_to_adapt
from scfm.tl._file_pass import FilePass, Rows
from scfm.tl._map_reference import Mapper
from scfm.tl._record import record_of
from scfm.tl._write_results import TABLE_SUFFIXES, Results, write_results

MAX_REFERENCE = 2**24  # cells whose row numbers float32 represents exactly


@document
def map_reference_files(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    reference: anndata.AnnData | str | Path | Sequence[str | Path],
    model: Model | str | Path,
    *,
    labels_key: str,
    n_neighbors: int = 15,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    adapt: bool = False,
    key_added: str = "scfm_mapped",
    progress: bool = True,
) -> pd.Series:
    """Transfer labels from a labeled reference to every cell of one or many files, with one block of them in memory at a time.

    The labels are the same as those of `scfm.tl.map_reference`, which also compares the mapping with simple methods. Progress is
    saved in the folder `<out>.part`. After an interruption, the same call resumes from there, unless the input or the reference
    has changed. Under torchrun, each process maps a part of the cells, and the first one writes `out`, which must be on a file
    system that all processes share.

    Parameters
    ----------
    {paths}
    out
        File to write, whose suffix determines the format:

        - `.h5ad` or `.zarr`: for one input, a copy of it with the results; for several, their `obs` with a column `file`, and
          the results, without counts
        - `.parquet` or `.csv`: one row per cell with label, confidence, distance, and the rows and distances of the neighbors
    reference
        Raw counts of the labeled cells: an AnnData, an AnnCollection, or one or several files, as in `scfm.fit`. Memory holds the
        log-expression of all labeled cells.
    model
        Any model, with or without labels, or its path.
    labels_key
        Column of `obs` of the reference with labels. Reference cells without one (NaN) are not used.
    n_neighbors
        Number of reference cells to use for each query cell.
    {layer}
    {gene_key}
    {depth_key}
    adapt
        Whether to ignore what all classes of the query have in common in their difference from the reference, as in
        `scfm.tl.map_reference`. The label of a cell then depends on all cells of the files, and memory holds some hundred bytes
        per cell.
    {prefix_key_added}
    {progress}

    Returns
    -------
    The number of cells of each label. In `out` the columns and arrays have the names that `scfm.tl.map_reference` writes.

    Raises
    ------
    LabelsError
        If `labels_key` is missing, fewer reference cells than `n_neighbors` have a label, or all have the same label.
    CountsError, VocabularyMismatchError, EmptyCellError
        If a matrix does not hold raw counts, its genes do not match the model, or a cell expresses no gene of the model.
    ValueError
        If the suffix of `out` is not one of those above, `out` is an input or a folder that is not a .zarr, or there are too few
        cells for `adapt`.
    OSError
        If an input is missing, cut short or not an AnnData, or `out` cannot be written (`OutputError` if the disk is full or
        another process is writing `out`).

    Examples
    --------
    >>> import pathlib, tempfile, scfm
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> adata = scfm.datasets.pbmc()
    >>> adata[:50].write_h5ad(folder / "query.h5ad")
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> n_cells = scfm.tl.map_reference_files(
    ...     folder / "query.h5ad", folder / "mapped.h5ad", adata[50:], model, labels_key="bulk_labels", progress=False
    ... )
    >>> int(n_cells.sum())
    50
    """
    model = opened(model)
    files, out = input_paths(paths), Path(out)
    require_writable(out, TABLE_SUFFIXES, inputs=files)
    n_cells = sum(map(count_rows, files))
    if not n_cells:
        raise EmptyCellError("The files hold no cells. Was every cell filtered out?")
    require_cells_to_adapt(n_cells, adapt)
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    mapper = Mapper.of(
        reference,
        model,
        labels_key=labels_key,
        n_neighbors=n_neighbors,
        source=source,
        progress=progress and torchrun_rank()[0] == 0,
    )
    if len(mapper.labels.codes) > MAX_REFERENCE:
        raise ValueError(
            f"The reference has {len(mapper.labels.codes):,} cells; at most {MAX_REFERENCE:,} can be used."
        )
    settings = {"labels_key": labels_key, "n_neighbors": n_neighbors, "adapt": adapt}

    def write(rows: Rows) -> pd.Series:
        if adapt:
            rows = _adapted(mapper, rows)
        results = _results(mapper, rows, key_added)
        n_chosen_R = np.zeros(len(mapper.labels.codes), dtype=np.int64)
        for _, block in rows.chunks():
            n_chosen_R += np.bincount(block[:, 3 : 3 + n_neighbors].astype(np.int64).ravel(), minlength=len(n_chosen_R))
        hubs = hub_fraction_of(n_chosen_R, len(mapper.labels.labeled))
        results.records[key_added] = record_of(model, **source, **settings, hub_fraction=hubs)
        write_results(out, files, results)
        return pd.Series(results.obs[f"{key_added}_label"]).value_counts()

    job = FilePass(
        files,
        out,
        model,
        source,
        {"task": "map_reference", **settings, "reference": _digest(mapper)},
        mapper.mapping.space.projection_XK.shape[1] if adapt else 3 + 2 * n_neighbors,
        partial(_coordinates if adapt else _rows, mapper),
        title="mapping",
        expression=True,
    )
    n_cells_of = job.run(write, progress=progress)
    return pd.Series(dtype=np.int64) if n_cells_of is None else n_cells_of


def _adapted(mapper: Mapper, rows: Rows) -> Rows:
    """Return the results from the coordinates of all cells, in a file beside them."""
    shift_K = mapper.mapping.common_shift(rows[:].astype(np.float64))
    path = rows.path.with_name("adapted.npy")
    found = np.concatenate([_found(mapper, block - shift_K) for _, block in rows.chunks()])
    np.save(path, found)
    return Rows(path, found.shape)


def _coordinates(mapper: Mapper, block: EncodedBlock, bar: tqdm) -> NDArray[np.float32]:
    return mapper.coordinates(block, bar).astype(np.float32)


def _rows(mapper: Mapper, block: EncodedBlock, bar: tqdm) -> NDArray[np.float32]:
    return _found(mapper, mapper.coordinates(block, bar))


def _found(mapper: Mapper, coordinate_QK: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return code of the label, its probability, mean distance, rows of the reference, and distances, shape (Q, 3 + 2 N)."""
    proba_QC, distance_QN, row_QN = mapper.predict(coordinate_QK)
    distance_QN = distance_QN / mapper.unit
    firsts = [proba_QC.argmax(1), proba_QC.max(1), distance_QN.mean(1)]
    return np.column_stack([*firsts, mapper.labels.labeled[row_QN], distance_QN]).astype(np.float32)


def _results(mapper: Mapper, rows: Rows, key: str) -> Results:
    n_neighbors = (rows.shape[1] - 3) // 2
    numbers = range(1, n_neighbors + 1)
    first_Q3 = np.concatenate([block[:, :3] for _, block in rows.chunks()])
    distances = Results(
        matrix=rows,
        key=f"{key}_neighbor_distances",
        columns=slice(3 + n_neighbors, None),
        names=[f"{key}_neighbor_distance_{number}" for number in numbers],
    )
    return Results(
        matrix=rows,
        key=f"{key}_neighbors",
        columns=slice(3, 3 + n_neighbors),
        names=[f"{key}_neighbor_{number}" for number in numbers],
        dtype=np.int64,
        others=(distances,),
        obs={
            f"{key}_label": mapper.label(first_Q3[:, 0].astype(np.int64)),
            f"{key}_confidence": first_Q3[:, 1],
            f"{key}_distance": first_Q3[:, 2],
        },
    )


def _digest(mapper: Mapper) -> str:
    """Return a digest of what is predicted from, so that progress with another reference is not resumed."""
    digest = hashlib.sha256("\n".join(mapper.labels.names).encode())
    for array in (mapper.labels.codes, mapper.mapping.space.projection_XK, mapper.mapping.space.center_CK):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
