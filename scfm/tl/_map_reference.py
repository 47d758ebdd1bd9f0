"""`scfm.tl.map_reference`."""

# Axes: Q query cells, R reference cells, N neighbors, D model width, X features, K directions, C classes.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax
from tqdm.auto import tqdm

from scfm import pp
from scfm._config import require_whole
from scfm._docs import document
from scfm.annotation.gene_classifier import ExpressionComponents
from scfm.annotation.mapping import HeldOut, Mapping, hub_fraction
from scfm.data import CountSource, columns
from scfm.data.many_files import open_data
from scfm.errors import LabelsError
from scfm.families.loading import opened
from scfm.models.inference import cell_bar
from scfm.models.model import Model
from scfm.pp._encode import EncodedBlock, encoded_blocks, open_counts, require_cells
from scfm.tl._annotate import require_cells_to_adapt
from scfm.tl._record import record

MAX_CELLS_TO_COMPARE = 20_000  # of the reference


@document
def map_reference(
    query: anndata.AnnData,
    reference: anndata.AnnData | str | Path | Sequence[str | Path],
    model: Model | str | Path,
    *,
    labels_key: str,
    n_neighbors: int = 15,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    adapt: bool = False,
    baselines: bool = True,
    key_added: str = "scfm_mapped",
    progress: bool = True,
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
        AnnData (in memory, backed or lazy) with raw counts of the cells to label, which are read in blocks. For files, see
        `scfm.tl.map_reference_files`.
    reference
        Raw counts of the labeled cells: an AnnData, an AnnCollection, or one or several files, as in `scfm.fit`. Its genes may
        differ from those of `query`. Memory holds the log-expression of all labeled cells.
    model
        Any model, with or without labels, or its path.
    labels_key
        Column of `reference.obs` with labels. Reference cells without one (NaN) are not used.
    n_neighbors
        Number of reference cells to use for each query cell.
    {layer}
    {gene_key}
    {depth_key}
    adapt
        Whether to ignore what all classes of the query have in common in their difference from the reference, for a query of
        another study or condition. The label of a cell then depends on the other cells of the query, and cells of a type that
        the reference does not have are harder to find by their distance. Needs at least 100 cells.
    baselines
        Whether to compare the mapping with simple methods on a fifth of the reference, which is held out for this. It is done
        only for references of at most 20,000 labeled cells.
    {prefix_key_added}
    progress
        Whether to show a progress bar while the reference is embedded, and one while the query is mapped.
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
    ValueError
        If there are too few cells for `adapt`.

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
    model = opened(model)
    require_cells(query)
    require_cells_to_adapt(query.n_obs, adapt)
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    mapper = Mapper.of(
        reference, model, labels_key=labels_key, n_neighbors=n_neighbors, source=source, progress=progress
    )
    query = query.copy() if copy else query
    with (
        encoded_blocks(query, model.encoding, expression=True, **source) as blocks,
        cell_bar(query.n_obs, "mapping", progress=progress) as bar,
    ):
        coordinates = [mapper.coordinates(block, bar) for block in blocks]
    shift_K = mapper.mapping.common_shift(np.concatenate(coordinates)) if adapt else 0
    found = [mapper.predict(coordinate_QK - shift_K) for coordinate_QK in coordinates]
    proba_QC, distance_QN, row_QN = (np.concatenate(parts) for parts in zip(*found))
    query.obs[f"{key_added}_label"] = mapper.label(proba_QC.argmax(1))
    query.obs[f"{key_added}_confidence"] = proba_QC.max(1)
    query.obs[f"{key_added}_distance"] = distance_QN.mean(1) / mapper.unit
    query.obsm[f"{key_added}_neighbors"] = mapper.labels.labeled[row_QN]
    query.obsm[f"{key_added}_neighbor_distances"] = (distance_QN / mapper.unit).astype(np.float32)
    codes_R = mapper.mapping.codes_R
    if baselines and mapper.held_out is not None and len(codes_R) <= MAX_CELLS_TO_COMPARE:
        expression_RG = mapper.counts.log_normalized()[0]
        names = mapper.labels.names
        query.uns[f"{key_added}_report"] = mapper.held_out.report(expression_RG, names, codes_R, n_neighbors)
    settings = {
        "labels_key": labels_key,
        "n_neighbors": n_neighbors,
        "adapt": adapt,
        "hub_fraction": hub_fraction(row_QN, len(codes_R)),
    }
    record(query, model, key_added, **source, **settings)
    return query if copy else None


@dataclass(frozen=True, eq=False)
class Mapper:
    """A labeled reference, and the prediction of labels of other cells from it.

    Attributes
    ----------
    model
        The model.
    counts, labels
        Counts of the labeled reference cells, and the labels of all reference cells.
    components, mapping, held_out
        What was fitted on the reference.
    """

    model: Model
    counts: CountSource
    labels: columns.Labels
    components: ExpressionComponents
    mapping: Mapping
    held_out: HeldOut | None

    @classmethod
    def of(
        cls,
        reference: Any,
        model: Model,
        *,
        labels_key: str,
        n_neighbors: int,
        source: dict[str, Any],
        progress: bool = False,
    ) -> Mapper:
        """Fit on the labeled cells of a reference."""
        require_whole("n_neighbors", n_neighbors, 1)
        data = open_data(reference)
        labels = columns.labels(data.obs, labels_key)
        if len(labels.labeled) < n_neighbors:
            raise LabelsError(
                f"`n_neighbors` is {n_neighbors}, but only {len(labels.labeled)} reference cells have a label. Lower it."
            )
        counts = open_counts(data, model.encoding, **source).select(labels.labeled)
        embedding_RD = model.embed(pp.encode(counts, model.encoding), progress=progress)
        expression_RV = pp.log_expression(counts, model.encoding)
        components = ExpressionComponents.of(expression_RV)
        features_RX = np.hstack([embedding_RD, components.transform(expression_RV)])
        codes_R = labels.codes[labels.labeled]
        mapping = Mapping.of(features_RX, codes_R, n_neighbors)
        return cls(model, counts, labels, components, mapping, HeldOut.of(features_RX, codes_R, n_neighbors))

    def coordinates(self, block: EncodedBlock, bar: tqdm) -> NDArray[np.float64]:
        """Return the coordinates of query cells in the supervised space, shape (Q, K)."""
        features_QX = np.hstack(
            [self.model.embed(block.cells, progress=bar), self.components.transform(block.expression_BV)]
        )
        return self.mapping.space.coordinates(features_QX)

    def predict(
        self, coordinate_QK: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Return probabilities (Q, C), and distances and rows (of the labeled cells) of the neighbors (Q, N)."""
        log_proba_QC, distance_QN, row_QN = self.mapping.predict(coordinate_QK)
        temperature = 1.0 if self.held_out is None else self.held_out.temperature
        return softmax(log_proba_QC / temperature, axis=1), distance_QN, row_QN

    @property
    def unit(self) -> float:
        """What distances are divided by in results: the square root of the number of directions."""
        return float(np.sqrt(self.mapping.space.projection_XK.shape[1]))

    def label(self, code_Q: NDArray[np.integer]) -> pd.Categorical:
        return pd.Categorical.from_codes(code_Q, categories=list(self.labels.names))
