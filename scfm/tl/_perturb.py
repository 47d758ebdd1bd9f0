"""`scfm.tl.perturb`: what deleting genes, or turning them up or down, does to a cell's embedding."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd

from scfm import perturbation
from scfm.models.model import Model, Precision
from scfm.perturbation.variants import Genes
from scfm.tl._record import store_table


def perturb(
    adata: anndata.AnnData,
    model: Model,
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
    """Perturb genes in silico and measure how far each cell's embedding moves, and whether toward a goal.

    Variants are made and embedded some at a time, and equal ones once: memory grows neither with cells nor with their
    product with genes. Under torchrun each process takes its share of the cells, and all of them return the same table.

    Parameters
    ----------
    adata
        Raw counts of the cells, n_obs cells by n_vars genes.
    model
        From `scfm.fit` or `scfm.load`.
    genes
        Each a name, or a list of names to perturb together; None for every gene that a cell expresses.
    kind
        "delete": the gene's token goes. "overexpress": the gene comes to the front of the ranks, or takes the cell's
        largest value, also where it was not expressed. "inhibit", "activate": its rank or value moves down or up by
        `quantile`. All but "overexpress" act only in cells that express all the genes perturbed together.
    effect_on
        "cell": the cell's embedding moves. "genes": the states of all its other genes move, each on its own; needs `genes`,
        and has no goal.
    combine
        Take all combinations of so many of `genes`.
    quantile
        Share of the cell's genes, or of its values, that "inhibit" and "activate" move a gene by.
    positions
        After a deletion under a rank encoding, later genes move up a rank ("shift", as published) or keep their
        positions ("held").
    groupby, start, goal
        Column of `adata.obs`, the state whose cells are perturbed (None: all but the goal's), and the state whose mean
        embedding they should approach.
    null_genes
        Genes to perturb in the same way as the null of the tests. None: for fewer than 100 `genes`, about 100 others that
        as many cells express, perturbed in at most 200 cells; else each perturbation is tested against all others.
    missing
        What to do about perturbations that no cell allows: "report" them in a row with `n_cells` 0 and a `reason`, or
        "error". If none can be done, that is an error.
    n_bootstrap
        Resamples of cells behind the intervals; 0 for none.
    precision
        "fp32", or "bf16": blocks in bfloat16, faster where the machine has it; cells before and after alike.
    checkpoint
        File to save to after every few thousand variants, and to continue from if it is there.
    layer, gene_key
        As in `scfm.tl.embed`.
    key_added
        Where the table goes in `adata.uns`; None for nowhere.
    seed
        Of the bootstrap, and of the sample of 512 cells that tests and intervals see where there are more.
    progress
        Whether to show a progress bar with the time left.

    Returns
    -------
    A row a perturbation, genes perturbed together joined by "+", the largest mean shift first (toward the goal, if there
    is one):

    - `n_cells` it was done to
    - `shift_mean`, `shift_std`, `shift_sem`, `shift_low`, `shift_high`: 1 - cosine similarity between a cell's embedding
      before and after, from 0 (nothing) to 2; with its 95 % bootstrap interval over cells
    - `goal_shift_...`: with `goal`, cos(after, goal) - cos(before, goal)
    - `excess_...`: with combinations, the shift minus the sum of the shifts of the single genes in the same cell
    - `null`, `null_mean`, `effect_size` (rank-biserial), `p_value` (rank-sum), `fdr` (Benjamini-Hochberg): of the goal
      shift if there is a goal, else of the shift, against the null that `null` names

    With ``effect_on="genes"`` a row a perturbation and other gene: `gene`, `affected`, then the same columns of the shift
    of the affected gene's state. It is tested against all other genes under the same perturbation, or, with `null_genes`,
    against itself under those.

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
    Deletion, overexpression, goal-state shift and rank-sum tests are those of Geneformer (Theodoris et al. 2023). Tests
    take cells as independent; where they come from few donors, p-values are too small.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:4]
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.perturb(adata, model, genes=["CD74", "CST3"], progress=False).index.name
    'gene'
    """
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
