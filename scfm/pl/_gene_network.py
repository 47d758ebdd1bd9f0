"""`scfm.pl.gene_network`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Curve
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from scfm._docs import document
from scfm.pl._figure import COLORS, GRAY, axes_of, finish, symbols_or_names

MORE, LESS = COLORS[0], COLORS[5]


@document
def gene_network(
    edges: pd.DataFrame,
    *,
    max_fdr: float = 0.05,
    n_edges: int = 40,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the genes of a network on a circle, and the edges with the largest |z| as arrows.

    Genes that are connected by strong edges are placed side by side.

    Parameters
    ----------
    edges
        Table from `scfm.tl.gene_network`.
    max_fdr
        False discovery rate up to which an edge is drawn.
    n_edges
        Maximum number of edges to draw; those with the largest |z| are chosen.
    {figure}

    Returns
    -------
    The axes. Arrows point from `source` to `target`. Two edges of the same sign between the same genes are drawn as one line
    with two heads. Blue edges are stronger than in shuffled cells, orange edges are weaker. The line width grows with |z|; a
    line with two heads has the width of the stronger edge.

    Raises
    ------
    ValueError
        If no edge has a false discovery rate up to `max_fdr`.

    Examples
    --------
    >>> import pandas as pd, scfm
    >>> edges = pd.DataFrame({"source": ["CD74"], "target": ["CD79A"], "z": [6.0], "fdr": [0.001]})
    >>> ax = scfm.pl.gene_network(edges, show=False)
    >>> sorted(text.get_text() for text in ax.texts)
    ['CD74', 'CD79A']
    """
    edges = edges.assign(source=symbols_or_names(edges, "source"), target=symbols_or_names(edges, "target"))
    sure = edges[edges["fdr"] <= max_fdr]
    if sure.empty:
        least = f"the smallest is {edges['fdr'].min():.2g}" if len(edges) else "there are none"
        raise ValueError(
            f"No edge has a false discovery rate of {max_fdr} or less ({least}); raise `max_fdr`, or use more cells."
        )
    drawn = sure.reindex(sure["z"].abs().sort_values(ascending=False, kind="stable").index)[:n_edges]
    genes = _in_order(drawn)
    angle = {gene: np.pi / 2 - 2 * np.pi * index / len(genes) for index, gene in enumerate(genes)}
    ax = axes_of(ax, 5.6, 5.6)
    strongest = drawn["z"].abs().max()
    for (source, target, both_ways), z in _lines(drawn).items():
        width = 0.5 + 2.5 * abs(z) / strongest
        ax.add_patch(_arrow(angle[source], angle[target], both_ways=both_ways, color=MORE if z > 0 else LESS, lw=width))
    for gene in genes:
        _name(ax, gene, angle[gene])
    ax.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal")
    ax.set_axis_off()
    ax.set_title(f"{len(drawn)} of {len(edges)} edges, false discovery rate up to {max_fdr:g}", fontsize=9)
    for color, words in ((MORE, "more than in shuffled cells"), (LESS, "less")):
        ax.plot([], [], color=color, label=words)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.04), ncols=2, frameon=False, fontsize=8)
    finish(ax, save=save, show=show)
    return ax


def _in_order(edges: pd.DataFrame) -> list[str]:
    """Order the genes on the circle so that genes with strong edges between them are side by side."""
    genes = sorted(set(edges["source"]) | set(edges["target"]))
    if len(genes) < 3:
        return genes
    index = {gene: number for number, gene in enumerate(genes)}
    tie_GG = np.zeros((len(genes),) * 2)
    for source, target, z in zip(edges["source"], edges["target"], edges["z"].abs()):
        tie_GG[index[source], index[target]] += z
    tie_GG += tie_GG.T
    distance = squareform(1 / (1 + tie_GG), checks=False)
    return [genes[leaf] for leaf in leaves_list(linkage(distance, "average", optimal_ordering=True))]


def _lines(edges: pd.DataFrame) -> dict[tuple[str, str, bool], float]:
    """Return z by (source, target, whether the line has two heads). Two edges of the same sign become one line."""
    z_of = {(source, target): z for source, target, z in zip(edges["source"], edges["target"], edges["z"])}
    lines: dict[tuple[str, str, bool], float] = {}
    for (source, target), z in z_of.items():
        back = z_of.get((target, source))
        if back is None or (back > 0) != (z > 0):
            lines[source, target, False] = z
        elif (target, source, True) not in lines:
            lines[source, target, True] = max(z, back, key=abs)
    return lines


def _on_circle(angle: float, radius: float) -> NDArray[np.float64]:
    return radius * np.array([np.cos(angle), np.sin(angle)])


def _arrow(start: float, end: float, *, both_ways: bool, color: str, lw: float) -> FancyArrowPatch:
    """Bend a line toward the center so that it does not cross the genes between its ends; close genes need less."""
    first, last = _on_circle(start, 0.97), _on_circle(end, 0.97)
    apart = abs((end - start + np.pi) % (2 * np.pi) - np.pi) / np.pi
    bend = (first + last) / 2 * (0.85 - 0.55 * apart)
    curve = Curve([first, bend, last], [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    style = "<|-|>" if both_ways else "-|>"
    return FancyArrowPatch(path=curve, arrowstyle=style, mutation_scale=8, color=color, lw=lw, alpha=0.75, shrinkA=0)


def _name(ax: Axes, gene: str, angle: float) -> None:
    """Write the name of a gene outside the circle, along the radius, and never upside down."""
    right = np.cos(angle) >= -1e-9
    x, y = _on_circle(angle, 1.06)
    turn = np.degrees(angle) if right else np.degrees(angle) + 180
    side = "left" if right else "right"
    ax.plot(*_on_circle(angle, 1.0), "o", color=GRAY, ms=4)
    ax.text(x, y, gene, rotation=turn, rotation_mode="anchor", ha=side, va="center", fontsize=8)
