"""`scfm.pl.volcano`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm.pl._figure import COLORS, GREY, axes_of, finish, measure_of, power_in_label


def volcano(
    effects: pd.DataFrame,
    *,
    max_fdr: float = 0.05,
    n_names: int = 8,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Size of every perturbation's effect against how surely it differs from the null.

    Parameters
    ----------
    effects
        What `scfm.tl.perturb` or `scfm.tl.screen` returned.
    max_fdr
        False discovery rate up to which a perturbation is drawn in colour; the dashed line.
    n_names
        How many of the coloured ones to name, the surest first.
    ax, show, save
        As in `scfm.pl.embedding`.

    Returns
    -------
    The axes. Tests take cells as independent; where they come from few donors, the vertical axis is too high.

    Raises
    ------
    ValueError
        If the table has no tested perturbation.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> effects = pd.DataFrame({"shift_mean": [0.02, 0.01], "fdr": [0.001, 0.6]}, index=["CD74", "CST3"])
    >>> ax = scfm.pl.volcano(effects, show=False)
    >>> [text.get_text() for text in ax.texts]
    ['CD74']
    """
    measure, words = measure_of(effects)
    tested = effects.dropna(subset=["fdr"]) if "fdr" in effects else effects[:0]
    if tested.empty:
        raise ValueError("No perturbation of `effects` has a false discovery rate; perturb more genes, or more cells.")
    smallest = tested["fdr"][tested["fdr"] > 0].min()
    height = -np.log10(tested["fdr"].clip(lower=smallest if np.isfinite(smallest) else 1e-300))
    sure = tested["fdr"] <= max_fdr
    ax = axes_of(ax, 5.2, 4.0)
    mean = tested[f"{measure}_mean"]
    ax.scatter(mean[~sure], height[~sure], s=10, color="#BBBBBB", linewidths=0)
    ax.scatter(mean[sure], height[sure], s=14, color=COLORS[5], linewidths=0)
    ax.axhline(-np.log10(max_fdr), color=GREY, lw=0.8, ls="--")
    named = tested[sure].assign(_height=height[sure]).nlargest(n_names, ["_height", f"{measure}_mean"])
    for gene, row in named.iterrows():
        ax.annotate(str(gene), (row[f"{measure}_mean"], row["_height"]), (3, 3), textcoords="offset points", fontsize=7)
    ax.set_ylabel("-log10 false discovery rate")
    power_in_label(ax.xaxis, f"{words} (mean)")
    finish(ax, save=save, show=show)
    return ax
