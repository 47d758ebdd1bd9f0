"""Weights of the ensemble members: the transformer, a regression on expression components, and a regression on all genes."""

# Axes: B cells, C classes.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

# Prior median of the weight of each member: transformer, components, genes. Chosen on development data, where a fine-tuned
# transformer was the most confident of the three, and the least reliable on cells of another condition.
PRIOR_WEIGHTS = (0.1, 0.7, 2.0)
PRIOR_DEVIATION = 0.5  # standard deviation of the logarithm of a weight in the prior
LABELS_FOR_HALF_THE_WEIGHT = 80  # median labels per class at which the regression on all genes has half its weight


def prior_weights(labels_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights without calibration cells, shape (3,). The weight of the regression on all genes grows with the labels per class.

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
    """Return the weights of the members' log-probabilities that fit the labels of the calibration cells.

    The weights maximize the log-likelihood of the weighted sum plus the log-density of a normal prior on their logarithms.
    No member was fitted on the calibration cells, so a member that overfits gets a low weight. The sum of the weights is the
    inverse of a temperature.

    Parameters
    ----------
    logits
        Logits of each member for the calibration cells, shape (B, C) each; B may be 0.
    labels_B
        Classes of these cells, shape (B,), int64.
    prior
        Prior medians of the weights, shape (members,).
    """
    members = [log_softmax(np.asarray(logits_BC, dtype=np.float64), axis=1) for logits_BC in logits]
    rows, log_prior = np.arange(len(labels_B)), np.log(prior)

    def negative_log_posterior(log_weights: NDArray[np.float64]) -> float:
        joint_BC = log_softmax(sum(w * member_BC for w, member_BC in zip(np.exp(log_weights), members)), axis=1)
        distance = (log_weights - log_prior) / PRIOR_DEVIATION
        return -float(joint_BC[rows, labels_B].sum()) + 0.5 * float((distance**2).sum())

    return np.exp(minimize(negative_log_posterior, log_prior, method="L-BFGS-B").x)
