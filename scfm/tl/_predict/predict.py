"""`scfm.tl.predict_perturbation`: learn from measured perturbations, predict others."""

# Axes: P perturbations, G genes.

from __future__ import annotations

from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm import pp
from scfm.models.model import Model
from scfm.tl._predict.features import target_features
from scfm.tl._predict.measured import Measured, read_measured
from scfm.tl._predict.methods import BASELINES, Predictor, Targets, ridge_on_features

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
    seed: int = 0,
) -> pd.DataFrame:
    """Predict the change of mean expression after perturbations of single genes or combinations.

    Parameters
    ----------
    adata
        Raw counts of control and perturbed cells, n_obs cells by n_vars genes.
    model
        From `scfm.fit` or `scfm.load`. Fit it without the cells of perturbations that are to be scored.
    perturbation_key
        Column of `adata.obs` with the perturbed gene, or genes joined by `separator`; cells with NaN are left out.
    control
        Value of that column for unperturbed cells.
    predict
        Perturbations to predict, genes joined by `separator`; measured ones are predicted from all of the data too.
    separator
        Between the genes of a combination.
    layer, gene_key
        As in `scfm.tl.embed`.
    seed
        Of the choice of control cells.

    Returns
    -------
    A row a method and perturbation (index: `method`, `perturbation`) by a column a gene: change of mean log1p counts per
    10,000. Methods: "scfm", and beside it "no change", "train mean", "additive" and "bilinear ridge".

    Notes
    -----
    Each gene is described by where its deletion moves control cells (it is put in where it is not expressed); a ridge leads from there to the measured changes, and, for combinations, a second one from products of
    features to what is left beside the sum of singles. The simple methods are hard to beat: see
    `scfm.tl.score_perturbation_prediction`.

    Examples
    --------
    Cells that are called knock-outs, to show the form; real ones come from a Perturb-seq experiment.

    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:200].copy()
    >>> model = scfm.fit(adata[:80].copy(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> adata.obs["target"] = ["control"] * 80 + ["LYZ", "CST3", "CD74", "NKG7"] * 30
    >>> change = scfm.tl.predict_perturbation(
    ...     adata, model, perturbation_key="target", control="control", predict=["CD79A", "LYZ+CST3"]
    ... )
    >>> change.loc["scfm"].shape
    (2, 765)
    """
    measured = read_measured(
        adata, perturbation_key=perturbation_key, control=control, separator=separator, layer=layer
    )
    targets = [tuple(name.split(separator)) for name in predict]
    methods = _methods(adata, model, measured, targets, layer=layer, gene_key=gene_key, seed=seed)
    parts = {
        name: pd.DataFrame(method(measured, targets), list(predict), list(measured.genes))
        for name, method in methods.items()
    }
    return pd.concat(parts, names=["method", "perturbation"])


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
    seed: int = 0,
) -> pd.DataFrame:
    """Leave each measured perturbation out in turn, predict it, and score the prediction beside the baselines'.

    Parameters
    ----------
    adata, model, perturbation_key, control, separator, layer, gene_key, seed
        As in `scfm.tl.predict_perturbation`.
    n_top
        How many genes, of the largest measured change, `pearson_top` looks at.

    Returns
    -------
    A row a perturbation and method:

    - `pearson_top`: correlation of predicted and measured change over the `n_top` genes; NaN where a prediction is constant
    - `rmse` over all genes
    - `rank`: share of the other measured perturbations whose change correlates better with the prediction than that of the
      right one; 0 is best, 0.5 is chance

    The perturbed genes themselves are left out of all scores: that a target falls is known beforehand.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:200].copy()
    >>> model = scfm.fit(adata[:80].copy(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> adata.obs["target"] = ["control"] * 80 + ["LYZ", "CST3", "CD74", "NKG7"] * 30
    >>> scores = scfm.tl.score_perturbation_prediction(adata, model, perturbation_key="target", control="control")
    >>> sorted(set(scores["method"]))
    ['additive', 'bilinear ridge', 'no change', 'scfm', 'train mean']
    """
    measured = read_measured(
        adata, perturbation_key=perturbation_key, control=control, separator=separator, layer=layer
    )
    methods = _methods(adata, model, measured, measured.targets, layer=layer, gene_key=gene_key, seed=seed)
    lines = []
    for place, target in enumerate(measured.targets):
        rest = measured.without(place)
        scored_G = ~np.isin(measured.genes, target)
        for name, method in methods.items():
            change_G = method(rest, [target])[0]
            scores = _scores(change_G[scored_G], measured.change_PG[:, scored_G], place, n_top)
            lines.append({"perturbation": separator.join(target), "n_genes": len(target), "method": name, **scores})
    return pd.DataFrame(lines)


def _methods(
    adata: anndata.AnnData,
    model: Model,
    measured: Measured,
    targets: Targets,
    *,
    layer: str | None,
    gene_key: str | None,
    seed: int,
) -> dict[str, Predictor]:
    rows = measured.control_rows
    rows = np.sort(np.random.default_rng(seed).choice(rows, min(CONTROL_CELLS, len(rows)), replace=False))
    cells = pp.encode(adata[rows], model.encoding, layer=layer, gene_key=gene_key)
    genes = sorted({gene for target in (*measured.targets, *targets) for gene in target})
    return {OURS: ridge_on_features(target_features(model, cells, genes)), **BASELINES}


def _scores(
    predicted_G: NDArray[np.float64], change_PG: NDArray[np.float64], place: int, n_top: int
) -> dict[str, float]:
    truth_G = change_PG[place]
    top = np.argsort(-np.abs(truth_G), kind="stable")[:n_top]
    alike = np.array([_correlation(predicted_G, other_G) for other_G in change_PG])
    others = np.delete(alike, place)
    rank = (
        np.nan
        if np.isnan(alike[place])
        else float((others > alike[place]).mean() + (others == alike[place]).mean() / 2)
    )
    return {
        "pearson_top": _correlation(predicted_G[top], truth_G[top]),
        "rmse": float(np.sqrt(np.mean((predicted_G - truth_G) ** 2))),
        "rank": rank,
    }


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    if first.std() < 1e-12 or second.std() < 1e-12:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
