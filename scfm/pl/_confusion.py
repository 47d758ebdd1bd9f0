"""`scfm.pl.confusion`."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.pl._figure import axes_of, finish


@document
def confusion(
    adata: anndata.AnnData,
    *,
    truth: str,
    predicted: str = "scfm_label",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Confusion matrix: number of cells of each true label (rows) that got each predicted label (columns).

    Parameters
    ----------
    adata
        Cells to count. Use held-out cells (`adata[adata.obs["scfm_split"] == "test"]`). Cells without a label are left out.
    truth
        Column of `obs` with the true labels.
    predicted
        Column of `obs` with the predicted labels.
    {figure}

    Returns
    -------
    The axes. The color is the fraction of the cells of the true label.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If no cell has both labels.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> ax = scfm.pl.confusion(adata, truth="bulk_labels", predicted="bulk_labels", show=False)
    >>> ax.get_xlabel()
    'predicted: bulk_labels'
    """
    if missing := [column for column in (truth, predicted) if column not in adata.obs]:
        raise KeyError(
            f"`adata.obs` has no column {', '.join(map(repr, missing))} ({', '.join(map(str, adata.obs))}). "
            "Run `scfm.tl.annotate` first, or name another column."
        )
    counts = confusion_counts(adata.obs[truth], adata.obs[predicted])
    if counts.empty:
        raise ValueError(f"None of the {adata.n_obs} cells has both {truth!r} and {predicted!r}; choose other cells.")
    fractions = counts.div(counts.sum(axis=1), axis=0)
    height = 1.4 + 0.34 * len(counts) + 0.05 * max(map(len, counts.columns))
    ax = axes_of(ax, 3.2 + 0.38 * counts.shape[1], height)
    drawn = ax.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*counts.to_numpy().nonzero()):
        color = "white" if fractions.iloc[row, column] > 0.55 else "black"
        ax.text(column, row, counts.iloc[row, column], ha="center", va="center", color=color, fontsize=8)
    ax.set_xticks(range(counts.shape[1]), counts.columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(range(counts.shape[0]), counts.index, fontsize=8)
    ax.set(xlabel=f"predicted: {predicted}", ylabel=f"true: {truth}")
    ax.figure.colorbar(drawn, ax=ax, label="fraction of the true label", fraction=0.04)
    finish(ax, save=save, show=show)
    return ax


def confusion_counts(truth: pd.Series, predicted: pd.Series) -> pd.DataFrame:
    """Numbers of cells by true label (only those that occur) and predicted label (all), both in the same order."""
    both = pd.DataFrame({"truth": truth, "predicted": predicted}).dropna().astype(str)
    names = sorted(set(both["truth"]) | set(both["predicted"]))
    counts = pd.crosstab(both["truth"], both["predicted"]).reindex(index=names, columns=names, fill_value=0)
    return counts.loc[counts.sum(axis=1) > 0]
