"""`scfm.tl.denoise`, and `scfm.tl.evaluate_denoising`, which compares it with simple methods."""

# Axes: B cells, G genes of the matrix, T packed tokens, V tokens of the vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm import baselines, pp
from scfm._config import require_seed, require_whole
from scfm._docs import document
from scfm.data import CountSource
from scfm.errors import ModelTaskError
from scfm.families.loading import opened
from scfm.models.inference import TOKENS_PER_BATCH, cell_bar, runs_of_tokens
from scfm.models.model import Model
from scfm.pp._encode import require_cells
from scfm.tl._record import record

MAX_RATE = 0.5  # of counts that are kept to fit the weights
ROWS_AT_A_TIME = 512


@document
def denoise(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    target_depth: float | None = None,
    n_neighbors: int = 15,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
    key_added: str = "scfm_denoised",
    progress: bool = True,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Predict the expression of each cell for a total count of `target_depth`.

    The prediction is a weighted sum of the cell's own log-expression, the mean over its nearest neighbors, and the prediction
    of the model. The weights are fitted by least squares: the counts of the same cells are downsampled, and the original
    values are predicted from the remaining counts.

    Parameters
    ----------
    {adata}
    model
        A model with a continuous encoding and a value head, trained with `scfm.objectives.ReadDepth` (scFoundation).
    target_depth
        Total counts to predict for. None for the total of each cell.
    n_neighbors
        Number of cells, the cell itself included, in the mean of neighbors. 0 for the prediction of the model alone, which
        does not depend on the other cells.
    {layer}
    {gene_key}
    {depth_key}
    seed
        Seed of the downsampling and of the principal components in which neighbors are found.
    key_added
        Key of `adata.layers` for the result.
    {progress}
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
    ValueError
        If `n_neighbors` is negative.

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
    require_seed(seed)
    require_cells(adata)
    model = opened(model)
    if "target_depth" not in model.encoding.config.special_roles or model.network.value_head is None:
        raise ModelTaskError(
            f"Denoising needs a model with a continuous encoding and a value head; this one has a "
            f"{model.encoding.config.kind} encoding. Load a scFoundation model, or train one with "
            "`scfm.objectives.ReadDepth`."
        )
    if n_neighbors < 0:
        raise ValueError(f"`n_neighbors` is {n_neighbors}; it must be at least 0.")
    adata = adata.copy() if copy else adata
    source = CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key)
    value_BG = _predict(source, model, target_depth, progress=progress)
    if n_neighbors:
        value_BG = _with_neighbors(source, value_BG, model, target_depth, n_neighbors=n_neighbors, seed=seed)
    adata.layers[key_added] = _in_columns(value_BG, adata, layer)
    settings = {"target_depth": target_depth, "n_neighbors": n_neighbors, "seed": seed}
    record(adata, model, key_added, layer=layer, gene_key=gene_key, depth_key=depth_key, **settings)
    return adata if copy else None


def _in_columns(value_BG: NDArray[np.float32], adata: anndata.AnnData, layer: str | None) -> NDArray[np.float32]:
    """Spread the genes of the counts over the columns of `adata`, which the result is for even if the counts are those of
    `adata.raw`; NaN for the others.
    """
    columns = CountSource.of(adata, layer=None if layer == "raw" and layer not in adata.layers else layer).columns
    spread_BG = np.full((adata.n_obs, adata.n_vars), np.nan, dtype=np.float32)
    spread_BG[:, columns] = value_BG
    return spread_BG


def _predict(source: CountSource, model: Model, target_depth: float | None, *, progress: bool) -> NDArray[np.float32]:
    """Return what the model predicts for every gene of `source`, shape (B, G); NaN for genes without a token."""
    cells = pp.encode(source, model.encoding.replace(include_zeros=True, target_depth=target_depth))
    token_ids_G = model.encoding.vocabulary.find(source.names(model.encoding.vocabulary)[0])[0]
    network, known_G = model.network.eval(), token_ids_G >= 0
    predicted_BG = np.full((len(cells), len(token_ids_G)), np.nan, dtype=np.float32)
    with torch.inference_mode(), cell_bar(len(cells), "denoising", progress=progress) as bar:
        for rows in runs_of_tokens(cells.cu_seqlens.numpy(), TOKENS_PER_BATCH):
            batch = cells.select(np.arange(rows.start, rows.stop)).to(model.device)
            value_T = network.values(network.value_states(batch)).float().clamp(min=0)
            value_BV = value_T.new_zeros(len(batch), network.config.n_tokens)
            value_BV[batch.cell_of_token_T(), batch.gene_ids_T.long()] = value_T
            predicted_BG[rows, known_G] = value_BV.cpu().numpy()[:, token_ids_G[known_G]]
            bar.update(len(batch))
    return predicted_BG


