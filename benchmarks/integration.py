"""Integration of Kang's control and stimulated cells, across conditions and donors; denoising of thinned PBMC.

    SCFM_DATA=FOLDER python benchmarks/integration.py

Integration is scored by scib-metrics where it is installed, else by silhouettes alone, beside PCA and Harmony (where
installed) with the same batches, and with a figure of the first seed (`docs/images/kang_integration.png`); training on the
objectives of integration in a part of its own; denoising beside no change, neighbor smoothing, and a weighted mean of both. Rows are written at once to `--rows`, so a stopped run resumes. Mapping is measured by shift.py.
"""

import argparse
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata
import matplotlib
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from intervals import interval
from numpy.typing import NDArray
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

import scfm
from scfm import baselines
from scfm.encoding import make_encoding
from scfm.families import scfoundation
from scfm.models.config import ModelConfig
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.objectives import ReadDepth
from scfm.train import train

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "kang_integration.png"
LABEL, CONDITION, DONOR, BATCH = "cell_type", "condition", "donor", "donor_and_condition"
BATCH_NAME = "their combinations"
BATCHES = {"donors and conditions": [DONOR, CONDITION], BATCH_NAME: [BATCH]}  # the keys that Harmony corrects for
PARTS = ("corrected", "trained", "denoising")
N_NEIGHBORS = 90  # of scib-metrics
Embeddings = dict[str, NDArray[np.floating]]


def read_kang() -> anndata.AnnData:
    """Labeled cells of classes of at least five, with at least 100 genes."""
    adata = anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / "kang_ifnb_2000.h5ad")
    counts = adata.obs[LABEL].value_counts()
    adata = adata[adata.obs[LABEL].isin(counts.index[counts >= 5]).to_numpy()].copy()
    adata.X = adata.X.astype(np.float32)
    sc.pp.filter_cells(adata, min_genes=100)
    sc.pp.filter_genes(adata, min_cells=3)
    adata.obs[BATCH] = adata.obs[DONOR].astype(str) + " " + adata.obs[CONDITION].astype(str)
    return adata


def principal_components(adata: anndata.AnnData, learn: NDArray[np.bool_]) -> NDArray[np.floating]:
    """Scanpy's usual way: 2,000 variable genes of log1p CP10k, scaled and cut at 10, 50 components; learned on some rows."""
    normalized = anndata.AnnData(baselines.log_normalize(adata.X), obs=adata.obs, var=adata.var)
    table = sc.pp.highly_variable_genes(normalized[learn].copy(), n_top_genes=2000, inplace=False)
    dense = normalized[:, table["highly_variable"].to_numpy()].X.toarray()
    mean, deviation = dense[learn].mean(0), dense[learn].std(0) + 1e-6
    dense = np.clip((dense - mean) / deviation, -10, 10)
    right = np.linalg.svd(dense[learn], full_matrices=False)[2][:50]
    return dense @ right.T


def embed_corrected(adata: anndata.AnnData, steps: int, seed: int) -> Embeddings:
    """Components and the embedding of a rank model, before and after Harmony with the same batches; none reads labels."""
    found: Embeddings = {"PCA": principal_components(adata, np.ones(adata.n_obs, dtype=bool))}
    config = scfm.FitConfig(n_steps=steps, tokens_per_step=4096, seed=seed)
    model = scfm.fit(adata, context_length=256, config=config, seed=seed, progress=False)
    found["scfm (rank), not integrated"] = adata.obsm["X_scfm"]
    if not find_spec("harmonypy"):
        return found
    import harmonypy

    for name, keys in BATCHES.items():
        corrected = harmonypy.run_harmony(found["PCA"], adata.obs, keys, verbose=False, random_state=seed)
        z = np.asarray(corrected.Z_corr)
        found[f"PCA + Harmony, {name}"] = z if z.shape[0] == adata.n_obs else z.T
        for method in ("harmony", "harmony-embedding"):
            scfm.tl.integrate(adata, model, batch_key=keys, method=method, seed=seed, progress=False)
            found[f"scfm.tl.integrate ({method}), {name}"] = adata.obsm["X_scfm_integrated"]
    return found


def embed_trained(adata: anndata.AnnData, steps: int, seed: int) -> Embeddings:
    """The embedding of a bin model, before and after training on the objectives of integration."""
    config = scfm.FitConfig(n_steps=steps, tokens_per_step=4096, seed=seed)
    model = scfm.fit(adata, encoding="bin", context_length=256, config=config, seed=seed, progress=False)
    stage = config.replace(n_steps=3 * steps, learning_rate=3e-4)
    scfm.tl.integrate(adata, model, batch_key=BATCH, method="train", config=stage, seed=seed, progress=False)
    return {
        "scfm (bin), not integrated": adata.obsm["X_scfm"],
        "scfm.tl.integrate (train)": adata.obsm["X_scfm_integrated"],
    }


