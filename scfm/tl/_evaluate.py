"""`scfm.tl.evaluate_annotation`: scores of annotation over several seeds, compared with simple methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import stats

from scfm.data import columns, split_cells
from scfm.data.columns import Labels
from scfm.tl._fit import fit

SCORES = ("accuracy", "macro_f1", "balanced_accuracy", "ece")
WITHOUT_PRETRAINING = ", without pretraining"


def evaluate_annotation(
    adata: anndata.AnnData,
    *,
    labels_key: str,
    seeds: Sequence[int] = range(5),
    label_fraction: float = 1.0,
    test_fraction: float = 0.3,
    variants: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Fit one model per seed, each on its own split, and score it and the baselines on the same test cells.

    Two variants of each model are fitted too: one without pretraining, and a transductive one, for which test cells without
    their labels are part of the training data.

    Parameters
    ----------
    adata
        AnnData with raw counts. It is not changed.
    labels_key
        Column of `adata.obs` with cell types.
    seeds
        Seeds of the splits and of the models.
    label_fraction
        Fraction of the training cells of each class that keep their labels, but at least one cell. The others are used as
        unlabeled cells. The test cells are the same for every fraction.
    test_fraction
        Fraction of the labeled cells that are test cells.
    variants
        Whether to fit the two variants. A variant that results from `settings` is not fitted twice.
    settings
        Further arguments of `scfm.fit`, except `seed` and `test_key`, which are set here. If `config` has a seed, all
        models are trained with this seed.

    Returns
    -------
    One row per seed and method, with `setting`, `accuracy`, `macro_f1`, `balanced_accuracy`, `ece` (expected calibration
    error), `seed`, `n_labels` (number of training and calibration cells) and `label_fraction`. `summarize_scores` averages
    them over seeds.

    Raises
    ------
    LabelsError
        If `labels_key` is missing, or there are too few classes or cells.
    ValueError
        If `settings` contain an argument that is set here.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:200].copy()
    >>> adata = adata[adata.obs["bulk_labels"].isin(["CD14+ Monocyte", "CD19+ B", "Dendritic"])].copy()
    >>> short = scfm.FitConfig(n_steps=2)
    >>> rows = scfm.tl.evaluate_annotation(
    ...     adata, labels_key="bulk_labels", seeds=[0], variants=False, config=short, pretrain=False, progress=False
    ... )
    >>> rows["method"].iloc[0], sorted(rows["setting"].unique())
    ('scfm', ['inductive', 'transductive'])
    """
    if given := sorted({"seed", "test_key"} & settings.keys()):
        raise ValueError(f"`{given[0]}` is set for each model by `seeds` and `test_fraction`. Omit it.")
    labels = columns.labels(adata.obs, labels_key)
    pretrains = settings.get("model") is None if settings.get("pretrain") is None else settings["pretrain"]
    tables = []
    for seed in seeds:
        chosen = hide_labels(
            adata, labels, labels_key=labels_key, label_fraction=label_fraction, test_fraction=test_fraction, seed=seed
        )
        common = {"labels_key": labels_key, "test_key": "is_test", "seed": seed, **settings}
        table = _report(chosen, **common)
        of_variant = {**common, "baselines": False}
        if variants and not settings.get("transductive"):
            table = pd.concat([table, _report(chosen, **{**of_variant, "transductive": True})])
        if variants and pretrains:
            bare = _report(chosen, **{**of_variant, "pretrain": False, "pretrain_config": None})
            table = pd.concat([table, bare.assign(method=bare["method"] + WITHOUT_PRETRAINING)])
        n_labels = int(chosen.obs["scfm_split"].isin(["train", "calibration"]).sum())
        tables.append(table.assign(seed=seed, n_labels=n_labels))
    return pd.concat(tables, ignore_index=True).assign(label_fraction=label_fraction)


def _report(adata: anndata.AnnData, **settings: Any) -> pd.DataFrame:
    return fit(adata, **settings).report().reset_index().drop(columns="above_scfm")


def hide_labels(
    adata: anndata.AnnData, labels: Labels, *, labels_key: str, label_fraction: float, test_fraction: float, seed: int
) -> anndata.AnnData:
    """Return a copy of `adata` with test cells marked and the labels of some other cells removed."""
    codes_B = labels.codes[labels.labeled]
    parts = split_cells(labels=codes_B, test_fraction=test_fraction, seed=seed)
    chosen = adata.copy()
    is_test_B = np.zeros(adata.n_obs, dtype=bool)
    is_test_B[labels.labeled[parts.test]] = True
    chosen.obs["is_test"] = is_test_B
    if label_fraction < 1:
        kept = split_cells(labels=codes_B[parts.train], test_fraction=1 - label_fraction, seed=seed)
        names = chosen.obs[labels_key].astype(object).to_numpy()
        names[labels.labeled[parts.train[kept.test]]] = None
        chosen.obs[labels_key] = pd.Categorical(names)
    return chosen


def summarize_scores(rows: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Average each score over seeds, with a confidence interval from Student's t distribution.

    Parameters
    ----------
    rows
        Result of `evaluate_annotation`.
    confidence
        Confidence level of the interval.

    Returns
    -------
    One row per method and setting, in the order of `rows`: `setting`, `n_seeds`, and for each score its mean and
    `<score>_interval`, half the width of the interval, which is NaN for a single seed.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> rows = pd.DataFrame({"method": "a", "setting": "inductive", "seed": [0, 1], "macro_f1": [0.7, 0.8]})
    >>> rows = rows.assign(accuracy=0.9, balanced_accuracy=0.8, ece=0.1)
    >>> table = scfm.tl.summarize_scores(rows)
    >>> float(table.loc["a", "macro_f1"]), round(float(table.loc["a", "macro_f1_interval"]), 3)
    (0.75, 0.635)
    """
    by_method = rows.groupby(["method", "setting"], sort=False)
    n_seeds = by_method["seed"].nunique()
    table = pd.DataFrame(index=n_seeds.index)
    for score in SCORES:
        table[score] = by_method[score].mean()
        t_value = stats.t.ppf((1 + confidence) / 2, np.maximum(n_seeds - 1, 1))
        table[f"{score}_interval"] = t_value * by_method[score].std() / np.sqrt(n_seeds)
    return table.assign(n_seeds=n_seeds).reset_index("setting")
