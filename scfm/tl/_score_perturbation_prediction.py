"""`scfm.tl.score_perturbation_prediction`: leave measured perturbations out and predict them."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model


@document
def score_perturbation_prediction(
    adata: anndata.AnnData,
    model: Model | str | Path,
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
    """Leave each measured perturbation out in turn, predict it, and compare the prediction with those of the baselines.

    Parameters
    ----------
    adata
        Raw counts of control and perturbed cells, n_obs cells by n_vars genes.
    model
        From `scfm.fit` or `scfm.load`, fitted without the perturbed cells.
    perturbation_key
        Column of `adata.obs` with the perturbed gene, or genes joined by `separator`; cells without a value are left out.
    control
        Value of that column for unperturbed cells.
    separator
        Text between the genes of a combination.
    n_top
        Number of genes with the largest measured change that `pearson_top` is computed on.
    {layer}
    gene_key
        Column of `adata.var` with the names that perturbations use. None for `var_names`.
    {depth_key}
    seed
        Seed of the choice of control cells.

    Returns
    -------
    One row per perturbation and method: `perturbation`, `n_genes`, `method`, and

    - `pearson_top`: correlation of predicted and measured change over the `n_top` genes; NaN if a prediction is constant
    - `rmse`: root mean squared error over all genes
    - `rank`: fraction of the other measured perturbations whose change correlates better with the prediction than the right
      one does, ties counted half; 0 is best, 0.5 is chance, NaN if a prediction is constant ("no change")

    The perturbed genes themselves are left out of all scores, because everybody knows that they change.
    `attrs["left_out"]` names measured perturbations that were not used, with the reason.

    Raises
    ------
    LabelsError
        If the column or the control is missing, or fewer than three perturbations have five cells or more.
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix holds no raw counts, its genes are not those of the model, or a control cell has none of them.

    Warns
    -----
    UserWarning
        If perturbations are left out because they have fewer than five cells.

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
    model = opened(model)
    return perturbation.score_perturbation_prediction(
        adata,
        model,
        perturbation_key=perturbation_key,
        control=control,
        separator=separator,
        n_top=n_top,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
        seed=seed,
    )
