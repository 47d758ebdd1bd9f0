"""`scfm.tl.predict_perturbation`: predict the effects of perturbations from measured ones."""

from __future__ import annotations

from collections.abc import Sequence
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
def predict_perturbation(
    adata: anndata.AnnData,
    model: Model | str | Path,
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
    """Predict the change of mean expression after perturbations of single genes or combinations.

    Parameters
    ----------
    adata
        AnnData with raw counts of control and perturbed cells.
    model
        A model, or its path. It should not have been trained on cells of the perturbations to predict.
    perturbation_key
        Column of `adata.obs` with the perturbed gene, or genes joined by `separator` in any order. The name of the control
        among them is ignored ("A+ctrl" is "A"). Cells without a value are omitted.
    control
        Value of that column for unperturbed cells.
    predict
        Perturbations to predict, written in the same way. If a perturbation was measured, its cells are training data too.
    separator
        Text between the genes of a combination.
    {layer}
    gene_key
        Column of `adata.var` with the names that perturbations use. None for `var_names`.
    {depth_key}
    seed
        Seed of the choice of control cells.

    Returns
    -------
    One row per method and perturbation (index: `method`, `perturbation`) and one column per gene of the data, with the change
    of mean log1p counts per 10,000. Methods are "scfm" and, for comparison, "no change", "train mean" (mean measured change),
    "additive" (sum of the changes of the single genes) and "bilinear ridge" (a regression on principal axes of the measured
    changes). `attrs["left_out"]` has the measured perturbations that were not used, with the reason.

    Raises
    ------
    LabelsError
        If the column or the control is missing, or fewer than three perturbations have five cells or more.
    VocabularyMismatchError
        If a gene to predict is in neither the data nor the model.
    ValueError
        If `predict` is a string or empty.
    CountsError, EmptyCellError
        If the matrix does not hold raw counts, or a control cell expresses no gene of the model.

    Warns
    -----
    UserWarning
        If perturbations with fewer than five cells are omitted.

    Notes
    -----
    For a gene that was measured alone, "scfm" returns the measured change. For another gene, the features are the mean shift
    of the embeddings of control cells when the gene is deleted; in cells that do not express it, the gene is added first. A
    ridge regression predicts the change from these features. If fewer than three genes were measured alone, the prediction is
    the mean of all measured changes. A combination is predicted as the sum of its genes. If at least three combinations were
    measured, a second ridge regression on products of features predicts the difference from this sum. Simple methods are
    often as good; `scfm.tl.score_perturbation_prediction` compares them.

    Examples
    --------
    The labels of this example are invented to show the format; real ones are from a Perturb-seq experiment.

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
    require_seed(seed)
    require_cells(adata)
    model = opened(model)
    return perturbation.predict_perturbation(
        adata,
        model,
        perturbation_key=perturbation_key,
        control=control,
        predict=predict,
        separator=separator,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
        seed=seed,
    )