def score_integration(found: Embeddings, obs: pd.DataFrame) -> pd.DataFrame:
    """Conserved types and mixed batches, each between 0 and 1, more is better; a row a method."""
    labels, batches, conditions = (
        obs[key].astype("category").cat.codes.to_numpy() for key in (LABEL, BATCH, CONDITION)
    )
    rows = {}
    for name, embedding in found.items():
        embedding = np.asarray(embedding, dtype=np.float32)
        row = {"silhouette of types": (silhouette_score(embedding, labels) + 1) / 2}
        if find_spec("scib_metrics"):
            row |= _scib(embedding, labels, batches, conditions)
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _scib(
    embedding: NDArray[np.float32], labels: NDArray[Any], batches: NDArray[Any], conditions: NDArray[Any]
) -> dict[str, float]:
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    distances, indices = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(embedding).kneighbors(embedding)
    found = NeighborsResults(indices=indices, distances=distances)
    return {
        "cLISI of types": float(scib_metrics.clisi_knn(found, labels)),
        "graph connectivity": float(scib_metrics.graph_connectivity(found, labels)),
        "batch silhouette": float(scib_metrics.silhouette_batch(embedding, labels, batches)),
        "iLISI of condition": float(scib_metrics.ilisi_knn(found, conditions)),
        "iLISI of donor and condition": float(scib_metrics.ilisi_knn(found, batches)),
    }


def draw(found: Embeddings, obs: pd.DataFrame, path: Path, seed: int) -> None:
    """UMAPs side by side: a column a method, colored by type above and by condition below."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 7.6), squeeze=False)
    for column, (name, embedding) in enumerate(found.items()):
        adata = anndata.AnnData(obs=obs.copy(), obsm={"X": np.asarray(embedding, dtype=np.float32)})
        sc.pp.neighbors(adata, use_rep="X", n_neighbors=15, random_state=seed)
        sc.tl.umap(adata, random_state=seed)
        order = np.random.default_rng(seed).permutation(adata.n_obs)
        for row, key in enumerate((LABEL, CONDITION)):
            _scatter(
                axes[row, column],
                adata.obsm["X_umap"][order],
                obs[key].iloc[order],
                row,
                legend=column + 1 == len(found),
            )
        axes[0, column].set_title(name)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _scatter(axes: Any, place: NDArray[np.floating], values: pd.Series, row: int, *, legend: bool) -> None:
    palette = matplotlib.colormaps["tab10" if row == 0 else "Set2"]
    categories = sorted(values.astype(str).unique())
    codes = pd.Categorical(values.astype(str), categories=categories).codes
    axes.scatter(*place.T, c=[palette(code) for code in codes], s=4, linewidths=0)
    axes.set(xticks=[], yticks=[])
    if legend:
        for code, category in enumerate(categories):
            axes.scatter([], [], color=palette(code), label=category)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def score_denoising(steps: int, seed: int) -> pd.DataFrame:
    """PBMC 3k, its 500 most expressed genes: half of the cells train a small scFoundation, the others are thinned to half."""
    adata = anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / "pbmc3k_raw_counts_labels.h5ad")
    adata.X = adata.X.astype(np.float32)
    total = np.asarray(adata.X.sum(0)).ravel()
    adata = adata[:, np.argsort(-total, kind="stable")[:500]].copy()
    rows = np.random.default_rng(seed).permutation(adata.n_obs)
    learn, test = adata[np.sort(rows[: len(rows) // 2])].copy(), adata[np.sort(rows[len(rows) // 2 :])].copy()
    encoding = make_encoding("continuous", adata=learn)
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "d_ff": 128, "context_length": 512}
    attention = {"kind": "linear", "qkv_bias": False, "head_width": 16, "n_random_features": 32}
    decoder = {"n_layers": 1, "d_model": 64, "n_heads": 4, "d_ff": 256, "attention": attention}
    vocabulary = encoding.vocabulary
    torch.manual_seed(seed)
    config = ModelConfig.from_dict(
        {**scfoundation.ARCHITECTURE, **shape, "decoder": decoder, "n_tokens": len(vocabulary)}
    )
    network = CellTransformer.for_vocabulary(config, vocabulary)
    target, source = (vocabulary.special_id(role) for role in ("target_depth", "source_depth"))
    objective = ReadDepth(
        is_gene_V=network.is_gene_V, target_id=target, source_id=source, downsample_probability=1.0, masked=False
    )
    cells = scfm.pp.encode(learn, encoding.replace(include_zeros=True))
    settings = scfm.FitConfig(n_steps=steps, tokens_per_step=16_384, learning_rate=2e-3, seed=seed)
    train(network, objective, cells, settings, title="read depth", progress=False)
    return scfm.tl.evaluate_denoising(test, Model(network, encoding), rate=0.5, seed=seed)


def measure(part: str, seed: int, steps: int, figure: Path) -> pd.DataFrame:
    """Scores of a part and a seed, a row per method; the figure is drawn for the first seed of "corrected"."""
    if part == "denoising":
        return score_denoising(6 * steps, seed)
    adata = read_kang()
    found = (embed_corrected if part == "corrected" else embed_trained)(adata, steps, seed)
    if seed == 0 and part == "corrected":
        kept = [name for name in found if "embedding" not in name and BATCH_NAME not in name]
        draw({name.removesuffix(f", {next(iter(BATCHES))}"): found[name] for name in kept}, adata.obs, figure, seed)
    return score_integration(found, adata.obs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=60, help="of each fit; integration takes three times as many, denoising six"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=Path("integration_rows"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    options.rows.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    matplotlib.use("agg")
    warnings.filterwarnings("ignore")
    for part in options.parts:
        tables = []
        for seed in range(options.seeds):
            path = options.rows / f"{part} {seed}.csv"
            if not path.exists():
                measure(part, seed, options.steps, options.figure).reset_index().to_csv(path, index=False)
            tables.append(pd.read_csv(path))
        table = pd.concat(tables, ignore_index=True).groupby("method", sort=False).agg(interval)
        print(f"\n{part}\n\n{table.to_markdown()}", flush=True)


if __name__ == "__main__":
    main()
