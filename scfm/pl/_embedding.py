"""`scfm.pl.embedding`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from scfm._docs import document
from scfm.pl._figure import COLORS, UNASSIGNED, UNLABELED_COLOR, finish

LEGEND_ROWS = 16  # maximum number of names in one column of the legend
MAX_COLUMNS = 4  # maximum number of panels side by side

Palette = str | Sequence[str] | Mapping[str, str]


@document
def embedding(
    adata: anndata.AnnData,
    *,
    color: str | Sequence[str],
    basis: str = "umap",
    layer: str | None = None,
    palette: Palette | None = None,
    size: float | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    **options: Any,
) -> list[Axes]:
    """Scatter plot of the cells on a two-dimensional embedding, with one panel per column of `obs` or gene, four in a row.

    A category has the same color in all panels. Panels with exactly the same categories have one legend. Cells without a
    category, and cells of the category "unassigned", are gray.

    Parameters
    ----------
    adata
        Cells with the embedding in `obsm`; its first two columns are drawn.
    color
        Columns of `obs` or names of genes. Categories get a legend; numbers get a color bar.
    basis
        Key of `obsm`, with or without its prefix `X_`. To make a UMAP of the model's embedding:
        `sc.pp.neighbors(adata, use_rep="X_scfm"); sc.tl.umap(adata)`.
    layer
        Layer with the values of genes. None for `X`. Counts are drawn as log(1 + count).
    palette
        Colors of categories: a list in the order of the categories, or a mapping of name to color. For numbers, the name of a
        colormap. None for the colors in `uns[f"{column}_colors"]`. If these are missing, up to 16 categories get colors that
        color-blind readers can distinguish, and more categories get scanpy's palette.
    size
        Area of a marker, as `s` of `matplotlib.axes.Axes.scatter`. None to choose it by the number of cells.
    {figure}
    options
        Further arguments of `matplotlib.axes.Axes.scatter`.

    Returns
    -------
    The axes, one for each entry of `color`.

    Raises
    ------
    KeyError
        If `basis` or an entry of `color` is missing.
    ValueError
        If `ax` is given for several panels, or `palette` has too few colors.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> axes = scfm.pl.embedding(adata, color=["bulk_labels", "CD74"], show=False)
    >>> [panel.get_title() for panel in axes]
    ['bulk_labels', 'CD74']
    """
    columns = [color] if isinstance(color, str) else list(color)
    key = _require(adata, columns, basis, ax)
    points = np.asarray(adata.obsm[key])[:, :2]
    values = [_values(adata, column, layer) for column in columns]
    colors = _colors_of_panels(adata, columns, values, palette)
    panels = [ax] if ax is not None else _panels(colors)
    options = {"s": float(np.clip(12_000 / max(len(points), 1), 1, 20)) if size is None else size, **options}
    axis_name = {"umap": "UMAP", "tsne": "tSNE", "pca": "PC"}.get(key.removeprefix("X_"), key)
    for number, (panel, column) in enumerate(zip(panels, columns)):
        if (own := colors[number]) is None:
            _draw_numbers(
                panel, points, values[number], is_gene=column not in adata.obs, palette=palette, options=options
            )
        else:
            _draw_categories(
                panel, points, values[number], colors=own, options=options, legend=_has_legend(colors, number)
            )
        panel.set(title=column, xticks=[], yticks=[], xlabel=f"{axis_name} 1", ylabel=f"{axis_name} 2")
    finish(panels[0], save=save, show=show)
    return panels


def _require(adata: anndata.AnnData, columns: list[str], basis: str, ax: Axes | None) -> str:
    """The key of `obsm`. Raises an error if the key, a column or a gene is missing."""
    key = basis if basis in adata.obsm else f"X_{basis}"
    if key not in adata.obsm:
        raise KeyError(
            f"`basis` is {basis!r}, which is not in `adata.obsm` ({', '.join(adata.obsm) or 'empty'}). Make it with "
            '`sc.pp.neighbors(adata, use_rep="X_scfm"); sc.tl.umap(adata)`.'
        )
    if missing := [column for column in columns if column not in adata.obs and column not in adata.var_names]:
        raise KeyError(
            f"`color` names {', '.join(map(repr, missing))}, which is neither a column of `adata.obs` "
            f"({', '.join(map(str, adata.obs))}) nor a gene of `adata.var_names`. `scfm.tl.annotate` writes 'scfm_label'."
        )
    if ax is not None and len(columns) > 1:
        raise ValueError(f"`ax` takes one panel; `color` names {len(columns)} columns. Pass one, or leave out `ax`.")
    return key


def _values(adata: anndata.AnnData, column: str, layer: str | None) -> pd.Series:
    """A column of `obs`, or the values of a gene."""
    return adata.obs[column] if column in adata.obs else pd.Series(adata.obs_vector(column, layer=layer))


def _categories(values: pd.Series) -> list[str] | None:
    """Names of the categories that occur: in their order if the column is categorical, else sorted. None for numbers."""
    if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype):
        return None
    present = set(values.dropna().astype(str))
    if isinstance(values.dtype, pd.CategoricalDtype):
        return [str(name) for name in values.cat.categories if str(name) in present]
    return sorted(present)


def _has_legend(colors: Sequence[dict[str, str] | None], number: int) -> bool:
    """Whether this panel shows a legend: it has categories, and no later panel has the same ones."""
    own = colors[number]
    return own is not None and not any(other is not None and set(other) == set(own) for other in colors[number + 1 :])


def _panels(colors: Sequence[dict[str, str] | None]) -> list[Axes]:
    """Axes of a new figure that is wide enough for the panels and their legends."""
    n_rows = -(-len(colors) // MAX_COLUMNS)
    width_of_row = np.zeros(n_rows)
    for number, own in enumerate(colors):
        width_of_row[number // MAX_COLUMNS] += 4.7
        if own and _has_legend(colors, number):
            width_of_row[number // MAX_COLUMNS] += -(-len(own) // LEGEND_ROWS) * (0.35 + 0.075 * max(map(len, own)))
    size = (width_of_row.max(), 4.4 * n_rows)
    _, axes = plt.subplots(n_rows, min(len(colors), MAX_COLUMNS), figsize=size, squeeze=False, layout="constrained")
    for unused in axes.ravel()[len(colors) :]:
        unused.remove()
    return list(axes.ravel()[: len(colors)])


def _colors_of_panels(
    adata: anndata.AnnData, columns: Sequence[str], values: Sequence[pd.Series], palette: Palette | None
) -> list[dict[str, str] | None]:
    """Colors of the categories of each panel; None for numbers. A category has the same color in all panels.

    The color of a category is that of `palette`; else that of `uns`; else that of another panel; else a default color.
    """
    stored = [_stored_colors(adata, column, series) for column, series in zip(columns, values)]
    shared = {name: color for panel in reversed(stored) for name, color in panel.items()}
    colors: list[dict[str, str] | None] = []
    for own, panel_values in zip(stored, values):
        found = _colors_of(panel_values, palette, {**shared, **own})
        shared = {**(found or {}), **shared}
        colors.append(found)
    return colors


def _colors_of(values: pd.Series, palette: Palette | None, known: Mapping[str, str]) -> dict[str, str] | None:
    """Color of each category of a panel; None for numbers. Without a `palette`, the colors in `known` are used."""
    names = _categories(values)
    if names is None:
        return None
    if isinstance(palette, Mapping):
        given = {name: palette[name] for name in names if name in palette}
    elif palette is not None and not isinstance(palette, str):
        given = dict(zip(names, palette))
    else:
        given = {name: known[name] for name in names if name in known}
    given = {name: to_hex(color) for name, color in given.items()}
    if UNASSIGNED in names:
        given.setdefault(UNASSIGNED, UNLABELED_COLOR)
    unused = [color for color in _default_colors(len(names)) if to_hex(color) not in given.values()]
    rest = [name for name in names if name not in given]
    if palette is not None and not isinstance(palette, str) and rest:
        raise ValueError(f"`palette` has no color for {', '.join(map(repr, rest[:5]))}; give one for each category.")
    return {**{name: unused[number % len(unused)] for number, name in enumerate(rest)}, **given}


def _stored_colors(adata: anndata.AnnData, column: str, values: pd.Series) -> dict[str, str]:
    """The colors that scanpy stores in `uns`; empty unless each category has one."""
    stored = adata.uns.get(f"{column}_colors")
    if stored is None or not isinstance(values.dtype, pd.CategoricalDtype):
        return {}
    categories = [str(name) for name in values.cat.categories]
    return dict(zip(categories, map(str, stored))) if len(stored) >= len(categories) else {}


def _default_colors(n: int) -> list[str]:
    """The 16 colors of scfm for up to 16 categories, and the 102 of scanpy for more."""
    if n <= len(COLORS):
        return COLORS
    from scanpy.plotting.palettes import default_102

    return list(default_102)


def _shuffled(n: int) -> NDArray[np.int64]:
    """A fixed random order in which to draw the cells, so that no category covers the others."""
    return np.random.default_rng(0).permutation(n)


def _draw_numbers(
    ax: Axes,
    points: np.ndarray,
    values: pd.Series,
    *,
    is_gene: bool,
    palette: Palette | None,
    options: dict[str, Any],
) -> None:
    """Draw numbers. Counts of a gene are drawn as logarithms, because a few cells have many times more than the others."""
    order = _shuffled(len(points))
    colormap = mpl.colormaps[palette] if isinstance(palette, str) else mpl.colormaps["cividis"]
    x, y = points[order].T
    number_B = np.asarray(values, dtype=float)
    are_counts = is_gene and bool(((number_B >= 0) & (number_B == np.floor(number_B))).all())
    color_B = np.log1p(number_B) if are_counts else number_B
    drawn = ax.scatter(x, y, c=color_B[order], **{"linewidths": 0, "cmap": colormap, **options})
    ax.figure.colorbar(drawn, ax=ax, fraction=0.04, label="log(1 + count)" if are_counts else None)


def _draw_categories(
    ax: Axes,
    points: np.ndarray,
    values: pd.Series,
    *,
    colors: dict[str, str],
    options: dict[str, Any],
    legend: bool,
) -> None:
    order = _shuffled(len(points))
    x, y = points[order].T
    text = values.astype(object).where(values.notna(), None)
    color = np.array([UNLABELED_COLOR if name is None else colors[str(name)] for name in text])
    ax.scatter(x, y, c=color[order], **{"linewidths": 0, **options})
    if not legend:
        return
    names = [name for name in _categories(values) or [] if name != UNASSIGNED]
    shown = [*names, *([UNASSIGNED] if UNASSIGNED in colors else [])]
    for name in shown:
        ax.scatter([], [], color=colors[name], s=30, label=name)
    if values.isna().any():
        ax.scatter([], [], color=UNLABELED_COLOR, s=30, label="unlabeled")
    columns = -(-len(shown) // LEGEND_ROWS)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, ncols=columns)
