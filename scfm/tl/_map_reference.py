"""`scfm.tl.map_reference`."""

# Axes: Q query cells, R reference cells, N neighbors, D model width, C classes.

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from scfm import pp
from scfm._config import require_whole
from scfm._docs import document
from scfm.data import columns
from scfm.errors import LabelsError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import require_cells, select_cells
from scfm.tl._record import record


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
    key_added: str = "scfm_mapped",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Transfer labels to query cells from their nearest reference cells in the model's embedding.

    Embeddings are standardized with mean and standard deviation of the reference. The distance d of two cells is their
    Euclidean distance divided by the square root of the number of dimensions. A neighbor has the weight
    exp(-d^2 / 2s^2), where s is the median distance from the cell to its neighbors.

    Parameters
    ----------
    query
        Raw counts of the cells to label.
    reference
        Raw counts of the labeled cells. Its genes may differ from those of `query`.
    model
        Any model; it does not need labels.
    labels_key
        Column of `reference.obs` with labels. Reference cells without one (NaN) are not used.
    n_neighbors
        Number of reference cells to use for each query cell.
    {layer}
    {gene_key}
    {depth_key}
    {prefix_key_added}
    copy
        Return a copy of `query` with the result instead of writing to it.

    Returns
    -------
    None, or the copy. Writes a record of model and settings to `uns["scfm"]`, and to `query`:

    - `obs["<key>_label"]`, categorical
    - `obs["<key>_confidence"]`: weighted fraction of the neighbors with this label, from 0 to 1
    - `obs["<key>_distance"]`: mean of the distances d to the neighbors
    - `obsm["<key>_neighbors"]`: rows of `reference`, nearest first, shape (n_obs, n_neighbors), int64
    - `obsm["<key>_neighbor_distances"]`: distances d to them, shape (n_obs, n_neighbors), float32

    Raises
    ------
    LabelsError
        If `labels_key` does not exist, or fewer than `n_neighbors` reference cells have a label.
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
    reference_RD, query_QD = (
        model.embed(pp.encode(cells, model.encoding, layer=layer, gene_key=gene_key, depth_key=depth_key))
        for cells in (select_cells(reference, labels.labeled), query)
    )
    center_D, scale_D = reference_RD.mean(0), np.maximum(reference_RD.std(0), 1e-6)
    found = NearestNeighbors(n_neighbors=n_neighbors).fit((reference_RD - center_D) / scale_D)
    distance_QN, row_QN = found.kneighbors((query_QD - center_D) / scale_D)
    share_QC = _shares(distance_QN, labels.codes[labels.labeled][row_QN], len(labels.names))
    query.obs[f"{key_added}_label"] = pd.Categorical.from_codes(share_QC.argmax(1), categories=list(labels.names))
    query.obs[f"{key_added}_confidence"] = share_QC.max(1)
    query.obs[f"{key_added}_distance"] = distance_QN.mean(1) / np.sqrt(len(scale_D))
    query.obsm[f"{key_added}_neighbors"] = labels.labeled[row_QN]
    query.obsm[f"{key_added}_neighbor_distances"] = (distance_QN / np.sqrt(len(scale_D))).astype(np.float32)
    record(
        query,
        model,
        key_added,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
        labels_key=labels_key,
        n_neighbors=n_neighbors,
    )
    return query if copy else None


def _shares(distance_QN: NDArray[np.floating], code_QN: NDArray[np.int64], n_classes: int) -> NDArray[np.float64]:
    """Return the weighted fraction of each class among the neighbors, shape (Q, C)."""
    width_Q1 = np.maximum(np.median(distance_QN, axis=1, keepdims=True), 1e-12)
    weight_QN = np.exp(-0.5 * (distance_QN / width_Q1) ** 2)
    share_QC = np.zeros((len(code_QN), n_classes))
    np.add.at(share_QC, (np.arange(len(code_QN))[:, None], code_QN), weight_QN)
    return share_QC / share_QC.sum(1, keepdims=True)
