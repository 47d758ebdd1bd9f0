"""`scfm.tl.score_perturbation_prediction`: leave measured perturbations out and predict them."""

from __future__ import annotations

import anndata
import pandas as pd

from scfm import perturbation
from scfm.models.model import Model


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
    return perturbation.score_perturbation_prediction(
        adata,
        model,
        perturbation_key=perturbation_key,
        control=control,
        separator=separator,
        n_top=n_top,
        layer=layer,
        gene_key=gene_key,
        seed=seed,
    )
