"""Fit the novelty score, of cells and of groups of similar cells, and thresholds that 95 % of the known cells do not exceed."""

# Axes: B cells, V tokens of the vocabulary, R components, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors

from scfm.nn.novelty import KINDS, ClassGaussians

N_COMPONENTS = 30
KEPT_FRACTION = 0.95  # fraction of the cells of known classes with a score up to the threshold
MIN_CELLS = 10  # with fewer calibration cells there is no threshold
N_NEIGHBORS = 15  # size of a group of similar cells
MAX_NEIGHBORS_FROM = 20_000  # cells among which neighbors are searched
MIN_CELLS_OF_GROUPS = 2 * N_NEIGHBORS  # with fewer calibration cells, groups have no threshold
MIN_CELLS_OF_CLASS = 5  # for a class to count in what all classes have in common
PRIOR_CELLS = 10  # number of cells of a class that weigh as much as all classes together in the scale of its distances


@torch.no_grad()
def fit_gaussians(
    gaussians: ClassGaussians,
    *,
    expression_BV: sparse.csr_matrix,
    labels_B: NDArray[np.int64],
    loading_VR: NDArray[np.float64],
    genes: NDArray[np.int64],
) -> None:
    """Fit the Gaussians of the classes.

    Parameters
    ----------
    gaussians
        Changed in place.
    expression_BV
        log1p of counts per 10,000 of the training cells by token id, shape (B, V).
    labels_B
        Classes of these cells, shape (B,), int64. Every class must occur.
    loading_VR
        Loadings that turn expression into components, shape (V, R).
    genes
        Token ids of the variable genes.

    Notes
    -----
    The distance to class-conditional Gaussians with a shared covariance is the score of Lee et al. (2018, arXiv:1807.03888).
    The covariance of the components within classes is shrunk by the method of Ledoit and Wolf (2004). The median of the
    variances of single genes is added to each, so that a gene with a very small variance does not dominate the distance.
    """
    classes_CB = sparse.csr_array(
        (np.ones(len(labels_B)), (labels_B, np.arange(len(labels_B)))), shape=(len(gaussians.mean_CR), len(labels_B))
    )
    classes_CB = sparse.diags_array(1 / classes_CB.sum(1)) @ classes_CB
    component_BR = expression_BV @ loading_VR
    mean_CR = classes_CB @ component_BR
    within_BR = component_BR - mean_CR[labels_B]
    deviation_R = np.maximum(within_BR.std(0), 1e-9)
    covariance_RR, _ = ledoit_wolf(within_BR / deviation_R, assume_centered=True)
    whitening_RR = np.linalg.cholesky(np.linalg.inv(covariance_RR)) / deviation_R[:, None]
    mean_CV = np.zeros(gaussians.mean_CV.shape)
    expression_BG = expression_BV[:, genes]
    mean_CV[:, genes] = (classes_CB @ expression_BG).toarray()
    variance_G = _variance_within(expression_BG, mean_CV[:, genes], labels_B)
    floor = max(float(np.median(variance_G)), 1e-9)
    weight_V = np.zeros(expression_BV.shape[1])
    weight_V[genes] = 1 / (variance_G + floor)
    for buffer, value in (
        (gaussians.loading_VR, loading_VR @ whitening_RR),
        (gaussians.mean_CR, mean_CR @ whitening_RR),
        (gaussians.weight_V, weight_V),
        (gaussians.mean_CV, mean_CV),
    ):
        buffer.copy_(torch.from_numpy(value))


@torch.no_grad()
def standardize(gaussians: ClassGaussians, expression_BV: sparse.csr_matrix) -> float | None:
    """Standardize both distances on held-out cells of known classes and return the threshold that keeps 95 % of them.

    Mean and variance of the distances from each class are shrunk toward those of all classes, as if each class had
    `PRIOR_CELLS` more cells that are typical of all.

    The threshold is the smallest (split conformal prediction) for which the next cell of a known class has a score up to it
    with a probability of about 95 %; the probability would be at least 95 % if the distances were not standardized on the
    same cells. With fewer than 19 cells it is their maximum, and with fewer than `MIN_CELLS` it is None.
    """
    if expression_BV.shape[0] < MIN_CELLS:
        return None
    log_B2, class_B2 = gaussians.log_distances(expression_BV)
    for kind, log_B, class_B in zip(KINDS, log_B2.T, class_B2.T):
        location_C, scale_C = _shrunk_moments(log_B, class_B, len(gaussians.mean_CR))
        getattr(gaussians, f"{kind}_location_C").copy_(torch.from_numpy(location_C))
        getattr(gaussians, f"{kind}_scale_C").copy_(torch.from_numpy(scale_C))
    return _threshold(gaussians(expression_BV))


