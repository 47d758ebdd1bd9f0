"""`scfm.pl.perturbation` and `scfm.pl.volcano`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.pl._figure import COLORS, GREY, axes_of, finish, measure_of, name_points, power_in_label


@document
def perturbation(
    effects: pd.DataFrame,
    *,
    n_genes: int = 20,
    min_cells: int = 3,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Genes whose perturbation moves cells most: mean shift with its standard error, and the number of cells.

    Parameters
    ----------
    effects
        What `scfm.tl.perturb` returned; with a goal, shifts toward it are drawn.
    n_genes
        How many genes to draw.
    min_cells
        Leave out genes that fewer cells express, whose mean says little.
    {figure}

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If no gene is expressed in `min_cells` cells.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> columns = {"n_cells": [9, 7], "shift_mean": [0.02, 0.01], "shift_sem": [0.003, 0.002]}
    >>> ax = scfm.pl.perturbation(pd.DataFrame(columns, index=["CD74", "CST3"]), show=False)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['CST3', 'CD74']
    """
    measure, words = measure_of(effects)
    drawn = effects[effects["n_cells"] >= min_cells].nlargest(n_genes, f"{measure}_mean")[::-1]
    if drawn.empty:
        raise ValueError(
            f"No gene of `effects` is expressed in {min_cells} cells or more; lower `min_cells` or perturb more cells."
        )
    ax = axes_of(ax, 5.2, 1.0 + 0.22 * len(drawn))
    place = np.arange(len(drawn))
    error = drawn[f"{measure}_sem"].fillna(0)
    ax.errorbar(drawn[f"{measure}_mean"], place, xerr=error, fmt="o", color=COLORS[0], ecolor="#999999", ms=5, lw=1)
    for row, n_cells in enumerate(drawn["n_cells"]):
        ax.text(1.01, row, f"{n_cells} cells", transform=ax.get_yaxis_transform(), va="center", fontsize=7, color=GREY)
    ax.set_yticks(place, drawn.index, fontsize=8)
    ax.set_ylabel("perturbed gene")
    if measure == "shift":
        ax.set_xlim(0, None)
    power_in_label(ax.xaxis, f"{words} (mean, s.e.m.)")
    ax.grid(axis="x", alpha=0.3)
    finish(ax, save=save, show=show)
    return ax


@document
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
        How many of the coloured ones to name at most, the surest first.
    {figure}

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
    points = pd.DataFrame({"x": mean[sure], "y": height[sure]})
    name_points(ax, points.nlargest(n_names, ["y", "x"]))
    ax.set_ylabel("-log10 false discovery rate")
    power_in_label(ax.xaxis, f"{words} (mean)")
    finish(ax, save=save, show=show)
    return ax
