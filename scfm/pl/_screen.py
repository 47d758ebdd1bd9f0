"""`scfm.pl.screen`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.pl._figure import COLORS, GRAY, axes_of, finish, largest, measure_of, name_points, power_in_label


@document
def screen(
    table: pd.DataFrame,
    *,
    n_names: int = 8,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Scatter plot of estimated (x) and exact (y) effects, for the genes whose exact effects a screen computed.

    Parameters
    ----------
    table
        Table from `scfm.tl.screen`.
    n_names
        Maximum number of genes to name; those with the largest exact effects are chosen.
    {figure}

    Returns
    -------
    The axes. On the dashed line, estimate and exact value are equal. If the table has `attrs["recall_estimate"]`, the title
    gives this estimated recall, which `scfm.tl.screen` defines.

    Raises
    ------
    ValueError
        If no gene was deleted exactly.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> columns = {"shift_mean": [0.02, 0.01], "estimate_mean": [0.018, 0.012], "exact": [True, True]}
    >>> ax = scfm.pl.screen(pd.DataFrame(columns, index=["CD74", "CST3"]), show=False)
    >>> [text.get_text() for text in ax.texts]
    ['CD74', 'CST3']
    """
    measure, words = measure_of(table)
    exact = table[table["exact"]] if "exact" in table else table[:0]
    if exact.empty:
        raise ValueError("No gene of `table` was deleted exactly; run `scfm.tl.screen` with `n_verify` above 0.")
    mean = exact[f"{measure}_mean"]
    ax = axes_of(ax, 4.6, 4.2)
    ax.scatter(exact["estimate_mean"], mean, s=16, color=COLORS[0], linewidths=0)
    low, high = min(exact["estimate_mean"].min(), mean.min()), max(exact["estimate_mean"].max(), mean.max())
    ax.plot([low, high], [low, high], color=GRAY, lw=0.8, ls="--")
    if (recall := table.attrs.get("recall_estimate")) is not None:
        ax.set_title(f"{len(exact)} of {len(table)} genes exact; estimated recall {recall:.0%}", fontsize=9)
    power_in_label(ax.xaxis, f"estimated {words}")
    power_in_label(ax.yaxis, f"exact {words}")
    points = pd.DataFrame({"x": exact["estimate_mean"], "y": mean})
    name_points(ax, points.loc[largest(exact, measure, n_names).index], others=points)
    finish(ax, save=save, show=show)
    return ax
