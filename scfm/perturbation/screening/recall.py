"""Estimate the recall of a screen, which computes only some genes exactly."""

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
    """Return the expected fraction of the `n_top` genes with the largest exact effects that was verified.

    Parameters
    ----------
    exact_V, estimate_V
        Exact and estimated effects of the verified genes, which have the largest estimates.
    exact_C, estimate_C
        Exact and estimated effects of random other genes.
    estimate_U
        Estimated effects of all genes that were not verified.
    n_top
        Number of best genes, at most the number of verified genes.
    ratios
        Whether errors are ratios (shifts, which are positive) or differences (goal shifts).

    Returns
    -------
    A number from 0 to 1.

    Notes
    -----
    Few of the random genes are among the best, so counting them would be inaccurate. Instead, the errors of the estimates are
    pooled from the random genes and the lower half of the verified ones. For each unverified gene, the probability is
    computed that an error from this pool makes its effect larger than that of a verified gene. The `n_top` best genes end at
    the verified gene at which the number of verified genes so far plus the sum of these probabilities reaches `n_top`.
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
        # Expected number of unverified genes that an error from the pool makes larger than this verified one.
        missed = (1 - np.searchsorted(errors, threshold - estimate_U, side="right") / len(errors)).sum()
        if found + missed >= n_top:
            break
    return float(found / n_top)
