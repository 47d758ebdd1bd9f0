"""Linear probes: balanced logistic regressions on a frozen representation of cells."""

# Axes: B cells, X inputs of a regression, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from scfm.models.network import CellTransformer

INVERSE_PENALTY = 0.01  # scikit-learn's C


def balanced_regression() -> LogisticRegression:
    """Return the unfitted regression of a probe, with balanced classes and a strong L2 penalty."""
    return LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=2000)


def standardized(features_BX: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scale each column to mean 0 and standard deviation 1, shape (B, X), float64."""
    return StandardScaler().fit_transform(features_BX.astype(np.float64))


def balanced_rows(labels_B: NDArray[np.int64], n_rows: int, seed: int) -> NDArray[np.int64]:
    """Return at most `n_rows` random rows, ascending, with numbers of cells per class that are as equal as possible."""
    order = np.random.default_rng(seed).permutation(len(labels_B))
    shuffled_B = labels_B[order]
    by_class = np.argsort(shuffled_B, kind="stable")
    number_B = np.empty(len(labels_B), dtype=np.int64)  # running number of each cell within its class
    number_B[by_class] = np.arange(len(labels_B)) - np.searchsorted(shuffled_B[by_class], shuffled_B[by_class])
    return np.sort(order[np.argsort(number_B, kind="stable")[:n_rows]])


def softmax_weights(regression: LogisticRegression) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights (C, X) and biases (C,) for a softmax. For two classes, scikit-learn stores only one row."""
    weight_CX, bias_C = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:
        weight_CX, bias_C = np.vstack([-weight_CX, weight_CX]) / 2, np.concatenate([-bias_C, bias_C]) / 2
    return weight_CX, bias_C


def start_from_probe(network: CellTransformer, features_BX: NDArray[np.float32], labels_B: NDArray[np.int64]) -> None:
    """Fit a probe on frozen features and copy it into the class head.

    Fine-tuning from a random head would first distort the pretrained features; a head that starts from a probe avoids this
    (LP-FT, Kumar et al. 2022, arXiv:2202.10054).

    Parameters
    ----------
    network
        A network with a class head of kind "batch_norm"; changed in place.
    features_BX
        Inputs of the head for the training cells, shape (B, X), float32.
    labels_B
        Classes of these cells, shape (B,), int64. Every class of the head must occur.
    """
    head = network.class_head
    head.set_statistics(torch.from_numpy(features_BX))
    weight_CX, bias_C = softmax_weights(balanced_regression().fit(standardized(features_BX), labels_B))
    head.set_linear_probe(torch.from_numpy(weight_CX), torch.from_numpy(bias_C))


def probe_probabilities(
    train_BX: NDArray[np.floating], labels_B: NDArray[np.int64], test_BX: NDArray[np.floating], n_classes: int
) -> NDArray[np.float64]:
    """Fit a probe on training features and return class probabilities of the test features, shape (B, C)."""
    scaler = StandardScaler().fit(train_BX.astype(np.float64))
    regression = balanced_regression().fit(scaler.transform(train_BX.astype(np.float64)), labels_B)
    proba_BC = np.zeros((len(test_BX), n_classes))
    proba_BC[:, regression.classes_] = regression.predict_proba(scaler.transform(test_BX.astype(np.float64)))
    return proba_BC
