"""The simple methods that every score is compared with.

All of them use log1p of counts per 10,000, are fitted with scikit-learn, and are scored on the same held-out cells as
the model.
"""

# Axes: B cells, G genes, C classes.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import TruncatedSVD
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, recall_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from scfm.data.counts import log_normalize

__all__ = [
    "RowSpace", "annotation_baselines", "expected_calibration_error", "log_normalize", "score_annotation_baselines",
    "score_proba", "scores", "smooth_over_neighbors",
]  # fmt: skip

MAX_ROWS_TO_PROJECT = 4000  # the cost grows with the cube of the rows
COLUMNS_AT_A_TIME = 4096
# Of the mean squared length of a row. The first is above the rounding errors of 4,000 different rows of log-expression.
RELATIVE_JITTERS = (1e-8, 1e-7, 1e-6, 1e-5)


def annotation_baselines(n_cells: int, n_genes: int, seed: int = 0) -> dict[str, Pipeline | DummyClassifier]:
    """Return unfitted baselines for annotation that use only training cells, by their names in a report.

    Parameters
    ----------
    n_cells, n_genes
        Number of training cells and of genes. With fewer than 51 of either the SVD has fewer components; with fewer than 15
        cells there are fewer neighbors.
    seed
        Seed of the SVD.

    Examples
    --------
    >>> import scfm
    >>> "logistic regression" in scfm.baselines.annotation_baselines(n_cells=500, n_genes=2000)
    True
    """
    return {
        "majority class": DummyClassifier(strategy="most_frequent"),
        "logistic regression": make_pipeline(MaxAbsScaler(), RowSpace(), LogisticRegression(max_iter=2000)),
        "logistic regression (balanced)": make_pipeline(MaxAbsScaler(), RowSpace(), _balanced()),
        "SVD-50 + 15 nearest neighbors": make_pipeline(
            _svd(n_cells, n_genes, seed), KNeighborsClassifier(min(15, n_cells))
        ),
    }


