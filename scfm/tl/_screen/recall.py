"""How many of the best genes a screen that verified only some of them will have missed."""

# Axes: V verified genes, C checked genes (random, not among the best), U unverified genes.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def recall_estimate(
    *,
    exact_V: NDArray[np.float64],
    estimate_V: NDArray[np.float64],
    exact_C: NDArray[np.float64],
    estimate_C: NDArray[np.float64],
    estimate_U: NDArray[np.float64],
    n_top: int,
    ratios: bool = True,
) -> float:
    """Expected share of the exact `n_top` best that is among the verified.

    Parameters
    ----------
    exact_V, estimate_V
        Of the verified genes, the best by estimate.
    exact_C, estimate_C
        Of random genes outside them.
    estimate_U
        Of all genes that were not verified as the best.
    n_top
        How many best genes are looked for; at most the number verified.
    ratios
        Whether errors are ratios (shifts, which are positive) or differences (shifts toward a goal).

    Returns
    -------
    From 0 to 1.

    Notes
    -----
    Counting hits among a few random genes has no power. Instead the errors of the random genes are pooled with those of the
    lower half of the verified, and each unverified gene gets the probability that such an error lifts it above the
    `n_top`-th best; the sum is the number missed.
    """
    n_top = min(n_top, len(exact_V))
    if n_top == 0 or not len(estimate_U):
        return 1.0 if n_top else float("nan")
    lower = np.argsort(-estimate_V, kind="stable")[len(estimate_V) // 2 :]
    exact = np.concatenate([exact_C, exact_V[lower]])
    estimate = np.concatenate([estimate_C, estimate_V[lower]])
    threshold = np.sort(exact_V)[-n_top]
    if ratios:
        tiny = 1e-300
        errors = np.log(np.maximum(exact, tiny)) - np.log(np.maximum(estimate, tiny))
        needed_U = np.log(max(threshold, tiny)) - np.log(np.maximum(estimate_U, tiny))
    else:
        errors, needed_U = exact - estimate, threshold - estimate_U
    missed = 1 - np.searchsorted(np.sort(errors), needed_U, side="right") / len(errors)
    return float(n_top / (n_top + missed.sum()))
