"""The simple methods that every score is held against.

All of them see log1p counts per 10,000, are fitted on the training cells with scikit-learn, and are scored on the
same held-out cells as the model.
"""

# Axes: B cells, G genes, C classes.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

TARGET_SUM = 1e4


def log_normalize(counts_BG: sparse.csr_matrix, depth_B: NDArray[np.floating] | None = None) -> sparse.csr_matrix:
    """log1p of counts per 10,000, shape (B, G), float32; `depth_B` replaces the row sums where the matrix is a part."""
    counts_BG = sparse.csr_matrix(counts_BG, dtype=np.float32, copy=True)
    depth_B = np.asarray(counts_BG.sum(1)).ravel() if depth_B is None else np.asarray(depth_B, dtype=np.float64)
    scale_B = TARGET_SUM / np.maximum(depth_B, 1e-12)
    counts_BG.data *= np.repeat(scale_B, np.diff(counts_BG.indptr)).astype(np.float32)
    np.log1p(counts_BG.data, out=counts_BG.data)
    return counts_BG


def annotation_baselines(n_cells: int, n_genes: int, seed: int = 0) -> dict[str, Pipeline | DummyClassifier]:
    """Unfitted baselines for annotation, by the name they carry in a report."""
    n_components = max(1, min(50, n_genes - 1, n_cells - 1))

    def svd() -> TruncatedSVD:
        return TruncatedSVD(n_components, random_state=seed)

    def balanced() -> LogisticRegression:
        return LogisticRegression(class_weight="balanced", max_iter=2000)

    return {
        "majority class": DummyClassifier(strategy="most_frequent"),
        "logistic regression (balanced)": make_pipeline(MaxAbsScaler(), balanced()),
        "SVD-50 + logistic regression (balanced)": make_pipeline(svd(), StandardScaler(), balanced()),
        "SVD-50 + 15 nearest neighbours": make_pipeline(svd(), KNeighborsClassifier(min(15, n_cells))),
    }


def scores(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro-averaged F1 over the classes that occur in `truth`, and balanced accuracy."""
    labels = sorted(set(truth))
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=labels, average="macro", zero_division=0)),
        "balanced_accuracy": float(
            np.mean([np.mean(np.asarray(predicted)[np.asarray(truth) == c] == c) for c in labels])
        ),
    }


def score_annotation_baselines(
    train_BG: sparse.csr_matrix,
    train_labels: Sequence[str],
    test_BG: sparse.csr_matrix,
    test_labels: Sequence[str],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit every baseline on log-normalised training cells and score it on the test cells, a row each."""
    rows = {}
    for name, baseline in annotation_baselines(*train_BG.shape, seed=seed).items():
        baseline.fit(train_BG, train_labels)
        rows[name] = scores(test_labels, baseline.predict(test_BG))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