def group_novelty(
    gaussians: ClassGaussians,
    expression_BV: sparse.csr_matrix,
    component_BR: NDArray[np.float64],
    *,
    shift_V: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Novelty of groups of similar cells: of each cell, the mean over itself and its nearest cells.

    Parameters
    ----------
    gaussians
        With standardized distances.
    expression_BV
        log1p of counts per 10,000 of cells of one experiment, shape (B, V).
    component_BR
        Coordinates in which similar cells are near each other, shape (B, R).
    shift_V
        What is added to the mean expression of every class (`common_shift`), shape (V,).
    seed
        Seed of the choice of cells among which neighbors are searched, if there are more than 20,000.

    Returns
    -------
    Novelty of each cell, shape (B,), float32. 0 is typical of these cells.

    Notes
    -----
    Cells of an unknown type lie together, and cells of known types that are unusual by chance do not, so the mean separates
    both better than the novelty of single cells. What is typical is subtracted, because cells of another study are farther from
    all classes: the median over the classes of their medians, or that of all cells if it is smaller. Unknown types can raise
    the first if they are nearest to most of the classes, and the second if they are most of the cells.
    """
    log_B2, class_B2 = gaussians.log_distances(expression_BV, shift_V)
    novelty_B, class_B = gaussians.standardized(log_B2, class_B2), class_B2[:, 0]
    medians = [np.median(novelty_B[class_B == label]) for label in frequent_classes(class_B)]
    novelty_B = novelty_B - min(np.median(novelty_B), np.median(medians) if medians else np.inf)
    rows = np.sort(np.random.default_rng(seed).permutation(len(novelty_B))[:MAX_NEIGHBORS_FROM])
    neighbors = NearestNeighbors(n_neighbors=min(N_NEIGHBORS, len(rows))).fit(component_BR[rows])
    novelty_BN = novelty_B[rows][neighbors.kneighbors(component_BR, return_distance=False)]
    others = np.setdiff1d(np.arange(len(novelty_B)), rows)
    novelty_BN[others, -1] = novelty_B[others]  # they did not find themselves
    return novelty_BN.mean(1)


def group_threshold(
    gaussians: ClassGaussians, expression_BV: sparse.csr_matrix, component_BR: NDArray[np.float64]
) -> float | None:
    """Return the group novelty that 95 % of these calibration cells do not exceed; None if they are too few."""
    if expression_BV.shape[0] < MIN_CELLS_OF_GROUPS:
        return None
    return _threshold(group_novelty(gaussians, expression_BV, component_BR))


def common_shift(
    gaussians: ClassGaussians, expression_BV: sparse.csr_matrix, class_B: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return what all classes have in common in the difference between cells and the training cells, shape (V,).

    It is `consistent_mean` of the differences of mean expression; 0 for genes that the Gaussians do not use. With cells of fewer
    than two classes it is 0, because a difference of one class can be one of its own.

    Parameters
    ----------
    gaussians
        Fitted Gaussians, which keep the mean expression of each class.
    expression_BV
        log1p of counts per 10,000 of the cells, shape (B, V).
    class_B
        Predicted class of each cell, shape (B,).
    """
    classes = frequent_classes(class_B)
    if len(classes) < 2:
        return np.zeros(expression_BV.shape[1])
    is_of_CB = sparse.csr_array(class_B == classes[:, None], dtype=np.float64)
    found_CV = np.asarray((sparse.diags_array(1 / is_of_CB.sum(1)) @ is_of_CB @ expression_BV).todense())
    shift_V = consistent_mean(found_CV - gaussians.mean_CV.cpu().numpy()[classes])
    return np.where(gaussians.weight_V.cpu().numpy() > 0, shift_V, 0)


def consistent_mean(difference_CX: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean over two or more classes, shrunk toward 0 where classes differ, shape (X,).

    It is multiplied by max(0, 1 - v / m^2), where m is the mean and v the variance of the mean over classes. This is the
    positive part of a James-Stein estimator, for each column. A difference that only one class has, for example because an
    unknown type was predicted as this class, becomes exactly 0.
    """
    mean_X = difference_CX.mean(0, dtype=np.float64)
    error_X = difference_CX.var(0, ddof=1, dtype=np.float64) / len(difference_CX)
    consistent: NDArray[np.float64] = mean_X * np.maximum(0, 1 - error_X / np.maximum(mean_X**2, 1e-12))
    return consistent


def frequent_classes(class_B: NDArray[np.integer]) -> NDArray[np.int64]:
    """Classes of at least `MIN_CELLS_OF_CLASS` cells."""
    return np.flatnonzero(np.bincount(class_B) >= MIN_CELLS_OF_CLASS)


def _threshold(novelty_B: NDArray[np.floating]) -> float:
    novelty_B = np.sort(novelty_B)
    return float(novelty_B[min(int(np.ceil(KEPT_FRACTION * (len(novelty_B) + 1))), len(novelty_B)) - 1])


def _shrunk_moments(
    value_B: NDArray[np.float64], class_B: NDArray[np.int64], n_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the values of each class, shrunk toward those of all values, shapes (C,)."""
    n_C = np.bincount(class_B, minlength=n_classes)
    mean_C = (np.bincount(class_B, value_B, n_classes) + PRIOR_CELLS * value_B.mean()) / (n_C + PRIOR_CELLS)
    squares_C = np.bincount(class_B, (value_B - mean_C[class_B]) ** 2, n_classes)
    variance_C = (squares_C + PRIOR_CELLS * value_B.var()) / (n_C + PRIOR_CELLS)
    return mean_C, np.maximum(np.sqrt(variance_C), 1e-6)


def _variance_within(
    expression_BG: sparse.csr_matrix, mean_CG: NDArray[np.float64], labels_B: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Variance of each gene around the means of the classes, shape (G,)."""
    squares_G = np.asarray(expression_BG.multiply(expression_BG).mean(0), dtype=np.float64).ravel()
    fraction_C = np.bincount(labels_B, minlength=len(mean_CG)) / len(labels_B)
    return np.maximum(squares_G - fraction_C @ mean_CG**2, 0)
