"""`scfm.pl.report`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.models.model import Model
from scfm.pl._figure import COLORS, axes_of, finish


@document
def report(
    model: Model | pd.DataFrame,
    *,
    score: str = "macro_f1",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Bar chart of one score of the model and of the baselines on the same held-out cells, the highest on top.

    Parameters
    ----------
    model
        A model that was fitted with labels, or the table from `model.report()`.
    score
        Column of the report. For an error such as `ece`, the best method is at the bottom.
    {figure}

    Returns
    -------
    The axes. Bars of the model are blue, those of other methods gray.

    Raises
    ------
    ModelTaskError
        If the model was fitted without labels.
    KeyError
        If the report has no such score.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> scores = pd.DataFrame({"macro_f1": [0.70, 0.68]}, index=["scfm", "logistic regression"])
    >>> ax = scfm.pl.report(scores, show=False)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['logistic regression', 'scfm']
    """
    table = model if isinstance(model, pd.DataFrame) else model.report()
    if score not in table:
        raise KeyError(f"`score` is {score!r}, which the report does not have; choose one of {', '.join(table)}.")
    ranked = table[score].sort_values(kind="stable")
    ax = axes_of(ax, 6.0, 0.9 + 0.3 * len(ranked))
    place = np.arange(len(ranked))
    ours = ranked.index.astype(str).str.startswith("scfm")
    ax.barh(place, ranked, height=0.62, color=np.where(ours, COLORS[0], "#BBBBBB"))
    for row, value in enumerate(ranked):
        ax.text(value, row, f" {value:.3f}", va="center", fontsize=8)
    ax.set_yticks(place, ranked.index, fontsize=8)
    ax.set(
        xlim=(min(0, ranked.min()), ranked.max() * 1.12),
        xlabel=f"{score.replace('_', ' ').replace('f1', 'F1')} on held-out cells",
    )
    ax.spines[["top", "right"]].set_visible(False)
    finish(ax, save=save, show=show)
    return ax
