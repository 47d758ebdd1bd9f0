"""The gene classifier: three linear classifiers of gene expression that form an ensemble with the transformer.

One is a regression on principal components of the most variable genes, which needs few labels. The other two need more labels
and are more accurate on cells of another study or condition: a regression on all genes, and linear discriminant analysis of
the components.
"""

# Axes: B cells, V tokens of the vocabulary, R components, C classes.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from scfm.annotation.discriminant import DiscriminantSpace
from scfm.annotation.probe import balanced_rows, softmax_weights
from scfm.baselines import RowSpace
from scfm.nn.class_heads import MAX_SCALED

NUMBERS_OF_COMPONENTS = (25, 50, 100)  # candidates of the cross-validation
N_FOLDS = 3  # of this cross-validation
MAX_CELLS_FOR_GENES = 4000  # labeled cells for the regression on all genes
N_DISPERSED = 2000  # number of genes that the components use
# scikit-learn's C. The one of all genes corresponds to C = 1 for values that are scaled to a maximum of 1.
INVERSE_PENALTY_OF_COMPONENTS, INVERSE_PENALTY_OF_GENES = 0.1, 1 / MAX_SCALED**2


@dataclass(frozen=True, eq=False)
class LinearMember:
    """A linear classifier of scaled expression: weights (V, C) and biases (C,)."""

    weight_VC: NDArray[np.float64]
    bias_C: NDArray[np.float64]

    def logits(self, scaled_BV: sparse.csr_matrix) -> NDArray[np.float64]:
        """Logits, shape (B, C)."""
        return scaled_BV @ self.weight_VC + self.bias_C


class GeneMembers:
    """Inputs of the linear members, computed once, so that they can be fitted to several sets of labeled cells.

    Parameters
    ----------
    scaled_BV
        Scaled expression of all cells to learn from, labeled or not, shape (B, V).
    labels_B
        Classes of these cells, shape (B,), int64; -1 for unlabeled cells.
    importance_V
        Factor of each scaled gene in the components, shape (V,); 0 for genes that are not used.
    is_fitted_B
        Whether a cell is used to fit the components, shape (B,), bool.
    seed
        Seed of the principal components and of the cross-validation folds.
    """

    def __init__(
        self,
        scaled_BV: sparse.csr_matrix,
        labels_B: NDArray[np.int64],
        importance_V: NDArray[np.float64],
        is_fitted_B: NDArray[np.bool_],
        *,
        seed: int = 0,
    ) -> None:
        self.labels_B, self.seed = labels_B, seed
        chosen = np.flatnonzero(importance_V)
        part_BG = (scaled_BV[:, chosen] @ sparse.diags_array(importance_V[chosen])).tocsr()
        n_components = min(NUMBERS_OF_COMPONENTS[-1], int(is_fitted_B.sum()) - 1, len(chosen) - 1)
        svd = TruncatedSVD(max(1, n_components), random_state=seed).fit(part_BG[is_fitted_B])
        component_BR = svd.transform(part_BG)
        self.mean_R = component_BR[is_fitted_B].mean(0)
        spread_BR = component_BR[is_fitted_B] - self.mean_R
        self.scale = max(float(np.sqrt((spread_BR**2).mean())), 1e-12)
        self.component_BR = (component_BR - self.mean_R) / self.scale
        self.loading_RV = np.zeros((component_BR.shape[1], scaled_BV.shape[1]))
        self.loading_RV[:, chosen] = svd.components_ * importance_V[chosen]
        labeled = np.flatnonzero(labels_B >= 0)
        self.rows_of_genes = labeled[balanced_rows(labels_B[labeled], MAX_CELLS_FOR_GENES, seed)]
        # The space may contain more cells than a regression: with an L2 penalty, its result depends on its own cells only.
        self.space = RowSpace()
        self.coordinate_NR = self.space.fit_transform(scaled_BV[self.rows_of_genes])

    def fit_components(self, rows: NDArray[np.int64]) -> LinearMember:
        """Fit the regression on the number of components that predicts labels best in cross-validation.

        Components are not standardized, so the penalty acts mostly on components of small variance.
        """
        labels_B = self.labels_B[rows]
        n_components = choose_n_components(self.component_BR[rows], labels_B, self.seed)
        read_BR = self.component_BR[rows, :n_components]
        weight_CR, bias_C = softmax_weights(_regression(INVERSE_PENALTY_OF_COMPONENTS).fit(read_BR, labels_B))
        return self._of_components(weight_CR, bias_C)

    def fit_discriminant(self, rows: NDArray[np.int64]) -> LinearMember:
        """Fit linear discriminant analysis of all components."""
        classes, labels_B = np.unique(self.labels_B[rows], return_inverse=True)
        assert len(classes) == classes[-1] + 1  # every class has training cells
        weight_RC, bias_C = DiscriminantSpace.of(self.component_BR[rows], labels_B).linear()
        return self._of_components(weight_RC.T, bias_C)

    def fit(self, rows: NDArray[np.int64]) -> list[LinearMember]:
        """Fit all linear members, in the order of `scfm.annotation.ensemble.SHARES`."""
        return [self.fit_components(rows), self.fit_genes(rows), self.fit_discriminant(rows)]

    def _of_components(self, weight_CR: NDArray[np.float64], bias_C: NDArray[np.float64]) -> LinearMember:
        """Return the classifier of scaled expression that equals a classifier of the first components."""
        n_components, weight_CR = weight_CR.shape[1], weight_CR / self.scale
        bias_C = bias_C - weight_CR @ self.mean_R[:n_components]
        return LinearMember((weight_CR @ self.loading_RV[:n_components]).T, bias_C)

    def fit_genes(self, rows: NDArray[np.int64]) -> LinearMember:
        """Fit the regression on all genes, with at most `MAX_CELLS_FOR_GENES` cells."""
        takes_part_N = np.isin(self.rows_of_genes, rows)
        regression = _regression(INVERSE_PENALTY_OF_GENES)
        regression.fit(self.coordinate_NR[takes_part_N], self.labels_B[self.rows_of_genes[takes_part_N]])
        weight_CR, bias_C = softmax_weights(regression)
        return LinearMember(self.space.weights_of_columns(weight_CR), bias_C)


