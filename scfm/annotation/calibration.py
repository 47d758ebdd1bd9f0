"""Calibration of class probabilities by a temperature."""

# Axes: B cells, C classes.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

MIN_CELLS = 10  # with fewer calibration cells, temperatures stay at 1
MAX_TEMPERATURE = 10.0
PRIOR_DEVIATION = 0.5  # standard deviation of the logarithm of a temperature in the prior


def fit_temperature(proba_BC: NDArray[np.floating], labels_B: NDArray[np.int64]) -> float:
    """Return the temperature that fits the labels (Guo et al. 2017, arXiv:1706.04599); 1 with fewer than `MIN_CELLS` cells.

    It maximizes the log-likelihood plus the log-density of a normal prior on its logarithm. Without the prior, the best
    temperature for a few cells that are all predicted correctly would be 0.
    """
    if len(labels_B) < MIN_CELLS:
        return 1.0
    log_proba_BC = np.log(np.maximum(proba_BC.astype(np.float64), 1e-12))

    def negative_log_posterior(log_temperature: float) -> float:
        scaled_BC = log_softmax(log_proba_BC / np.exp(log_temperature), axis=1)
        likelihood = float(scaled_BC[np.arange(len(labels_B)), labels_B].sum())
        return 0.5 * (log_temperature / PRIOR_DEVIATION) ** 2 - likelihood

    bound = np.log(MAX_TEMPERATURE)
    return float(np.exp(minimize_scalar(negative_log_posterior, bounds=(-bound, bound), method="bounded").x))
