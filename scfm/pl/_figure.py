"""What every figure shares: finishing, saving, colours."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's eight, then Tol's muted set: distinguishable with the common colour-vision deficiencies.
COLORS = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB",
]  # fmt: skip


def finish(figure: Figure, *, save: str | Path | None, show: bool | None) -> None:
    """Write the figure to `save` if given, and show it unless `show` is False or it was saved."""
    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show or (show is None and save is None):
        plt.show()
