"""`scfm.tl.integrate`."""

# Axes: B cells, D model width.

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import torch

from scfm import pp
from scfm._config import require_seed
from scfm._docs import document
from scfm.data import columns
from scfm.data.columns import Labels
from scfm.errors import LabelsError, ModelTaskError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.objectives import Integration
from scfm.pp._encode import require_cells
from scfm.tl._record import record
from scfm.train import FitConfig, train


@document
def integrate(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    batch_key: str,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    config: FitConfig | None = None,
    seed: int = 0,
    key_added: str = "X_scfm_integrated",
    progress: bool = True,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed cells with less influence of their experimental batch, by training a copy of the model on them.

    The copy learns masked values from tokens and from cell embeddings, draws similar cells together (elastic cell
    similarity, ECS), and is trained against a discriminator of batches (domain adaptation by reverse gradients, DAR).
    Labels are not read.

    Parameters
    ----------
    {adata}
    model
        A model whose encoding has values, such as that of `scfm.fit(adata, encoding="bin")`, or its path; left unchanged.
    batch_key
        Column of `adata.obs` with experimental batches: at least two, and one for every cell.
    {layer}
    {gene_key}
    {depth_key}
    config
        Settings of training. None for 200 steps with a learning rate of 3e-4.
    seed
        Seed of the new heads, the order of cells, masks and dropout.
    {obsm_key_added}
    {progress}
    {copy}

    Returns
    -------
    None, or the copy. Writes `obsm[key_added]`, shape (n_obs, d_model), float32.

    Raises
    ------
    ModelTaskError
        If the model's encoding has no values.
    LabelsError
        If `batch_key` is missing, has gaps, or names one batch only.

    Notes
    -----
    scGPT's integration (Cui et al. 2024), without its domain-specific batch norm.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:100].copy()
    >>> adata.obs["donor"] = ["a", "b"] * 50
    >>> short = scfm.FitConfig(n_steps=2)
    >>> model = scfm.fit(adata, encoding="bin", config=short, progress=False)
    >>> scfm.tl.integrate(adata, model, batch_key="donor", config=short, progress=False)
    >>> adata.obsm["X_scfm_integrated"].shape
    (100, 128)
    """
    require_seed(seed)
    require_cells(adata)
    model = opened(model)
    if not model.encoding.config.has_values or model.network.config.heads.values != "mlp":
        raise ModelTaskError(
            f"Integration trains on masked values, which this model with its {model.encoding.config.kind} encoding does not have. "
            'Fit one with `scfm.fit(adata, encoding="bin")`.'
        )
    batches = _batches(adata.obs, batch_key)
    adata = adata.copy() if copy else adata
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    cells = pp.encode(adata, model.encoding, **source)
    network = _with_integration_heads(model, len(batches.names), seed)
    objective = Integration(is_gene_V=network.is_gene_V.cpu())
    stage = (config or FitConfig(n_steps=200, learning_rate=3e-4)).with_defaults(seed=seed)
    labeled = cells.replace(batch_ids_B=torch.from_numpy(batches.codes))
    train(network, objective, labeled, stage, title="integration", progress=progress)
    adata.obsm[key_added] = Model(network, model.encoding).embed(cells)
    record(adata, model, key_added, **source, batch_key=batch_key, seed=seed)
    return adata if copy else None


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
    """Copy the network; heads of this task that it lacks are added, and heads of other tasks are left out."""
    config = model.network.config.replace(
        n_batches=n_batches,
        heads={"batches": True, "zeros": True, "values_from_cells": True},
        classes={"n_classes": 0, "gene_classifier": False},
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
    network.load_state_dict(kept, strict=False)  # what is missing are the heads of this task
    return network.to(model.device)
