"""`scfm.tl.denoise`, and `scfm.tl.evaluate_denoising`, which compares it with simple methods."""

# Axes: B cells, G genes of the matrix, T packed tokens, V tokens of the vocabulary.

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm import baselines, pp
from scfm._config import require_seed, require_whole
from scfm._docs import document
from scfm.data import CellBatch, CountSource
from scfm.errors import ModelTaskError
from scfm.families.loading import opened
from scfm.models.model import TOKENS_PER_BATCH, Model, runs_of_tokens
from scfm.pp._encode import require_cells
from scfm.tl._record import record


@document
def denoise(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    target_depth: float | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    key_added: str = "scfm_denoised",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Predict the expression of each cell for a total count of `target_depth`.

    Parameters
    ----------
    {adata}
    model
        A model with a continuous encoding and a value head, trained with `scfm.objectives.ReadDepth` (scFoundation).
    target_depth
        Total count for which expression is predicted. None for the total of each cell.
    {layer}
    {gene_key}
    {depth_key}
    key_added
        Key of `adata.layers` for the result.
    {copy}

    Returns
    -------
    None, or the copy. Writes `layers[key_added]`, shape (n_obs, n_vars), dense float32: predicted log1p of counts, scaled
    to the `target_sum` of the model's encoding, at least 0; NaN for genes that are not in the vocabulary. This takes 4
    bytes per cell and gene, so 12 GB for 100,000 cells and 30,000 genes.

    Raises
    ------
    ModelTaskError
        If the model cannot predict values from read depth.

    Notes
    -----
    This is the read-depth enhancement of scFoundation (Hao et al. 2024). To train a network for denoising only, use the
    objective without masking: ``ReadDepth(masked=False, downsample_probability=1.0)``.

    Examples
    --------
    A small untrained network with the architecture of scFoundation; `scfm.load` opens the published one.

    >>> import scfm
    >>> from scfm.encoding import make_encoding
    >>> from scfm.models import CellTransformer, Model, ModelConfig
    >>> from scfm.families import scfoundation
    >>> adata = scfm.datasets.pbmc()[:20, :50].copy()
    >>> encoding = make_encoding("continuous", adata=adata)
    >>> sizes = {"n_tokens": len(encoding.vocabulary), "d_model": 16, "n_layers": 1}
    >>> config = ModelConfig.from_dict(scfoundation.ARCHITECTURE | sizes)
    >>> model = Model(CellTransformer.for_vocabulary(config, encoding.vocabulary), encoding)
    >>> scfm.tl.denoise(adata, model)
    >>> adata.layers["scfm_denoised"].shape
    (20, 50)
    """
    require_cells(adata)
    model = opened(model)
    if "target_depth" not in model.encoding.config.special_roles or model.network.value_head is None:
        raise ModelTaskError(
            f"Denoising needs a model with a continuous encoding and a value head; this one has a "
            f"{model.encoding.config.kind} encoding. Load a scFoundation model, or train one with "
            "`scfm.objectives.ReadDepth`."
        )
    adata = adata.copy() if copy else adata
    every_gene = model.encoding.replace(include_zeros=True, target_depth=target_depth)
    cells = pp.encode(adata, every_gene, layer=layer, gene_key=gene_key, depth_key=depth_key)
    adata.layers[key_added] = _predict(model, cells, _tokens_of_columns(adata, model, layer, gene_key))
    record(adata, model, key_added, layer=layer, gene_key=gene_key, depth_key=depth_key, target_depth=target_depth)
    return adata if copy else None


def _tokens_of_columns(
    adata: anndata.AnnData, model: Model, layer: str | None, gene_key: str | None
) -> NDArray[np.int32]:
    """Return the token of each column of `adata`, shape (G,); the result has these columns even if counts are in `raw`."""
    source = CountSource.of(
        adata, layer=None if layer == "raw" and layer not in adata.layers else layer, gene_key=gene_key
    )
    token_ids_G = np.full(adata.n_vars, -1, dtype=np.int32)
    token_ids_G[source.columns] = model.encoding.vocabulary.find(source.names(model.encoding.vocabulary)[0])[0]
    return token_ids_G


def _predict(model: Model, cells: CellBatch, token_ids_G: NDArray[np.int32]) -> NDArray[np.float32]:
    network = model.network.eval()
    known_G = token_ids_G >= 0
    predicted_BG = np.full((len(cells), len(token_ids_G)), np.nan, dtype=np.float32)
    with torch.inference_mode():
        for rows in runs_of_tokens(cells.cu_seqlens.numpy(), TOKENS_PER_BATCH):
            batch = cells.select(np.arange(rows.start, rows.stop)).to(model.device)
            value_T = network.values(network.value_states(batch)).float().clamp(min=0)
            value_BV = value_T.new_zeros(len(batch), network.config.n_tokens)
            value_BV[batch.cell_of_token_T(), batch.gene_ids_T.long()] = value_T
            predicted_BG[rows, known_G] = value_BV.cpu().numpy()[:, token_ids_G[known_G]]
    return predicted_BG


def thin_counts(counts_BG: sparse.csr_matrix, rate: float, seed: int = 0) -> sparse.csr_matrix:
    """Downsample counts: keep each counted molecule with probability `rate`."""
    thinned_BG = counts_BG.copy()
    thinned_BG.data = np.random.default_rng(seed).binomial(counts_BG.data.astype(np.int64), rate).astype(np.float32)
    thinned_BG.eliminate_zeros()
    return thinned_BG


@document
def evaluate_denoising(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    rate: float = 0.2,
    n_neighbors: int = 15,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Remove a part of the counts, denoise the rest, and compare the result with the original counts.

    Simple methods are scored in the same way: no change, the mean of the nearest neighbors, and a linear regression on the
    counts of the cell and the mean of its neighbors.

    Parameters
    ----------
    adata
        Raw counts of cells that the model was not trained on.
    model
        A model with a continuous encoding and a value head.
    rate
        Fraction of the counts that is kept.
    n_neighbors
        Number of cells over which the baseline averages.
    {layer}
    {gene_key}
    {depth_key}
    seed
        Seed of the downsampling.

    Returns
    -------
    One row per method with `mse`, the mean squared error of log1p counts per 10,000, and `correlation`, the Pearson
    correlation averaged over cells, both over the genes in the vocabulary.

    Notes
    -----
    The kept counts are part of the original counts, which favors methods that change little.

    Examples
    --------
    A small untrained network with the architecture of scFoundation; `scfm.load` opens the published one.

    >>> import scfm
    >>> from scfm.encoding import make_encoding
    >>> from scfm.models import CellTransformer, Model, ModelConfig
    >>> from scfm.families import scfoundation
    >>> adata = scfm.datasets.pbmc()[:20, :50].copy()
    >>> encoding = make_encoding("continuous", adata=adata)
    >>> sizes = {"n_tokens": len(encoding.vocabulary), "d_model": 16, "n_layers": 1}
    >>> config = ModelConfig.from_dict(scfoundation.ARCHITECTURE | sizes)
    >>> model = Model(CellTransformer.for_vocabulary(config, encoding.vocabulary), encoding)
    >>> scfm.tl.evaluate_denoising(adata, model, rate=0.5).index.tolist()
    ['scfm', 'no change', 'mean of 15 nearest neighbors', 'own counts and neighbors, weighed']
    """
    require_seed(seed)
    require_whole("n_neighbors", n_neighbors, 1)
    require_cells(adata)
    model = opened(model)
    source = CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key)
    blocks, depths = zip(*((block, depth_B) for _, block, depth_B in source.blocks()))
    counts_BG = sparse.vstack(blocks, format="csr")
    original_BG = baselines.log_normalize(counts_BG, np.concatenate(depths)).toarray()
    # Totals named in `uns` are those of the original cells, so they are not used.
    thinned = anndata.AnnData(thin_counts(counts_BG, rate, seed), obs=adata.obs.copy(), var=source.var.copy())
    keep_B = np.asarray(thinned.X.sum(1)).ravel() > 0
    thinned, original_BG = thinned[keep_B].copy(), original_BG[keep_B]
    depth = np.median(np.asarray(counts_BG.sum(1)))
    denoise(thinned, model, target_depth=float(depth), gene_key=gene_key)
    shallow_BG = baselines.log_normalize(thinned.X)
    methods = {
        "scfm": thinned.layers["scfm_denoised"],
        "no change": shallow_BG.toarray(),
        f"mean of {n_neighbors} nearest neighbors": baselines.smooth_over_neighbors(shallow_BG, n_neighbors, seed),
        "own counts and neighbors, weighed": own_and_neighbors_weighed(thinned.X, rate, n_neighbors, seed),
    }
    known = ~np.isnan(methods["scfm"]).any(0)
    rows = {name: _errors(values_BG[:, known], original_BG[:, known]) for name, values_BG in methods.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def own_and_neighbors_weighed(
    counts_BG: sparse.csr_matrix, rate: float, n_neighbors: int, seed: int
) -> NDArray[np.floating]:
    """Linear regression on a cell's values and the mean of its neighbors, fitted on the same cells after downsampling again."""
    again_BG = thin_counts(counts_BG, rate, seed + 1)
    inputs = [_own_and_neighbors(counts, n_neighbors, seed) for counts in (again_BG, counts_BG)]
    target = baselines.log_normalize(counts_BG).toarray().ravel()
    weights = np.linalg.lstsq(inputs[0], target, rcond=None)[0]
    return (inputs[1] @ weights).clip(min=0).reshape(counts_BG.shape)


def _own_and_neighbors(counts_BG: sparse.csr_matrix, n_neighbors: int, seed: int) -> NDArray[np.floating]:
    values_BG = baselines.log_normalize(counts_BG)
    own, neighbors = values_BG.toarray(), baselines.smooth_over_neighbors(values_BG, n_neighbors, seed)
    return np.stack([own.ravel(), neighbors.ravel(), own.ravel() > 0, np.ones(own.size)], 1)


def _errors(predicted_BG: NDArray[np.floating], original_BG: NDArray[np.floating]) -> dict[str, float]:
    centered = [values_BG - values_BG.mean(1, keepdims=True) for values_BG in (predicted_BG, original_BG)]
    norm_B = np.linalg.norm(centered[0], axis=1) * np.linalg.norm(centered[1], axis=1)
    correlation_B = (centered[0] * centered[1]).sum(1) / np.maximum(norm_B, 1e-12)
    return {"mse": float(((predicted_BG - original_BG) ** 2).mean()), "correlation": float(correlation_B.mean())}
