"""`scfm.tl.annotate_files`: label the cells of files that are larger than memory, and resume after an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from scfm import pp
from scfm._docs import document
from scfm._files import require_writable
from scfm._remote import AnyPath, input_paths
from scfm.annotation.adapt import adapted_rows
from scfm.data import columns
from scfm.data.files import count_rows, obs_of
from scfm.errors import EmptyCellError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import gene_map, open_counts
from scfm.tl._annotate import LabelOptions, proba_and_novelty, require_cells_to_adapt, warn_of_missing_genes
from scfm.tl._file_pass import FilePass, Rows
from scfm.tl._record import record_of
from scfm.tl._write_results import TABLE_SUFFIXES, Results, write_results


@document
def annotate_files(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    model: Model | str | Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    min_confidence: float = 0.0,
    max_novelty: float | Literal["calibrated"] | None = None,
    majority_key: str | None = None,
    adapt: bool = False,
    key_added: str = "scfm",
    progress: bool = True,
) -> pd.Series:
    """Predict the label of every cell of one or many files, with one block of cells in memory at a time.

    The labels are the same as those of `scfm.tl.annotate`. Progress is saved in the folder `<out>.part`. After an
    interruption, the same call resumes from there, unless the input has changed. Under torchrun, each process labels a part of
    the cells, and the first one writes `out`, which must be on a file system that all processes share.

    Parameters
    ----------
    {paths}
    out
        File to write, whose suffix determines the format:

        - `.h5ad` or `.zarr`: for one input, a copy of it with the labels; for several, their `obs` with a column `file`, and
          the labels, without counts
        - `.parquet` or `.csv`: one row per cell with label, confidence, novelty and the probability of each label
    model
        A model that was fitted with `labels_key`, or the path of one.
    {layer}
    {gene_key}
    {depth_key}
    {how_labels_are_made}
    {prefix_key_added}
    {progress}

    Returns
    -------
    The number of cells of each label. In `out` the columns and arrays have the names that `scfm.tl.annotate` writes.

    Raises
    ------
    ModelTaskError
        If the model was fitted without labels, or `max_novelty` needs a score or a threshold that it does not have.
    CountsError, VocabularyMismatchError, EmptyCellError
        If a matrix does not hold raw counts, its genes do not match the model, or a cell expresses no gene of the model.
    LabelsError
        If `majority_key` is missing in a file.
    ValueError
        If the suffix of `out` is not one of those above, `out` is an input or a folder that is not a .zarr,
        `min_confidence` is not a probability, or there are too few cells for `adapt`.
    OSError
        If an input is missing, cut short or not an AnnData, or `out` cannot be written (`OutputError` if the disk is full or
        another process is writing `out`).

    Examples
    --------
    >>> import pathlib, tempfile, scfm
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> adata = scfm.datasets.pbmc()
    >>> adata.write_h5ad(folder / "pbmc.h5ad")
    >>> quick = {"context_length": 64, "baselines": False, "pretrain": False, "progress": False}
    >>> model = scfm.fit(adata, labels_key="bulk_labels", config=scfm.FitConfig(n_steps=2), **quick)
    >>> n_cells = scfm.tl.annotate_files(folder / "pbmc.h5ad", folder / "labels.parquet", model, progress=False)
    >>> int(n_cells.sum())
    700
    """
    model = opened(model)
    options = LabelOptions.of(model, min_confidence, max_novelty, adapt=adapt)
    files, out = input_paths(paths), Path(out)
    require_writable(out, TABLE_SUFFIXES, inputs=files)
    where: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    n_cells = sum(map(count_rows, files))
    if files and not n_cells:
        n_genes = open_counts(files[0], model.encoding, **where).n_vars
        raise EmptyCellError(f"The data hold no cells (0 x {n_genes}). Was every cell filtered out?")
    require_cells_to_adapt(n_cells, adapt)
    clusters_B = None if majority_key is None else _clusters(files, majority_key)
    if files:
        warn_of_missing_genes(gene_map(open_counts(files[0], model.encoding, **where), model.encoding).report, model)
    n_labels = len(model.labels)

    def write(rows: Rows) -> pd.Series:
        if adapt:
            rows = _adapted(rows, files, model, where)
        obs = options.columns(rows[:], clusters_B, key_added)
        settings = {**where, **options.settings, "majority_key": majority_key}
        results = Results(
            matrix=rows,
            key=f"{key_added}_proba",
            columns=slice(n_labels),
            names=[f"probability of {label}" for label in model.labels],
            obs=obs,
            records={f"{key_added}_label": record_of(model, **settings)},
        )
        write_results(out, files, results)
        return pd.Series(obs[f"{key_added}_label"]).value_counts()

    job = FilePass(
        files,
        out,
        model,
        where,
        {"task": "annotate"},
        n_labels + (model.network.novelty is not None),
        partial(proba_and_novelty, model),
        title="annotating",
        expression=True,
    )
    n_cells_of = job.run(write, progress=progress)
    return pd.Series(dtype=np.int64) if n_cells_of is None else n_cells_of


def _adapted(rows: Rows, files: Sequence[AnyPath], model: Model, where: dict[str, Any]) -> Rows:
    """Return adapted rows, in a file beside the others."""
    parts = [pp.log_expression(path, model.encoding, **where) for path in files]
    path = rows.path.with_name("adapted.npy")
    np.save(path, adapted_rows(model, rows[:], sparse.vstack(parts, format="csr")))
    return Rows(path, rows.shape)


def _clusters(files: Sequence[AnyPath], key: str) -> Any:
    """Return the cluster of each cell of all files, -1 for a cell without one."""
    tables = ((f"obs of {path.name}", obs_of(path)) for path in files)
    return columns.groups_of_tables(tables, key, argument="majority_key").codes
