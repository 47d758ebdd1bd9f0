"""`scfm.pl.training`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.errors import ModelTaskError
from scfm.models.model import Model
from scfm.pl._figure import COLORS, finish


@document
def training(
    model: Model,
    *,
    smoothing: int = 10,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes]:
    """Training curves, with one panel per stage: the loss of each step (faint) and its moving average.

    Parameters
    ----------
    model
        A model from `scfm.fit` or `scfm.pretrain`, or a saved one. Losses of validation cells are not drawn.
    smoothing
        Number of steps of the moving average, centered at each step; at the ends, there are fewer. 1 for no average.
    {figure}

    Returns
    -------
    The axes, one for each stage. The stages have different losses, which cannot be compared.

    Raises
    ------
    ModelTaskError
        If the model has no training history.
    ValueError
        If `ax` has another number of axes than the model has stages.

    Examples
    --------
    >>> import scfm
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> [panel.get_title() for panel in scfm.pl.training(model, show=False)]
    ['pretraining']
    """
    stages = model.history.get("stages", [])
    if not stages:
        raise ModelTaskError("This model has no training history; `scfm.fit` makes one that does.")
    panels = _panels(ax, len(stages))
    for number, (panel, stage) in enumerate(zip(panels, stages)):
        losses = pd.Series(stage["losses"], dtype=float)
        steps = 1 + np.arange(len(losses))
        color = COLORS[number % len(COLORS)]
        panel.plot(steps, losses, color=color, alpha=0.25, lw=0.8)
        panel.plot(
            steps,
            losses.rolling(smoothing, center=True, min_periods=1).mean(),
            color=color,
            label=f"average over {smoothing} steps",
        )
        panel.set(title=stage["name"], xlabel="step", ylabel="loss")
        panel.grid(axis="y", alpha=0.3)
    if smoothing > 1:
        panels[-1].legend(frameon=False, fontsize=8)
    finish(panels[0], save=save, show=show)
    return panels


def _panels(ax: Axes | Sequence[Axes] | None, n: int) -> list[Axes]:
    if ax is None:
        _, made = plt.subplots(1, n, figsize=(0.6 + 3.8 * n, 3.0), squeeze=False, layout="constrained")
        return list(made[0])
    given = [ax] if isinstance(ax, Axes) else list(ax)
    if len(given) != n:
        raise ValueError(f"`ax` has {len(given)} axes, and the model has {n} stages of training; pass one for each.")
    return given
