"""`scfm.tl.perturb`: what deleting genes, or turning them up or down, does to a cell's embedding."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.perturbation.variants import Genes
from scfm.tl._record import store_table


@document
def perturb(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    genes: Genes | None = None,
    kind: str = "delete",
    effect_on: str = "cell",
    combine: int = 1,
    quantile: float = 0.25,
    positions: str = "shift",
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    null_genes: Genes | None = None,
    missing: str = "report",
    n_bootstrap: int = 1000,
    precision: Precision = "fp32",
    checkpoint: str | Path | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Table of the effects of in-silico perturbations: how far the embeddings of cells move, and whether toward a goal.

    Perturbed cells are made and embedded in batches, so memory does not grow with the number of perturbations. Under
    torchrun each process takes a part of the cells, and all of them return the same table.

    Parameters
    ----------
    {adata}
    {model}
    genes
        Perturbations: each is a gene, or a list of genes to perturb together. None for every gene that a cell expresses.
    kind
        "delete" removes the token of the gene. "overexpress" moves the gene to the first rank, or gives it the largest
        value of the cell, also if it was not expressed. "inhibit" and "activate" move its rank or value down or up by
        `quantile`. All but "overexpress" apply only to cells that express all genes of the perturbation.
    effect_on
        "cell" measures the shift of the cell's embedding. "genes" measures the shift of the state of each other gene; it
        needs `genes`, and takes no goal.
    combine
        Perturb all combinations of this many of `genes`.
    quantile
        Fraction of the ranks, or of the range of values, by which "inhibit" and "activate" move a gene.
    {positions}
    {start_and_goal}
    null_genes
        Genes to perturb in the same way as the null of the tests. None: for fewer than 100 `genes`, about 100 others that
        as many cells express, perturbed in at most 200 cells; else each perturbation is tested against all others.
    missing
        What to do about perturbations that no cell allows: "report" them in a row with `n_cells` 0 and a `reason`, or
        "error". If none can be done, that is an error.
    {n_bootstrap}
    precision
        "fp32", or "bf16", which is faster on machines that support it.
    checkpoint
        File to save progress to, and to continue from if it exists.
    {layer}
    {gene_key}
    {uns_key_added}
    seed
        Seed of the bootstrap, and of the sample of 512 cells that tests and intervals use if there are more.
    {progress}

    Returns
    -------
    One row per perturbation, with genes perturbed together joined by "+", the largest mean shift first (toward the goal,
    if there is one):

    - `n_cells`: number of perturbed cells
    - `shift_mean`, `shift_std`, `shift_sem`, `shift_low`, `shift_high`: 1 - cosine similarity between a cell's embedding
      before and after, from 0 (no change) to 2, with its 95 % bootstrap interval over cells
    - `goal_shift_...`: with `goal`, cos(after, goal) - cos(before, goal)
    - `excess_...`: with combinations, the shift minus the sum of the shifts of the single genes in the same cell
    - `null`, `null_mean`, `effect_size` (rank-biserial), `p_value` (rank-sum), `fdr` (Benjamini-Hochberg): of the goal
      shift if there is a goal, else of the shift, against the null that `null` names

    With ``effect_on="genes"``, one row per perturbation and other gene: `gene`, `affected`, then the same columns for the
    shift of the state of the affected gene. It is tested against all other genes under the same perturbation, or, with
    `null_genes`, against the same gene under those perturbations.

    Raises
    ------
    VocabularyMismatchError
        If a gene is not in the vocabulary, or no cell can be perturbed.
    LabelsError
        If `groupby`, `start` or `goal` does not fit `adata.obs`.
    ValueError
        If arguments do not go together; the message says which.

    Notes
    -----
    Deletion, overexpression, goal-state shift and rank-sum tests are those of Geneformer (Theodoris et al. 2023). The tests
    treat cells as independent; if the cells come from few donors, the p-values are too small.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:4]
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.perturb(adata, model, genes=["CD74", "CST3"], progress=False).index.name
    'gene'
    """
    model = opened(model)
    table = perturbation.perturb(
        adata,
        model,
        genes=genes,
        kind=kind,
        effect_on=effect_on,
        combine=combine,
        quantile=quantile,
        positions=positions,
        groupby=groupby,
        start=start,
        goal=goal,
        null_genes=null_genes,
        missing=missing,
        n_bootstrap=n_bootstrap,
        precision=precision,
        checkpoint=checkpoint,
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
        kind=kind,
        effect_on=effect_on,
        groupby=groupby,
        start=start,
        goal=goal,
        positions=positions,
    )
    return table