class RowSpace(TransformerMixin, BaseEstimator):
    """Project rows to coordinates in the space that the fitted rows span, if there are fewer fitted rows than columns.

    Scalar products between rows do not change, except that those of a row with itself grow by about a part in 10^8. The weights
    of a regression with an L2 penalty lie in this space, so its predictions do not change either, and its solver works on (B, B)
    instead of (B, G) numbers.

    Examples
    --------
    >>> import numpy as np, scfm
    >>> from scipy.sparse import csr_matrix
    >>> rows = csr_matrix(np.arange(12.0).reshape(2, 6) ** 2)
    >>> projected = scfm.baselines.RowSpace().fit_transform(rows)
    >>> projected.shape, np.allclose(projected @ projected.T, (rows @ rows.T).toarray())
    ((2, 2), True)
    """

    def fit(self, rows_BG: sparse.csr_matrix, labels_B: object = None) -> RowSpace:
        self.fit_transform(rows_BG)
        return self

    def fit_transform(self, rows_BG: sparse.csr_matrix, labels_B: object = None) -> Any:
        """Fit, and return what `transform` would, which is known without multiplying again."""
        n_rows, n_columns = rows_BG.shape
        self.rows_BG_: sparse.csr_matrix | None = None
        if n_rows >= min(n_columns, MAX_ROWS_TO_PROJECT):
            return rows_BG
        rows_BG = sparse.csc_matrix(rows_BG)
        self.is_used_G_ = np.diff(rows_BG.indptr) > 0
        self.rows_BG_ = rows_BG[:, self.is_used_G_]
        product_BB = _products(self.rows_BG_, self.rows_BG_)
        self.factor_BB_ = _lower_factor(product_BB)
        return self.factor_BB_

    def transform(self, rows_BG: sparse.csr_matrix) -> Any:
        """Return coordinates, shape (B, R), or the unchanged rows if there were too many fitted rows to project."""
        if self.rows_BG_ is None:
            return rows_BG
        product_NB = _products(sparse.csc_matrix(rows_BG)[:, self.is_used_G_], self.rows_BG_)
        return solve_triangular(self.factor_BB_, product_NB.T, lower=True, check_finite=False).T

    def weights_of_columns(self, weight_CR: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of the original columns, shape (G, C), from weights of coordinates, shape (C, R)."""
        if self.rows_BG_ is None:
            return weight_CR.T
        weight_GC = np.zeros((len(self.is_used_G_), len(weight_CR)))
        weight_BC = solve_triangular(self.factor_BB_, weight_CR.T, trans="T", lower=True, check_finite=False)
        weight_GC[self.is_used_G_] = self.rows_BG_.T @ weight_BC
        return weight_GC


def _lower_factor(product_BB: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Cholesky factor of a matrix of scalar products.

    Equal or dependent rows have none; a small multiple of the identity gives them one. Products that were rounded to float32
    need a larger multiple if many rows are equal, such as cells that occur twice.
    """
    diagonal_B = product_BB.diagonal().copy()
    for jitter in RELATIVE_JITTERS:
        np.fill_diagonal(product_BB, diagonal_B + jitter * diagonal_B.mean() + np.finfo(np.float64).tiny)
        with suppress(LinAlgError):
            return np.asarray(cholesky(product_BB, lower=True, check_finite=False))
    return np.asarray(cholesky(product_BB, lower=True))  # raises


def _products(first_BG: sparse.csc_matrix, second_NG: sparse.csc_matrix) -> NDArray[np.float64]:
    """Scalar products of rows, shape (B, N), by dense blocks of columns: counts are not sparse enough for sparse products."""
    product_BN = np.zeros((first_BG.shape[0], second_NG.shape[0]))
    for start in range(0, first_BG.shape[1], COLUMNS_AT_A_TIME):
        block = slice(start, start + COLUMNS_AT_A_TIME)
        first = first_BG[:, block].toarray()
        second = (
            first if second_NG is first_BG else second_NG[:, block].toarray()
        )  # NumPy then computes one triangle only
        product_BN += first @ second.T
    return product_BN


def _balanced() -> LogisticRegression:
    return LogisticRegression(class_weight="balanced", max_iter=2000)


def _svd(n_cells: int, n_genes: int, seed: int) -> TruncatedSVD:
    return TruncatedSVD(max(1, min(50, n_genes - 1, n_cells - 1)), random_state=seed)


def scores(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Return accuracy, macro-averaged F1 over the classes in `truth`, and balanced accuracy.

    Parameters
    ----------
    truth, predicted
        True and predicted labels of the same cells, shape (B,) each.

    Examples
    --------
    >>> import scfm
    >>> scfm.baselines.scores(["B", "B", "T", "T"], ["B", "B", "B", "T"])["accuracy"]
    0.75
    """
    labels = sorted(set(truth))
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=labels, average="macro", zero_division=0)),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=labels, average="macro", zero_division=0)),
    }


def score_annotation_baselines(
    expression_BG: sparse.csr_matrix,
    names: NDArray[np.str_],
    codes_B: NDArray[np.int64],
    *,
    learn: NDArray[np.int64],
    test: NDArray[np.int64],
    seed: int = 0,
) -> pd.DataFrame:
    """Fit every baseline on the cells `learn`, and score it on the cells `test`.

    Parameters
    ----------
    expression_BG
        log1p of counts per 10,000 of all cells, labeled or not.
    names, codes_B
        Class names, and the class of each cell, -1 for an unlabeled cell.
    learn, test
        Rows of the training and of the test cells.
    seed
        Seed of the decompositions.

    Returns
    -------
    One row per method: its scores, its expected calibration error, and the setting, "transductive" if components were
    fitted on all cells including the test cells, otherwise "inductive".
    """
    n_cells, n_genes = expression_BG.shape
    rows = {}
    learn_BG, test_BG = expression_BG[learn], expression_BG[test]
    space = make_pipeline(MaxAbsScaler(), RowSpace())
    learn_BR, test_BR = space.fit_transform(learn_BG), space.transform(test_BG)
    for name, baseline in annotation_baselines(len(learn), n_genes, seed=seed).items():
        if isinstance(baseline, Pipeline) and isinstance(baseline[-2], RowSpace):  # the same space for both regressions
            scored = _scored(baseline[-1].fit(learn_BR, codes_B[learn]), test_BR, names, codes_B[test])
        else:
            scored = _scored(baseline.fit(learn_BG, codes_B[learn]), test_BG, names, codes_B[test])
        rows[name] = {"setting": "inductive", **scored}
    components_BR = _svd(n_cells, n_genes, seed).fit_transform(expression_BG)
    regression = make_pipeline(StandardScaler(), _balanced()).fit(components_BR[learn], codes_B[learn])
    scored = _scored(regression, components_BR[test], names, codes_B[test])
    rows["SVD-50 of all cells + logistic regression (balanced)"] = {"setting": "transductive", **scored}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _scored(baseline: Any, test_BX: Any, names: NDArray[np.str_], codes_B: NDArray[np.int64]) -> dict[str, float]:
    proba_BC = np.zeros((len(codes_B), len(names)))
    proba_BC[:, baseline.classes_] = baseline.predict_proba(test_BX)
    return score_proba(proba_BC, names, codes_B)


def score_proba(
    proba_BC: NDArray[np.floating], names: NDArray[np.str_], codes_B: NDArray[np.int64]
) -> dict[str, float]:
    """Return `scores` of the most probable classes, and the expected calibration error.

    Parameters
    ----------
    proba_BC
        Probability of each class, shape (B, C).
    names
        Class names, shape (C,).
    codes_B
        True class of each cell, shape (B,).
    """
    predicted_B = proba_BC.argmax(1)
    error = expected_calibration_error(proba_BC.max(1), predicted_B == codes_B)
    return {**scores(list(names[codes_B]), list(names[predicted_B])), "ece": error}


def expected_calibration_error(
    confidence_B: NDArray[np.floating], right_B: NDArray[np.bool_], n_bins: int = 10
) -> float:
    """Return the expected calibration error (Guo et al. 2017).

    It is the absolute difference between mean confidence and accuracy in each bin of confidence, averaged over cells.

    Parameters
    ----------
    confidence_B
        Probability of the predicted class, shape (B,).
    right_B
        Whether the prediction is right, shape (B,), bool.
    n_bins
        Number of bins of equal width.
    """
    bin_B = np.minimum((confidence_B * n_bins).astype(int), n_bins - 1)
    gaps = [
        abs(right_B[bin_B == index].mean() - confidence_B[bin_B == index].mean()) * (bin_B == index).mean()
        for index in np.unique(bin_B)
    ]
    return float(sum(gaps))


def smooth_over_neighbors(expression_BG: sparse.csr_matrix, n_neighbors: int, seed: int = 0) -> NDArray[np.float32]:
    """Return the mean log-expression of each cell and its nearest neighbors on 50 components, dense, shape (B, G)."""
    n_cells, n_genes = expression_BG.shape
    n_neighbors = min(n_neighbors, n_cells)
    components_BR = _svd(n_cells, n_genes, seed).fit_transform(expression_BG)
    graph_BB = NearestNeighbors(n_neighbors=n_neighbors).fit(components_BR).kneighbors_graph(components_BR)
    return np.asarray((graph_BB @ expression_BG).toarray() / n_neighbors, dtype=np.float32)
