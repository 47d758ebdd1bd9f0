"""Weights of the two ensemble members, the transformer and the gene classifier."""

# Axes: B cells, X inputs of a member, R components, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from scfm.annotation.probe import balanced_regression, standardized
from scfm.models.network import CellTransformer

N_FOLDS = 5
MAX_LOG_WEIGHT = 4.0


@torch.no_grad()
def fit_ensemble_weights(
    network: CellTransformer,
    features_BX: NDArray[np.float32],
    component_BR: NDArray[np.float64],
    labels_B: NDArray[np.int64],
    *,
    seed: int = 0,
) -> None:
    """Weight the members by what each predicts for training cells that it was not fitted on.

    Both regressions are fitted on four fifths of the cells and predict the last fifth, in turn. The weights maximize
    the class-weighted log-likelihood of the weighted sum of log-probabilities, with a standard normal prior on their
    logarithms. A member that adds nothing to the other loses its weight. A class of one cell takes part in fitting
    only.

    Parameters
    ----------
    network
        With a gene classifier; its `ensemble_weights` are set in place.
    features_BX, component_BR
        What the class head and the gene classifier read of the training cells.
    labels_B
        Their classes, shape (B,), int64; every class occurs.
    seed
        Seed of the folds.
    """
    fold_B = _folds(labels_B, seed)
    scored = np.flatnonzero(fold_B >= 0)
    if not len(scored):
        return
    members = [
        _out_of_fold(inputs_BX, labels_B, fold_B)[scored] for inputs_BX in (standardized(features_BX), component_BR)
    ]
    labels = labels_B[scored]
    weight_B = 1 / np.sqrt(np.bincount(labels)[labels])  # as in fine-tuning

    def negative_log_posterior(log_weights: NDArray[np.float64]) -> float:
        joint_BC = log_softmax(sum(w * member_BC for w, member_BC in zip(np.exp(log_weights), members)), axis=1)
        mean = np.average(joint_BC[np.arange(len(labels)), labels], weights=weight_B)
        return -len(labels) * mean + 0.5 * float((log_weights**2).sum())

    bounds = [(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT)] * 2
    best = minimize(negative_log_posterior, np.zeros(2), method="L-BFGS-B", bounds=bounds)
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
        scored_B = fold_B == fold
        log_proba_BC[scored_B] = (
            balanced_regression().fit(inputs_BX[~scored_B], labels_B[~scored_B]).predict_log_proba(inputs_BX[scored_B])
        )
    return log_proba_BC
