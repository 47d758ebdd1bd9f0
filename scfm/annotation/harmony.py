"""Correction of coordinates for batches by Harmony (Korsunsky et al. 2019), as harmonypy computes it."""

# Axes: B cells, R components.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MAX_CLUSTERS = 100


def corrected_by_harmony(
    component_BR: NDArray[np.float64],
    batches: Mapping[str, NDArray[Any]],
    seed: int,
    *,
    cells_per_cluster: int = 30,
    **settings: float,
) -> NDArray[np.float32]:
    """Return the corrected coordinates, shape (B, R).

    Parameters
    ----------
    component_BR
        Coordinates of the cells, shape (B, R).
    batches
        Name of the batch of each cell, shape (B,), for one or several kinds of batches.
    seed
        Seed of its clusters.
    cells_per_cluster
        Number of cells for each cluster; there are at most 100 clusters.
    settings
        Further settings of `harmonypy.run_harmony`.

    Raises
    ------
    ImportError
        If harmonypy is not installed.
    """
    try:
        import harmonypy
    except ImportError as error:
        raise ImportError(
            "Integration by Harmony needs harmonypy: `pip install harmonypy`. Or train a copy of the model: "
            '`method="train"`.'
        ) from error
    corrected = harmonypy.run_harmony(
        component_BR,
        pd.DataFrame(dict(batches)),
        list(batches),
        nclust=max(2, min(len(component_BR) // cells_per_cluster, MAX_CLUSTERS)),
        verbose=False,
        random_state=seed,
        ncores=1,
        **settings,
    ).Z_corr
    corrected = np.asarray(corrected, dtype=np.float32)
    return corrected if corrected.shape == component_BR.shape else corrected.T
