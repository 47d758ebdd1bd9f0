"""`scfm.tl.annotate`."""

# Axes: B cells, C classes.

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm import pp
from scfm.annotation.calibration import distances
from scfm.errors import LabelsError
from scfm.models.model import Model
from scfm.pp._encode import require_cells
from scfm.tl._record import record

UNASSIGNED = "unassigned"


def annotate(
    adata: anndata.AnnData,
    model: Model,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    min_confidence: float = 0.0,
    max_distance: float | None = None,
    majority_key: str | None = None,
    key_added: str = "scfm",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Give every cell the most probable of the labels that the model was fitted on.

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes, in `X` or in `layer`.
    model
        Fitted with `labels_key=`.
    layer, gene_key
        As in `scfm.tl.embed`.
    min_confidence
        Cells whose most probable label is less probable than this become "unassigned".
    max_distance
        Cells further than this from the training cells become "unassigned". Distances are in standard deviations of the
        training cells; `model.calibration.typical_distance` is the one that 99 of 100 held-out cells keep.
        None rejects none.
    majority_key
        Column of `adata.obs` with clusters; every cell then gets the label that most cells of its cluster got, before
        cells are rejected. Cells without a cluster (NaN) keep their own.
    key_added
        Prefix of what is written.
    copy
        Return a copy with the result instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Writes `obs["<key>_label"]` (categorical), `obs["<key>_confidence"]` (calibrated probability of
    the label, 0 to 1), with `max_distance` also `obs["<key>_distance"]`, and `obsm["<key>_proba"]`, shape
    (n_obs, n_labels), float32, its columns in the order of `model.labels`.

    Raises
    ------
    ModelTaskError
        If the model was fitted without labels.
    LabelsError
        If `majority_key` is missing.
    EmptyCellError
        If there are no cells, or one has no known gene.
    ValueError
        If `min_confidence` is not a probability.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> quick = {"context_length": 64, "baselines": False, "pretrain": False, "config": scfm.FitConfig(n_steps=2), "progress": False}
    >>> model = scfm.fit(adata, labels_key="bulk_labels", **quick)
    >>> scfm.tl.annotate(adata, model)
    >>> adata.obs["scfm_label"].cat.categories.size
    10
    """
    model.require_labels()
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"`min_confidence` is {min_confidence}; it is a probability, from 0 to 1.")
    require_cells(adata)
    if majority_key is not None and majority_key not in adata.obs:
        raise LabelsError(
            f"`majority_key` is {majority_key!r}, which is not in `adata.obs` ({', '.join(map(str, adata.obs))})."
        )
    adata = adata.copy() if copy else adata
    cells = pp.encode(adata, model.encoding, layer=layer, gene_key=gene_key)
    proba_BC = model.predict_proba(cells, pp.log_expression(adata, model.encoding, layer=layer, gene_key=gene_key))
    code_B = proba_BC.argmax(1)
    if majority_key is not None:
        code_B = _majority(code_B, adata.obs[majority_key])
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
        layer=layer,
        gene_key=gene_key,
        labels=list(model.labels),
        min_confidence=min_confidence,
        max_distance=max_distance,
        majority_key=majority_key,
    )
    return adata if copy else None


def _majority(code_B: NDArray[np.int64], clusters: pd.Series) -> NDArray[np.int64]:
    """Most frequent code of each cell's cluster; of equally frequent ones the first."""
    voted_B = code_B.copy()
    cluster_B = pd.factorize(clusters)[0]
    for cluster in range(cluster_B.max() + 1):
        members = cluster_B == cluster
        voted_B[members] = np.bincount(code_B[members]).argmax()
    return voted_B
