"""`scfm.tl.screen`: the effect of deleting every gene of every cell, estimated, the best verified exactly."""

from __future__ import annotations

import anndata
import pandas as pd

from scfm import perturbation
from scfm.models.model import Model, Precision
from scfm.tl._record import store_table


def screen(
    adata: anndata.AnnData,
    model: Model,
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
    """Estimate what deleting each gene does, for all genes of each cell at once, and verify the best.

    Exact deletion of the N genes of a cell takes N forward passes. The estimate takes `n_projections` backward passes,
    or one toward a goal, and under a rank encoding that shifts five forward passes more, or eight toward a goal.

    Parameters
    ----------
    adata
        Raw counts of the cells, n_obs cells by n_vars genes.
    model
        From `scfm.fit` or `scfm.load`; mean or `cls` embedding, softmax attention.
    groupby, start, goal
        As in `scfm.tl.perturb`. With a goal, genes are ranked by how far their deletion moves cells toward it.
    positions
        As in `scfm.tl.perturb`: "shift" or "held". Matters for rank encodings only.
    n_verify
        How many of the best genes to delete exactly, in every cell that expresses them.
    n_check
        How many random other genes to delete exactly, for the estimate of the recall.
    n_projections
        Directions in which the estimate resolves what other genes do, without a goal. They are found once for a model, by
        640 exact deletions in ten of these cells, and saved with it.
    min_cells
        Genes that fewer cells express are not ranked among the best.
    n_bootstrap
        Resamples of cells behind the intervals; 0 for none.
    precision
        Of the estimates: "fp32", or "bf16" for blocks in bfloat16, two to three times faster where the machine has it. The
        best genes are verified in fp32 all the same.
    layer, gene_key
        As in `scfm.tl.embed`.
    key_added
        Where the table goes in `adata.uns`; None for nowhere.
    seed
        Of calibration, checked genes and bootstrap.
    progress
        Whether to show progress bars.

    Returns
    -------
    A row a gene, the best first, as from `scfm.tl.perturb` (`goal_shift_...` in place of `shift_...` with a goal), and

    - `exact`: whether mean, deviation and interval of the row are exact; else they are those of the estimate
    - `estimate_mean`: the estimate, also where the row is exact; tests and effect sizes compare estimates with estimates
    - `rank_only`: the gene's mean place in its cells, from 0 (first by rank, or largest value) to 1, as a control

    `attrs` has `recall_estimate`, the expected share of the exact best 50 that was verified; `rank_only_recall`, the share
    of the best 50 found that as many genes chosen by `rank_only` would have held; and `n_top`, that 50 or fewer.

    Raises
    ------
    ValueError
        If the model is not one that the estimate describes; use `scfm.tl.perturb`.

    Notes
    -----
    Where rank embeddings are rough (short training), moving up a rank dominates every shift, and the best genes are the
    highest ranked: look at `rank_only_recall`, and use ``positions="held"``. The estimate follows such ranks too, by the forward
    passes named above.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> table = scfm.tl.screen(adata[:4], model, n_verify=5, progress=False)
    >>> int(table["exact"].sum()) - 20
    5
    """
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
