"""What every figure shares: axes, finishing, saving, colors."""

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

# The eight colors of Okabe and Ito, then eight of Tol and others. Readers with deuteranopia or protanopia can distinguish all
# of them (a test simulates it).
COLORS = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
    "#332288", "#7F0000", "#DDCC77", "#555555", "#999933", "#5D3A9B", "#6699CC", "#BBBBBB",
]  # fmt: skip
UNLABELED_COLOR = "#dddddd"
UNASSIGNED = "unassigned"  # what `scfm.tl.annotate` calls a cell without a clear label
GRAY = "#666666"


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The given axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    _, made = plt.subplots(figsize=(width, height), layout="constrained")
    return made


def power_in_label(axis: Axis, label: str) -> None:
    """Label an axis, with its power of ten in the label: matplotlib would put the power where it covers other text."""
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
    """Prefix of the columns that a table of perturbations is sorted by, and the label of an axis for it."""
    if not {"shift_mean", "goal_shift_mean"} & set(effects):
        raise KeyError(
            f"The table has no column 'shift_mean' ({', '.join(map(str, effects.columns[:8])) or 'no columns'}). Pass what "
            "`scfm.tl.perturb` or `scfm.tl.screen` returned."
        )
    if "goal_shift_mean" in effects:
        return "goal_shift", "shift toward the goal, change of cosine"
    return "shift", "shift of the embedding, 1 - cosine"


def name_points(ax: Axes, points: pd.DataFrame, *, size: float = 7) -> None:
    """Write the index of `points` (columns x and y) next to them.

    Each name is written on the first of four sides on which it covers no earlier name and stays inside the axes; a name
    without such a side is left out.
    """
    ax.autoscale_view()  # positions on the page follow the limits, which matplotlib sets late
    scale = 72 / ax.figure.dpi  # from pixels to points, in which the size of text is given
    (left, bottom), (right, top) = ax.transAxes.transform([(0, 0), (1, 1)]) * scale
    taken: list[tuple[float, float, float, float]] = []
    for name, x, y in zip(points.index.astype(str), points["x"], points["y"]):
        at_x, at_y = ax.transData.transform((x, y)) * scale
        width, height = 0.65 * size * len(name), size + 1
        for toward_x, toward_y in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
            start = at_x + 3 if toward_x > 0 else at_x - 3 - width
            base = at_y + 3 if toward_y > 0 else at_y - 3 - height
            inside = left <= start and start + width <= right and bottom <= base and base + height <= top
            free = all(
                start >= x1 or x0 >= start + width or base >= y1 or y0 >= base + height for x0, x1, y0, y1 in taken
            )
            if inside and free:
                taken.append((start, start + width, base, base + height))
                side, rise = ("left" if toward_x > 0 else "right"), ("bottom" if toward_y > 0 else "top")
                offset = (3 * toward_x, 3 * toward_y)
                ax.annotate(name, (x, y), offset, textcoords="offset points", ha=side, va=rise, fontsize=size)
                break


def finish(ax: Axes, *, save: str | Path | None, show: bool | None) -> None:
    """Write the figure to `save` if given, and show it unless `show` is False or it was saved."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show or (show is None and save is None):
        plt.show()
