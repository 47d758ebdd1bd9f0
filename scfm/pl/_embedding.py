"""`scfm.pl.embedding`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.pl._figure import COLORS, UNLABELLED, finish

LEGEND_ROWS = 16  # names in a column of the legend


@document
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

    A name has the same colour in every panel; panels with the same names share a legend.

    Parameters
    ----------
    adata
        With `obsm[basis]`, of which the first two columns are drawn.
    color
        Columns of `obs`: categories get a legend, numbers a colour bar.
    basis
        Key of `obsm`. For a UMAP of the model's embedding: `sc.pp.neighbors(adata, use_rep="X_scfm"); sc.tl.umap(adata)`.
    {figure}

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        If `basis` or a column of `color` is missing.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> axes = scfm.pl.embedding(adata, color="bulk_labels", basis="X_umap", show=False)
    >>> axes[0].get_title()
    'bulk_labels'
    """
    columns = [color] if isinstance(color, str) else list(color)
    _require(adata, columns, basis, ax)
    if ax is None:
        _, axes = plt.subplots(1, len(columns), figsize=(5.4 * len(columns), 4.4), squeeze=False, layout="constrained")
        panels = list(axes[0])
    else:
        panels = [ax]
    points = np.asarray(adata.obsm[basis])[:, :2]
    names = [_names(adata.obs[column]) for column in columns]
    every = sorted({name for panel_names in names if panel_names for name in panel_names})
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(every)}
    for place, (panel, column) in enumerate(zip(panels, columns)):
        last_of_its_names = names[place] not in names[place + 1 :]
        _scatter(panel, points, adata.obs[column], colors, legend=last_of_its_names)
        axis_name = {"umap": "UMAP", "tsne": "tSNE", "pca": "PC"}.get(basis.removeprefix("X_"), basis)
        panel.set(title=column, xticks=[], yticks=[], xlabel=f"{axis_name} 1", ylabel=f"{axis_name} 2")
    finish(panels[0], save=save, show=show)
    return panels


def _require(adata: anndata.AnnData, columns: list[str], basis: str, ax: Axes | None) -> None:
    if basis not in adata.obsm:
        raise KeyError(
            f"`basis` is {basis!r}, which is not in `adata.obsm` ({', '.join(adata.obsm) or 'empty'}). Make it with "
            '`sc.pp.neighbors(adata, use_rep="X_scfm"); sc.tl.umap(adata)`.'
        )
    if missing := [column for column in columns if column not in adata.obs]:
        raise KeyError(
            f"`color` names {', '.join(map(repr, missing))}, which `adata.obs` does not have "
            f"({', '.join(map(str, adata.obs))}). `scfm.tl.annotate` writes 'scfm_label'."
        )
    if ax is not None and len(columns) > 1:
        raise ValueError(f"`ax` takes one panel; `color` names {len(columns)} columns. Pass one, or leave out `ax`.")


def _names(values: pd.Series) -> list[str] | None:
    """Names of the categories that occur, sorted; None for numbers."""
    if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype):
        return None
    return sorted(values.dropna().astype(str).unique())


def _scatter(ax: Axes, points: np.ndarray, values: pd.Series, colors: dict[str, str], *, legend: bool) -> None:
    size = float(np.clip(12_000 / max(len(points), 1), 1, 20))
    # Drawn in one call and in an order that is shuffled but fixed, so that no class covers the others.
    order = np.random.default_rng(0).permutation(len(points))
    x, y = points[order].T
    names = _names(values)
    if names is None:
        drawn = ax.scatter(x, y, c=values.to_numpy()[order], s=size, linewidths=0, cmap="cividis")
        ax.figure.colorbar(drawn, ax=ax, fraction=0.04)
        return
    text = values.astype(object).where(values.notna(), None)
    color = np.array([UNLABELLED if name is None else colors[str(name)] for name in text])
    ax.scatter(x, y, s=size, linewidths=0, c=color[order])
    if legend:
        for name in names:
            ax.scatter([], [], color=colors[name], s=30, label=name)
        if values.isna().any():
            ax.scatter([], [], color=UNLABELLED, s=30, label="unlabelled")
        columns = -(-len(names) // LEGEND_ROWS)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, ncols=columns)
