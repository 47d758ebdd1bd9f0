"""`scfm.tl.map_reference`."""

# Axes: Q query cells, R reference cells, N neighbors, D model width, X features, K directions, C classes.

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from scfm import pp
from scfm._config import require_whole
from scfm._docs import document
from scfm.annotation.gene_classifier import expression_components
from scfm.annotation.mapping import HeldOut, Mapping, hub_fraction
from scfm.data import columns
from scfm.errors import LabelsError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import require_cells
from scfm.pp._expression import log_normalized_counts
from scfm.tl._record import record

MAX_CELLS_TO_COMPARE = 20_000  # of the reference


@document
def map_reference(
    query: anndata.AnnData,
    reference: anndata.AnnData,
    model: Model | str | Path,
    *,
    labels_key: str,
    n_neighbors: int = 15,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    baselines: bool = True,
    key_added: str = "scfm_mapped",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Transfer labels to query cells from a labeled reference.

    Cells are compared in a supervised space: the directions in which the labels of the reference differ most. They are found
    by linear discriminant analysis (with a shrunk covariance) of the model's embedding and principal components of
    log-expression, concatenated. The probability of a label is the mean of two estimates: that of the discriminant analysis,
    and the weighted fraction of the label among the nearest reference cells. A neighbor at distance d has the weight
    exp(-d^2 / 2s^2) / sqrt(n), where s is the median distance of the query cell's neighbors, and n is the number of reference
    cells with the neighbor's label.

    Parameters
    ----------
    query
        Raw counts of the cells to label.
    reference
        Raw counts of the labeled cells. Its genes may differ from those of `query`.
    model
        Any model, with or without labels, or its path.
    labels_key
        Column of `reference.obs` with labels. Reference cells without one (NaN) are not used.
    n_neighbors
        Number of reference cells to use for each query cell.
    {layer}
    {gene_key}
    {depth_key}
    baselines
        Whether to compare the mapping with simple methods on a fifth of the reference, which is held out for this. It is done
        only for references of at most 20,000 labeled cells.
    {prefix_key_added}
    copy
        Return a copy of `query` with the result instead of writing to it.

    Returns
    -------
    None, or the copy. Writes to `query`:

    - `obs["KEY_label"]`: most probable label, categorical
    - `obs["KEY_confidence"]`: its probability, 0 to 1, calibrated on a fifth of the reference
    - `obs["KEY_distance"]`: mean distance to the neighbors. Distances are Euclidean, in standard deviations within labels,
      divided by the square root of the number of directions.
    - `obsm["KEY_neighbors"]`: rows of `reference`, nearest first, shape (n_obs, n_neighbors), int64
    - `obsm["KEY_neighbor_distances"]`: their distances, shape (n_obs, n_neighbors), float32
    - `uns["KEY_report"]`: scores of the mapping, of regressions and of nearest neighbors on the held-out fifth of the
      reference, as in `Model.report`; with harmonypy also of nearest neighbors after Harmony. The held-out cells are of the
      same experiment as the rest; on a query of another experiment, all methods usually do worse.
    - `uns["scfm"]`: model, settings, and `hub_fraction`: of all neighbors of all query cells, the fraction that belongs to
      the 5 % of reference cells that are neighbors most often. If it is large, many query cells are mapped to the same few
      reference cells, and the labels should not be trusted.

    Raises
    ------
    LabelsError
        If `labels_key` is missing, fewer reference cells than `n_neighbors` have a label, or all have the same label.
    EmptyCellError
        If `query` has no cells, or a cell expresses no gene of the model.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> query = adata[:50].copy()
    >>> scfm.tl.map_reference(query, adata[50:], model, labels_key="bulk_labels")
    >>> query.obsm["scfm_mapped_neighbors"].shape
    (50, 15)
    """
    require_whole("n_neighbors", n_neighbors, 1)
    model = opened(model)
    require_cells(query)
    labels = columns.labels(reference.obs, labels_key)
    if len(labels.labeled) < n_neighbors:
        raise LabelsError(
            f"`n_neighbors` is {n_neighbors}, but only {len(labels.labeled)} reference cells have a label. Lower it."
        )
    query = query.copy() if copy else query
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    features_RX, features_QX = _features(reference[labels.labeled], query, model, source)
    codes_R = labels.codes[labels.labeled]
    mapping = Mapping.of(features_RX, codes_R, n_neighbors)
    held_out = HeldOut.of(features_RX, codes_R, n_neighbors)
    log_proba_QC, distance_QN, row_QN = mapping.predict(features_QX)
    proba_QC = softmax(log_proba_QC / (1.0 if held_out is None else held_out.temperature), axis=1)
    unit = np.sqrt(mapping.space.projection_XK.shape[1])
    query.obs[f"{key_added}_label"] = pd.Categorical.from_codes(proba_QC.argmax(1), categories=list(labels.names))
    query.obs[f"{key_added}_confidence"] = proba_QC.max(1)
    query.obs[f"{key_added}_distance"] = distance_QN.mean(1) / unit
    query.obsm[f"{key_added}_neighbors"] = labels.labeled[row_QN]
    query.obsm[f"{key_added}_neighbor_distances"] = (distance_QN / unit).astype(np.float32)
    if baselines and held_out is not None and len(codes_R) <= MAX_CELLS_TO_COMPARE:
        expression_RG = log_normalized_counts(reference[labels.labeled], **source)
        query.uns[f"{key_added}_report"] = held_out.report(expression_RG, labels.names, codes_R, n_neighbors)
    settings = {
        "labels_key": labels_key,
        "n_neighbors": n_neighbors,
        "hub_fraction": hub_fraction(row_QN, len(codes_R)),
    }
    record(query, model, key_added, **source, **settings)
    return query if copy else None


def _features(
    reference: anndata.AnnData, query: anndata.AnnData, model: Model, source: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Embedding and components of expression of reference and query; components are learned from the reference."""
    embedding_RD, embedding_QD = (
        model.embed(pp.encode(cells, model.encoding, **source)) for cells in (reference, query)
    )
    expression_RV, expression_QV = (pp.log_expression(cells, model.encoding, **source) for cells in (reference, query))
    component_RK, component_QK = expression_components(expression_RV, expression_QV)
    return np.hstack([embedding_RD, component_RK]), np.hstack([embedding_QD, component_QK])
