"""`scfm.pl.perturbation` and `scfm.pl.volcano`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.pl._figure import (
    COLORS,
    GRAY,
    UNLABELED_COLOR,
    axes_of,
    finish,
    largest,
    measure_of,
    name_points,
    named,
    power_in_label,
)

MIN_GENES_IN_BAND = 20  # fewer genes are too few to estimate the quantiles


@document
def perturbation(
    effects: pd.DataFrame,
    *,
    n_genes: int = 20,
    min_cells: int = 3,
    max_fdr: float = 0.05,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the genes with the largest effects: the mean effect, its standard error, and the number of cells.

    Parameters
    ----------
    effects
        Table from `scfm.tl.perturb` or `scfm.tl.screen`. The measure by which the table is sorted is drawn: the change of the
        log-odds of the label, the shift toward the goal, or the shift.
    n_genes
        Number of genes to draw.
    min_cells
        Genes that are expressed in fewer cells are left out, because their means are uncertain.
    max_fdr
        Genes with a false discovery rate up to this get a filled marker, other genes an empty one. Without the column `fdr`,
        all markers are filled.
    {figure}

    Returns
    -------
    The axes, with the largest effect on top. For effects on a label the lowest value is on top: the genes whose perturbation
    lowers the log-odds of the label most. The gray band contains the middle 95 % of the mean effects of the null genes, or,
    if the table has no null, of its genes with at least `min_cells` cells. It is drawn for 20 genes or more. The band shows
    how large effects usually are; it is not a significance limit.

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
    measured = named(effects[effects["n_cells"] >= min_cells])
    drawn = largest(measured, measure, n_genes)[::-1]
    if drawn.empty:
        raise ValueError(
            f"No gene of `effects` is expressed in {min_cells} cells or more; lower `min_cells` or perturb more cells."
        )
    ax = axes_of(ax, 5.2, 1.2 + 0.22 * len(drawn))
    position = np.arange(len(drawn))
    mean, error = drawn[f"{measure}_mean"].to_numpy(), drawn[f"{measure}_sem"].fillna(0)
    _draw_null_band(ax, measured, measure)
    ax.errorbar(mean, position, xerr=error, fmt="none", ecolor="#999999", lw=1)
    significant = drawn["fdr"].to_numpy() <= max_fdr if "fdr" in drawn else np.ones(len(drawn), dtype=bool)
    filled = np.where(significant, COLORS[0], "white")
    ax.scatter(mean, position, c=filled, edgecolors=COLORS[0], s=26, zorder=3)
    for row, n_cells in enumerate(drawn["n_cells"]):
        ax.text(1.01, row, f"{n_cells} cells", transform=ax.get_yaxis_transform(), va="center", fontsize=7, color=GRAY)
    ax.set_yticks(position, drawn.index, fontsize=8)
    ax.set(ylabel="perturbed gene", ylim=(-0.7, len(drawn) - 0.3))
    if "fdr" in drawn:
        for color, label in ((COLORS[0], f"FDR up to {max_fdr:g}"), ("white", "FDR above")):
            ax.scatter([], [], c=color, edgecolors=COLORS[0], s=26, label=label)
    power_in_label(ax.xaxis, f"{words} (mean, s.e.m.)")
    ax.grid(axis="x", alpha=0.3)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=7)
    finish(ax, save=save, show=show)
    return ax


def _draw_null_band(ax: Axes, effects: pd.DataFrame, measure: str) -> None:
    """Shade the middle 95 % of the mean effects of the null genes or of all genes. For a signed effect, also mark 0."""
    if measure != "shift":
        ax.axvline(0, color=GRAY, lw=0.8, ls=":")
    means, kind = effects.attrs.get("null_means", ()), "null genes"
    if not len(means):
        means, kind = effects[f"{measure}_mean"], "pairs of genes" if "affected" in effects else "genes"
    if len(means) < MIN_GENES_IN_BAND:
        return
    low, high = np.quantile(means, [0.025, 0.975])
    ax.axvspan(low, high, color=UNLABELED_COLOR, alpha=0.6, lw=0, label=f"middle 95 % of {len(means)} {kind}")


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
    """Volcano plot: mean effect (x) and -log10 of the false discovery rate (y) of each perturbation.

    Parameters
    ----------
    effects
        Table from `scfm.tl.perturb` or `scfm.tl.screen`.
    max_fdr
        Perturbations with a false discovery rate up to this are colored. A dashed line marks it.
    n_names
        Maximum number of perturbations to name; the most significant ones are chosen.
    {figure}

    Returns
    -------
    The axes. The tests treat cells as independent. If the cells come from few donors, the p-values are too small.

    Raises
    ------
    ValueError
        If no perturbation of the table was tested.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> effects = pd.DataFrame({"shift_mean": [0.02, 0.01], "fdr": [0.001, 0.6]}, index=["CD74", "CST3"])
    >>> ax = scfm.pl.volcano(effects, show=False)
    >>> [text.get_text() for text in ax.texts]
    ['FDR = 0.05', 'CD74']
    """
    measure, words = measure_of(effects)
    tested = named(effects.dropna(subset=["fdr"]) if "fdr" in effects else effects[:0])
    if tested.empty:
        raise ValueError("No perturbation of `effects` has a false discovery rate; perturb more genes, or more cells.")
    smallest = tested["fdr"][tested["fdr"] > 0].min()
    height = -np.log10(tested["fdr"].clip(lower=smallest if np.isfinite(smallest) else 1e-300))
    sure = tested["fdr"] <= max_fdr
    ax = axes_of(ax, 5.2, 4.0)
    mean = tested[f"{measure}_mean"]
    ax.scatter(mean[~sure], height[~sure], s=10, color="#BBBBBB", linewidths=0)
    ax.scatter(mean[sure], height[sure], s=14, color=COLORS[5], linewidths=0)
    ax.axhline(-np.log10(max_fdr), color=GRAY, lw=0.8, ls="--")
    side = ax.get_yaxis_transform()
    height_of_line, words_of_line = -np.log10(max_fdr), f"FDR = {max_fdr:g}"
    ax.text(0.99, height_of_line, words_of_line, transform=side, ha="right", va="bottom", fontsize=7, color=GRAY)
    ax.set_ylabel("-log10 false discovery rate")
    power_in_label(ax.xaxis, f"{words} (mean)")
    points = pd.DataFrame({"x": mean, "y": height, "size": mean.abs()})
    name_points(ax, points[sure].nlargest(n_names, ["y", "size"]), others=points)
    finish(ax, save=save, show=show)
    return ax
