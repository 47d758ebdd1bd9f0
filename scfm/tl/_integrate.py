"""`scfm.tl.integrate`."""

# Axes: B cells, D model width.

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import torch

from scfm import pp
from scfm.errors import LabelsError, ModelTaskError
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.objectives import Integration
from scfm.tl._record import record
from scfm.train import FitConfig, train


def integrate(
    adata: anndata.AnnData,
    model: Model,
    *,
    batch_key: str,
    layer: str | None = None,
    gene_key: str | None = None,
    config: FitConfig | None = None,
    seed: int = 0,
    key_added: str = "X_scfm_integrated",
    progress: bool = True,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed cells so that their experimental batch is forgotten, by training a copy of the model on them.

    The copy learns masked values from tokens and from cells, while similar cells are drawn together (ECS) and a
    discriminator of batches is misled (DAR). Labels are not read.

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes, in `X` or in `layer`.
    model
        With an encoding that has values, such as `scfm.fit(adata, encoding="bin")`; left unchanged.
    batch_key
        Column of `adata.obs` with experimental batches: two at least, none missing.
    layer, gene_key
        As in `scfm.tl.embed`.
    config
        Settings of training; by default 200 steps at a rate of 3e-4.
    seed
        Of the new heads, the order of cells, masks and dropout.
    key_added
        Where the embedding goes in `adata.obsm`.
    progress
        Whether to show a progress bar.
    copy
        Return a copy with the result instead of writing to `adata`.

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
    if not model.encoding.config.has_values or model.network.config.value_head != "mlp":
        raise ModelTaskError(
            f"Integration learns masked values, which this model with its {model.encoding.config.kind} encoding cannot. "
            'Fit one with `scfm.fit(adata, encoding="bin")`.'
        )
    batches = _batches(adata.obs, batch_key)
    adata = adata.copy() if copy else adata
    cells = pp.encode(adata, model.encoding, layer=layer, gene_key=gene_key)
    network = _with_integration_heads(model, len(batches.categories), seed)
    objective = Integration(is_gene_V=network.is_gene_V.cpu())
    stage = config or FitConfig(n_steps=200, learning_rate=3e-4, seed=seed)
    labelled = cells.replace(batch_ids_B=torch.from_numpy(batches.codes.astype(np.int64)))
    train(network, objective, labelled, stage, title="integration", progress=progress)
    adata.obsm[key_added] = Model(network, model.encoding).embed(cells)
    record(adata, model, key_added, layer=layer, gene_key=gene_key, batch_key=batch_key, seed=seed)
    return adata if copy else None


def _batches(obs: pd.DataFrame, batch_key: str) -> pd.Categorical:
    if batch_key not in obs:
        raise LabelsError(f"`batch_key` is {batch_key!r}, which is not in `adata.obs` ({', '.join(map(str, obs))}).")
    if n_missing := int(obs[batch_key].isna().sum()):
        raise LabelsError(f"{n_missing} cells have no batch in `adata.obs[{batch_key!r}]`; leave them out or name one.")
    batches = pd.Categorical(obs[batch_key].astype(str))
    if len(batches.categories) < 2:
        raise LabelsError(f"`adata.obs[{batch_key!r}]` names one batch only, {batches.categories[0]!r}.")
    return batches


def _with_integration_heads(model: Model, n_batches: int, seed: int) -> CellTransformer:
    """Copy the network, with fresh heads where it has none for this task, and without those that it does not need."""
    config = model.network.config.replace(
        batch_head=True,
        n_batches=n_batches,
        zero_head=True,
        value_from_cell_head=True,
        n_classes=0,
        gene_classifier=False,
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
