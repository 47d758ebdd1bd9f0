"""Starting points: gene embeddings from a singular value decomposition, a class head from a linear probe."""

# Axes: B cells, V tokens of the vocabulary, D model width, E inputs of the class head, R components, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from scfm.data.splits import split_cells
from scfm.models.network import CellTransformer

PROBE_INVERSE_PENALTIES = (
    0.1,
    0.03,
    0.01,
    0.003,
)  # scikit-learn's C; the best on a part of the training cells is taken


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


def set_linear_probe(
    network: CellTransformer, features_BE: NDArray[np.float32], labels_B: NDArray[np.int64], seed: int = 0
) -> None:
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
    seed
        Of the split on which the penalty is chosen.
    """
    head = network.class_head
    assert head is not None
    head.set_statistics(torch.from_numpy(features_BE))
    normalized_BE = StandardScaler().fit_transform(features_BE.astype(np.float64))
    probe = _balanced(best_inverse_penalty(normalized_BE, labels_B, seed)).fit(normalized_BE, labels_B)
    weight_CE, bias_C = weights_of(probe)
    head.set_linear_probe(torch.from_numpy(weight_CE), torch.from_numpy(bias_C))


def best_inverse_penalty(features_BE: NDArray[np.float64], labels_B: NDArray[np.int64], seed: int) -> float:
    """Choose the probe's penalty by the class-balanced log-likelihood of a fifth of the training cells."""
    parts = split_cells(labels=labels_B, test_fraction=0.2, seed=seed)
    weight_B = 1 / np.bincount(labels_B)[labels_B[parts.test]]

    def likelihood(inverse_penalty: float) -> float:
        probe = _balanced(inverse_penalty).fit(features_BE[parts.train], labels_B[parts.train])
        column_B = np.searchsorted(probe.classes_, labels_B[parts.test])
        log_proba_BC = probe.predict_log_proba(features_BE[parts.test])
        return float((weight_B * log_proba_BC[np.arange(len(column_B)), column_B]).sum())

    return max(PROBE_INVERSE_PENALTIES, key=likelihood)


@torch.no_grad()
def set_gene_classifier(
    network: CellTransformer, expression_BV: sparse.csr_matrix, labels_B: NDArray[np.int64]
) -> None:
    """Fit a balanced logistic regression on log-expression and keep it beside the class head.

    Each gene is scaled to a largest value of 1, as in the baseline of that name.

    Parameters
    ----------
    network
        With a gene classifier.
    expression_BV
        log1p counts per 10,000 of the training cells by token id, shape (B, V).
    labels_B
        Their classes, shape (B,), int64.
    """
    classifier = network.gene_classifier
    assert classifier is not None
    scaler = MaxAbsScaler().fit(expression_BV)
    weight_CV, bias_C = weights_of(_balanced(1.0).fit(scaler.transform(expression_BV), labels_B))
    classifier.weight_VC.copy_(torch.from_numpy((weight_CV / scaler.scale_).T))
    classifier.bias_C.copy_(torch.from_numpy(bias_C))


def weights_of(regression: LogisticRegression) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights (C, E) and biases (C,) for a softmax; of two classes scikit-learn keeps one row."""
    weight_CE, bias_C = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:
        weight_CE, bias_C = np.vstack([-weight_CE, weight_CE]) / 2, np.concatenate([-bias_C, bias_C]) / 2
    return weight_CE, bias_C


def _balanced(inverse_penalty: float) -> LogisticRegression:
    return LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=2000)
