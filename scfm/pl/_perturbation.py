"""`scfm.pl.perturbation`."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm.pl._figure import COLORS, finish


def perturbation(
    effects: pd.DataFrame,
    *,
    n_genes: int = 20,
    min_cells: int = 3,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Genes whose deletion moves cells most: mean shift with its standard error, and the number of cells.

    Parameters
    ----------
    effects
        What `scfm.tl.perturb` returned.
    n_genes
        How many genes to draw.
    min_cells
        Leave out genes that fewer cells express, whose mean says little.
    ax, show, save
        As in `scfm.pl.embedding`.

    Returns
    -------
    The axes.
    """
    drawn = effects[effects["n_cells"] >= min_cells].nlargest(n_genes, "shift_mean")[::-1]
    if drawn.empty:
        raise ValueError(
            f"No gene of `effects` is expressed in {min_cells} cells or more; lower `min_cells` or perturb more cells."
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(5.2, 1.2 + 0.24 * len(drawn)))
    place = np.arange(len(drawn))
    ax.errorbar(
        drawn["shift_mean"], place, xerr=drawn["shift_sem"], fmt="o", color=COLORS[0], ecolor="#999999", ms=5, lw=1
    )
    for row, n_cells in zip(place, drawn["n_cells"]):
        ax.annotate(
            f"n={n_cells}",
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="#666666",
        )
    ax.set_yticks(place, drawn.index)
    ax.set(
        xlabel="shift of the cell's embedding (1 - cosine), mean and standard error",
        xlim=(0, None),
        title="deleted gene",
    )
    ax.grid(axis="x", alpha=0.3)
    finish(ax.figure, save=save, show=show)
    return ax
