"""Shrinkage discriminant analysis of labeled cells: a supervised space in which to compare cells."""

# Axes: B cells, X features, K directions, C classes.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf


@dataclass(frozen=True, eq=False)
class DiscriminantSpace:
    """Directions in which classes differ, in units of the standard deviation within classes.

    This is linear discriminant analysis with equal class priors. The covariance within classes is shrunk by the method of
    Ledoit and Wolf (2004). C classes have at most C - 1 directions.

    Attributes
    ----------
    mean_X, projection_XK
        A cell's coordinates are (features - mean) @ projection.
    center_CK
        Mean coordinates of each class.
    """

    mean_X: NDArray[np.float64]
    projection_XK: NDArray[np.float64]
    center_CK: NDArray[np.float64]

    @classmethod
    def of(cls, features_BX: NDArray[np.floating], labels_B: NDArray[np.int64]) -> DiscriminantSpace:
        """Learn the space from labeled cells. Classes are numbered 0 to C - 1, and every class must occur."""
        counts_C = np.bincount(labels_B)
        mean_X, scale_X = features_BX.mean(0, dtype=np.float64), np.maximum(features_BX.std(0, dtype=np.float64), 1e-6)
        z_BX = (features_BX - mean_X) / scale_X
        means_CX = np.stack([z_BX[labels_B == label].mean(0) for label in range(len(counts_C))])
        covariance_XX, _ = ledoit_wolf(z_BX - means_CX[labels_B], assume_centered=True)
        values_X, vectors_XX = np.linalg.eigh(covariance_XX)
        whitening_XX = vectors_XX / np.sqrt(np.maximum(values_X, 1e-9 * values_X.max(initial=1e-30)))
        between_CX = (means_CX - means_CX.mean(0)) @ whitening_XX
        directions_KX = np.linalg.svd(between_CX, full_matrices=False)[2][: max(1, len(counts_C) - 1)]
        projection_XK = whitening_XX @ directions_KX.T / scale_X[:, None]
        return cls(mean_X, projection_XK, means_CX @ whitening_XX @ directions_KX.T)

    def coordinates(self, features_BX: NDArray[np.floating]) -> NDArray[np.float64]:
        """Coordinates of cells, shape (B, K)."""
        return (features_BX - self.mean_X) @ self.projection_XK

    def log_proba(self, coordinate_BK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-probabilities of Gaussian classes with equal priors, shape (B, C)."""
        squared_BC = ((coordinate_BK[:, None] - self.center_CK) ** 2).sum(2)
        return log_softmax(-0.5 * squared_BC, axis=1)
