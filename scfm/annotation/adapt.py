"""Predict labels and novelty again with the help of the other new cells, without labels of these cells."""

# Axes: B cells, V tokens of the vocabulary, R components, C classes, X columns.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import log_softmax

from scfm.models.state import ModelState

N_COMPONENTS = 50
MIN_CELLS = 100  # with fewer, components are mostly noise
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
    rows_BX[:, :n_classes] = adapted_probabilities(rows_BX[:, :n_classes], component_BR)
    if novelty is not None and model.calibration is not None and model.calibration.group_novelty_threshold is not None:
        rows_BX[:, n_classes] = group_novelty(novelty, expression_BV, component_BR, seed=seed)
    return rows_BX


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
