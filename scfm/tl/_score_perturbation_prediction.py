"""`scfm.tl.score_perturbation_prediction`: scores of the prediction of measured perturbations."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._config import require_seed
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import require_cells


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
    """Predict each measured perturbation from the others, and score the predictions of the model and of simple methods.

    Parameters
    ----------
    adata
        AnnData with raw counts of control and perturbed cells.
    model
        A model that was not trained on the perturbed cells, or its path.
    perturbation_key
        Column of `adata.obs` with the perturbed gene, or genes joined by `separator`. Cells without a value are omitted.
    control
        Value of that column for unperturbed cells.
    separator
        Text between the genes of a combination.
    n_top
        Number of genes for `pearson_top`, those with the largest measured change.
    {layer}
    gene_key
        Column of `adata.var` with the names that perturbations use. None for `var_names`.
    {depth_key}
    seed
        Seed of the choice of control cells.

    Returns
    -------
    One row per perturbation and method: `perturbation`, `n_genes`, `method`, and

    - `pearson_top`: correlation of predicted and measured change over the `n_top` genes; NaN if the prediction is constant
    - `rmse`: root mean squared error over all genes
    - `rank`: fraction of the other measured perturbations whose change correlates better with the prediction than the change
      of the predicted perturbation, with ties counted half; 0 is best, 0.5 is chance, NaN if the prediction is constant ("no
      change")

    The perturbed genes are not part of the scores, because their change is known in advance. `attrs["left_out"]` has the
    measured perturbations that were not used, with the reason.

    Raises
    ------
    LabelsError
        If the column or the control is missing, or fewer than three perturbations have five cells or more.
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix does not hold raw counts, its genes do not match the model, or a control cell expresses none of them.

    Warns
    -----
    UserWarning
        If perturbations with fewer than five cells are omitted.

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
    require_seed(seed)
    require_cells(adata)
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
