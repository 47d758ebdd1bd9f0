"""Weights of the members of the ensemble: the transformer, and three linear classifiers of gene expression."""

# Axes: B cells, C classes.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from scfm.annotation.calibration import fit_temperature

# Share of each member, chosen on development data. Calibration cells are of the same experiment as the training cells, so
# weights that were fitted to them would prefer members that fail on cells of another study, condition or donor.
SHARES = {"transformer": 0.1, "components": 1.0, "genes": 2.5, "discriminant": 1.5}
NEED_LABELS = ("genes", "discriminant")
LABELS_FOR_AN_EIGHTH = 20  # median labels per class at which members that need labels have an eighth of their share


def member_shares(labels_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of each member, shape (4,). The shares of members that need labels grow with the labels per class.

    Parameters
    ----------
    labels_B
        Classes of the training cells, shape (B,), int64.
    """
    counts_C = np.bincount(labels_B)
    typical = float(np.median(counts_C[counts_C > 0]))
    gate = (typical / (typical + LABELS_FOR_AN_EIGHTH)) ** 3
    return np.array([share * (gate if name in NEED_LABELS else 1) for name, share in SHARES.items()])


def fit_weights(
    logits: Sequence[NDArray[np.floating]], labels_B: NDArray[np.int64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weights of the members' log-probabilities, calibrated by the labels of the calibration cells.

    Each member is divided by the temperature that suits it. No member was fitted on the calibration cells, so a member that
    overfits, and is too confident, gets a high temperature. The members are averaged by their shares, and the average is
    divided by a temperature of its own. The sum of the weights is the inverse of the ensemble's temperature.

    Parameters
    ----------
    logits
        Logits of each member for the calibration cells, shape (B, C) each; B may be 0.
    labels_B
        Classes of these cells, shape (B,), int64.
    shares
        Share of each member, shape (members,).
    """
    members = [log_softmax(np.asarray(logits_BC, dtype=np.float64), axis=1) for logits_BC in logits]
    temperatures = np.array([fit_temperature(np.exp(member_BC), labels_B) for member_BC in members])
    weights = shares / shares.sum() / temperatures
    joint_BC = softmax(sum(weight * member_BC for weight, member_BC in zip(weights, members)), axis=1)
    return weights / fit_temperature(joint_BC, labels_B)
