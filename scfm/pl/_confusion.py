"""`scfm.pl.confusion`."""

from __future__ import annotations

from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from scfm.pl._figure import finish


def confusion(
    adata: anndata.AnnData,
    *,
    truth: str,
    predicted: str = "scfm_label",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Which label each true label was given: row shares as colour, numbers of cells as text.

    Parameters
    ----------
    adata
        The cells to count; take held-out ones (`adata[adata.obs["scfm_split"] == "test"]`). Cells without a true label are left out.
    truth, predicted
        Columns of `obs`.
    ax, show, save
        As in `scfm.pl.embedding`.

    Returns
    -------
    The axes.
    """
    if missing := [column for column in (truth, predicted) if column not in adata.obs]:
        raise KeyError(f"`adata.obs` has no column {', '.join(map(repr, missing))}; run `scfm.tl.annotate` first.")
    labelled = adata.obs[[truth, predicted]].dropna().astype(str)
    names = sorted(set(labelled[truth]) | set(labelled[predicted]))
    counts = pd.crosstab(labelled[truth], labelled[predicted]).reindex(index=names, columns=names, fill_value=0)
    counts = counts.loc[counts.sum(axis=1) > 0]
    shares = counts.div(counts.sum(axis=1), axis=0)
    if ax is None:
        side = 2.5 + 0.42 * len(names)
        _, ax = plt.subplots(figsize=(side + 0.8, side))
    drawn = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*counts.to_numpy().nonzero()):
        dark = shares.iat[row, column] < 0.5
        ax.text(
            column,
            row,
            counts.iat[row, column],
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=8,
        )
    ax.set_xticks(range(counts.shape[1]), counts.columns, rotation=90)
    ax.set_yticks(range(counts.shape[0]), counts.index)
    ax.set(xlabel="predicted", ylabel="true")
    ax.figure.colorbar(drawn, ax=ax, label="share of the true label", fraction=0.04)
    finish(ax.figure, save=save, show=show)
    return ax
