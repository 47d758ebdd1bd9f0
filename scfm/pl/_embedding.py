"""`scfm.pl.embedding`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm.pl._figure import COLORS, finish


def embedding(
    adata: anndata.AnnData,
    *,
    color: str | Sequence[str],
    basis: str = "X_umap",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes]:
    """Scatter the cells on a two-dimensional embedding, a panel a column of `obs`.

    Parameters
    ----------
    adata
        With `obsm[basis]`, of which the first two columns are drawn.
    color
        Columns of `obs`: categories get a legend, numbers a colour bar.
    basis
        Key of `obsm`. For a UMAP of the model's embedding: `sc.pp.neighbors(adata, use_rep="X_scfm"); sc.tl.umap(adata)`.
    ax
        Axes to draw on, for one panel; None to make them.
    show, save
        As in scanpy; `save` is a path.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        If `basis` or a column of `color` is missing.
    """
    columns = [color] if isinstance(color, str) else list(color)
    if basis not in adata.obsm:
        raise KeyError(
            f"`basis` is {basis!r}, which is not in `adata.obsm` ({', '.join(adata.obsm) or 'empty'}). Make it with "
            '`sc.pp.neighbors(adata, use_rep="X_scfm"); sc.tl.umap(adata)`.'
        )
    if missing := [column for column in columns if column not in adata.obs]:
        raise KeyError(f"`color` names {', '.join(map(repr, missing))}, which `adata.obs` does not have.")
    if ax is not None and len(columns) > 1:
        raise ValueError(f"`ax` takes one panel; `color` names {len(columns)} columns.")
    if ax is None:
        figure, axes = plt.subplots(1, len(columns), figsize=(6.4 * len(columns), 4.4), squeeze=False)
        panels = list(axes[0])
    else:
        figure, panels = ax.figure, [ax]
    points = np.asarray(adata.obsm[basis])[:, :2]
    for panel, column in zip(panels, columns):
        _scatter(panel, points, adata.obs[column])
        panel.set(
            title=column,
            xticks=[],
            yticks=[],
            xlabel=f"{basis.removeprefix('X_')} 1",
            ylabel=f"{basis.removeprefix('X_')} 2",
        )
    figure.tight_layout()
    finish(figure, save=save, show=show)
    return panels


def _scatter(ax: Axes, points: np.ndarray, values: pd.Series) -> None:
    size = float(np.clip(12_000 / max(len(points), 1), 1, 20))
    if pd.api.types.is_numeric_dtype(values.dtype):
        drawn = ax.scatter(*points.T, c=values, s=size, linewidths=0, cmap="cividis")
        ax.figure.colorbar(drawn, ax=ax, fraction=0.04)
        return
    categories = values.astype("category").cat
    for place, name in enumerate(categories.categories):
        chosen = (categories.codes == place).to_numpy()
        ax.scatter(*points[chosen].T, s=size, linewidths=0, color=COLORS[place % len(COLORS)], label=str(name))
    unlabelled = (categories.codes == -1).to_numpy()
    if unlabelled.any():
        ax.scatter(*points[unlabelled].T, s=size, linewidths=0, color="#DDDDDD", label="unlabelled", zorder=0)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, markerscale=2)
