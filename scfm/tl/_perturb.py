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
    measure: str | None = None,
    center: bool = False,
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
    depth_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Perturb genes in silico and measure how far each cell moves: its embedding, toward a goal, or away from its label.

    Memory does not grow with the number of variants, and equal variants are computed once. Under torchrun each process
    takes a part of the cells, and all processes return the same table.

    Parameters
    ----------
    {adata}
    {model}
    genes
        Names, or lists of names to perturb together. None for every gene that a cell expresses, one at a time.
    kind
        "delete": the gene's token is removed. "overexpress": the gene becomes the first in rank, or gets the cell's largest
        value, also if it was not expressed. "inhibit" and "activate": its rank or value moves down or up by `quantile`. All
        but "overexpress" act only in cells that express all the genes perturbed together.
    effect_on
        "cell": the cell moves. "genes": the states of all its other genes move, each on its own; this needs `genes`, and
        measures shifts only.
    combine
        Perturb all combinations of this many of `genes`.
    quantile
        Fraction of the cell's genes, or of its values, that "inhibit" and "activate" move a gene by.
    {positions}
    measure
        "shift": 1 - cosine similarity of the embeddings before and after. "goal": change of the cosine similarity to the
        mean embedding of `goal`. "label": change of the log-odds that the model's classifier gives to the cell's own
        label, which is that in `groupby`, or the predicted one without `groupby`. None for "goal" if there is a `goal`, else
        "shift".
    center
        Subtract the mean embedding of all cells (perturbed and goal) before cosines are computed. Embeddings of all cells
        have much in common, so that shifts are tiny and alike without it.
    {start_and_goal}
    null_genes
        Genes to perturb in the same way as the null of the tests. None: for fewer than 100 `genes`, about 100 others that
        as many cells express, perturbed in at most 200 cells; else each perturbation is tested against all others.
    missing
        What to do about perturbations that no cell allows: "report" them in a row with `n_cells` 0 and a `reason`, or
        "error". If none can be done, that is an error.
    {n_bootstrap}
    precision
        "fp32", or "bf16" for blocks in bfloat16, which is faster on processors that support it.
    checkpoint
        File to save to after every few thousand variants, and to resume from if it exists.
    {layer}
    {gene_key}
    {depth_key}
    {uns_key_added}
    {seed}
    {progress}

    Returns
    -------
    One row per perturbation (index `gene`; genes perturbed together are joined by "+"), the largest mean first; for labels
    the lowest first, the genes that hold cells in their state. Columns:

    - `n_cells`: number of cells in which it was done
    - `shift_mean`, `shift_std`, `shift_sem`, `shift_low`, `shift_high`: mean over cells, standard deviation, standard error,
      and 95 % bootstrap interval (not with `n_bootstrap` 0) of the shift, from 0 (no effect) to 2
    - `goal_shift_...`: the same for the change of the cosine similarity to the goal
    - `label_shift_...`: the same for the change of the log-odds, in place of the others
    - `excess_...`, `goal_excess_...`, `label_excess_...`: for combinations, the effect minus the sum of the effects of the
      single genes in the same cell
    - `null`, `null_mean`, `effect_size` (rank-biserial), `p_value` (rank-sum), `fdr` (Benjamini-Hochberg over the genes that
      were asked for): of the chosen measure, against the null that `null` names; `attrs["null_genes"]` lists it
    - `reason`, with `genes`: why a perturbation could not be done, empty for the others

    With ``effect_on="genes"``, one row per perturbation and other gene: `gene`, `affected`, then the same columns of the
    shift of the affected gene's state. It is tested against all other genes under the same perturbation, or, with
    `null_genes`, against itself under those.

    Raises
    ------
    VocabularyMismatchError
        If no perturbation can be done, or one cannot and `missing` is "error".
    LabelsError
        If `groupby`, `start` or `goal` does not fit `adata.obs`, or a label is not one of the model's.
    ModelTaskError
        If `measure` is "label" and the model has no classifier of cells.
    CountsError, EmptyCellError
        If the matrix holds no raw counts, there are no cells, a cell expresses no gene of the model, or each expresses one gene
        only.
    ValueError
        If arguments contradict each other; the message says which.

    Notes
    -----
    Deletion, overexpression, goal-state shift and rank-sum tests are those of Geneformer (Theodoris et al. 2023). The
    classifier of "label" is the transformer's alone, without the linear classifier that `scfm.tl.annotate` combines it
    with. Tests treat cells as independent; if they come from few donors, p-values are too small.

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
        measure=measure,
        center=center,
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
        depth_key=depth_key,
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
        measure=measure,
        center=center,
    )
    return table