def _with_neighbors(
    source: CountSource,
    model_BG: NDArray[np.float32],
    model: Model,
    target_depth: float | None,
    *,
    n_neighbors: int,
    seed: int,
) -> NDArray[np.float32]:
    """Weighted sum of own values, neighbors and the model's prediction, shape (B, G), at least 0."""
    counts_BG, depth_B = _counts_and_depths(source)
    known_G = np.logical_not(np.isnan(model_BG).any(axis=0))
    typical_depth = float(np.median(depth_B))
    rate = MAX_RATE if target_depth is None else min(typical_depth / target_depth, MAX_RATE)
    again_BG = thin_counts(counts_BG, rate, seed + 1)
    keep_B = np.asarray(again_BG[:, known_G].sum(1)).ravel() > 0
    again_BG = again_BG[keep_B]
    named = source.named_depth is not None
    again_depth_B = depth_B[keep_B] * rate if named else np.asarray(again_BG.sum(1), dtype=np.float64).ravel()
    shallower = CountSource(again_BG, var=source.var, gene_key=source.gene_key, depth=again_depth_B)
    learned = _Inputs.of(
        again_BG, again_depth_B, _predict(shallower, model, typical_depth, progress=False), n_neighbors, seed
    )
    weights = learned.weights(baselines.log_normalize(counts_BG, depth_B)[keep_B], known_G)
    return _Inputs.of(counts_BG, depth_B, model_BG, n_neighbors, seed).weighted(weights)


