"""Learn from measured perturbations, predict others."""

# Axes: P perturbations, G genes.

from __future__ import annotations

from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm import pp
from scfm.models.model import Model
from scfm.perturbation.prediction.features import target_features
from scfm.perturbation.prediction.measured import Measured, read_measured
from scfm.perturbation.prediction.methods import BASELINES, Predictor, Targets, ridge_on_features
from scfm.perturbation.prediction.targets import read_targets
from scfm.pp._encode import open_counts

CONTROL_CELLS = 48  # that features are averaged over
OURS = "scfm"


def predict_perturbation(
    adata: anndata.AnnData,
    model: Model,
    *,
    perturbation_key: str,
    control: str,
    predict: Sequence[str],
    separator: str = "+",
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Predicted changes of mean expression; `scfm.tl.predict_perturbation` explains them."""
    measured = read_measured(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        separator=separator,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
    )
    known = {*measured.genes, *model.encoding.vocabulary.genes, *model.encoding.vocabulary.aliases}
    known |= {gene for target in measured.targets for gene in target}
    targets = read_targets(predict, known, control=control, separator=separator)
    methods = _methods(adata, model, measured, targets, layer=layer, gene_key=gene_key, depth_key=depth_key, seed=seed)
    parts = {
        name: pd.DataFrame(method(measured, targets), list(predict), list(measured.columns))
        for name, method in methods.items()
    }
    table = pd.concat(parts, names=["method", "perturbation"])
    table.attrs["left_out"] = dict(measured.left_out)
    return table


def score_perturbation_prediction(
    adata: anndata.AnnData,
    model: Model,
    *,
    perturbation_key: str,
    control: str,
    separator: str = "+",
    n_top: int = 20,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of predictions with each perturbation left out; `scfm.tl.score_perturbation_prediction` explains them."""
    measured = read_measured(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        separator=separator,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
    )
    methods = _methods(
        adata, model, measured, measured.targets, layer=layer, gene_key=gene_key, depth_key=depth_key, seed=seed
    )
    lines = []
    for row, (name, target) in enumerate(zip(measured.names, measured.targets)):
        rest = measured.without(row)
        scored_G = ~np.isin(measured.genes, target)
        for method, predictor in methods.items():
            change_G = predictor(rest, [target])[0]
            scores = _scores(change_G[scored_G], measured.change_PG[:, scored_G], row, n_top)
            lines.append({"perturbation": name, "n_genes": len(target), "method": method, **scores})
    table = pd.DataFrame(lines)
    table.attrs["left_out"] = dict(measured.left_out)
    return table


def _methods(
    adata: anndata.AnnData,
    model: Model,
    measured: Measured,
    targets: Targets,
    *,
    layer: str | None,
    gene_key: str | None,
    depth_key: str | None,
    seed: int,
) -> dict[str, Predictor]:
    rows = measured.control_rows
    rows = np.sort(np.random.default_rng(seed).choice(rows, min(CONTROL_CELLS, len(rows)), replace=False))
    counts = open_counts(adata, model.encoding, layer=layer, gene_key=gene_key, depth_key=depth_key)
    cells = pp.encode(counts.select(rows), model.encoding)
    genes = sorted({gene for target in (*measured.targets, *targets) for gene in target})
    return {OURS: ridge_on_features(target_features(model, cells, genes)), **BASELINES}


def _scores(predicted_G: NDArray[np.float64], change_PG: NDArray[np.float64], row: int, n_top: int) -> dict[str, float]:
    truth_G = change_PG[row]
    top = np.argsort(-np.abs(truth_G), kind="stable")[:n_top]
    alike = np.array([_correlation(predicted_G, other_G) for other_G in change_PG])
    others = np.delete(alike, row)
    rank = np.nan if np.isnan(alike[row]) else float((others > alike[row]).mean() + (others == alike[row]).mean() / 2)
    return {
        "pearson_top": _correlation(predicted_G[top], truth_G[top]),
        "rmse": float(np.sqrt(np.mean((predicted_G - truth_G) ** 2))),
        "rank": rank,
    }


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    if first.std() < 1e-12 or second.std() < 1e-12:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
