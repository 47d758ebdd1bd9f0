"""`scfm.tl.predict_perturbation`: learn from measured perturbations, predict others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model


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
        Raw counts of control and perturbed cells, n_obs cells by n_vars genes.
    model
        From `scfm.fit` or `scfm.load`. Fit it without the cells of perturbations that are to be scored.
    perturbation_key
        Column of `adata.obs` with the perturbed gene, or genes joined by `separator`; cells without a value are left out.
        The order of genes does not matter, and the control's name among them is ignored ("A+ctrl" is "A").
    control
        Value of that column for unperturbed cells.
    predict
        Perturbations to predict, written in the same way. For a measured one, the data of all cells are used too.
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
    One row per method and perturbation (index: `method`, `perturbation`) and one column per gene of the data: change of mean
    log1p counts per 10,000. Methods: "scfm", and for comparison "no change", "train mean", "additive" and "bilinear
    ridge". `attrs["left_out"]` names measured perturbations that were not used, with the reason.

    Raises
    ------
    LabelsError
        If the column or the control is missing, or fewer than three perturbations have five cells or more.
    VocabularyMismatchError
        If a gene to predict is in neither the data nor the model.
    ValueError
        If `predict` is a text or empty.
    CountsError, EmptyCellError
        If the matrix holds no raw counts, or a control cell expresses no gene of the model.

    Warns
    -----
    UserWarning
        If perturbations are left out because they have fewer than five cells.

    Notes
    -----
    For a gene that was measured alone, "scfm" returns its measured change. For other genes, each gene is described by the
    shift of control cells when it is deleted (it is inserted first if it is not expressed), and a ridge regression predicts
    the changes from these shifts; with fewer than three genes that were measured alone, it is the mean of all measured
    changes. A combination is the sum of its genes, and, if three combinations or more were measured, a second ridge
    regression adds the difference from that sum, predicted from products of the shifts. The simple methods are hard to beat:
    see `scfm.tl.score_perturbation_prediction`.

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
