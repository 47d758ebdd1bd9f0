"""`scfm.tl.annotate`."""

# Axes: B cells, C classes.

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm import pp
from scfm._docs import document
from scfm.annotation.adapt import MIN_CELLS, adapted_rows
from scfm.data import columns
from scfm.encoding import GeneReport
from scfm.errors import ModelTaskError
from scfm.families.loading import opened
from scfm.models.inference import cell_bar
from scfm.models.model import Model
from scfm.models.state import Calibration
from scfm.pp._encode import EncodedBlock, encoded_blocks, gene_map, open_counts, require_cells
from scfm.tl._record import record

logger = logging.getLogger(__name__)

UNASSIGNED = "unassigned"
MIN_GENE_FRACTION = 0.5  # of the genes of the model; with fewer, a warning is logged


@document
def annotate(
    adata: anndata.AnnData,
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
    {how_labels_are_made}
    {prefix_key_added}
    {progress}
    {copy}

    Returns
    -------
    None, or the copy. Writes to `adata`:

    - `obs["KEY_label"]`: label or "unassigned", categorical
    - `obs["KEY_confidence"]`: calibrated probability of the label, 0 to 1
    - `obs["KEY_novelty"]`: how far the expression of the cell is from every known class; 0 is typical of cells of known
      classes; with `adapt`, of these cells. Published classifiers have no novelty score.
    - `obsm["KEY_proba"]`: probability of each label, shape (n_obs, n_labels), float32, columns as in `model.labels`
    - `uns["scfm"]`: model and settings

    Raises
    ------
    ModelTaskError
        If the model was fitted without labels, or `max_novelty` needs a score or a threshold that it does not have.
    CountsError, VocabularyMismatchError
        If the matrix does not hold raw counts, or its genes do not match the model.
    LabelsError
        If `majority_key` is missing.
    EmptyCellError
        If there are no cells, or one expresses no gene of the vocabulary.
    ValueError
        If `min_confidence` is not a probability, or there are too few cells for `adapt`.

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
    options = LabelOptions.of(model, min_confidence, max_novelty, adapt=adapt)
    require_cells(adata)
    require_cells_to_adapt(adata.n_obs, adapt)
    clusters_B = (
        None if majority_key is None else columns.groups(adata.obs, majority_key, argument="majority_key").codes
    )
    adata = adata.copy() if copy else adata
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    counts = open_counts(adata, model.encoding, **source)
    warn_of_missing_genes(gene_map(counts, model.encoding).report, model)
    with (
        encoded_blocks(counts, model.encoding, expression=True) as blocks,
        cell_bar(adata.n_obs, "annotating", progress=progress) as bar,
    ):
        rows_BX = np.concatenate([proba_and_novelty(model, block, bar) for block in blocks])
    if adapt:
        rows_BX = adapted_rows(model, rows_BX, pp.log_expression(counts, model.encoding))
    for name, values in options.columns(rows_BX, clusters_B, key_added).items():
        adata.obs[name] = values
    adata.obsm[f"{key_added}_proba"] = rows_BX[:, : len(model.labels)].copy()
    settings = {**source, **options.settings, "majority_key": majority_key}
    record(adata, model, f"{key_added}_label", **settings)
    return adata if copy else None


def require_cells_to_adapt(n_obs: int, adapt: bool) -> None:
    if adapt and n_obs < MIN_CELLS:
        raise ValueError(
            f"`adapt` learns from the cells that are annotated, and {n_obs} are too few; it needs {MIN_CELLS}. Omit it, or "
            "annotate more cells of the same study together."
        )


def proba_and_novelty(model: Model, block: EncodedBlock, bar: tqdm) -> NDArray[np.float32]:
    """Return the probability of each class, and if the model has it the novelty score, shape (B, C) or (B, C + 1)."""
    proba_BC = model.predict_proba(block.cells, block.expression_BV, progress=bar)
    if model.network.novelty is None:
        return proba_BC
    return np.column_stack([proba_BC, model.network.novelty(block.expression_BV)])


@dataclass(frozen=True)
class LabelOptions:
    """How labels are made from probabilities and novelty scores.

    `threshold` is the calibrated threshold of the novelty score, None if there is none; `limit` is the novelty above which a
    cell is rejected, infinite to reject none.
    """

    model: Model
    min_confidence: float
    max_novelty: float | Literal["calibrated"] | None
    adapt: bool
    threshold: float | None
    limit: float

    @classmethod
    def of(
        cls,
        model: Model,
        min_confidence: float,
        max_novelty: float | Literal["calibrated"] | None,
        *,
        adapt: bool,
    ) -> LabelOptions:
        """Check the options against the model."""
        model.require_labels()
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"`min_confidence` is {min_confidence}; it is a probability, from 0 to 1.")
        fitted = model.calibration or Calibration(n_cells=0)
        threshold = fitted.novelty_threshold
        if adapt and fitted.group_novelty_threshold is not None:
            threshold = fitted.group_novelty_threshold
        limit = _novelty_limit(model, max_novelty, threshold)
        return cls(model, min_confidence, max_novelty, adapt, threshold, limit)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "labels": list(self.model.labels),
            "min_confidence": self.min_confidence,
            "max_novelty": self.max_novelty,
            "adapt": self.adapt,
        }

    def columns(
        self, rows_BX: NDArray[np.float32], clusters_B: NDArray[np.int64] | None, key_added: str
    ) -> dict[str, Any]:
        """Return the columns of `obs` from the result of `proba_and_novelty` for all cells, and log how many are novel."""
        labels = self.model.labels
        proba_BC = rows_BX[:, : len(labels)]
        code_B = proba_BC.argmax(1)
        if clusters_B is not None:
            code_B = _majority(code_B, clusters_B)
        confidence_B = proba_BC[np.arange(len(code_B)), code_B]
        rejected_B = confidence_B < self.min_confidence
        novelty = {}
        if self.model.network.novelty is not None:
            novelty_B = rows_BX[:, len(labels)].copy()
            rejected_B |= novelty_B > self.limit
            novelty = {f"{key_added}_novelty": novelty_B}
            if self.max_novelty is None and self.threshold is not None:
                _report_novel(novelty_B, self.threshold)
        rejects = self.min_confidence > 0 or self.max_novelty is not None
        names = [*labels, UNASSIGNED] if rejects and UNASSIGNED not in labels else list(labels)
        code_B = np.where(rejected_B, names.index(UNASSIGNED), code_B) if rejects else code_B
        label = pd.Categorical.from_codes(code_B, categories=names)
        return {**novelty, f"{key_added}_label": label, f"{key_added}_confidence": confidence_B}