@dataclass(frozen=True, eq=False)
class ExpressionComponents:
    """Principal components of log-expression that were fitted on some cells.

    Attributes
    ----------
    chosen
        Tokens of the genes that count, shape (G,).
    factor_G, limit_G
        Factor of each gene, and the value at which it is clipped.
    svd
        The fitted decomposition.
    """

    chosen: NDArray[np.int64]
    factor_G: NDArray[np.float64]
    limit_G: NDArray[np.float64]
    svd: TruncatedSVD

    @classmethod
    def of(
        cls, fitted_BV: sparse.csr_matrix, *, n_components: int = NUMBERS_OF_COMPONENTS[-1], seed: int = 0
    ) -> ExpressionComponents:
        scale_V = max_scales(fitted_BV)
        importance_V = component_importance(fitted_BV, scale_V)
        chosen = np.flatnonzero(importance_V)
        components = cls(
            chosen,
            scale_V[chosen] * importance_V[chosen],
            MAX_SCALED * importance_V[chosen],
            TruncatedSVD(max(1, min(n_components, fitted_BV.shape[0] - 1, len(chosen) - 1)), random_state=seed),
        )
        components.svd.fit(components._scaled(fitted_BV))
        return components

    def transform(self, expression_BV: sparse.csr_matrix) -> NDArray[np.float64]:
        """Return the components of cells, shape (B, R)."""
        components_BR: NDArray[np.float64] = self.svd.transform(self._scaled(expression_BV))
        return components_BR

    def _scaled(self, expression_BV: sparse.csr_matrix) -> sparse.csr_matrix:
        scaled_BG = (expression_BV[:, self.chosen] @ sparse.diags_array(self.factor_G)).tocsr()
        scaled_BG.data = np.minimum(scaled_BG.data, self.limit_G[scaled_BG.indices])
        return scaled_BG


def expression_components(
    fitted_BV: sparse.csr_matrix,
    *others: sparse.csr_matrix,
    n_components: int = NUMBERS_OF_COMPONENTS[-1],
    seed: int = 0,
) -> list[NDArray[np.float64]]:
    """Return principal components of log-expression of sets of cells, fitted on the first, shapes (B, R)."""
    components = ExpressionComponents.of(fitted_BV, n_components=n_components, seed=seed)
    return [components.transform(expression_BV) for expression_BV in (fitted_BV, *others)]


