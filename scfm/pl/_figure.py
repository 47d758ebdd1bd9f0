"""Code that all figures use: axes, labels, colors, saving and showing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from scfm.vocab import SYMBOL_COLUMNS

if TYPE_CHECKING:
    from matplotlib.axis import Axis

# The eight colors of Okabe and Ito, then eight of Tol and others. Readers with deuteranopia or protanopia can distinguish all
# of them (a test simulates both).
COLORS = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
    "#332288", "#7F0000", "#DDCC77", "#555555", "#999933", "#5D3A9B", "#6699CC", "#BBBBBB",
]  # fmt: skip
UNLABELED_COLOR = "#dddddd"
UNASSIGNED = "unassigned"  # label that `scfm.tl.annotate` gives to a cell that it cannot classify
GRAY = "#666666"
N_SIDES = 8  # number of directions from a point in which its name can be written
# Measures of a perturbation by the prefix of their columns. A table is sorted by the first of these that it has.
MEASURES = {
    "label_shift": "change of the log-odds of the cell's label",
    "goal_shift": "shift toward the goal, change of cosine",
    "shift": "shift of the embedding, 1 - cosine",
}


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The given axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    _, made = plt.subplots(figsize=(width, height), layout="constrained")
    return made


def power_in_label(axis: Axis, label: str) -> None:
    """Label an axis and write its power of ten in the label, because matplotlib would write it over other text."""
    axis.set_major_formatter(ScalarFormatter(useOffset=False))
    low, high = axis.get_view_interval()
    largest = max(abs(low), abs(high))
    power = 0 if largest == 0 else int(f"{largest:e}".partition("e")[2])
    if -2 <= power <= 4:
        axis.set_label_text(label)
        return
    axis.set_major_formatter(lambda value, _: f"{value / 10.0**power:g}")
    axis.set_label_text(f"{label}  [$10^{{{power}}}$]")


def measure_of(effects: pd.DataFrame) -> tuple[str, str]:
    """Return the column prefix of the measure that a table of perturbations is sorted by, and an axis label for it."""
    for measure, words in MEASURES.items():
        if f"{measure}_mean" in effects:
            return measure, words
    raise KeyError(
        f"The table has no column 'shift_mean' ({', '.join(map(str, effects.columns[:8])) or 'no columns'}). Pass what "
        "`scfm.tl.perturb` or `scfm.tl.screen` returned."
    )


def largest(effects: pd.DataFrame, measure: str, n: int) -> pd.DataFrame:
    """The `n` rows with the largest mean effects, in descending order; for effects on a label, the lowest, ascending."""
    column = f"{measure}_mean"
    return effects.nsmallest(n, column) if measure == "label_shift" else effects.nlargest(n, column)


def named(effects: pd.DataFrame) -> pd.DataFrame:
    """The table with one name per row as its index: the perturbed gene, or the perturbed and the affected gene."""
    if "affected" not in effects:
        return effects.set_axis(symbols_or_names(effects, "gene"), axis=0)
    pairs = symbols_or_names(effects, "gene") + " on " + symbols_or_names(effects, "affected")
    return effects.set_axis(pairs, axis=0)


def symbols_or_names(table: pd.DataFrame, column: str) -> pd.Index:
    """Symbols of the genes of a column, or of the index; the name of a gene without one. For tables of Ensembl ids."""
    names = pd.Index(table.get(column, table.index)).astype(str)
    added = SYMBOL_COLUMNS[column]
    return names if added not in table else pd.Index(np.where(table[added] == "", names, table[added]))


def name_points(ax: Axes, points: pd.DataFrame, *, others: pd.DataFrame | None = None, size: float = 7) -> None:
    """Write the index of `points` (columns x and y) next to them; call it after everything else is drawn.

    A name must stay inside the axes and must not cover an earlier name. Of these positions, the one that covers the fewest
    points (of `points` and `others`) is used; among equals, the nearest. A name that is not next to its point is connected to
    it by a line. A name without such a position is left out.
    """
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # positions are known only after the layout is computed
    scale = 72 / figure.dpi  # pixels to points, the unit of text sizes
    (left, bottom), (right, top) = ax.transAxes.transform([(0, 0), (1, 1)]) * scale
    drawn = points if others is None else pd.concat([points, others])
    dots = ax.transData.transform(drawn[["x", "y"]].to_numpy(dtype=float)) * scale
    taken = np.zeros((0, 4))
    for name, x, y in zip(points.index.astype(str), points["x"], points["y"]):
        box = np.array([TextPath((0, 0), name, size=size).get_extents().width + 2, size + 1])
        center = ax.transData.transform((x, y)) * scale + _offsets(box)
        low, high = center - box / 2, center + box / 2
        inside = (low >= (left, bottom)).all(1) & (high <= (right, top)).all(1)
        apart = np.any((low[:, None] >= taken[None, :, 2:]) | (high[:, None] <= taken[None, :, :2]), axis=-1)
        free = np.all(apart, axis=1)
        covered = ((dots > low[:, None] - 1) & (dots < high[:, None] + 1)).all(-1).sum(1)
        allowed = np.flatnonzero(inside & free)
        if not len(allowed):
            continue
        best = allowed[np.lexsort((allowed, 3 * covered[allowed] + allowed // N_SIDES))[0]]
        taken = np.vstack([taken, [*low[best], *high[best]]])
        line = {"arrowstyle": "-", "color": GRAY, "lw": 0.5, "shrinkA": 0, "shrinkB": 1} if best >= N_SIDES else None
        offset = _offsets(box)[best]
        ax.annotate(
            name, (x, y), offset, textcoords="offset points", ha="center", va="center", fontsize=size, arrowprops=line
        )


def _offsets(box: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions to try for the center of a text of this size (in points), nearest first, shape (5 N_SIDES, 2)."""
    sides = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)], dtype=float)
    return np.concatenate([sides * (box / 2 + gap) for gap in (3, 10, 20, 34, 50)])


def finish(ax: Axes, *, save: str | Path | None, show: bool | None) -> None:
    """Write the figure to `save` if it is given. Show the figure unless `show` is False or the figure was saved."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show or (show is None and save is None):
        plt.show()
