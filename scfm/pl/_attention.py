"""`scfm.pl.attention`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scfm._docs import document
from scfm.pl._figure import UNLABELED_COLOR, axes_of, finish


@document
def attention(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Heat map of the attention between pairs of genes.

    Parameters
    ----------
    table
        Table from `scfm.tl.attention`.
    {figure}

    Returns
    -------
    The axes. A pair is orange if the gene attends to the other gene more than to an average token, and violet if it attends
    to it less. Pairs without a value, or with an attention of 0, are gray.

    Raises
    ------
    ValueError
        If no pair of genes has a value.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> genes = ["CD74", "CD79A"]
    >>> table = pd.DataFrame([[None, 3.0], [0.5, None]], index=genes, columns=genes, dtype=float)
    >>> ax = scfm.pl.attention(table, show=False)
    >>> ax.get_xlabel()
    'gene that is attended to'
    """
    with np.errstate(divide="ignore"):
        ratio = np.log2(table.to_numpy(dtype=float))
    seen = np.isfinite(ratio)
    if not seen.any():
        raise ValueError("No two genes of `table` occur together in a cell; choose genes that more cells express.")
    limit = max(float(np.abs(ratio[seen]).max()), 1e-3)
    side = 0.28 * len(table) + 0.06 * max(len(str(gene)) for gene in table.index)
    ax = axes_of(ax, side + 2.2, side + 1.1)
    ax.set_facecolor(UNLABELED_COLOR)
    drawn = ax.imshow(np.where(seen, ratio, np.nan), cmap="PuOr_r", vmin=-limit, vmax=limit)
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(table.shape[0]), table.index, fontsize=8)
    ax.set(xlabel="gene that is attended to", ylabel="gene that attends")
    ax.figure.colorbar(drawn, ax=ax, label="log2 (attention / average token)", fraction=0.046, pad=0.03)
    finish(ax, save=save, show=show)
    return ax
