"""How far probabilities can be trusted: temperatures, and the distance of a cell from the training cells."""

# Axes: B cells, X inputs of the class head, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scfm.annotation.splits import FitSplit
from scfm.models.model import Model
from scfm.models.state import Calibration

MIN_CELLS = 10  # with fewer calibration cells, temperatures stay at 1
MAX_TEMPERATURE = 10.0
TYPICAL_QUANTILE = 0.99  # of the distances of calibration cells


def calibrate(model: Model, logits_BC: torch.Tensor, expression_BV: sparse.csr_matrix, split: FitSplit) -> Calibration:
    """Fit the temperatures on the calibration cells of `split` (Guo et al. 2017, arXiv:1706.04599).

    Parameters
    ----------
    model
        With labels; its members are used uncalibrated.
    logits_BC
        Logits of the transformer for all cells.
    expression_BV
        log1p counts per 10,000 of all cells by token id.
    split
        Which cells calibrate.
    """
    assert split.labels is not None
    rows = split.calibration
    if not len(rows):
        return Calibration(n_cells=0)
    logits_BC, labels_B = logits_BC[rows], split.labels.codes[rows]
    transformer_BC = model.proba_of_logits(logits_BC, calibrated=False)
    ensemble_BC = model.proba_of_logits(logits_BC, expression_BV[rows], calibrated=False)
    return Calibration(
        n_cells=len(rows),
        transformer_temperature=fit_temperature(transformer_BC, labels_B),
        ensemble_temperature=fit_temperature(ensemble_BC, labels_B),
    )


def fit_temperature(proba_BC: NDArray[np.floating], labels_B: NDArray[np.int64]) -> float:
    """Return the temperature that maximizes the likelihood of the labels; 1 with too few cells to fit it."""
    if len(labels_B) < MIN_CELLS:
        return 1.0
    log_proba_BC = np.log(np.maximum(proba_BC.astype(np.float64), 1e-12))

    def negative_log_likelihood(log_temperature: float) -> float:
        scaled_BC = log_softmax(log_proba_BC / np.exp(log_temperature), axis=1)
        return -float(scaled_BC[np.arange(len(labels_B)), labels_B].mean())

    bound = np.log(MAX_TEMPERATURE)
    return float(np.exp(minimize_scalar(negative_log_likelihood, bounds=(-bound, bound), method="bounded").x))


def typical_distance(distance_B: NDArray[np.floating]) -> float:
    """Return the distance that 99 of 100 calibration cells keep."""
    return float(np.quantile(distance_B, TYPICAL_QUANTILE))


def distances(model: Model, features_BX: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the distance of each cell from the training cells, shape (B,).

    It is the root mean square of the class features in standard deviations of the training cells, so it needs a class
    head of kind "batch_norm", which stores them.
    """
    norm = model.network.class_head.norm
    mean_X, variance_X = norm.running_mean.cpu().numpy(), norm.running_var.cpu().numpy()
    z_BX = (features_BX - mean_X) / np.sqrt(variance_X + norm.eps)
    return np.sqrt((z_BX**2).mean(1))


def has_distances(model: Model) -> bool:
    """Whether the class head stores the statistics that `distances` needs."""
    return hasattr(model.network.class_head, "set_statistics")
