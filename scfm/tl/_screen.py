"""`scfm.tl.screen`: the effect of deleting every gene of every cell, estimated, the best verified exactly."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.tl._record import store_table


@document
def screen(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    positions: str = "shift",
    n_verify: int = 75,
    n_check: int = 20,
    n_projections: int = 8,
    min_cells: int = 1,
    n_bootstrap: int = 1000,
    precision: Precision = "fp32",
    layer: str | None = None,
    gene_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Table of the effects of deleting each gene: estimated for all genes of a cell at once, and exact for the best ones.

    Exact deletion of the N genes of a cell takes N forward passes. The estimate takes `n_projections` backward passes, or
    one toward a goal. A rank encoding with `positions="shift"` takes five more forward passes, or eight toward a goal.

    Parameters
    ----------
    {adata}
    model
        A model from `scfm.fit` or `scfm.load`, with a mean or `cls` embedding and softmax attention.
    {start_and_goal}
    {positions}
    n_verify
        Number of best genes to delete exactly, in every cell that expresses them.
    n_check
        Number of random other genes to delete exactly, to estimate the recall.
    n_projections
        Number of directions in the embedding along which effects are estimated, without a goal. They are found once for a
        model, from 640 exact deletions in ten of these cells, and saved with it.
    min_cells
        Genes that fewer cells express are not ranked among the best.
    {n_bootstrap}
    precision
        Precision of the estimates: "fp32", or "bf16", which is two to three times faster on machines that support it. The
        best genes are always verified in fp32.
    {layer}
    {gene_key}
    {uns_key_added}
    seed
        Seed of the choice of directions, of the random genes and of the bootstrap.
    {progress}

    Returns
    -------
    One row per gene, the largest effect first (toward the goal, if there is one), with the columns of `scfm.tl.perturb` and

    - `exact`: whether mean, standard deviation and interval of the row are exact or estimated
    - `estimate_mean`: the estimate, also if the row is exact; tests and effect sizes compare estimates with each other
    - `rank_only`: the mean position of the gene in its cells, from 0 (highest rank or value) to 1, as a control

    `attrs` holds `recall_estimate`, the expected fraction of the true best 50 genes that was verified; `rank_only_recall`,
    the fraction that the same number of genes chosen by `rank_only` would contain; and `n_top`, 50 or the number of genes.

    Raises
    ------
    ValueError
        If the model has another embedding or attention; use `scfm.tl.perturb`.

    Notes
    -----
    After a short training, moving up a rank changes the embedding more than the deletion itself, so the best genes are
    those with the highest ranks. Check `rank_only_recall`, and use ``positions="held"``.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> table = scfm.tl.screen(adata[:4], model, n_verify=5, progress=False)
    >>> int(table["exact"].sum()) - 20
    5
    """
    model = opened(model)
    table = perturbation.screen(
        adata,
        model,
        groupby=groupby,
        start=start,
        goal=goal,
        positions=positions,
        n_verify=n_verify,
        n_check=n_check,
        n_projections=n_projections,
        min_cells=min_cells,
        n_bootstrap=n_bootstrap,
        precision=precision,
        layer=layer,
        gene_key=gene_key,
        seed=seed,
        progress=progress,
    )
    store_table(
        adata,
        model,
        key_added,
        table,
        groupby=groupby,
        start=start,
        goal=goal,
        positions=positions,
        precision=precision,
        **table.attrs,
    )
    return table
