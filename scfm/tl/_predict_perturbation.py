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
    seed: int = 0,
) -> pd.DataFrame:
    """Predict the change of mean expression after perturbations of single genes or combinations.

    Parameters
    ----------
    adata
        Raw counts of control and perturbed cells, n_obs cells by n_vars genes, in `X` or in `layer`.
    model
        A model from `scfm.fit` or `scfm.load`, fitted without the cells of the perturbations to be scored.
    perturbation_key
        Column of `adata.obs` with the perturbed gene, or genes joined by `separator`; cells with NaN are left out.
    control
        Value of that column for unperturbed cells.
    predict
        Perturbations to predict, with genes joined by `separator`. Measured ones are predicted from all data.
    separator
        Text between the genes of a combination.
    {layer}
    {gene_key}
    seed
        Seed of the choice of control cells.

    Returns
    -------
    Change of mean log1p counts per 10,000, with one row per method and perturbation (index: `method`, `perturbation`) and one
    column per gene. Methods: "scfm", and the baselines "no change", "train mean", "additive" and "bilinear ridge".

    Notes
    -----
    The features of a gene are the shift of control cells after its deletion (cells that do not express it get it first).
    Ridge regression predicts the measured changes from them. For combinations, a second ridge regression predicts, from
    products of features, the difference from the sum of the single changes. The baselines are hard to beat: see
    `scfm.tl.score_perturbation_prediction`.

    Examples
    --------
    The labels of this example are made up; real ones come from a Perturb-seq experiment.

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
        seed=seed,
    )
