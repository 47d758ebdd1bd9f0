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
    measure: str | None = None,
    center: bool = False,
    n_verify: int = 75,
    n_check: int = 20,
    n_projections: int = 8,
    min_cells: int = 1,
    n_bootstrap: int = 1000,
    precision: Precision = "fp32",
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Estimate the effect of deleting each gene, for all genes of each cell at once, and verify the largest exactly.

    Exact deletion of the N genes of a cell takes N forward passes. The estimate takes `n_projections` backward passes, or
    one toward a goal or for a label. Under a rank encoding with ``positions="shift"`` it takes five forward passes more, or
    eight with one direction.

    Parameters
    ----------
    {adata}
    model
        From `scfm.fit` or `scfm.load`; mean or `cls` embedding, softmax attention.
    {start_and_goal}
    {positions}
    measure
        What is measured: the "shift" of the embedding, the movement toward the "goal", or the log-odds of each cell's own
        "label". None for "goal" if there is a `goal`, else "shift"; "shift" cannot be combined with a `goal`.
    center
        Subtract the mean embedding of all cells before cosines are computed.
    n_verify
        Number of the best genes to delete exactly, in every cell that expresses them.
    n_check
        Number of random other genes to delete exactly, for the estimate of the recall.
    n_projections
        Number of directions in which the estimate resolves the effect on other genes, for "shift" only. Each call computes
        them by at most 640 exact deletions, in ten of the cells that `seed` draws.
    min_cells
        Genes that fewer cells express are not verified.
    {n_bootstrap}
    precision
        Precision of the estimates: "fp32", or "bf16" for blocks in bfloat16, two to three times faster on processors that
        support it. The best genes are always verified in fp32.
    {layer}
    {gene_key}
    {depth_key}
    {uns_key_added}
    {seed}
    {progress}

    Returns
    -------
    One row per gene, in the order and with the columns of `scfm.tl.perturb`, of the chosen measure only, and

    - `exact`: whether mean, standard deviation, standard error and interval of the row are exact; otherwise they are those
      of the estimate. `null_mean`, `effect_size`, `p_value` and `fdr` compare estimates with estimates in every row.
    - `estimate_mean`: the estimate, also if the row is exact
    - `rank_only`: the gene's mean rank in its cells, from 0 (first by position, or largest value) to 1, as a control

    `attrs` has `recall_estimate`, the expected fraction of the exact best 50 that was verified; `rank_only_recall`, the
    fraction of the best 50 that would have been among as many genes chosen by `rank_only`; and `n_top`, that 50 or fewer.

    Raises
    ------
    ValueError
        If the estimate does not apply to the model (use `scfm.tl.perturb`), or arguments contradict each other.
    LabelsError
        If `groupby`, `start` or `goal` does not fit `adata.obs`, or a label is not one of the model's.
    ModelTaskError
        If `measure` is "label" and the model has no classifier of cells.
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix holds no raw counts, its genes are not those of the model, there are no cells, or no cell has a gene
        that can be deleted.

    Notes
    -----
    If rank embeddings are rough (short training), moving up by one rank dominates every shift, and the best genes are
    those with the highest ranks. Compare with `rank_only_recall`, and use ``positions="held"``. The estimate follows such
    ranks too, by the forward passes named above.

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
        measure=measure,
        center=center,
        n_verify=n_verify,
        n_check=n_check,
        n_projections=n_projections,
        min_cells=min_cells,
        n_bootstrap=n_bootstrap,
        precision=precision,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
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
        measure=measure,
        center=center,
        precision=precision,
        **table.attrs,
    )
    return table
