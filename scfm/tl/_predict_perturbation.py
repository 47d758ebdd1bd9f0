"""`scfm.tl.predict_perturbation`: learn from measured perturbations, predict others."""

from __future__ import annotations

from collections.abc import Sequence

import anndata
import pandas as pd

from scfm import perturbation
from scfm.models.model import Model


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
