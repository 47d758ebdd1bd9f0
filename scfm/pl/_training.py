"""`scfm.pl.training`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.errors import ModelTaskError
from scfm.models.model import Model
from scfm.pl._figure import COLORS, axes_of, finish


@document
def training(
    model: Model,
    *,
    smoothing: int = 10,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Loss of every step of every stage: single steps faint, their running mean strong.

    Parameters
    ----------
    model
        From `scfm.fit`.
    smoothing
        Steps of the running mean.
    {figure}

    Returns
    -------
    The axes. Stages stand one after the other; their losses measure different things and are not to be compared.

    Raises
    ------
    ModelTaskError
        If the model was not trained here, so that there are no losses.

    Examples
    --------
    >>> import scfm
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.pl.training(model, show=False).get_xlabel()
    'step'
    """
    stages = model.history.get("stages", [])
    if not stages:
        raise ModelTaskError("This model has no training history; `scfm.fit` makes one that does.")
    ax = axes_of(ax, 6.0, 3.2)
    start = 0
    for place, stage in enumerate(stages):
        losses = pd.Series(stage["losses"], dtype=float)
        steps = start + 1 + np.arange(len(losses))
        color = COLORS[place % len(COLORS)]
        ax.plot(steps, losses, color=color, alpha=0.25, lw=0.8)
        ax.plot(steps, losses.rolling(smoothing, min_periods=1).mean(), color=color, label=stage["name"])
        if start:
            ax.axvline(start + 0.5, color="#999999", lw=0.8, ls=":")
        start += len(losses)
    ax.set(xlabel="step", ylabel="loss", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    ax.grid(axis="y", alpha=0.3)
    finish(ax, save=save, show=show)
    return ax
