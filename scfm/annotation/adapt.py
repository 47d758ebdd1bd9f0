"""Predict labels and novelty again with the help of the other new cells, without labels of these cells."""

# Axes: B cells, V tokens of the vocabulary, R components, C classes, X columns.

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import log_softmax, softmax

from scfm.models.state import Calibration, ModelState

logger = logging.getLogger(__name__)

N_COMPONENTS = 50
MIN_CELLS = 100  # with fewer, components are mostly noise
N_SHIFTS = 3  # how often labels and the common shift are computed, each from the other
FOREIGN_FRACTION = 0.75  # of cells above the threshold of single cells; with more, a warning is logged
INVERSE_PENALTY = 1.0  # scikit-learn's C, for components with a mean square of 1


def adapted_rows(
    model: ModelState, rows_BX: NDArray[np.float32], expression_BV: sparse.csr_matrix, *, seed: int = 0
) -> NDArray[np.float32]:
    """Predict the probabilities of all classes again, and the novelty if the model has a threshold for groups of cells.

    Models with few calibration cells and older ones have no such threshold.

    Parameters
    ----------
    model
        A model with labels.
    rows_BX
        Probability of each class, and the novelty if the model has it, shape (B, C) or (B, C + 1).
    expression_BV
        log1p of counts per 10,000 of the same cells, shape (B, V).
    seed
        Seed of the components and of the choice of cells among which neighbors are searched.

    Returns
    -------
    A copy of `rows_BX` with the new values.
    """
    # Prediction without adaptation needs neither, and scikit-learn takes a second to import.
    from scfm.annotation.gene_classifier import expression_components
    from scfm.annotation.novelty import group_novelty

    (component_BR,) = expression_components(expression_BV, n_components=N_COMPONENTS, seed=seed)
    n_classes, novelty, rows_BX = len(model.labels), model.network.novelty, rows_BX.copy()
    proba_BC, shift_V = without_common_shift(model, rows_BX[:, :n_classes], expression_BV)
    rows_BX[:, :n_classes] = adapted_probabilities(proba_BC, component_BR)
    fitted = model.calibration or Calibration(n_cells=0)
    if novelty is not None and fitted.group_novelty_threshold is not None:
        _warn_of_foreign_cells(rows_BX[:, n_classes], fitted.novelty_threshold)
        rows_BX[:, n_classes] = group_novelty(novelty, expression_BV, component_BR, shift_V=shift_V, seed=seed)
    return rows_BX


def without_common_shift(
    model: ModelState, proba_BC: NDArray[np.floating], expression_BV: sparse.csr_matrix
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predict probabilities as if the cells did not differ from the training cells by what all classes have in common.

    A difference between studies or conditions changes many genes in all classes. What the differences of the predicted classes
    have in common estimates it (`common_shift`), and the linear members predict without it; then classes and difference are
    computed again, three times in all. A model without linear members keeps its probabilities.

    Parameters
    ----------
    model
        A model with labels.
    proba_BC
        Its probabilities, shape (B, C).
    expression_BV
        log1p of counts per 10,000 of the same cells, shape (B, V).

    Returns
    -------
    Probabilities (B, C), and the common difference of expression (V,).
    """
    from scfm.annotation.novelty import common_shift

    current_BC: NDArray[np.float64] = np.asarray(proba_BC, dtype=np.float64)
    shift_V: NDArray[np.float64] = np.zeros(expression_BV.shape[1])
    novelty, classifier = model.network.novelty, model.network.gene_classifier
    if novelty is None or classifier is None:
        return current_BC, shift_V
    weight = float(classifier.ensemble_weights[1]) / (model.calibration or Calibration(n_cells=0)).ensemble_temperature
    log_proba_BC = np.log(np.maximum(current_BC, 1e-30))
    for _ in range(N_SHIFTS):
        shift_V = common_shift(novelty, expression_BV, current_BC.argmax(1))
        current_BC = softmax(log_proba_BC - weight * classifier.change(shift_V), axis=1)
    return current_BC, shift_V


def _warn_of_foreign_cells(novelty_B: NDArray[np.float32], threshold: float | None) -> None:
    """Log a warning if most cells are novel, which the novelty of groups does not show, because it is relative to these cells."""
    fraction = 0.0 if threshold is None else float((novelty_B > threshold).mean())
    if fraction > FOREIGN_FRACTION:
        logger.warning(
            "%.0f %% of the cells have a higher novelty score than 95 %% of the calibration cells. If the model does not know "
            "their tissue, omit `adapt`: with it, the score shows only which of these cells differ from the others.",
            100 * fraction,
        )


def adapted_probabilities(proba_BC: NDArray[np.floating], component_BR: NDArray[np.float64]) -> NDArray[np.float32]:
    """Fit a softmax regression on components of these cells to the probabilities of a model, and return its probabilities.

    Parameters
    ----------
    proba_BC
        Probabilities that a model predicts, shape (B, C).
    component_BR
        Components of the log-expression of the same cells, shape (B, R).

    Returns
    -------
    Probabilities, shape (B, C), float32.

    Notes
    -----
    A model that was fitted on another study or condition makes errors that its own genes cause. They are nearly random along
    the components of the new cells, so a regression on few components corrects many of them: this is self-training with soft
    labels, one round (Xie et al. 2020, arXiv:1911.04252). More rounds make rare classes rarer.
    """
    from scipy.optimize import minimize  # takes half a second, which other predictions do not need

    component_BR = component_BR - component_BR.mean(0)
    component_BR /= max(float(np.sqrt((component_BR**2).mean())), 1e-12)
    target_BC = np.asarray(proba_BC, dtype=np.float64)
    shape = (component_BR.shape[1] + 1, target_BC.shape[1])

    def log_probabilities(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-probabilities, shape (B, C), from weights and, in the last row, biases."""
        return log_softmax(component_BR @ parameters[:-1] + parameters[-1], axis=1)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Cross-entropy with an L2 penalty, and its gradient."""
        weight_RC = flat.reshape(shape)[:-1]
        log_proba_BC = log_probabilities(flat.reshape(shape))
        excess_BC = np.exp(log_proba_BC) - target_BC
        gradient = np.vstack([component_BR.T @ excess_BC + weight_RC / INVERSE_PENALTY, excess_BC.sum(0)])
        penalty = float((weight_RC**2).sum()) / (2 * INVERSE_PENALTY)
        return penalty - float((target_BC * log_proba_BC).sum()), gradient.ravel()

    fitted = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return np.exp(log_probabilities(fitted.x.reshape(shape))).astype(np.float32)
