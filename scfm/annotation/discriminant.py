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

    The mean of a class is itself uncertain: the squared distance to the mean of n cells is on average larger by the trace of
    the inverse covariance times the covariance, divided by n, than the squared distance to the mean of the class. Without
    `excess_C`, which is subtracted, classes of few cells would nearly never be predicted.

    Attributes
    ----------
    mean_X, projection_XK
        A cell's coordinates are (features - mean) @ projection.
    center_CK
        Mean coordinates of each class.
    excess_C
        Expected excess of the squared distance to each center.
    """

    mean_X: NDArray[np.float64]
    projection_XK: NDArray[np.float64]
    center_CK: NDArray[np.float64]
    excess_C: NDArray[np.float64]

    @classmethod
    def of(cls, features_BX: NDArray[np.floating], labels_B: NDArray[np.int64]) -> DiscriminantSpace:
        """Learn the space from labeled cells. Classes are numbered 0 to C - 1, and every class must occur."""
        counts_C = np.bincount(labels_B)
        mean_X, scale_X = features_BX.mean(0, dtype=np.float64), np.maximum(features_BX.std(0, dtype=np.float64), 1e-6)
        z_BX = (features_BX - mean_X) / scale_X
        means_CX = np.stack([z_BX[labels_B == label].mean(0) for label in range(len(counts_C))])
        residual_BX = z_BX - means_CX[labels_B]
        residual_BX *= np.sqrt(
            len(labels_B) / max(1, len(labels_B) - len(counts_C))
        )  # means were fitted to the same cells
        covariance_XX, _ = ledoit_wolf(residual_BX, assume_centered=True)
        values_X, vectors_XX = np.linalg.eigh(covariance_XX)
        whitening_XX = vectors_XX / np.sqrt(np.maximum(values_X, 1e-9 * values_X.max(initial=1e-30)))
        between_CX = (means_CX - means_CX.mean(0)) @ whitening_XX
        directions_KX = np.linalg.svd(between_CX, full_matrices=False)[2][: max(1, len(counts_C) - 1)]
        projection_XK = whitening_XX @ directions_KX.T / scale_X[:, None]
        trace = ((residual_BX @ whitening_XX) ** 2).sum() / len(labels_B)
        return cls(mean_X, projection_XK, means_CX @ whitening_XX @ directions_KX.T, trace / counts_C)

    def coordinates(self, features_BX: NDArray[np.floating]) -> NDArray[np.float64]:
        """Coordinates of cells, shape (B, K)."""
        return (features_BX - self.mean_X) @ self.projection_XK

    def log_proba(self, coordinate_BK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-probabilities of Gaussian classes with equal priors, shape (B, C)."""
        # Squared distances to the centers, without the squared length of the cell, which all classes share.
        squared_BC = (self.center_CK**2).sum(1) - 2 * coordinate_BK @ self.center_CK.T
        return log_softmax(0.5 * (self.excess_C - squared_BC), axis=1)

    def linear(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (X, C) and biases (C,) of the linear classifier of features that has the same probabilities."""
        weight_XC = self.projection_XK @ self.center_CK.T
        return weight_XC, 0.5 * (self.excess_C - (self.center_CK**2).sum(1)) - self.mean_X @ weight_XC
