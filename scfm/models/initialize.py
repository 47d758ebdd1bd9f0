"""Starting points: gene embeddings from a singular value decomposition, a class head from a linear probe."""

# Axes: B cells, V tokens of the vocabulary, D model width, E inputs of the class head, R components, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from scfm.models.network import CellTransformer

INVERSE_PENALTY = 0.01  # scikit-learn's C of both votes
N_DISPERSED = 2000  # genes that components are made of
N_FOLDS = 5
LARGEST_LOG_WEIGHT = 4.0  # of a vote


def gene_loadings(expression_BV: sparse.csr_matrix, n_components: int, seed: int = 0) -> torch.Tensor:
    """Right singular vectors of the cells-by-genes matrix, shape (V, R), float32, each column of root mean square 1.

    Large loadings are drawn in (the signed square root is taken), so that a few marker genes do not use up the scale.
    """
    n_components = min(n_components, *(size - 1 for size in expression_BV.shape))
    svd = TruncatedSVD(n_components, random_state=seed).fit(expression_BV)
    loadings_VR = svd.components_.T
    scaled_VR = loadings_VR / np.sqrt((loadings_VR**2).mean(0, keepdims=True) + 1e-12)
    return torch.from_numpy(np.sign(scaled_VR) * np.sqrt(np.abs(scaled_VR))).float()


@torch.no_grad()
def set_gene_embeddings(network: CellTransformer, loadings_VR: torch.Tensor, scale: float) -> None:
    """Put the loadings into the first columns of the gene embedding, times `scale`; the rest keeps its random start."""
    weight_VD = network.embedding.gene.weight
    n_columns = min(loadings_VR.shape[1], weight_VD.shape[1])
    is_gene_V = network.is_gene_V
    weight_VD[is_gene_V, :n_columns] = scale * loadings_VR[is_gene_V, :n_columns].to(weight_VD.device)


def set_linear_probe(network: CellTransformer, features_BE: NDArray[np.float32], labels_B: NDArray[np.int64]) -> None:
    """Fit a balanced logistic regression on frozen features and put it into the class head.

    Fine-tuning from a probe keeps what pretraining learned, where a random head would first overwrite it (LP-FT, Kumar et al. 2022,
    arXiv:2202.10054). Every class of the head must occur in `labels_B`.

    Parameters
    ----------
    network
        With a class head.
    features_BE
        What the head reads of the training cells, shape (B, E), float32.
    labels_B
        Their classes, shape (B,), int64.
    """
    head = network.class_head
    assert head is not None
    head.set_statistics(torch.from_numpy(features_BE))
    weight_CE, bias_C = weights_of(_balanced().fit(_standardised(features_BE), labels_B))
    head.set_linear_probe(torch.from_numpy(weight_CE), torch.from_numpy(bias_C))


