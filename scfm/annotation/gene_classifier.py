"""The linear classifier of gene expression that is an ensemble member next to the transformer."""

# Axes: B cells, V tokens of the vocabulary, R components, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from scfm.annotation.probe import balanced_regression, softmax_weights
from scfm.models.network import CellTransformer

N_COMPONENTS = 50  # of the singular value decomposition
N_DISPERSED = 2000  # genes that components are made of


@torch.no_grad()
def fit_gene_classifier(
    network: CellTransformer, expression_BV: sparse.csr_matrix, labels_B: NDArray[np.int64], *, seed: int = 0
) -> NDArray[np.float64]:
    """Fit a balanced logistic regression on components of scaled expression and store it in the network.

    Components are learned from all cells, labeled or not; the weights of the regression are folded back to genes.
    The components keep their variances, so that the penalty falls mostly on the weak ones.

    Parameters
    ----------
    network
        With a gene classifier; changed in place.
    expression_BV
        log1p counts per 10,000 by token id of all cells to learn from, shape (B, V).
    labels_B
        Their classes, shape (B,), int64, -1 if unlabeled.
    seed
        Seed of the decomposition.

    Returns
    -------
    Components of the labeled cells, as the regression reads them, shape (labeled cells, R).
    """
    classifier = network.gene_classifier
    assert classifier is not None
    classifier.scale_V.copy_(torch.from_numpy(gene_scales(expression_BV)))
    scaled_BV = classifier.scaled(expression_BV)
    svd = TruncatedSVD(min(N_COMPONENTS, *(size - 1 for size in scaled_BV.shape)), random_state=seed)
    component_BR = svd.fit_transform(scaled_BV)
    mean_R = component_BR.mean(0)
    scale = np.sqrt(((component_BR - mean_R) ** 2).mean())
    labeled = np.flatnonzero(labels_B >= 0)
    read_BR = (component_BR[labeled] - mean_R) / scale
    weight_CR, bias_C = softmax_weights(balanced_regression().fit(read_BR, labels_B[labeled]))
    classifier.weight_VC.copy_(torch.from_numpy((weight_CR @ svd.components_ / scale).T))
    classifier.bias_C.copy_(torch.from_numpy(bias_C - weight_CR @ mean_R / scale))
    return read_BR


def gene_scales(expression_BV: sparse.csr_matrix) -> NDArray[np.float64]:
    """Return 1 / standard deviation for the `N_DISPERSED` most dispersed genes and 0 for the others, shape (V,).

    Dispersion is the variance over the mean of counts per 10,000; the standard deviation is that of their log1p.
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


def _moments(matrix_BV: sparse.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each column."""
    matrix_BV = matrix_BV.astype(np.float64)
    mean_V = np.asarray(matrix_BV.mean(0)).ravel()
    mean_square_V = np.asarray(matrix_BV.multiply(matrix_BV).mean(0)).ravel()
    return mean_V, np.maximum(mean_square_V - mean_V**2, 0)