def max_scales(expression_BV: sparse.csr_matrix) -> NDArray[np.float64]:
    """Return `MAX_SCALED` / maximum of each gene, 0 for a gene without counts, shape (V,).

    The classifier clips scaled values at `MAX_SCALED`, so a gene cannot count more in a new cell than in the cells that the
    scale was computed from. Without this, genes that respond to an unseen condition would dominate the prediction.
    """
    max_V = expression_BV.max(0).toarray().ravel().astype(np.float64)
    return np.divide(MAX_SCALED, max_V, out=np.zeros_like(max_V), where=max_V > 0)


def component_importance(expression_BV: sparse.csr_matrix, scale_V: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / sqrt(standard deviation of scaled values) for the `N_DISPERSED` most dispersed genes, and 0 for others.

    With 1 / standard deviation, weakly expressed genes would have as much influence as strongly expressed ones, and the
    components would predict cells of another condition less well.
    """
    root_V = np.sqrt(gene_scales(expression_BV))
    return np.divide(root_V, scale_V, out=np.zeros_like(root_V), where=scale_V > 0)


def gene_scales(expression_BV: sparse.csr_matrix) -> NDArray[np.float64]:
    """Return 1 / standard deviation for the `N_DISPERSED` most dispersed genes and 0 for the others, shape (V,).

    Dispersion is the variance of counts per 10,000 divided by their mean; the standard deviation is that of their log1p.
    """
    counts_BV = expression_BV.copy()
    counts_BV.data = np.expm1(counts_BV.data)
    mean_V, variance_V = _moments(counts_BV)
    dispersion_V = np.divide(variance_V, mean_V, out=np.zeros_like(mean_V), where=mean_V > 0)
    chosen = np.argsort(-dispersion_V, kind="stable")[:N_DISPERSED]
    deviation_V = np.sqrt(_moments(expression_BV)[1])
    scale_V = np.zeros(expression_BV.shape[1])
    scale_V[chosen] = np.divide(1, deviation_V[chosen], out=np.zeros(len(chosen)), where=deviation_V[chosen] > 0)
    return scale_V


def choose_n_components(component_BR: NDArray[np.float64], labels_B: NDArray[np.int64], seed: int) -> int:
    """Return the number of leading components with the largest class-balanced log-likelihood in cross-validation.

    Parallel analysis, which does not use labels, chooses about ten components for a thousand cells. These predict cells of
    another condition much worse than a hundred components.
    """
    counts_C = np.bincount(labels_B)
    often_B = counts_C[labels_B] >= N_FOLDS
    sizes = [size for size in NUMBERS_OF_COMPONENTS if size < component_BR.shape[1]] + [component_BR.shape[1]]
    if len(np.unique(labels_B[often_B])) < 2:
        return sizes[0]
    read_BR, labels_B = component_BR[often_B], labels_B[often_B]
    weight_B = 1 / counts_C[labels_B]
    folds = list(StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(read_BR, labels_B))
    likelihoods = []
    for size in sizes:
        total = 0.0
        for train, test in folds:
            regression = _regression(INVERSE_PENALTY_OF_COMPONENTS).fit(read_BR[train, :size], labels_B[train])
            column_B = np.searchsorted(regression.classes_, labels_B[test])
            log_proba_BC = regression.predict_log_proba(read_BR[test, :size])
            total += float(weight_B[test] @ log_proba_BC[np.arange(len(test)), column_B])
        likelihoods.append(total)
    return sizes[int(np.argmax(likelihoods))]


def _regression(inverse_penalty: float) -> LogisticRegression:
    return LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=2000)


def _moments(matrix_BV: sparse.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each column."""
    matrix_BV = matrix_BV.astype(np.float64)
    mean_V = np.asarray(matrix_BV.mean(0)).ravel()
    mean_square_V = np.asarray(matrix_BV.multiply(matrix_BV).mean(0)).ravel()
    return mean_V, np.maximum(mean_square_V - mean_V**2, 0)