@torch.no_grad()
def set_gene_classifier(
    network: CellTransformer,
    expression_BV: sparse.csr_matrix,
    labels_B: NDArray[np.int64],
    *,
    n_components: int,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Fit a balanced logistic regression on components of scaled expression and keep it beside the class head.

    Components are learned from all cells, labelled or not; the regression's weights are folded back to genes. The
    components are not brought to one variance, so that a strong penalty falls on the weak ones.

    Parameters
    ----------
    network
        With a gene classifier.
    expression_BV
        log1p counts per 10,000 by token id of all cells to learn from, shape (B, V).
    labels_B
        Their classes, shape (B,), int64, -1 where unlabelled.
    n_components
        Of the singular value decomposition.
    seed
        Of the same.

    Returns
    -------
    Components of the labelled cells, as the regression reads them, shape (labelled cells, R).
    """
    classifier = network.gene_classifier
    assert classifier is not None
    classifier.scale_V.copy_(torch.from_numpy(gene_scales(expression_BV)))
    scaled_BV = classifier.scaled(expression_BV)
    svd = TruncatedSVD(min(n_components, *(size - 1 for size in scaled_BV.shape)), random_state=seed)
    component_BR = svd.fit_transform(scaled_BV)
    mean_R = component_BR.mean(0)
    scale = np.sqrt(((component_BR - mean_R) ** 2).mean())
    labelled = np.flatnonzero(labels_B >= 0)
    read_BR = (component_BR[labelled] - mean_R) / scale
    weight_CR, bias_C = weights_of(_balanced().fit(read_BR, labels_B[labelled]))
    classifier.weight_VC.copy_(torch.from_numpy((weight_CR @ svd.components_ / scale).T))
    classifier.bias_C.copy_(torch.from_numpy(bias_C - weight_CR @ mean_R / scale))
    return read_BR


@torch.no_grad()
def set_vote_weights(
    network: CellTransformer,
    features_BE: NDArray[np.float32],
    component_BR: NDArray[np.float64],
    labels_B: NDArray[np.int64],
    seed: int = 0,
) -> None:
    """Weigh the votes of network and gene classifier by what each knows of training cells that it was not fitted on.

    Both regressions are fitted on four fifths of the cells and asked about the last, in turn; the weights make the
    class-weighted log-likelihood of the joint answer largest, with a standard normal prior on their logarithms. A vote
    that knows nothing more than the other loses its weight. Classes of one cell are learned and not asked about.

    Parameters
    ----------
    network
        With a gene classifier.
    features_BE, component_BR
        What the class head and the gene classifier read of the training cells.
    labels_B
        Their classes, shape (B,), int64; every class occurs.
    seed
        Of the folds.
    """
    fold_B = _folds(labels_B, seed)
    asked = np.flatnonzero(fold_B >= 0)
    votes = [
        _out_of_fold(inputs_BX, labels_B, fold_B)[asked] for inputs_BX in (_standardised(features_BE), component_BR)
    ]
    labels = labels_B[asked]
    weight_B = 1 / np.sqrt(np.bincount(labels)[labels])  # as in fine-tuning

    def surprise(log_weights: NDArray[np.float64]) -> float:
        joint_BC = log_softmax(sum(w * vote_BC for w, vote_BC in zip(np.exp(log_weights), votes)), axis=1)
        mean = np.average(joint_BC[np.arange(len(labels)), labels], weights=weight_B)
        return -len(labels) * mean + 0.5 * float((log_weights**2).sum())

    if len(asked):
        limits = [(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)] * 2
        best = minimize(surprise, np.zeros(2), method="L-BFGS-B", bounds=limits)
        network.gene_classifier.ensemble_weights.copy_(torch.from_numpy(np.exp(best.x)))  # type: ignore[union-attr]


def _folds(labels_B: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Fold of each cell, every class spread evenly; -1 for the only cell of a class."""
    rng = np.random.default_rng(seed)
    fold_B = np.full(len(labels_B), -1)
    for label in np.unique(labels_B):
        members = rng.permutation(np.flatnonzero(labels_B == label))
        if len(members) > 1:
            fold_B[members] = (np.arange(len(members)) + rng.integers(N_FOLDS)) % N_FOLDS
    return fold_B


def _out_of_fold(
    inputs_BX: NDArray[np.float64], labels_B: NDArray[np.int64], fold_B: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Log-probabilities of each cell by a regression on the other folds, shape (B, C)."""
    log_proba_BC = np.zeros((len(labels_B), labels_B.max() + 1))
    for fold in np.unique(fold_B[fold_B >= 0]):
        asked_B = fold_B == fold
        log_proba_BC[asked_B] = (
            _balanced().fit(inputs_BX[~asked_B], labels_B[~asked_B]).predict_log_proba(inputs_BX[asked_B])
        )
    return log_proba_BC


def gene_scales(expression_BV: sparse.csr_matrix) -> NDArray[np.float64]:
    """One over the deviation of the `N_DISPERSED` genes of largest dispersion, 0 for all others, shape (V,).

    Dispersion is the variance over the mean of counts per 10,000; the deviation is that of their log1p.
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


def weights_of(regression: LogisticRegression) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights (C, E) and biases (C,) for a softmax; of two classes scikit-learn keeps one row."""
    weight_CE, bias_C = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:
        weight_CE, bias_C = np.vstack([-weight_CE, weight_CE]) / 2, np.concatenate([-bias_C, bias_C]) / 2
    return weight_CE, bias_C


def _balanced() -> LogisticRegression:
    return LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=2000)


def _standardised(features_BE: NDArray[np.floating]) -> NDArray[np.float64]:
    return StandardScaler().fit_transform(features_BE.astype(np.float64))
