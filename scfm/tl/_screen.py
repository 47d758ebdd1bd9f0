"""`scfm.tl.screen`: estimate the effect of deleting each gene, and compute the largest effects exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._config import require_seed
from scfm._docs import document
from scfm.data.matrices import require_adata
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.tl._record import add_symbols, store_table


@document
def screen(
    adata: anndata.AnnData | str | Path | Sequence[str | Path],
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
    min_cells: int = 3,
    n_bootstrap: int = 1000,
    precision: Precision = "fp32",
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Estimate the effect of deleting each gene, for all genes of a cell at once, and compute the largest effects exactly.

    Exact deletion of the N genes of a cell takes N forward passes. The estimate takes `n_projections` backward passes for
    the measure "shift", and one backward pass for "goal" and "label". With a rank encoding and ``positions="shift"`` it
    takes five further forward passes for "shift", and eight for "goal" and "label".

    Parameters
    ----------
    {adata_or_files}
    model
        A model with "mean", "weighted" or "cls" pooling and softmax attention, or its path.
    {start_and_goal}
    {positions}
    measure
        "shift", "goal" or "label", as in `scfm.tl.perturb`. None for "goal" if there is a `goal`, otherwise "shift". "shift"
        cannot be combined with a `goal`.
    center
        Whether to subtract the mean embedding of all cells before cosines are computed.
    n_verify
        Number of genes to verify: the effects of the genes with the largest estimates are computed exactly, in all cells that
        express them.
    n_check
        Number of random other genes whose effect is computed exactly, to estimate the recall of the screen.
    n_projections
        For "shift" only: number of directions of the embedding space in which changes of the embedding are estimated. More
        directions are slower and more accurate. Each call computes the directions from at most 640 exact deletions in ten
        random cells.
    min_cells
        Minimum number of cells that express a gene. Genes of fewer cells are not verified and come last in the table.
    {n_bootstrap}
    precision
        Precision of the estimates: "fp32", or "bf16" for blocks of the network in bfloat16, which is faster on processors
        that support it. Verified effects are always computed in fp32.
    {layer}
    {gene_key}
    {depth_key}
    {uns_key_added}
    {seed}
    {progress}

    Returns
    -------
    One row per gene, with the order and the columns of `scfm.tl.perturb` for the chosen measure, and

    - `exact`: True if the gene was verified. In the other rows, mean, standard deviation, standard error and interval are
      those of the estimates. `null_mean`, `effect_size`, `p_value` and `fdr` are computed from estimates in all rows.
    - `estimate_mean`: mean of the estimates, also for verified genes
    - `rank_only`: mean rank of the gene in its cells, from 0 (first, or largest value) to 1, for comparison with a ranking
      by expression alone

    `attrs` has

    - `recall_estimate`: of the `n_top` genes with the largest effects, the estimated fraction that was verified
    - `rank_only_recall`: the same fraction, if the genes with the lowest `rank_only` were verified instead
    - `n_top`: number of genes of which the recall is computed, at most 50

    Raises
    ------
    ValueError
        If the estimate does not apply to the model (use `scfm.tl.perturb`), or arguments contradict each other.
    LabelsError
        If `groupby`, `start` or `goal` does not exist in `adata.obs`, or a label is not one of the model.
    ModelTaskError
        If `measure` is "label" and the model has no classifier of cells.
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix does not hold raw counts, its genes do not match the model, there are no cells, or no cell has a gene
        that can be deleted.

    Notes
    -----
    Deleting a gene changes the ranks of all later genes. If the embeddings of consecutive ranks differ much, as after short
    training, this effect dominates all shifts, and the genes with the highest ranks have the largest ones. The estimate
    includes this effect. Compare the recall with `rank_only_recall`; ``positions="held"`` excludes the effect.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> table = scfm.tl.screen(adata[:4], model, n_verify=5, progress=False)
    >>> int(table["exact"].sum()) - 20
    5
    """
    require_seed(seed)
    if key_added is not None:
        require_adata(adata)
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
    add_symbols(table, model)
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
