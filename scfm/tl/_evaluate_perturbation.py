"""`scfm.tl.evaluate_perturbation`: agreement of a ranking of genes with markers or measured effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anndata
import pandas as pd

from scfm import perturbation
from scfm._config import require_seed
from scfm._docs import document


@document
def evaluate_perturbation(
    table: pd.DataFrame,
    truth: Sequence[str] | Mapping[str, float] | pd.Series,
    adata: anndata.AnnData | None = None,
    *,
    groupby: str | None = None,
    group: str | None = None,
    n_components: int = 50,
    n_permutations: int = 1000,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the order of genes in a table of perturbations, and in simple rankings, with markers or measured effects.

    Parameters
    ----------
    table
        Table from `scfm.tl.perturb` (not with ``effect_on="genes"``) or `scfm.tl.screen`. Genes are ranked by
        `label_shift_mean` (the lowest first), `goal_shift_mean` or `shift_mean`: the first of these columns that exists.
    truth
        A list of marker genes of the cells, or the measured effect of each gene. Markers, or genes with large effects, should
        be ranked first.
    adata
        AnnData with raw counts for the simple methods. Markers should not have been found in these cells, which would favor
        differential expression. None to score only the table.
    groupby, group
        Column of `adata.obs`, and its value for the cells that were perturbed. None for all cells; methods that need other
        cells for comparison are then omitted.
    n_components
        Number of principal components of the linear map.
    n_permutations
        Number of random permutations of the truth among the genes.
    {layer}
    {gene_key}
    {depth_key}
    {seed}

    Returns
    -------
    One row per method (index `method`): "scfm", "expression rank" (mean expression in the group), "differential expression"
    (Welch's t against the other cells) and "linear map on components" (contribution of a gene to the log-odds of the group in
    a logistic regression on principal components). Columns:

    - `auc`, the probability that a marker is ranked above another gene, or `spearman`, the rank correlation with effects
    - `precision`, for markers only: the fraction of markers among the first genes, as many genes as there are markers
    - `null_low`, `null_high`: central 95 % of the scores of permutations
    - `p_value`: (1 + number of permutations that score at least as high) / (1 + `n_permutations`), one-sided
    - `n_genes`, `n_truth`: number of ranked genes, and of markers or effects among them

    All methods rank the same genes.

    Raises
    ------
    ValueError
        If `table` does not rank genes, or `truth` is a string.
    VocabularyMismatchError
        If all or none of the ranked genes are markers, or fewer than three have a measured effect.
    LabelsError
        If only one of `groupby` and `group` is given, or they do not exist in `adata.obs`.
    CountsError
        If `adata` does not hold raw counts.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, labels_key="bulk_labels", config=scfm.FitConfig(n_steps=2), progress=False)
    >>> b_cells = adata[adata.obs["bulk_labels"] == "CD19+ B"][:4]
    >>> table = scfm.tl.screen(b_cells, model, measure="label", n_verify=5, progress=False)
    >>> scores = scfm.tl.evaluate_perturbation(
    ...     table, ["CD79A", "CD79B", "CD74"], adata, groupby="bulk_labels", group="CD19+ B", n_permutations=100
    ... )
    >>> list(scores.index)
    ['scfm', 'expression rank', 'differential expression', 'linear map on components']
    """
    require_seed(seed)
    return perturbation.evaluate_perturbation(
        table,
        truth,
        adata,
        groupby=groupby,
        group=group,
        n_components=n_components,
        n_permutations=n_permutations,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
        seed=seed,
    )
