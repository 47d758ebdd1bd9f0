"""`scfm.tl.evaluate_annotation`: annotation over seeds, with intervals, beside simple methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import stats

from scfm.data import split_cells
from scfm.data.labels import Labels
from scfm.tl._fit import fit

SCORES = ("accuracy", "macro_f1", "balanced_accuracy", "ece")


def evaluate_annotation(
    adata: anndata.AnnData,
    *,
    labels_key: str,
    seeds: Sequence[int] = range(5),
    label_fraction: float = 1.0,
    test_fraction: float = 0.3,
    **settings: Any,
) -> pd.DataFrame:
    """Fit a model for each seed, each with a split of its own, and score it beside the baselines on the same cells.

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes; left unchanged.
    labels_key
        Column of `adata.obs` with cell types.
    seeds
        Of the splits and of the models.
    label_fraction
        Share of the remaining cells that keep their labels, by class, at least one each; the others stay as unlabelled
        cells. The test cells are the same for every share.
    test_fraction
        Share of the labelled cells that are tested.
    settings
        Passed on to `scfm.fit`.

    Returns
    -------
    A row a seed and method, with setting, scores and numbers of cells; `summarize_scores` makes a table of them.
    """
    labels = Labels.from_obs(adata.obs, labels_key)
    tables = []
    for seed in seeds:
        chosen = _hide(adata, labels, labels_key, label_fraction, test_fraction, seed)
        model = fit(chosen, labels_key=labels_key, test_key="is_test", seed=seed, **settings)
        part = chosen.obs["scfm_split"]
        tables.append(
            model.report().reset_index().assign(seed=seed, n_labels=int(part.isin(["train", "calibration"]).sum()))
        )
    return pd.concat(tables, ignore_index=True).assign(label_fraction=label_fraction)


def _hide(
    adata: anndata.AnnData, labels: Labels, labels_key: str, label_fraction: float, test_fraction: float, seed: int
) -> anndata.AnnData:
    """Copy `adata`, mark its test cells, and take labels away from a part of the others."""
    codes_B = labels.codes[labels.labelled]
    parts = split_cells(labels=codes_B, test_fraction=test_fraction, seed=seed)
    chosen = adata.copy()
    is_test_B = np.zeros(adata.n_obs, dtype=bool)
    is_test_B[labels.labelled[parts.test]] = True
    chosen.obs["is_test"] = is_test_B
    if label_fraction < 1:
        kept = split_cells(labels=codes_B[parts.train], test_fraction=1 - label_fraction, seed=seed)
        names = chosen.obs[labels_key].astype(object).to_numpy()
        names[labels.labelled[parts.train[kept.test]]] = None
        chosen.obs[labels_key] = pd.Categorical(names)
    return chosen


def summarize_scores(rows: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Mean of each score over seeds, a row a method, and half the width of its t interval; NaN of a single seed."""
    by_method = rows.groupby(["method", "setting"], sort=False)
    n_seeds = by_method["seed"].nunique()
    table = pd.DataFrame(index=n_seeds.index)
    for score in SCORES:
        table[score] = by_method[score].mean()
        t_value = stats.t.ppf((1 + confidence) / 2, np.maximum(n_seeds - 1, 1))
        table[f"{score}_interval"] = t_value * by_method[score].std() / np.sqrt(n_seeds)
    return table.assign(n_seeds=n_seeds).reset_index("setting")
