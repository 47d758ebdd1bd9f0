"""`scfm.tl.annotate`."""

# Axes: B cells, C classes.

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm import pp
from scfm._docs import document
from scfm.annotation.calibration import distances, has_distances
from scfm.data import columns
from scfm.errors import ModelTaskError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import require_cells
from scfm.tl._record import record

UNASSIGNED = "unassigned"


@document
def annotate(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    min_confidence: float = 0.0,
    max_distance: float | None = None,
    majority_key: str | None = None,
    key_added: str = "scfm",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Predict the label of every cell.

    Parameters
    ----------
    {adata}
    model
        A model that was fitted with `labels_key`, or the path of one.
    {layer}
    {gene_key}
    {depth_key}
    min_confidence
        Cells whose predicted label has a lower probability become "unassigned".
    max_distance
        Cells at a larger distance from the training cells become "unassigned". The distance is the root mean square of the
        inputs of the class head, standardized with the training cells. For 99 % of the calibration cells it is at most
        `model.calibration.typical_distance`, which is None if it was not measured. None rejects no cell.
    majority_key
        Column of `adata.obs` with clusters. Every cell then gets the label that is predicted most often in its cluster, and
        its confidence is its own probability of this label. Cells are rejected afterward. Cells without a cluster (NaN)
        keep the label that is predicted for them.
    {prefix_key_added}
    {copy}

    Returns
    -------
    None, or the copy. Writes a record of model and settings to `uns["scfm"]`, and

    - `obs["<key>_label"]`, categorical
    - `obs["<key>_confidence"]`: calibrated probability of the label, from 0 to 1
    - `obs["<key>_distance"]`, with `max_distance`
    - `obsm["<key>_proba"]`: probability of each label in the order of `model.labels`, shape (n_obs, n_labels), float32

    Raises
    ------
    ModelTaskError
        If the model was fitted without labels, or `max_distance` is given and the model has a published class head, which
        stores no statistics of training cells.
    CountsError, VocabularyMismatchError
        If the matrix does not hold raw counts, or its genes do not match the model.
    LabelsError
        If `majority_key` is missing.
    EmptyCellError
        If there are no cells, or one expresses no gene of the vocabulary.
    ValueError
        If `min_confidence` is not a probability.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> quick = {"context_length": 64, "baselines": False, "pretrain": False, "progress": False}
    >>> model = scfm.fit(adata, labels_key="bulk_labels", config=scfm.FitConfig(n_steps=2), **quick)
    >>> scfm.tl.annotate(adata, model)
    >>> adata.obs["scfm_label"].cat.categories.size
    10
    """
    model = opened(model)
    model.require_labels()
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"`min_confidence` is {min_confidence}; it is a probability, from 0 to 1.")
    require_cells(adata)
    clusters_B = (
        None if majority_key is None else columns.groups(adata.obs, majority_key, argument="majority_key").codes
    )
    if max_distance is not None and not has_distances(model):
        raise ModelTaskError(
            "The class head of this model is that of a published classifier, which stores no statistics of its training "
            "cells, so distances cannot be computed. Use `min_confidence`, or fine-tune the model with `scfm.fit(model=...)`."
        )
    adata = adata.copy() if copy else adata
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    cells = pp.encode(adata, model.encoding, **source)
    proba_BC = model.predict_proba(cells, pp.log_expression(adata, model.encoding, **source))
    code_B = proba_BC.argmax(1)
    if clusters_B is not None:
        code_B = _majority(code_B, clusters_B)
    confidence_B = proba_BC[np.arange(len(code_B)), code_B]
    rejected_B = confidence_B < min_confidence
    if max_distance is not None:
        distance_B = distances(model, model.class_features(cells))
        rejected_B |= distance_B > max_distance
        adata.obs[f"{key_added}_distance"] = distance_B
    rejects = min_confidence > 0 or max_distance is not None
    names = [*model.labels, UNASSIGNED] if rejects and UNASSIGNED not in model.labels else list(model.labels)
    code_B = np.where(rejected_B, names.index(UNASSIGNED), code_B) if rejects else code_B
    adata.obs[f"{key_added}_label"] = pd.Categorical.from_codes(code_B, categories=names)
    adata.obs[f"{key_added}_confidence"] = confidence_B
    adata.obsm[f"{key_added}_proba"] = proba_BC
    record(
        adata,
        model,
        f"{key_added}_label",
        **source,
        labels=list(model.labels),
        min_confidence=min_confidence,
        max_distance=max_distance,
        majority_key=majority_key,
    )
    return adata if copy else None


def _majority(code_B: NDArray[np.int64], cluster_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most frequent code in the cluster of each cell; of equally frequent ones, the lowest."""
    majority_B = code_B.copy()
    for cluster in range(cluster_B.max() + 1):
        members = cluster_B == cluster
        majority_B[members] = np.bincount(code_B[members]).argmax()
    return majority_B
