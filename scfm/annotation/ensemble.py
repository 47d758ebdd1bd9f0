"""Weights of the ensemble members: the transformer, a regression on components of expression, and one on all genes."""

# Axes: B cells, C classes.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

# Median of each weight before calibration cells are seen: transformer, components, genes. Chosen on development data:
# a fine-tuned transformer is the most confident of the three, and the least reliable on cells of another condition.
PRIOR_WEIGHTS = (0.1, 0.7, 2.0)
PRIOR_DEVIATION = 0.5  # of the logarithms of the weights
LABELS_FOR_HALF_THE_WEIGHT = 80  # labels per class (median) at which the regression on all genes has half of its weight


def prior_weights(labels_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights without calibration cells, shape (3,); the regression on all genes needs many labels per class.

    Parameters
    ----------
    labels_B
        Classes of the training cells, shape (B,), int64.
    """
    counts_C = np.bincount(labels_B)
    typical = float(np.median(counts_C[counts_C > 0]))
    return np.array(PRIOR_WEIGHTS) * (1, 1, typical / (typical + LABELS_FOR_HALF_THE_WEIGHT))


def fit_weights(
    logits: Sequence[NDArray[np.floating]], labels_B: NDArray[np.int64], prior: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weights of the members' log-probabilities that fit cells which no member has learned from.

    They maximize the log-likelihood of the weighted sum, with a normal prior on their logarithms. A member that is confident
    only on the cells that it was fitted on gets no trust from it. The sum of the weights is the inverse of a temperature.

    Parameters
    ----------
    logits
        Of each member for the calibration cells, shape (B, C); B may be 0.
    labels_B
        Classes of these cells, shape (B,), int64.
    prior
        Medians of the weights, shape (members,).
    """
    members = [log_softmax(np.asarray(logits_BC, dtype=np.float64), axis=1) for logits_BC in logits]
    rows, log_prior = np.arange(len(labels_B)), np.log(prior)

    def negative_log_posterior(log_weights: NDArray[np.float64]) -> float:
        joint_BC = log_softmax(sum(w * member_BC for w, member_BC in zip(np.exp(log_weights), members)), axis=1)
        distance = (log_weights - log_prior) / PRIOR_DEVIATION
        return -float(joint_BC[rows, labels_B].sum()) + 0.5 * float((distance**2).sum())

    return np.exp(minimize(negative_log_posterior, log_prior, method="L-BFGS-B").x)