def _counts_and_depths(source: CountSource) -> tuple[sparse.csr_matrix, NDArray[np.float64]]:
    blocks, depths = zip(*((block, depth_B) for _, block, depth_B in source.blocks()))
    return sparse.vstack(blocks, format="csr"), np.concatenate(depths)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What a prediction is a weighted sum of: own values, neighbors, whether the gene was seen, 1, and the model's prediction."""

    own_BG: sparse.csr_matrix
    neighbors_BG: NDArray[np.float32]
    model_BG: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        counts_BG: sparse.csr_matrix,
        depth_B: NDArray[np.float64],
        model_BG: NDArray[np.float32],
        n_neighbors: int,
        seed: int,
    ) -> _Inputs:
        own_BG = baselines.log_normalize(counts_BG, depth_B)
        return cls(own_BG, baselines.smooth_over_neighbors(own_BG, n_neighbors, seed), model_BG)

    def rows(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield the inputs of some rows at a time, shape (rows, G, 5)."""
        for start in range(0, len(self.model_BG), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            own = self.own_BG[rows].toarray()
            parts = [own, self.neighbors_BG[rows], own > 0, np.ones_like(own), self.model_BG[rows]]
            yield rows, np.stack(parts, -1, dtype=np.float32)

    def weights(self, target_BG: sparse.csr_matrix, known_G: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the weights of least squares over the known genes, shape (5,)."""
        gram, moment = np.zeros((5, 5)), np.zeros(5)
        for rows, inputs in self.rows():
            flat = inputs[:, known_G].reshape(-1, 5).astype(np.float64)
            gram += flat.T @ flat
            moment += flat.T @ target_BG[rows].toarray()[:, known_G].ravel()
        return np.asarray(np.linalg.lstsq(gram, moment, rcond=None)[0], dtype=np.float64)

    def weighted(self, weights: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the weighted sum, at least 0, shape (B, G); NaN where the model predicts nothing."""
        return np.concatenate([(inputs @ weights.astype(np.float32)).clip(min=0) for _, inputs in self.rows()])


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
        Fraction of the counts that is kept, between 0 and 1.
    n_neighbors
        Number of cells, the cell itself included, in the mean of neighbors.
    {layer}
    {gene_key}
    {depth_key}
    seed
        Seed of the downsampling.

    Returns
    -------
    One row per method with `mse`, the mean squared error of log1p counts per 10,000, and `correlation`, the Pearson
    correlation averaged over cells, both over the genes in the vocabulary.

    Raises
    ------
    ModelTaskError
        If the model cannot predict values from read depth.
    ValueError
        If `rate` is not between 0 and 1, or `n_neighbors` is below 1.

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
    ['scfm', 'scfm, network alone', 'no change', 'mean of 15 nearest neighbors', 'own counts and neighbors, weighted']
    """
    require_seed(seed)
    require_whole("n_neighbors", n_neighbors, 1)
    if not 0 < rate < 1:
        raise ValueError(f"`rate` is {rate}; it is the fraction of the counts that is kept, between 0 and 1.")
    require_cells(adata)
    model = opened(model)
    source = CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key)
    counts_BG, depth_B = _counts_and_depths(source)
    thinned_BG = thin_counts(counts_BG, rate, seed)
    keep_B = np.asarray(thinned_BG.sum(1)).ravel() > 0
    thinned_BG, original_BG = thinned_BG[keep_B], baselines.log_normalize(counts_BG, depth_B)[keep_B].toarray()
    thinned = anndata.AnnData(thinned_BG, obs=adata.obs[keep_B].copy(), var=source.var.copy())
    named = source.named_depth is not None
    thinned.obs["depth"] = depth_B[keep_B] * rate if named else np.asarray(thinned_BG.sum(1)).ravel()
    for key, n in (("joined", n_neighbors), ("alone", 0)):
        settings: dict[str, Any] = {"gene_key": gene_key, "depth_key": "depth", "seed": seed, "key_added": key}
        denoise(thinned, model, progress=False, target_depth=float(np.median(depth_B)), n_neighbors=n, **settings)
    shallow_BG = baselines.log_normalize(thinned_BG, thinned.obs["depth"].to_numpy())
    weighted_BG = own_and_neighbors_weighted(
        thinned_BG,
        rate=rate,
        n_neighbors=n_neighbors,
        seed=seed,
        depth_B=thinned.obs["depth"].to_numpy() if named else None,
    )
    methods = {
        "scfm": thinned.layers["joined"],
        "scfm, network alone": thinned.layers["alone"],
        "no change": shallow_BG.toarray(),
        f"mean of {n_neighbors} nearest neighbors": baselines.smooth_over_neighbors(shallow_BG, n_neighbors, seed),
        "own counts and neighbors, weighted": weighted_BG,
    }
    known = ~np.isnan(methods["scfm"]).any(0)
    rows = {name: _errors(values_BG[:, known], original_BG[:, known]) for name, values_BG in methods.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def own_and_neighbors_weighted(
    counts_BG: sparse.csr_matrix,
    *,
    rate: float,
    n_neighbors: int,
    seed: int,
    depth_B: NDArray[np.float64] | None = None,
) -> NDArray[np.floating]:
    """Linear regression on a cell's values and the mean of its neighbors, fitted on the same cells after downsampling again."""
    again_BG = thin_counts(counts_BG, rate, seed + 1)
    again_depth_B = None if depth_B is None else depth_B * rate
    inputs = [
        _own_and_neighbors(baselines.log_normalize(counts, depth), n_neighbors, seed)
        for counts, depth in ((again_BG, again_depth_B), (counts_BG, depth_B))
    ]
    target = baselines.log_normalize(counts_BG, depth_B).toarray().ravel()
    weights = np.linalg.lstsq(inputs[0], target, rcond=None)[0]
    return (inputs[1] @ weights).clip(min=0).reshape(counts_BG.shape)


def _own_and_neighbors(values_BG: sparse.csr_matrix, n_neighbors: int, seed: int) -> NDArray[np.floating]:
    own, neighbors = values_BG.toarray(), baselines.smooth_over_neighbors(values_BG, n_neighbors, seed)
    return np.stack([own.ravel(), neighbors.ravel(), own.ravel() > 0, np.ones(own.size)], 1)


def _errors(predicted_BG: NDArray[np.floating], original_BG: NDArray[np.floating]) -> dict[str, float]:
    centered = [values_BG - values_BG.mean(1, keepdims=True) for values_BG in (predicted_BG, original_BG)]
    norm_B = np.linalg.norm(centered[0], axis=1) * np.linalg.norm(centered[1], axis=1)
    correlation_B = (centered[0] * centered[1]).sum(1) / np.maximum(norm_B, 1e-12)
    return {"mse": float(((predicted_BG - original_BG) ** 2).mean()), "correlation": float(correlation_B.mean())}
