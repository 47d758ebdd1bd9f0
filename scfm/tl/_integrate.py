"""`scfm.tl.integrate`."""

# Axes: B cells, G genes, R components, X columns.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA

from scfm import pp, train
from scfm._config import require_seed
from scfm._docs import document
from scfm.annotation.gene_classifier import gene_scales
from scfm.annotation.harmony import corrected_by_harmony
from scfm.data import CellBatch, columns
from scfm.data.columns import Labels
from scfm.errors import LabelsError, ModelTaskError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.nn.class_heads import MAX_SCALED
from scfm.objectives import Integration
from scfm.pp._encode import require_cells
from scfm.pp._expression import log_normalized_counts
from scfm.tl._record import record
from scfm.train import FitConfig

Method = Literal["harmony", "harmony-embedding", "train"]
N_EMBEDDING_COMPONENTS, N_EXPRESSION_COMPONENTS = 20, 40
# More and harder clusters than harmonypy's defaults (30 cells, 0.1) mix batches of few cells better, and keep types as separate.
# They need more iterations than 10.
HARMONY: dict[str, Any] = {"cells_per_cluster": 20, "sigma": 0.08, "max_iter_harmony": 30, "epsilon_harmony": 1e-5}
EXPRESSION_WEIGHT = 3.0  # mean length of the expression components, relative to that of the embedding components


