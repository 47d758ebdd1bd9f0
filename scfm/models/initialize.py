"""Starting points: gene embeddings from a singular value decomposition, a class head from a linear probe."""

# Axes: B cells, V tokens of the vocabulary, D model width, E inputs of the class head, R components, C classes, M votes.

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
from scfm.nn import GeneClassifier

PROBE_INVERSE_PENALTIES = (
    0.1,
    0.03,
    0.01,
    0.003,
)  # scikit-learn's C; the best on a part of the training cells is taken


def gene_components(expression_BV: sparse.csr_matrix, n_components: int, seed: int = 0) -> NDArray[np.float64]:
    """Right singular vectors of the cells-by-genes matrix, shape (R, V)."""
    n_components = min(n_components, *(size - 1 for size in expression_BV.shape))
    return TruncatedSVD(n_components, random_state=seed).fit(expression_BV).components_.astype(np.float64)


def gene_loadings(components_RV: NDArray[np.float64]) -> torch.Tensor:
    """Make gene vectors of singular vectors, shape (V, R), float32, each column of root mean square 1.

    Large loadings are drawn in (the signed square root is taken), so that a few marker genes do not use up the scale.
    """
    loadings_VR = components_RV.T
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
    network: CellTransformer,
    expression_BV: sparse.csr_matrix,
    features_BE: NDArray[np.float32],
    labels_B: NDArray[np.int64],
    components_RV: NDArray[np.float64],
    seed: int = 0,
) -> None:
    """Fit balanced logistic regressions on genes and on components, and choose how much each vote counts.

    The shares are those under which a fifth of the training cells, left out of the fits that are compared, is most likely; the
    class head's part is played by a probe on its features.

    Parameters
    ----------
    network
        With a gene classifier.
    expression_BV, features_BE
        log1p counts per 10,000 of the training cells by token id, and what the class head reads of them.
    labels_B
        Their classes, shape (B,), int64.
    components_RV
        Right singular vectors of the cells, labelled or not.
    seed
        Of the split.
    """
    classifier = network.gene_classifier
    assert classifier is not None
    parts = split_cells(labels=labels_B, test_fraction=0.2, seed=seed)
    learn, check = parts.train, parts.test
    normalized_BE = StandardScaler().fit_transform(features_BE.astype(np.float64))
    penalty = best_inverse_penalty(normalized_BE, labels_B, seed)
    probe = _balanced(penalty).fit(normalized_BE[learn], labels_B[learn])
    _set_linear(classifier, expression_BV[learn], labels_B[learn], components_RV)
    votes_MBC = np.concatenate(
        [probe.predict_proba(normalized_BE[check])[None], classifier.probabilities(expression_BV[check])]
    )
    shares_M = mixture_shares(votes_MBC[:, np.arange(len(check)), labels_B[check]])
    _set_linear(classifier, expression_BV, labels_B, components_RV)
    classifier.share_M.copy_(torch.from_numpy(shares_M))


def mixture_shares(likelihood_MB: NDArray[np.floating], n_prior: float = 5.0) -> NDArray[np.float64]:
    """Shares under which a mixture makes the labels most likely, shape (M,), sum 1; by expectation maximisation.

    `n_prior` cells a vote are added as its own, so that few cells leave the shares near equal.
    """
    share_M = np.full(len(likelihood_MB), 1 / len(likelihood_MB))
    for _ in range(100):
        joint_MB = share_M[:, None] * np.maximum(likelihood_MB, 1e-12)
        share_M = (joint_MB / joint_MB.sum(0)).sum(1) + n_prior
        share_M /= share_M.sum()
    return share_M


def _set_linear(
    classifier: GeneClassifier,
    expression_BV: sparse.csr_matrix,
    labels_B: NDArray[np.int64],
    components_RV: NDArray[np.float64],
) -> None:
    largest = MaxAbsScaler().fit(expression_BV)
    gene_CV, gene_bias_C = weights_of(_balanced(1.0).fit(largest.transform(expression_BV), labels_B))
    scores_BR = expression_BV @ components_RV.T
    scaler = StandardScaler().fit(scores_BR)
    component_CR, component_bias_C = weights_of(_balanced(1.0).fit(scaler.transform(scores_BR), labels_B))
    component_CR = component_CR / scaler.scale_
    weight_LVC = np.stack([(gene_CV / largest.scale_).T, (component_CR @ components_RV).T])
    classifier.weight_LVC.copy_(torch.from_numpy(weight_LVC))
    classifier.bias_LC.copy_(torch.from_numpy(np.stack([gene_bias_C, component_bias_C - component_CR @ scaler.mean_])))


def weights_of(regression: LogisticRegression) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights (C, E) and biases (C,) for a softmax; of two classes scikit-learn keeps one row."""
    weight_CE, bias_C = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:
        weight_CE, bias_C = np.vstack([-weight_CE, weight_CE]) / 2, np.concatenate([-bias_C, bias_C]) / 2
    return weight_CE, bias_C


def _balanced(inverse_penalty: float) -> LogisticRegression:
    return LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=2000)
