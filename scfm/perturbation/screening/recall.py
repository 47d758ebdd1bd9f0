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
    """Expected fraction of the exact `n_top` best that is among the verified.

    Parameters
    ----------
    exact_V, estimate_V
        Of the verified genes, the best by estimate.
    exact_C, estimate_C
        Of random genes outside them.
    estimate_U
        Of all genes that were not verified as the best.
    n_top
        Number of best genes that should be found; at most the number verified.
    ratios
        Whether errors are ratios (shifts, which are positive) or differences (shifts toward a goal).

    Returns
    -------
    From 0 to 1.

    Notes
    -----
    Counting hits among a few random genes has no power. Instead the errors of the random genes are pooled with those of the
    lower half of the verified ones, and each unverified gene gets the probability that such an error lifts it above a
    verified one. The best end at the verified gene at which the number of verified genes so far, plus the sum of these
    probabilities, reaches `n_top`.
    """
    n_top = min(n_top, len(exact_V))
    if n_top == 0 or not len(estimate_U):
        return 1.0 if n_top else float("nan")
    lower = np.argsort(-estimate_V, kind="stable")[len(estimate_V) // 2 :]
    exact = np.concatenate([exact_C, exact_V[lower]])
    estimate = np.concatenate([estimate_C, estimate_V[lower]])
    if ratios:
        exact, estimate, exact_V, estimate_U = (
            np.log(np.maximum(x, 1e-300)) for x in (exact, estimate, exact_V, estimate_U)
        )
    errors = np.sort(exact - estimate)
    for found, threshold in enumerate(-np.sort(-exact_V)[:n_top], start=1):
        # How many unverified genes an error from the pool lifts above this verified one.
        missed = (1 - np.searchsorted(errors, threshold - estimate_U, side="right") / len(errors)).sum()
        if found + missed >= n_top:
            break
    return float(found / n_top)
