"""How far a model's probabilities can be trusted: temperature, calibration error, distance to what it was trained on."""

# Axes: B cells, V tokens of the vocabulary, E inputs of the class head, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scfm.models.model import Model
from scfm.models.state import Calibration
from scfm.tl._split import FitSplit

FEWEST_CELLS = 10
LARGEST_TEMPERATURE = 10.0
TYPICAL_DISTANCE = 0.99  # quantile of the calibration cells


def calibrate(
    model: Model, features_BE: NDArray[np.float32], expression_BV: sparse.csr_matrix, split: FitSplit
) -> Calibration:
    """Fit the temperatures on the calibration cells of `split` (Guo et al. 2017, arXiv:1706.04599).

    `features_BE` is what the class head reads of all cells, and `expression_BV` what the gene classifier reads.
    """
    assert split.labels is not None
    rows = split.calibration
    if not len(rows):
        return Calibration(n_cells=0)
    logits_BC, labels_B = class_logits(model, features_BE[rows]), split.labels.codes[rows]
    votes = {
        "transformer": model.proba_of_logits(logits_BC, calibrated=False),
        "ensemble": model.proba_of_logits(logits_BC, expression_BV[rows], calibrated=False),
    }
    temperature = {name: fit_temperature(proba_BC, labels_B) for name, proba_BC in votes.items()}
    return Calibration(
        n_cells=len(rows),
        transformer_temperature=temperature["transformer"],
        ensemble_temperature=temperature["ensemble"],
        typical_distance=float(np.quantile(distances(model, features_BE[rows]), TYPICAL_DISTANCE)),
    )


@torch.inference_mode()
def class_logits(model: Model, features_BE: NDArray[np.float32]) -> torch.Tensor:
    """The class head's logits from what it reads, shape (B, C)."""
    network = model.network.eval()
    return network.class_head(torch.from_numpy(features_BE).to(model.device)).float().cpu()


def fit_temperature(proba_BC: NDArray[np.floating], labels_B: NDArray[np.int64]) -> float:
    """Temperature that makes the labels most likely; 1 where there are too few cells to tell."""
    if len(labels_B) < FEWEST_CELLS:
        return 1.0
    log_proba_BC = np.log(np.maximum(proba_BC.astype(np.float64), 1e-12))

    def surprise(log_temperature: float) -> float:
        scaled_BC = log_softmax(log_proba_BC / np.exp(log_temperature), axis=1)
        return -float(scaled_BC[np.arange(len(labels_B)), labels_B].mean())

    bound = np.log(LARGEST_TEMPERATURE)
    return float(np.exp(minimize_scalar(surprise, bounds=(-bound, bound), method="bounded").x))


def distances(model: Model, features_BE: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far each cell is from the training cells: root mean square of its class features in their deviations, (B,)."""
    norm = model.network.class_head.norm
    mean_E, variance_E = norm.running_mean.cpu().numpy(), norm.running_var.cpu().numpy()
    z_BE = (features_BE - mean_E) / np.sqrt(variance_E + norm.eps)
    return np.sqrt((z_BE**2).mean(1))
