"""`scfm.tl.perturb`: the effect of deleting, overexpressing, inhibiting or activating genes on cell embeddings."""

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
from scfm.perturbation.variants import Genes
from scfm.tl._record import add_symbols, store_table


@document
def perturb(
    adata: anndata.AnnData | str | Path | Sequence[str | Path],
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
    min_cells: int = 3,
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
    """Change genes in the input of the model, and measure the effect on the embedding or the predicted label of each cell.

    A gene is deleted, inhibited or activated only in cells in which it is a token, that is, within the context length of the
    model. Under torchrun, each process computes a part of the cells, and all processes return the same table.

    Parameters
    ----------
    {adata_or_files}
    {model}
    genes
        List of gene names, or of lists of names to perturb together. None for every gene that a cell expresses, one at a time.
    kind
        "delete": remove the token of the gene. "overexpress": make the gene the first (rank encoding) or give it the largest
        value of the cell (other encodings), even if it was not expressed. "inhibit" and "activate": lower or raise its rank,
        or the quantile of its value, by `quantile`. All kinds except "overexpress" are computed only in cells that express
        all genes that are perturbed together.
    effect_on
        "cell": measure the change of the cell. "genes": measure the change of the hidden vector of every other gene of the
        cell; this needs `genes`, and only the measure "shift" exists.
    combine
        Perturb all combinations of this many of `genes`.
    quantile
        Change of "inhibit" and "activate", as a fraction of the cell's genes (rank encoding) or values (other encodings).
    {positions}
    measure
        Measure by which perturbations are tested and sorted. "shift": 1 - cosine similarity of the embeddings before and
        after. "goal": change of the cosine similarity to the mean embedding of `goal`. "label": change of the log-odds of the
        cell's label in the classifier that `scfm.tl.annotate` uses: the mean over the other labels of log(p / p'), where p is
        the probability of the cell's label and p' that of the other. The label is read from the column `groupby`, or
        predicted without it. None for
        "goal" if there is a `goal`, otherwise "shift".
    center
        Whether to subtract the mean embedding of all cells (perturbed and goal) before cosines are computed. Without it, all
        cosines are close to 1.
    {start_and_goal}
    null_genes
        Genes that are perturbed in the same way, and whose effects are the null distribution of the tests. None: if `genes`
        has fewer than 100 entries, about 100 other genes that are expressed in a similar number of cells, perturbed in at
        most 200 cells; otherwise, each perturbation is tested against all others.
    missing
        What to do with perturbations that are possible in no cell: "report" to return a row with `n_cells` 0 and a `reason`,
        or "error" to raise. If no perturbation is possible, an error is always raised.
    min_cells
        Perturbations with `n_cells` below this come last in the table, because their means are uncertain.
    {n_bootstrap}
    precision
        "fp32", or "bf16" for blocks of the network in bfloat16, which is faster on processors that support it.
    checkpoint
        File in which results are saved after every few thousand perturbed cells. If it exists, the run resumes from it.
    {layer}
    {gene_key}
    {depth_key}
    {uns_key_added}
    {seed}
    {progress}

    Returns
    -------
    One row per perturbation (index `gene`; genes perturbed together are joined by "+"), the largest mean of the chosen
    measure first; for "label" the most negative first. Columns:

    - `symbol`: symbol of the gene; only if the model has Ensembl ids and their symbols
    - `n_cells`: number of cells in which the perturbation was computed
    - `shift_mean`, `shift_std`, `shift_sem`, `shift_low`, `shift_high`: mean over cells, standard deviation, standard error,
      and 95 % bootstrap interval (not with `n_bootstrap` 0) of the shift, which is from 0 (no effect) to 2
    - `goal_shift_...`: the same for the change of the cosine similarity to the goal
    - `label_shift_...`: the same for the change of the log-odds; a table of the measure "label" has no other shifts
    - `excess_...`, `goal_excess_...`, `label_excess_...`: for combinations, the effect minus the sum of the effects of the
      single genes in the same cell
    - `null`: description of the null of the chosen measure; `null_mean`: its mean effect. `attrs["null_genes"]` lists its
      genes, and `attrs["null_means"]` their mean effects.
    - `effect_size`: rank-biserial correlation with the null, from -1 to 1
    - `p_value`: of the rank-sum test; `fdr`: false discovery rate (Benjamini-Hochberg) over the requested genes
    - `reason`: why a perturbation is not possible, empty for the others; only with `genes`

    With ``effect_on="genes"``, one row per perturbation and other gene: `gene`, `affected` (and their symbols as above,
    `symbol` and `affected_symbol`), and the same columns for the shift of the affected gene's hidden vector. An affected gene is tested against all other genes under the same
    perturbation, or, with `null_genes`, against the same gene under the perturbations of `null_genes`.

    Raises
    ------
    VocabularyMismatchError
        If no perturbation is possible, or one is not possible and `missing` is "error".
    LabelsError
        If `groupby`, `start` or `goal` does not exist in `adata.obs`, or a label is not one of the model.
    ModelTaskError
        If `measure` is "label" and the model has no classifier of cells.
    CountsError, EmptyCellError
        If the matrix does not hold raw counts, there are no cells, a cell expresses no gene of the model, or all cells express
        only one gene.
    ValueError
        If arguments contradict each other; the message says which.

    Notes
    -----
    Deletion, overexpression, goal shift and rank-sum tests are those of Geneformer (Theodoris et al. 2023). For the
    measure "label", the log-expression that the linear members of the ensemble read is changed as values of tokens are: a
    deletion sets it to 0, and other counts of the cell stay. Tests treat cells as
    independent; with cells of few donors, p-values are too small.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:4]
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.perturb(adata, model, genes=["CD74", "CST3"], progress=False).index.name
    'gene'
    """
    require_seed(seed)
    if key_added is not None:
        require_adata(adata)
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
        min_cells=min_cells,
        n_bootstrap=n_bootstrap,
        precision=precision,
        checkpoint=checkpoint,
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
