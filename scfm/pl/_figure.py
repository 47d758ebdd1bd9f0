"""What every figure shares: axes, finishing, saving, colours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

if TYPE_CHECKING:
    from matplotlib.axis import Axis

# Okabe and Ito's eight, then eight of Tol's and others' that stay apart from them and from each other as eyes with
# deuteranopia and protanopia see them (a test simulates it).
COLORS = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
    "#332288", "#7F0000", "#DDCC77", "#555555", "#999933", "#5D3A9B", "#6699CC", "#BBBBBB",
]  # fmt: skip
UNLABELLED = "#DDDDDD"
GREY = "#666666"


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The given axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    _, made = plt.subplots(figsize=(width, height), layout="constrained")
    return made


def power_in_label(axis: Axis, label: str) -> None:
    """Label an axis and put its power of ten into the label; matplotlib puts it where it covers other text."""
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
    """Column prefix of what a table of perturbations ranks by, and its words for an axis."""
    if not {"shift_mean", "goal_shift_mean"} & set(effects):
        raise KeyError(
            f"The table has no column 'shift_mean' ({', '.join(map(str, effects.columns[:8])) or 'no columns'}). Pass what "
            "`scfm.tl.perturb` or `scfm.tl.screen` returned."
        )
    if "goal_shift_mean" in effects:
        return "goal_shift", "shift toward the goal, change of cosine"
    return "shift", "shift of the embedding, 1 - cosine"


def name_points(ax: Axes, points: pd.DataFrame, *, size: float = 7) -> None:
    """Write the index of `points` (columns x and y) beside them, in order; a name that would cover an earlier one is left out."""
    middle = sum(ax.get_xlim()) / 2
    taken: list[tuple[float, float, float]] = []
    for name, x, y in zip(points.index.astype(str), points["x"], points["y"]):
        left = x > middle
        at_x, at_y = ax.transData.transform((x, y)) * 72 / ax.figure.dpi  # in points, as sizes of text are
        width = 0.7 * size * len(name)
        start = at_x - width if left else at_x
        if any(abs(at_y - other) < size + 1 and start < end and first < start + width for first, end, other in taken):
            continue
        taken.append((start, start + width, at_y))
        offset, side = ((-3, 3), "right") if left else ((3, 3), "left")
        ax.annotate(name, (x, y), offset, textcoords="offset points", ha=side, fontsize=size)


def finish(ax: Axes, *, save: str | Path | None, show: bool | None) -> None:
    """Write the figure to `save` if given, and show it unless `show` is False or it was saved."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show or (show is None and save is None):
        plt.show()