@document
def integrate(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    batch_key: str | Sequence[str],
    method: Method = "harmony",
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    config: FitConfig | None = None,
    seed: int = 0,
    key_added: str = "X_scfm_integrated",
    progress: bool = True,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed cells so that their coordinates depend less on the experimental batch. Labels are not used.

    - "harmony" corrects the first 20 principal components of the model's embedding together with 40 principal components of
      log-expression.
    - "harmony-embedding" corrects the components of the embedding only.
    - "train" trains a copy of the model on these cells and embeds them with it. Its loss has four kinds of terms: predict
      masked values from tokens; predict them from the cell embedding; make the embeddings of similar cells more similar
      (elastic cell similarity, ECS); and make the batch hard to predict from the embedding, by reversing the gradient of a
      batch classifier (domain adaptation by reverse backpropagation, DAR).

    Parameters
    ----------
    {adata}
    model
        Any model, or its path; left unchanged. "train" needs a model with the bin encoding, such as that of
        `scfm.fit(adata, encoding="bin")`.
    batch_key
        Column of `adata.obs` with the experimental batch of each cell. There must be at least two batches, and no missing
        values. To correct for several kinds of batch, such as donor and chemistry, pass several columns.
    method
        "harmony", "harmony-embedding" or "train".
    {layer}
    {gene_key}
    {depth_key}
    config
        Settings of the training for "train". None for 200 steps with a learning rate of 3e-4.
    seed
        Seed of Harmony's clusters, or, for "train", of the new heads, the order of cells, the masks and dropout.
    {obsm_key_added}
    {progress}
    {copy}

    Returns
    -------
    None, or the copy. Writes `obsm[key_added]`, float32, shape (n_obs, d_model) for "train", and (n_obs, number of corrected
    components) for the other methods.

    Raises
    ------
    ImportError
        If harmonypy is not installed (extra `harmony`) and the method needs it.
    ModelTaskError
        If the method is "train" and the model has no head for masked values of bins (only models with a bin encoding do).
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix does not hold raw counts, its genes do not match the model, or a cell expresses no gene of the model.
    LabelsError
        If `batch_key` is missing from `obs`, has missing values, or has only one batch.
    ValueError
        If `method` is unknown, or `config` is given for another method than "train".

    Notes
    -----
    Harmony (Korsunsky et al. 2019, *Nature Methods*) is computed by harmonypy. "train" is scGPT's integration (Cui et al.
    2024) without its domain-specific batch norm. In our benchmarks, Harmony is better.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:100].copy()
    >>> adata.obs["donor"] = ["a", "b"] * 50
    >>> short = scfm.FitConfig(n_steps=2)
    >>> model = scfm.fit(adata, encoding="bin", config=short, progress=False)
    >>> scfm.tl.integrate(adata, model, batch_key="donor", method="train", config=short, progress=False)
    >>> adata.obsm["X_scfm_integrated"].shape
    (100, 128)
    """
    require_seed(seed)
    require_cells(adata)
    if method not in get_args(Method):
        raise ValueError(f"`method` is {method!r}; choose one of {', '.join(get_args(Method))}.")
    if config is not None and method != "train":
        raise ValueError(f'`config` holds settings of training, but method "{method}" trains no network. Omit it.')
    model = opened(model)
    keys = [batch_key] if isinstance(batch_key, str) else list(batch_key)
    batches = [_batches(adata.obs, key) for key in keys]
    adata = adata.copy() if copy else adata
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    cells = pp.encode(adata, model.encoding, **source)
    if method == "train":
        stage = (config or FitConfig()).with_defaults(n_steps=200, learning_rate=3e-4, seed=seed)
        adata.obsm[key_added] = _trained(model, cells, _crossed(batches), stage, progress=progress)
    else:
        parts = [_components(model.embed(cells), N_EMBEDDING_COMPONENTS)]
        if method == "harmony":
            parts.append(_expression_components(log_normalized_counts(adata, **source)))
        names = {key: np.asarray(labels.names, dtype=object)[labels.codes] for key, labels in zip(keys, batches)}
        adata.obsm[key_added] = corrected_by_harmony(np.concatenate(parts, 1), names, seed, **HARMONY)
    record(adata, model, key_added, **source, batch_key=keys, method=method, seed=seed)
    return adata if copy else None


def _components(value_BX: NDArray[np.floating], n_components: int) -> NDArray[np.float64]:
    """Principal components, scaled so that the mean squared length of a cell's vector is 1; shape (B, R).

    Single components are not standardized: Harmony compares directions of cells, and weak components contain mostly noise.
    """
    centered_BX = value_BX.astype(np.float64) - value_BX.mean(0, dtype=np.float64)
    right_XX = np.linalg.eigh(centered_BX.T @ centered_BX)[1][:, ::-1]
    component_BR = centered_BX @ right_XX[:, : min(n_components, len(value_BX) - 1)]
    return component_BR / np.sqrt(max((component_BR**2).sum(1).mean(), 1e-12))


def _expression_components(expression_BG: sparse.csr_matrix) -> NDArray[np.float64]:
    """Principal components of the most dispersed genes, multiplied by `EXPRESSION_WEIGHT`.

    The expression of each gene is in units of its standard deviation, at most `MAX_SCALED`.
    """
    scale_G = gene_scales(expression_BG)
    chosen = np.flatnonzero(scale_G)
    scaled_BG = expression_BG[:, chosen] @ sparse.diags_array(scale_G[chosen]).tocsr()
    np.minimum(scaled_BG.data, MAX_SCALED, out=scaled_BG.data)
    n_components = max(1, min(N_EXPRESSION_COMPONENTS, min(scaled_BG.shape) - 1))
    component_BR = PCA(n_components, svd_solver="covariance_eigh").fit_transform(scaled_BG)
    return EXPRESSION_WEIGHT * _components(component_BR, n_components)


def _trained(
    model: Model, cells: CellBatch, batches: Labels, stage: FitConfig, *, progress: bool
) -> NDArray[np.float32]:
    if not model.encoding.config.has_values or model.network.config.heads.values != "mlp":
        raise ModelTaskError(
            f'`method="train"` needs a head for masked values of bins, which this model ({model.encoding.config.kind} encoding) '
            'does not have. Use "harmony", or fit a model with `scfm.fit(adata, encoding="bin")`.'
        )
    network = _with_integration_heads(model, len(batches.names), stage.seed or 0)
    labeled = cells.replace(batch_ids_B=torch.from_numpy(batches.codes))
    objective = Integration(is_gene_V=network.is_gene_V.cpu())
    train.train(network, objective, labeled, stage, title="integration", progress=progress)
    return Model(network, model.encoding).embed(cells)


def _crossed(batches: list[Labels]) -> Labels:
    """Combine several kinds of batch: each combination that occurs is one batch."""
    if len(batches) == 1:
        return batches[0]
    rows = np.stack([labels.codes for labels in batches], 1)
    combinations, codes = np.unique(rows, axis=0, return_inverse=True)
    names = tuple(" ".join(str(labels.names[code]) for labels, code in zip(batches, row)) for row in combinations)
    return Labels(names, codes.ravel())


def _batches(obs: pd.DataFrame, batch_key: str) -> Labels:
    batches = columns.groups(obs, batch_key)
    if n_missing := int((batches.codes < 0).sum()):
        raise LabelsError(
            f"{n_missing} cells have no batch in `adata.obs[{batch_key!r}]`. Remove these cells, or name their batch."
        )
    if len(batches.names) < 2:
        raise LabelsError(f"`adata.obs[{batch_key!r}]` names only one batch, {batches.names[0]!r}; two are needed.")
    return batches


def _with_integration_heads(model: Model, n_batches: int, seed: int) -> CellTransformer:
    """Copy the network with the heads that integration needs. Heads of other tasks are left out."""
    config = model.network.config.replace(
        n_batches=n_batches,
        heads={"batches": True, "zeros": True, "values_from_cells": True},
        classes={"n_classes": 0, "gene_classifier": False, "n_novelty_components": 0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CellTransformer.for_vocabulary(config, model.encoding.vocabulary)
    wanted = network.state_dict()
    kept = {
        name: tensor
        for name, tensor in model.network.state_dict().items()
        if name in wanted and wanted[name].shape == tensor.shape
    }
    network.load_state_dict(kept, strict=False)  # only the new heads are missing
    return network.to(model.device)
