"""Agreement of a gene ranking with known genes or effects, compared with simple rankings and with chance."""

# Axes: B cells, G genes of the table that the data have, K components, R permutations.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data.columns import groups
from scfm.errors import LabelsError, VocabularyMismatchError
from scfm.perturbation.prediction.measured import log_expression
from scfm.perturbation.statistics import average_ranks

MODEL = "scfm"


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
    """Scores of a ranking and of simple rankings; `scfm.tl.evaluate_perturbation` explains them."""
    scores = pd.DataFrame({MODEL: _importance(table)})
    if adata is not None:
        expression_BG, names, _ = log_expression(adata, layer=layer, gene_key=gene_key, depth_key=depth_key)
        shared = [gene for gene in scores.index if gene in set(names)]
        columns = pd.Index(names).get_indexer_for(shared)
        in_group_B = _members(adata, groupby, group)
        baselines = simple_rankings(
            expression_BG[:, columns].toarray(), in_group_B, n_components=n_components, seed=seed
        )
        scores = scores.loc[shared].assign(**baselines)
    wanted, measure = _truth(truth, scores.index)
    scores, truth_G = scores.loc[wanted.index], wanted.to_numpy()
    rng = np.random.default_rng(seed)
    shuffled_RG = np.stack([rng.permutation(truth_G) for _ in range(n_permutations)])
    agreement = _auc if measure == "auc" else _spearman
    lines = {}
    for name, score_G in scores.items():
        rank_G, _ = average_ranks(score_G.to_numpy())
        found, null_R = agreement(rank_G, truth_G[None])[0], agreement(rank_G, shuffled_RG)
        low, high = np.quantile(null_R, [0.025, 0.975])
        p_value = (1 + (null_R >= found).sum()) / (1 + n_permutations)
        lines[name] = {measure: found, "null_low": low, "null_high": high, "p_value": p_value}
        if measure == "auc":
            first = np.argsort(-rank_G, kind="stable")[: int(truth_G.sum())]
            lines[name] = {measure: found, "precision": truth_G[first].mean(), **lines[name]}
    result = pd.DataFrame(lines).T.rename_axis("method")
    return result.assign(n_genes=len(truth_G), n_truth=int((truth_G > 0).sum()) if measure == "auc" else len(truth_G))


def simple_rankings(
    expression_BG: NDArray[np.floating], in_group_B: NDArray[np.bool_], *, n_components: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Return the importance of each gene by methods without a transformer, by name of the method; shape (G,) each.

    "expression rank" is the mean expression in the group. The other two need cells outside the group. "differential
    expression" is the t statistic of the group against the other cells. "linear map on components" is a logistic regression
    on principal components that predicts the group; the importance of a gene is the mean contribution of its expression to
    the log-odds in the group's cells.
    """
    own_BG, rest_BG = expression_BG[in_group_B], expression_BG[~in_group_B]
    found = {"expression rank": own_BG.mean(0, dtype=np.float64)}
    if len(rest_BG) < 2 or len(own_BG) < 2:
        return found
    from scipy import stats  # takes half a second, like scikit-learn, which other functions of the package do not need
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    with np.errstate(invalid="ignore", divide="ignore"):
        t_G = stats.ttest_ind(own_BG, rest_BG, equal_var=False).statistic
    found["differential expression"] = np.nan_to_num(np.asarray(t_G, dtype=np.float64))
    n_components = min(n_components, *(size - 1 for size in expression_BG.shape))
    components = PCA(n_components, random_state=seed).fit(expression_BG)
    scores_BK = components.transform(expression_BG)
    scale_K = scores_BK.std(0)
    fitted = LogisticRegression(class_weight="balanced", max_iter=1000).fit(scores_BK / scale_K, in_group_B)
    weight_G = (fitted.coef_[0] / scale_K) @ components.components_
    found["linear map on components"] = weight_G * own_BG.mean(0, dtype=np.float64)
    return found


def _importance(table: pd.DataFrame) -> pd.Series:
    """Importance of each gene in a table of `perturb` or `screen`: its mean effect, with the sign that ranks it."""
    if "affected" in table:
        raise ValueError(
            '`table` has a row for each pair of genes (`effect_on="genes"`), so it does not rank genes; pass one of '
            '`effect_on="cell"`.'
        )
    for measure, sign in (("label_shift", -1), ("goal_shift", 1), ("shift", 1)):
        if f"{measure}_mean" in table:
            return sign * table[f"{measure}_mean"].dropna()
    raise ValueError(
        "`table` has none of the columns label_shift_mean, goal_shift_mean and shift_mean; pass what `scfm.tl.perturb` or "
        "`scfm.tl.screen` returned."
    )


def _members(adata: anndata.AnnData, groupby: str | None, group: str | None) -> NDArray[np.bool_]:
    if (groupby is None) != (group is None):
        raise LabelsError("`groupby` and `group` go together: the column, and the value whose cells were perturbed.")
    if groupby is None:
        return np.ones(adata.n_obs, dtype=bool)
    labels = groups(adata.obs, groupby, argument="groupby")
    if group not in labels.names:
        raise LabelsError(
            f"`group` is {group!r}, but no cell has this value in `adata.obs[{groupby!r}]`. Its values: "
            f"{', '.join(map(repr, labels.names[:10]))}."
        )
    return labels.codes == labels.names.index(group)


def _truth(truth: Sequence[str] | Mapping[str, float] | pd.Series, genes: pd.Index) -> tuple[pd.Series, str]:
    """Return 1 or 0, or the rank of the effect, for each gene that can be scored, and the name of the score."""
    if isinstance(truth, str):
        raise ValueError(f"`truth` is the text {truth!r}; pass a list of markers, or measured effects by gene.")
    if isinstance(truth, Mapping | pd.Series):
        effects = pd.Series(truth, dtype=float).reindex(genes).dropna()
        if len(effects) < 3:
            raise VocabularyMismatchError(
                f"{len(effects)} genes of the table have a measured effect; at least 3 are needed."
            )
        return effects.rank(), "spearman"
    markers = list(truth)
    is_marker = pd.Series(genes.isin(markers).astype(float), genes)
    if not 0 < is_marker.sum() < len(genes):
        raise VocabularyMismatchError(
            f"{int(is_marker.sum())} of the {len(markers)} markers are among the {len(genes)} ranked genes; there must be "
            "markers and other genes."
        )
    return is_marker, "auc"


def _auc(rank_G: NDArray[np.float64], is_marker_RG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability that a marker is ranked above a gene that is not a marker, for each set of markers, shape (R,)."""
    n_R = is_marker_RG.sum(1)
    return (is_marker_RG @ rank_G - n_R * (n_R + 1) / 2) / (n_R * (len(rank_G) - n_R))


def _spearman(rank_G: NDArray[np.float64], effect_RG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation with each ranking of effects, shape (R,)."""
    rank_G, effect_RG = rank_G - rank_G.mean(), effect_RG - effect_RG.mean(1, keepdims=True)
    return effect_RG @ rank_G / np.maximum(np.linalg.norm(effect_RG, axis=1) * np.linalg.norm(rank_G), 1e-300)