def warn_of_missing_genes(report: GeneReport, model: Model) -> None:
    """Log a warning if the data lack most genes of a model with a gene classifier, to which absent genes are zeros."""
    if model.network.gene_classifier is not None and report.n_found < MIN_GENE_FRACTION * report.n_vocabulary:
        logger.warning(
            "The data have %s of the %s genes of the model. The model takes absent genes for genes without counts, so the labels "
            "may be wrong. Pass the complete matrix, not only variable genes.",
            report.n_found,
            report.n_vocabulary,
        )


def _novelty_limit(model: Model, max_novelty: float | Literal["calibrated"] | None, threshold: float | None) -> float:
    if max_novelty is None:
        return np.inf
    if model.network.novelty is None:
        raise ModelTaskError(
            "This model has no novelty score: it was not fine-tuned by `scfm.fit`. Use `min_confidence`, or fine-tune it with "
            "`scfm.fit(model=...)`."
        )
    if max_novelty != "calibrated":
        return float(max_novelty)
    if threshold is None:
        raise ModelTaskError(
            "This model has no calibrated threshold, because it was fitted with too few labeled cells to hold some out. Give "
            "`max_novelty` a number, such as 2."
        )
    return threshold


def _report_novel(novelty_B: NDArray[np.floating], threshold: float) -> None:
    """Log how many cells the calibrated threshold would reject."""
    n_novel = int((novelty_B > threshold).sum())
    logger.info(
        "%s of %s cells (%.0f %%) have a higher novelty score than 95 %% of the calibration cells; "
        '`max_novelty="calibrated"` rejects them.',
        n_novel,
        len(novelty_B),
        100 * n_novel / len(novelty_B),
    )


def _majority(code_B: NDArray[np.int64], cluster_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most frequent code in the cluster of each cell; of equally frequent ones, the lowest."""
    majority_B = code_B.copy()
    for cluster in range(cluster_B.max() + 1):
        members = cluster_B == cluster
        majority_B[members] = np.bincount(code_B[members]).argmax()
    return majority_B
